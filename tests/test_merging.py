"""Merging against PEFT's own merge, on one shard and on many, and everything that is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from gguf_tiny import SHAPE, adapter, qwen2, save
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Qwen2Config

from mipo_lite import disk
from mipo_lite.adapters import check_adapter, load_adapter
from mipo_lite.base import keep_backward_on_cpu
from mipo_lite.checkpoint import Checkpoint
from mipo_lite.errors import UserError
from mipo_lite.merging import merge, quantized_weights


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return qwen2(tmp_path_factory.mktemp("base"), torch.bfloat16)


def by_peft(base: Path, adapter_dir: Path) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    merged = PeftModel.from_pretrained(model, adapter_dir).merge_and_unload()
    return dict(merged.state_dict())


def weights(path: Path) -> dict[str, torch.Tensor]:
    return {k: v for file in sorted(path.glob("*.safetensors")) for k, v in load_file(file).items()}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"layers.1.mlp.down_proj": 3}},
        {"target_modules": r".*layers\.1\.self_attn\.(q|v)_proj"},
    ],
    ids=["plain", "rslora", "patterns", "some"],
)
def test_equals_peft(base: Path, tmp_path: Path, settings: dict) -> None:
    lora = adapter(base, tmp_path / "lora", **settings)
    merge(base, lora, tmp_path / "merged")
    ours, theirs = weights(tmp_path / "merged"), by_peft(base, lora)
    assert ours.keys() == weights(base).keys()
    changed = 0
    for name, tensor in ours.items():
        assert tensor.dtype == torch.bfloat16
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=0)
        changed += not torch.equal(tensor, weights(base)[name])
    assert changed == len(load_file(lora / "adapter_model.safetensors")) / 2


def test_untied_head_and_embeddings(tmp_path: Path) -> None:
    base = qwen2(tmp_path / "base", torch.bfloat16, tie_word_embeddings=False)
    lora = adapter(
        base,
        tmp_path / "lora",
        target_modules=["q_proj", "embed_tokens"],
        modules_to_save=["lm_head"],
    )
    merge(base, lora, tmp_path / "merged")
    ours, theirs = weights(tmp_path / "merged"), by_peft(base, lora)
    for name, tensor in ours.items():
        # PEFT keeps A and B of an embedding in bfloat16 and rounds their product too.
        bound = 2**-7 if name == "model.embed_tokens.weight" else 0
        torch.testing.assert_close(tensor, theirs[name], rtol=bound, atol=bound / 4)
    assert not torch.equal(ours["lm_head.weight"], weights(base)["lm_head.weight"])


def test_shards_files_and_loading(tmp_path: Path) -> None:
    base = save(tmp_path / "base", Qwen2Config(**SHAPE), torch.bfloat16, max_shard_size="400KB")
    (base / "LICENSE").write_text("a licence")
    lora = adapter(base, tmp_path / "lora")
    seen: list[int] = []

    class Bar:
        def __init__(self, title: str, total: int) -> None:
            seen.append(-total)

        def __enter__(self):
            return seen.append

        def __exit__(self, *error: object) -> None:
            pass

    merge(base, lora, tmp_path / "merged", progress=Bar)
    assert len(list((tmp_path / "merged").glob("*.safetensors"))) > 2
    assert seen[0] == -len(seen[1:])
    theirs = by_peft(base, lora)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.bfloat16)
    for name, tensor in loaded.state_dict().items():
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=0)
    for name in ("LICENSE", "config.json", "chat_template.jinja", "tokenizer.json"):
        assert (tmp_path / "merged" / name).read_bytes() == (base / name).read_bytes()
    merge(base, lora, tmp_path / "merged")  # again, onto itself


def test_dequantized_is_the_trained_policy(tmp_path: Path) -> None:
    base = qwen2(tmp_path / "base")  # float32, so that nothing is rounded when it is stored
    lora = adapter(base, tmp_path / "lora")
    merge(base, lora, tmp_path / "full")
    merge(base, lora, tmp_path / "dequantized", onto="dequantized")
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    nf4 = AutoModelForCausalLM.from_pretrained(
        base, quantization_config=config, dtype=torch.float32
    )
    keep_backward_on_cpu(nf4)  # else the forward on some CPUs is in bfloat16
    assert quantized_weights(base) == {
        f"{name}.weight" for name, m in nf4.named_modules() if type(m).__name__ == "Linear4bit"
    }
    trained = PeftModel.from_pretrained(nf4, lora).eval()
    tokens = torch.randint(
        3, SHAPE["vocab_size"], (2, 40), generator=torch.Generator().manual_seed(0)
    )

    def kl(path: Path) -> float:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        with torch.no_grad():
            p = trained(tokens).logits.log_softmax(-1)
            q = model(tokens).logits.log_softmax(-1)
        return float((p.exp() * (p - q)).sum(-1).mean())

    assert kl(tmp_path / "dequantized") < 1e-6
    assert kl(tmp_path / "full") > 1e-3


def edit(path: Path, **values: object) -> None:
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps(config | values))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"use_dora": True}, "uses DoRA (use_dora)"),
        ({"peft_type": "IA3"}, "is a IA3 adapter, not LoRA"),
        ({"bias": "all"}, "trained biases too (bias=all)"),
        ({"init_lora_weights": "pissa_niter_16"}, "which changes the base"),
        ({"fan_in_fan_out": True}, "transposed"),
    ],
)
def test_refused_adapters(base: Path, tmp_path: Path, values: dict, message: str) -> None:
    lora = adapter(base, tmp_path / "lora")
    edit(lora, **values)
    with pytest.raises(UserError) as error:
        merge(base, lora, tmp_path / "merged")
    assert message in error.value.what
    assert "Merge" in error.value.fix
    assert not (tmp_path / "merged").exists()


def test_dora_by_peft_itself_is_refused(base: Path, tmp_path: Path) -> None:
    lora = adapter(base, tmp_path / "lora", use_dora=True)
    edit(lora, use_dora=False)  # even when its config hides it
    with pytest.raises(UserError, match=r"not plain LoRA: .*lora_magnitude_vector"):
        merge(base, lora, tmp_path / "merged")


def test_tied_embeddings_are_refused(base: Path, tmp_path: Path) -> None:
    lora = adapter(base, tmp_path / "lora", target_modules=["embed_tokens"])
    with pytest.raises(UserError, match=r"the head of .* is tied to them"):
        merge(base, lora, tmp_path / "merged")


def test_wrong_base(base: Path, tmp_path: Path) -> None:
    other = qwen2(tmp_path / "other", torch.bfloat16, intermediate_size=512)
    lora = adapter(other, tmp_path / "lora")
    with pytest.raises(UserError, match=r"has model\.layers\.0\.mlp\..* as .*, .* as"):
        merge(base, lora, tmp_path / "merged")
    deeper = qwen2(tmp_path / "deeper", torch.bfloat16, num_hidden_layers=3)
    with pytest.raises(UserError, match=r"changes model\.layers\.2\..*does not have"):
        merge(base, adapter(deeper, tmp_path / "lora3"), tmp_path / "merged")


def test_quantized_base_is_refused(base: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(base, tmp_path / "base"))
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes"}
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="holds quantized weights"):
        merge(copy, adapter(base, tmp_path / "lora"), tmp_path / "merged")


def test_output_must_be_ours_to_replace(base: Path, tmp_path: Path) -> None:
    lora = adapter(base, tmp_path / "lora")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    for out in (tmp_path / "mine", base, lora):
        with pytest.raises(UserError):
            merge(base, lora, out)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"


def test_too_little_disk(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lora = adapter(base, tmp_path / "lora")
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 2, 7))
    needed = Checkpoint(base).nbytes
    with pytest.raises(UserError, match=f"it needs {needed:,} bytes, .* has 7 free") as error:
        merge(base, lora, tmp_path / "merged")
    assert error.value.fix.startswith(f"Free {needed - 7:,} bytes")
    assert not list(tmp_path.glob("*merged*"))


def test_interrupted_merge_leaves_nothing(base: Path, tmp_path: Path) -> None:
    lora = adapter(base, tmp_path / "lora")

    class Interrupted:
        def __init__(self, title: str, total: int) -> None:
            self.left = 10

        def __enter__(self):
            return self.advance

        def advance(self, n: int) -> None:
            self.left -= n
            if not self.left:
                raise KeyboardInterrupt

        def __exit__(self, *error: object) -> None:
            pass

    with pytest.raises(KeyboardInterrupt):
        merge(base, lora, tmp_path / "merged", progress=Interrupted)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["lora"]


def test_damaged_weights(base: Path, tmp_path: Path) -> None:
    lora = adapter(base, tmp_path / "lora")
    copy = Path(shutil.copytree(base, tmp_path / "base"))
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"model\.safetensors is cut off"):
        merge(copy, lora, tmp_path / "merged")
    file.write_bytes(b"not at all")
    with pytest.raises(UserError, match="is not a safetensors file"):
        merge(copy, lora, tmp_path / "merged")
    file.unlink()
    with pytest.raises(UserError, match=r"has no weights: model\.safetensors is missing"):
        merge(copy, lora, tmp_path / "merged")


def test_a_damaged_adapter_is_said_to_be_damaged(base: Path, tmp_path: Path) -> None:
    broken = tmp_path / "adapter"
    adapter(base, broken)
    (broken / "adapter_config.json").write_text("{")
    with pytest.raises(UserError, match=r"adapter_config\.json is damaged"):
        load_adapter(broken)
    (broken / "adapter_config.json").unlink()
    with pytest.raises(UserError, match="is not an adapter"):
        check_adapter(broken)
