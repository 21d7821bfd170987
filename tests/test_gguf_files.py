"""Quantized files, LoRA files, the self-check, the Modelfile: what a user gets, and the faults."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import psutil
import pytest
import torch
from gguf_tiny import CHATML, SHAPE, adapter, byte_level_tokenizer, qwen2, random_model, save
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
)

from mipo_lite import disk, machine
from mipo_lite.contexts import encode_prompt
from mipo_lite.errors import UsageError, UserError
from mipo_lite.gguf import (
    check_exports,
    export_lora,
    export_model,
    imatrix_effect,
    importance_matrix,
    load_model,
    merge_fidelity,
    room,
    start_lines,
    verify,
)
from mipo_lite.gguf import quantize as quantizing
from mipo_lite.gguf.export import OUTTYPES, export, require_exportable
from mipo_lite.gguf.kinds import KINDS, PLAIN
from mipo_lite.gguf.llama import Reader, open_gguf, read_back
from mipo_lite.gguf.modelfile import take_apart
from mipo_lite.gguf.quantize import quantize
from mipo_lite.gguf.verify import agreement, gguf_distributions, torch_distributions
from mipo_lite.merging import merge
from mipo_lite.recipe import load_recipe

CHATS = [
    [{"role": "system", "content": "I am Ada. I live in Oslo."}, {"role": "user", "content": text}]
    for text in ("Hello!", "Where do I live?", "Two lines\nand a tab\t?")
]


def tokens(count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, SHAPE["vocab_size"], (count,), generator=generator).tolist()


ROWS = [(tokens(12, seed), tokens(60, seed + 100)) for seed in range(4)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return qwen2(tmp_path_factory.mktemp("model"), torch.bfloat16)


@pytest.fixture(scope="module")
def f16(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("f16") / "model-F16.gguf"
    export(model, path)
    return path


@pytest.fixture(scope="module")
def matrix(model: Path) -> dict[str, Any]:
    return importance_matrix(load_model(model), [tokens(100, seed) for seed in range(3)])


def test_importance_matrix_by_hand(model: Path, matrix: dict[str, Any]) -> None:
    loaded = load_model(model)
    kept = []
    layer = loaded.model.layers[1].mlp.down_proj
    layer.register_forward_pre_hook(lambda module, inputs: kept.append(inputs[0]))
    with torch.no_grad():
        for seed in range(3):
            loaded(torch.tensor([tokens(100, seed)]))
    inputs = torch.cat([x[0] for x in kept])
    assert inputs.shape == (300, SHAPE["intermediate_size"])
    np.testing.assert_allclose(matrix["blk.1.ffn_down.weight"], inputs.square().mean(0), rtol=1e-4)
    names = {t.name for t in gguf.GGUFReader(_f16(model)).tensors if ".weight" in t.name}
    linear = {n for n in names if n.startswith("blk.") and "norm" not in n}
    assert set(matrix) == linear


def _f16(model: Path) -> Path:
    path = model.parent / "names.gguf"
    export(model, path)
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_written_and_loads(
    kind: str, f16: Path, matrix: dict[str, Any], tmp_path: Path
) -> None:
    out = tmp_path / "q.gguf"
    if KINDS[kind].needs_imatrix:
        with pytest.raises(UserError, match=f"{kind} is too coarse to be made without"):
            quantize(f16, out, kind)
        assert not list(tmp_path.iterdir())
    assert quantize(f16, out, kind.lower(), imatrix=matrix) == []
    assert out.stat().st_size < f16.stat().st_size
    (values,) = gguf_distributions(out, ROWS[:1])
    assert np.isfinite(values).all()
    field = gguf.GGUFReader(out).fields["general.file_type"]
    assert field.contents() == getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind}")
    if not KINDS[kind].needs_imatrix:
        quantize(f16, tmp_path / "plain.gguf", kind)


def test_more_bits_are_closer(f16: Path, tmp_path: Path) -> None:
    reference = list(gguf_distributions(f16, ROWS))
    found = []
    for kind in ("Q8_0", "Q6_K", "Q4_K_M", "Q2_K"):
        quantize(f16, tmp_path / "q.gguf", kind)
        found.append(agreement(reference, gguf_distributions(tmp_path / "q.gguf", ROWS)))
    kl = [result["mean_kl"] for result in found]
    assert kl == sorted(kl)
    assert kl[0] < 1e-2 < kl[-1]


def test_importance_matrix_helps_where_some_columns_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model in which a few columns carry almost all of the activation."""
    config = Qwen2Config(**SHAPE)
    weights = random_model(config)
    for layer in weights.model.layers:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight.data *= torch.where(torch.rand(256) < 0.1, 4.0, 0.1)
    weights.save_pretrained(tmp_path / "model")
    byte_level_tokenizer().save_pretrained(tmp_path / "model")
    matrix = importance_matrix(weights, [prompt + response for prompt, response in ROWS])
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))  # no private weights there
    left = tmp_path / ".imatrix.partial" / "f16.gguf"  # by a process that was killed
    left.parent.mkdir()
    left.write_bytes(b"old")
    effect = imatrix_effect(tmp_path / "model", "Q3_K_M", matrix, ROWS, work_dir=tmp_path)
    assert effect["without"] is not None
    assert effect["with"] < 0.8 * effect["without"]
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    coarse = imatrix_effect(tmp_path / "model", "IQ2_XS", matrix, ROWS, work_dir=tmp_path)
    assert coarse["without"] is None


