"""Every family against transformers, in llama.cpp, and every rule of the tables broken once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_tiny import SHAPE, random_model, save
from transformers import (
    BertConfig,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from mipo_lite.errors import UserError
from mipo_lite.gguf import architectures, export
from mipo_lite.gguf.architectures import FAMILIES, GEMMA3, LLAMA, QWEN3, SMOLLM3
from mipo_lite.gguf.verify import agreement, gguf_distributions, torch_distributions

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
UNTIED = {"tie_word_embeddings": False}
FULL = {"num_key_value_heads": 4}  # as many as query heads
GEMMA: dict[str, Any] = {
    "head_dim": 64,
    "query_pre_attn_scalar": 64,
    "sliding_window": 32,
    "num_hidden_layers": 7,
}
TWO_LAYERS = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
SOFTCAP = {"final_logit_softcapping": 5.0}
NOPE = {"num_hidden_layers": 5}


def config(cls: type[PreTrainedConfig], **changes: Any) -> PreTrainedConfig:
    return cls(**(SHAPE | changes))


CASES = {
    "llama": config(LlamaConfig),
    "llama-untied-full": config(LlamaConfig, **UNTIED, **FULL),
    "llama-3": config(LlamaConfig, rope_parameters=LLAMA3_ROPE),
    "llama-linear-rope": config(LlamaConfig, rope_parameters=LINEAR),
    "llama-biases": config(LlamaConfig, attention_bias=True, mlp_bias=True),
    "llama-head-dim": config(LlamaConfig, head_dim=32, rope_parameters=LLAMA3_ROPE),
    "mistral": config(MistralConfig, sliding_window=None),
    "mistral-untied-full": config(MistralConfig, sliding_window=None, **UNTIED, **FULL),
    "mistral-head-dim": config(MistralConfig, sliding_window=None, head_dim=128),
    "smollm3": config(SmolLM3Config, **NOPE),
    "smollm3-untied-full": config(SmolLM3Config, **NOPE, **UNTIED, **FULL),
    "qwen2": config(Qwen2Config),
    "qwen2-untied-full": config(Qwen2Config, **UNTIED, **FULL),
    "qwen2-yarn": config(Qwen2Config, rope_parameters=YARN),
    "qwen3": config(Qwen3Config, head_dim=64),
    "qwen3-untied-full": config(Qwen3Config, head_dim=64, **UNTIED, **FULL),
    "qwen3-head-dim": config(Qwen3Config, head_dim=128),
    "gemma3": config(Gemma3TextConfig, **GEMMA),
    "gemma3-untied-full": config(Gemma3TextConfig, **GEMMA | TWO_LAYERS | UNTIED | FULL),
    "gemma3-pattern": config(Gemma3TextConfig, **GEMMA | TWO_LAYERS),
    "gemma3-softcap": config(
        Gemma3TextConfig, **GEMMA | TWO_LAYERS | UNTIED, final_logit_softcapping=5.0
    ),
}
POSITIONS = 200


def rows(seed: int = 0) -> list[tuple[list[int], list[int]]]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, SHAPE["vocab_size"], (POSITIONS + 1,), generator=generator).tolist()
    return [(tokens[:1], tokens[1:])]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Any]]:
    """Directory and reference distributions of a case, made when first asked for."""

    class Made(dict):
        def __missing__(self, case: str) -> tuple[Path, Any]:
            path = save(tmp_path_factory.mktemp(case), CASES[case])
            self[case] = path, torch_distributions(random_model(CASES[case]), rows())
            return self[case]

    return Made()


def compare(models: Any, case: str, out: Path, outtype: str) -> dict[str, Any]:
    """The file against torch; keys and values in float32: the file is measured, not the cache."""
    path, reference = models[case]
    export.export(path, out, outtype=outtype)
    return agreement(reference, gguf_distributions(out, rows(), exact=True))


@pytest.mark.parametrize("case", CASES)
def test_same_distributions(case: str, models: Any, tmp_path: Path) -> None:
    exact = compare(models, case, tmp_path / "f32.gguf", "f32")
    assert exact["positions"] == POSITIONS
    assert exact["max_difference"] < 5e-3
    assert exact["greedy_agreement"] == 1.0
    half = compare(models, case, tmp_path / "f16.gguf", "f16")
    assert half["greedy_agreement"] >= 0.995
    assert half["mean_kl"] < 1e-4


def test_bfloat16(models: Any, tmp_path: Path) -> None:
    found = compare(models, "qwen2", tmp_path / "bf16.gguf", "bf16")
    assert found["greedy_agreement"] >= 0.95
    assert found["mean_kl"] < 1e-2


def test_references_are_peaked(models: Any) -> None:
    """Agreement of greedy tokens would mean little for flat distributions."""
    for case in ("llama", "qwen2", "qwen3", "smollm3"):
        _, (reference,) = models[case]
        assert float(torch.tensor(reference).exp().amax(-1).mean()) > 0.3


def family(model_type: str, **changes: Any) -> Callable[[pytest.MonkeyPatch], None]:
    """Break a rule of a family's table."""
    broken = replace(FAMILIES[model_type], **changes)
    return lambda patch: patch.setitem(FAMILIES, model_type, broken)