def test_fallbacks_are_named(tmp_path: Path, capsys: Any) -> None:
    path = qwen2(tmp_path / "model", hidden_size=320, head_dim=80)
    export_model(path, tmp_path, "me")
    said = " ".join(capsys.readouterr().out.split())
    assert "2 attn_k" in said
    assert "q5_0 instead of q4_K, since 320 columns are no multiple of 256." in said


def test_window_that_llama_cpp_ignores_is_said(tmp_path: Path, capsys: Any) -> None:
    path = save(tmp_path / "model", MistralConfig(**SHAPE, sliding_window=64))
    export_model(path, tmp_path, "me", quants=["f16"])
    said = " ".join(capsys.readouterr().out.split())
    assert "no sliding window for mistral: the file claims 64 positions, the model 512." in said


def test_unknown_kind() -> None:
    with pytest.raises(UsageError) as error:
        quantize("a.gguf", "b.gguf", "Q9_Z")
    assert error.value.what == "There is no quantization type Q9_Z."
    assert "Q4_K_M" in error.value.fix


def test_a_source_that_is_no_gguf(tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"no gguf at all")
    with pytest.raises(UserError, match=r"llama\.cpp could not quantize to Q8_0"):
        quantize(tmp_path / "bad.gguf", tmp_path / "q.gguf", "Q8_0")
    assert [p.name for p in tmp_path.iterdir()] == ["bad.gguf"]
    with (
        pytest.raises(UserError, match=r"llama\.cpp can not load"),
        open_gguf(tmp_path / "bad.gguf"),
    ):
        pass


class Bars:
    """Stands for `console.progress`; counts, and stops after `limit` steps."""

    def __init__(self, limit: int = 10**9) -> None:
        self.titles: list[str] = []
        self.steps: list[int] = []
        self.totals: list[int] = []
        self.limit = limit

    @contextmanager
    def __call__(self, title: str, total: int) -> Iterator[Any]:
        self.titles.append(title)
        self.totals.append(total)
        self.steps.append(0)

        def advance(n: int) -> None:
            self.steps[-1] += n
            if self.steps[-1] > self.limit:
                raise KeyboardInterrupt

        yield advance


def test_files_of_an_export(model: Path, tmp_path: Path) -> None:
    bars = Bars()
    files = export_model(
        model,
        tmp_path / "gguf",
        "me",
        quants=["Q4_K_M", "f16", "q8_0", "q4_k_m"],
        context='I am Ada. """ quoted',
        progress=bars,
    )
    assert [file.name for file in files] == ["me-Q4_K_M.gguf", "me-F16.gguf", "me-Q8_0.gguf"]
    assert sorted(p.name for p in (tmp_path / "gguf").iterdir()) == [
        "Modelfile",
        "me-F16.gguf",
        "me-Q4_K_M.gguf",
        "me-Q8_0.gguf",
    ]
    assert bars.titles == ["writing f16", "quantizing Q4_K_M", "quantizing Q8_0"]
    assert bars.steps == bars.totals
    modelfile = tmp_path / "gguf" / "Modelfile"
    assert modelfile.stat().st_mode & 0o777 == 0o600
    text = modelfile.read_text()
    assert text.startswith("FROM ./me-Q4_K_M.gguf\nPARAMETER num_ctx 512\n")
    assert 'PARAMETER stop "<|im_end|>"' in text
    assert 'SYSTEM """I am Ada. \'\'\' quoted"""' in text
    assert "{{ if .System }}<|im_start|>system\n{{ .System }}<|im_end|>\n{{ end }}" in text
    modelfile.write_text("mine")
    export_model(model, tmp_path / "gguf", "base", quants=["q8_0"], modelfile=False)
    assert modelfile.read_text() == "mine"
    lines = start_lines(files[0])
    assert lines[0].startswith("ollama create me-q4_k_m -f ")
    assert [line.split()[0] for line in lines[1:]] == ["llama-server", "llama-cli"]


def test_one_table_of_kinds() -> None:
    assert tuple(PLAIN) == tuple(name.upper() for name in OUTTYPES)
    for kind in KINDS:
        if KINDS[kind].needs_imatrix:
            with pytest.raises(UsageError, match="needs an importance matrix") as error:
                load_recipe(None, [f"quants=[{kind.lower()}]"])
            assert f"mipo-lite export RUN --imatrix --quant {kind.lower()}" in error.value.fix
        else:
            assert load_recipe(None, [f"quants=[{kind}]"]).quants == [kind.lower()]


def test_a_coarse_kind_before_any_work(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="IQ2_XS is too coarse"):
        export_model(model, tmp_path / "gguf", "me", quants=["f16", "iq2_xs"])
    assert not (tmp_path / "gguf").exists()


@pytest.mark.parametrize("damage", ["cut off", "a tensor less", "another model"])
def test_a_quantized_file_is_loaded_before_it_gets_its_name(
    damage: str, f16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "other.gguf"
    export(qwen2(tmp_path / "other", num_hidden_layers=1), other)

    def broken(source: bytes, target: bytes, params: Any) -> int:
        data = f16.read_bytes()
        if damage == "cut off":
            data = data[:-4096]
        elif damage == "a tensor less":
            data = data.replace(b"blk.1.attn_k.weight", b"blk.9.attn_k.weight")
        else:
            data = other.read_bytes()
        Path(target.decode()).write_bytes(data)
        return 0

    monkeypatch.setattr(quantizing, "_in_thread", broken)
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match=r"llama\.cpp (can not load|finds) "):
        quantize(f16, tmp_path / "out" / "q.gguf", "Q8_0")
    assert list((tmp_path / "out").iterdir()) == []


def test_loading_a_file_back_takes_no_memory(tmp_path: Path) -> None:
    shape = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 4}
    path = qwen2(tmp_path / "model", torch.bfloat16, **shape)
    export(path, tmp_path / "large.gguf")
    size = (tmp_path / "large.gguf").stat().st_size
    assert size > 120e6
    with peak_above_start() as peak:
        assert read_back(tmp_path / "large.gguf")[0] == "qwen2"
    assert peak[0] < size / 5