def function(name: str, value: Any) -> Callable[[pytest.MonkeyPatch], None]:
    """Break a shared rule."""

    def apply(patch: pytest.MonkeyPatch) -> None:
        for module in (architectures, export):
            if hasattr(module, name):
                patch.setattr(module, name, value)

    return apply


def ones(part: str) -> Callable[..., torch.Tensor]:
    """`convert` that forgets what one kind of tensor holds."""
    plain = architectures.convert

    def convert(family: Any, config: Any, name: str, tensor: torch.Tensor) -> torch.Tensor:
        converted = plain(family, config, name, tensor)
        return torch.ones_like(converted) if part in name else converted

    return convert


def without_biases(*args: Any) -> dict[str, str]:
    return {k: v for k, v in NAMES(*args).items() if not k.endswith(".bias")}


NAMES = export._names
BROKEN = {
    "permutation": ("llama", family("llama", interleaved_rope=False)),
    "permutation of biases": (
        "llama-biases",
        function(
            "interleave", lambda rows, heads: rows if rows.ndim == 1 else INTERLEAVE(rows, heads)
        ),
    ),
    "permutation where there is none": ("qwen2", family("qwen2", interleaved_rope=True)),
    "llama 3 rope scaling": ("llama-3", function("extra_tensors", lambda config: {})),
    "rope scaling": (
        "qwen2-yarn",
        function("_rope", lambda config: {"rope_type": "default", "rope_theta": 10000.0}),
    ),
    "head_dim": ("qwen3-head-dim", function("head_dim", lambda config: 64)),
    "attention biases": ("qwen2", function("_names", without_biases)),
    "qk-norm": ("qwen3", function("convert", ones("q_norm"))),
    "sliding window": ("gemma3", function("_write_sliding", lambda writer, config: None)),
    "which layers slide": (
        "gemma3-pattern",
        function("_write_sliding", lambda writer, config: writer.add_sliding_window(32)),
    ),
    "norms of Gemma": ("gemma3", family("gemma3_text", norm_offset=0.0)),
    "layers without positions": ("smollm3", family("smollm3", name="llama")),
    "untied head": (
        "llama-untied-full",
        function(
            "_names", lambda *args: {k: v for k, v in NAMES(*args).items() if k != "lm_head.weight"}
        ),
    ),
}
INTERLEAVE = architectures.interleave


@pytest.mark.parametrize("rule", BROKEN)
def test_broken_rule_is_seen(
    rule: str, models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, break_it = BROKEN[rule]
    break_it(monkeypatch)
    try:
        found = compare(models, case, tmp_path / "broken.gguf", "f32")
    except UserError as error:  # llama.cpp may notice by itself
        assert "llama.cpp can not load" in error.what
    else:
        assert found["max_difference"] > 0.05


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
            "dynamic",
        ),
        ({"hidden_act": "relu"}, "activation relu instead of silu"),
    ],
)
def test_what_llama_cpp_can_not_compute(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        architectures.architecture(config(LlamaConfig, **changes))


def test_refusals_of_families() -> None:
    with pytest.raises(UserError, match="no_rope_layers other than every 4th"):
        architectures.architecture(config(SmolLM3Config, no_rope_layers=[1, 0]))
    with pytest.raises(UserError, match="query_pre_attn_scalar"):
        architectures.architecture(
            config(Gemma3TextConfig, **GEMMA | {"query_pre_attn_scalar": 100})
        )
    with pytest.raises(UserError, match="head_dim that is not"):
        qwen2 = config(Qwen2Config)
        qwen2.head_dim = 32
        architectures.architecture(qwen2)


def test_unknown_architecture_is_named() -> None:
    with pytest.raises(UserError) as error:
        architectures.architecture(BertConfig())
    assert error.value.what == (
        "Models of type bert can not be exported to GGUF yet; known are llama, mistral, smollm3, "
        "qwen2, qwen3, gemma3_text."
    )


def test_names() -> None:
    name = architectures.gguf_name
    assert name(LLAMA, "model.layers.11.self_attn.q_proj.weight") == "blk.11.attn_q.weight"
    assert name(GEMMA3, "model.layers.0.post_attention_layernorm.weight") == (
        "blk.0.post_attention_norm.weight"
    )
    assert name(QWEN3, "model.norm.weight") == "output_norm.weight"
    with pytest.raises(UserError, match=r"no tensor model\.layers\.0\.mlp\.router\.weight"):
        name(LLAMA, "model.layers.0.mlp.router.weight")
    with pytest.raises(UserError, match=r"no bias at model\.layers\.0\.self_attn\.o_proj\.bias"):
        name(SMOLLM3, "model.layers.0.self_attn.o_proj.bias")


def test_interleave_by_hand() -> None:
    # Two heads of four rows: the halves (0, 1), (2, 3) become the pairs (0, 2), (1, 3).
    rows = torch.arange(8)
    assert architectures.interleave(rows, 2).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_context_is_cut_to_a_window_llama_cpp_ignores() -> None:
    window = architectures.context_length
    assert window(LLAMA, config(MistralConfig, sliding_window=64)) == 64
    assert window(LLAMA, config(MistralConfig, sliding_window=None)) == 512
    assert window(GEMMA3, config(Gemma3TextConfig, **GEMMA)) == 512