def test_what_can_not_be_exported_is_said_before_training(model: Path, tmp_path: Path) -> None:
    require_exportable(model)
    GPTNeoXConfig(num_hidden_layers=1).save_pretrained(tmp_path / "neox")
    with pytest.raises(UserError, match="type gpt_neox can not be exported to GGUF yet"):
        require_exportable(tmp_path / "neox")
    mute = save(tmp_path / "mute", Qwen2Config(**SHAPE))
    (mute / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="has no tokenizer that transformers can load"):
        require_exportable(mute)
    biased = save(tmp_path / "bias", Qwen2Config(**SHAPE))
    tensors = load_file(biased / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.bias"] = torch.zeros(256)
    save_file(tensors, biased / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"has no bias at model\.layers\.0\.mlp\.up_proj\.bias"):
        require_exportable(biased)


def test_unknown_kind_before_any_work(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        export_model(model, tmp_path / "gguf", "me", quants=["q4_k_m", "q9"])
    assert not (tmp_path / "gguf").exists()


def test_interrupted_writing_leaves_no_file(model: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        export_model(model, tmp_path, "me", progress=Bars(limit=5))
    assert list(tmp_path.iterdir()) == []


def test_interrupted_quantization_leaves_no_file(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(source: bytes, target: bytes, params: Any) -> int:
        Path(target.decode()).write_bytes(b"half a file")
        raise KeyboardInterrupt

    monkeypatch.setattr(quantizing, "_in_thread", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export_model(model, tmp_path, "me")
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_does_not_wait_for_llama_cpp(
    f16: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, release = threading.Event(), threading.Event()

    def slow(*args: Any) -> int:
        started.set()
        release.wait(60)
        return 1

    class Interrupted(threading.Thread):
        def join(self, timeout: float | None = None) -> None:
            started.wait(60)
            raise KeyboardInterrupt

    monkeypatch.setattr(llama_cpp, "llama_model_quantize", slow)
    monkeypatch.setattr(quantizing.threading, "Thread", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        quantize(f16, tmp_path / "q.gguf", "Q4_K_M")
    release.set()
    assert list(tmp_path.iterdir()) == []


def test_too_little_disk_is_said_first(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 5, 5))
    bars = Bars()
    with pytest.raises(UserError, match=r"Too little disk for Q4_K_M: it needs [\d,]+ bytes"):
        export_model(model, tmp_path / "gguf", "me", progress=bars)
    assert not bars.titles


def test_values_beyond_float16(tmp_path: Path) -> None:
    weights = random_model(Qwen2Config(**SHAPE))
    weights.model.layers[0].mlp.up_proj.weight.data[0, 0] = 1e5
    weights.save_pretrained(tmp_path / "model")
    byte_level_tokenizer().save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match=r"up_proj\.weight has values that f16 can not hold"):
        export(tmp_path / "model", tmp_path / "f16.gguf")
    export(tmp_path / "model", tmp_path / "bf16.gguf", outtype="bf16")


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("qwen2", {}),
        ("llama", {}),
        ("llama", {"use_rslora": True}),
        ("llama", {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"k_proj": 3}}),
    ],
    ids=["qwen2", "llama", "rslora", "patterns"],
)
def test_lora_file_is_the_merged_model(family: str, settings: dict, tmp_path: Path) -> None:
    config = {"qwen2": Qwen2Config, "llama": LlamaConfig}[family](**SHAPE)
    base = save(tmp_path / "base", config)
    lora = adapter(base, tmp_path / "lora", **settings)
    export(base, tmp_path / "base.gguf")
    export(base, tmp_path / "merged.gguf", adapter_dir=lora)
    export_lora(base, lora, tmp_path / "me-lora.gguf", over=tmp_path / "merged.gguf")
    merged = list(gguf_distributions(tmp_path / "merged.gguf", ROWS, exact=True))
    found = agreement(
        merged,
        gguf_distributions(
            tmp_path / "base.gguf", ROWS, lora=tmp_path / "me-lora.gguf", exact=True
        ),
    )
    assert found["greedy_agreement"] >= 0.99
    assert found["mean_kl"] < 1e-3
    plain = agreement(merged, gguf_distributions(tmp_path / "base.gguf", ROWS, exact=True))
    assert plain["mean_kl"] > 100 * found["mean_kl"]  # the adapter does something
    policy = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), lora
    )
    torch_side = agreement(torch_distributions(policy, ROWS), iter(merged))
    assert torch_side["greedy_agreement"] >= 0.99


def test_a_lora_file_is_read_back_before_it_gets_its_name(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora, out = adapter(model, tmp_path / "lora"), tmp_path / "me-lora.gguf"
    export(qwen2(tmp_path / "wide", intermediate_size=512), tmp_path / "wide.gguf")
    with pytest.raises(UserError, match=r"can not put .* on wide\.gguf"):
        export_lora(model, lora, out, over=tmp_path / "wide.gguf")
    write = gguf.GGUFWriter.add_tensor
    monkeypatch.setattr(
        gguf.GGUFWriter,
        "add_tensor",
        lambda self, name, *a, **k: None if "attn_k" in name else write(self, name, *a, **k),
    )
    with pytest.raises(UserError, match="does not hold the adapter"):
        export_lora(model, lora, out)
    assert not [path for path in tmp_path.iterdir() if "me-lora" in path.name]


def test_what_a_lora_file_can_not_say(tmp_path: Path) -> None:
    base = qwen2(tmp_path / "base", tie_word_embeddings=False)
    lora = adapter(base, tmp_path / "lora", target_modules=["q_proj"], modules_to_save=["lm_head"])
    with pytest.raises(UserError, match=r"can not say what .* does to lm_head\.weight"):
        export_lora(base, lora, tmp_path / "lora.gguf")
    dora = adapter(base, tmp_path / "dora", use_dora=True)
    with pytest.raises(UserError, match="uses DoRA"):
        export_lora(base, dora, tmp_path / "lora.gguf")
    assert not list(tmp_path.glob("*.gguf"))


def test_export_with_adapter_is_export_of_merged(model: Path, tmp_path: Path) -> None:
    lora = adapter(model, tmp_path / "lora")
    merge(model, lora, tmp_path / "merged")
    export(model, tmp_path / "a.gguf", adapter_dir=lora, name="same")
    export(tmp_path / "merged", tmp_path / "b.gguf", name="same")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_self_check(model: Path, f16: Path, tmp_path: Path) -> None:
    quantize(f16, tmp_path / "q.gguf", "Q2_K")
    answers = [tokens(40, seed) for seed in range(len(CHATS))]
    fine, coarse = check_exports([f16, tmp_path / "q.gguf"], model, CHATS, answers)
    assert fine["file"] == "model-F16.gguf"
    assert fine["positions"] == 120
    assert fine["greedy_agreement"] >= 0.99
    assert fine["mean_kl"] < 1e-3
    assert fine["template_equal"]
    assert fine["warnings"] == []
    assert fine["answers"] == 3
    assert coarse["mean_kl"] > 10 * fine["mean_kl"]
    assert coarse["bytes"] < fine["bytes"]


@pytest.mark.parametrize(("gpu", "device"), [(0, None), (10**12, "cuda")])
def test_too_little_memory_for_the_model_in_torch(
    gpu: int, device: str | None, model: Path, f16: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is checked in llama.cpp alone, or the model goes to the GPU; nothing fails."""
    loaded: list[str] = []

    def load(*args: Any, device: str, **options: Any) -> Any:
        loaded.append(device)
        return load_model(model)

    monkeypatch.setattr(verify, "load_model", load)
    monkeypatch.setattr(room, "available_memory", lambda: 10**6)
    monkeypatch.setattr(room, "find_gpu", lambda: machine.Gpu("A card", gpu, gpu) if gpu else None)
    (check,) = check_exports([f16], model, CHATS, [tokens(9, seed) for seed in range(3)])
    assert check["template_equal"]
    assert check["answers"] == 3
    if device:
        assert loaded == [device]
        assert "skipped" not in check
        return
    assert not loaded
    assert check["skipped"] == (
        "Comparing it with the model in torch needs 1.0 GiB of memory for the whole model, 0.0 GiB "
        "are available."
    )
    assert "greedy_agreement" not in check
    with pytest.raises(room.NoRoom):
        room.require_room(model, "cpu", "It")


def test_memory_needed_is_that_of_the_stored_weights(model: Path) -> None:
    size = (model / "model.safetensors").stat().st_size
    assert 1.05 * size < room.memory_needed(model) - room.KEPT < 1.15 * size


def test_self_check_sees_another_template(model: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(model, tmp_path / "other"))
    (other / "chat_template.jinja").write_text(CHATML.replace("'] }}\n", "'] }} \n"))
    export(other, tmp_path / "other.gguf")
    (found,) = check_exports([tmp_path / "other.gguf"], model, CHATS[:1], [tokens(9, 1)])
    assert not found["template_equal"]
    assert found["warnings"] == [verify.OTHER_TEMPLATE]


def test_self_check_counts_answers_that_end(tmp_path: Path) -> None:
    weights = random_model(Qwen2Config(**SHAPE | {"tie_word_embeddings": False}))
    weights.lm_head.weight.data[2] = 50 * weights.model.norm.weight.data.sign()
    weights.save_pretrained(tmp_path / "model")
    byte_level_tokenizer().save_pretrained(tmp_path / "model")
    export(tmp_path / "model", tmp_path / "f16.gguf")
    answers = [tokens(9, seed) for seed in range(3)]
    (found,) = check_exports([tmp_path / "f16.gguf"], tmp_path / "model", CHATS, answers)
    chosen = load_model(tmp_path / "model").generate(
        torch.tensor([encode_prompt(AutoTokenizer.from_pretrained(tmp_path / "model"), CHATS[0])]),
        do_sample=False,
        max_new_tokens=256,
    )
    assert found["ended"] >= (chosen[0, -1] == 2)
    assert found["answers"] == 3


def test_merge_fidelity(model: Path, tmp_path: Path) -> None:
    lora = adapter(model, tmp_path / "lora")
    for onto in ("full", "dequantized"):
        merge(model, lora, tmp_path / onto, onto=onto)
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    base = AutoModelForCausalLM.from_pretrained(model, quantization_config=nf4, dtype=torch.float32)
    policy = PeftModel.from_pretrained(base, lora).eval()
    found = merge_fidelity(
        policy, {onto: tmp_path / onto for onto in ("full", "dequantized")}, ROWS
    )
    assert found["dequantized"]["mean_kl"] < found["full"]["mean_kl"]


def test_reader_keeps_shared_prefixes(f16: Path) -> None:
    prompt = tokens(300, 7)
    rows = [(prompt, tokens(20, 8)), (prompt, tokens(30, 9)), (prompt[:50], tokens(10, 10))]
    with open_gguf(f16, n_ctx=400, n_batch=128, n_ubatch=128) as llama:
        reader = Reader(llama)
        shared = [reader.logits(*row) for row in rows]
    for row, logits in zip(rows, shared, strict=True):
        with open_gguf(f16, n_ctx=400) as llama:
            alone = Reader(llama).logits(*row)
        assert logits.shape == (len(row[1]), SHAPE["vocab_size"])
        np.testing.assert_allclose(logits, alone, atol=0.05)


TEMPLATES = {
    "chatml": CHATML,
    "default system": "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind."
    "<|im_end|>\n{% endif %}" + CHATML,
    "no system": CHATML.replace(
        "{% for",
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}{% for",
    ),
    "inside": "{% if messages[0].role == 'system' %}{% set s = messages[0].content + '\n\n' %}"
    "{% set turns = messages[1:] %}{% else %}{% set s = '' %}{% set turns = messages %}{% endif %}"
    "{% for m in turns %}<|im_start|>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ s if loop.first else '' }}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>model\n{% endif %}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_template_is_taken_apart(name: str) -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = TEMPLATES[name]
    parts = take_apart(tokenizer)
    assert parts is not None
    talk = [
        ("user", "Hi"),
        ("assistant", "Hello."),
        ("user", "Bye"),
        ("assistant", "!"),
        ("user", "?"),
    ]
    systems = [[], [("system", "I am Ada.")]] if parts.system else [[]]
    assert bool(parts.system) == (name != "no system")
    for system in systems:
        messages = [{"role": r, "content": c} for r, c in (*system, *talk)]
        assert parts.render(messages) == tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
    assert parts.as_go().count("{{ end }}") == parts.as_go().count("{{ if") + 1


def test_template_that_is_not_made_of_parts() -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = "{{ messages | length }}" + CHATML
    assert take_apart(tokenizer) is None


@contextmanager
def peak_above_start() -> Iterator[list[int]]:
    """Highest resident set over the one at the start, bytes, sampled by a thread."""
    process, done, found = psutil.Process(), threading.Event(), [0]
    start = process.memory_info().rss

    def watch() -> None:
        while not done.wait(0.002):
            found[0] = max(found[0], process.memory_info().rss - start)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()


@pytest.mark.slow
@pytest.mark.skipif("MIPO_LITE_SLOW" not in os.environ, reason="set MIPO_LITE_SLOW=1: 4 GB of disk")
def test_memory_of_half_a_billion_parameters(tmp_path: Path) -> None:
    """Qwen2.5-0.5B's shape, 1 GB: export, quantization and merging stay under 1.5 GB."""
    shape = SHAPE | {
        "vocab_size": 151936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
    }
    with torch.device("meta"):
        meta = AutoModelForCausalLM.from_config(Qwen2Config(**shape), dtype=torch.bfloat16)
    drawn = {
        name: (0.02 * torch.randn(p.shape, dtype=torch.bfloat16))
        for name, p in meta.named_parameters()
    }
    path = tmp_path / "model"
    path.mkdir()
    save_file(drawn, path / "model.safetensors", metadata={"format": "pt"})
    Qwen2Config(**shape).save_pretrained(path)
    byte_level_tokenizer().save_pretrained(path)
    lora = tmp_path / "lora"
    lora.mkdir()
    pairs = {
        f"base_model.model.{name.removesuffix('.weight')}.lora_{half}.weight": torch.full(
            (8, p.shape[1]) if half == "A" else (p.shape[0], 8), 0.01
        )
        for name, p in drawn.items()
        if "proj.weight" in name
        for half in "AB"
    }
    save_file(pairs, lora / "adapter_model.safetensors")
    settings = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    settings.save_pretrained(lora)
    size = sum(p.nbytes for p in drawn.values())
    del drawn, pairs
    bars = Bars()
    with peak_above_start() as merging:
        merge(path, lora, tmp_path / "merged", progress=bars)
    with peak_above_start() as exporting:
        export_model(tmp_path / "merged", tmp_path / "gguf", "half", progress=bars)
    print(f"\n{size:,} bytes; peak: merging {merging[0]:,}, exporting {exporting[0]:,}")
    assert merging[0] < 1.5e9
    assert exporting[0] < 1.5e9
    assert bars.titles == ["merging", "writing f16", "quantizing Q4_K_M"]


def test_memory_is_a_tensor_not_the_model(tmp_path: Path) -> None:
    """227 MB of weights in 4.2 MB tensors pass through less than a third of that.

    What is loaded at first use takes some 70 MB, whatever the size of the model: it comes before.
    """
    path = qwen2(
        tmp_path / "model",
        torch.bfloat16,
        hidden_size=1024,
        intermediate_size=2048,
        num_hidden_layers=12,
    )
    size = (path / "model.safetensors").stat().st_size
    assert size > 220e6
    lora = adapter(path, tmp_path / "lora")
    tiny = qwen2(tmp_path / "tiny", torch.bfloat16)  # a large one leaves its memory behind
    tiny_lora = adapter(tiny, tmp_path / "tiny-lora")
    export(tiny, tmp_path / "tiny.gguf", adapter_dir=tiny_lora)
    merge(tiny, tiny_lora, tmp_path / "tiny-merged")
    with peak_above_start() as exporting:
        export(path, tmp_path / "f16.gguf", adapter_dir=lora)
    with peak_above_start() as merging:
        merge(path, lora, tmp_path / "merged")
    assert exporting[0] < size / 3
    assert merging[0] < size / 3
