"""The instruct models that `--base auto` chooses from, planned for without a download.

In the order in which auto prefers them: larger first. Sizes are those of the published
config.json files; a test holds that they give the published parameter counts. Gemma 3 from 4B on
is a vision model as well and does not load as a causal LM here, so it is not among them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_SIZES = (
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "vocab_size",
    "max_position_embeddings",
)
_APACHE, _LLAMA = "Apache-2.0", "Llama Community License"


@dataclass(frozen=True)
class KnownBase:
    """An instruct model of the table.

    Attributes:
        config: what `shapes.shape_of` reads of its config.json.
        licence: its SPDX id, or its name.
        gated: its page asks for an agreement before the weights can be downloaded.
        restricted: its licence forbids some uses, commercial ones for example.
    """

    name: str
    config: dict[str, Any]
    licence: str = _APACHE
    gated: bool = False
    restricted: bool = False


def _config(family: str, *sizes: int, tied: bool, **more: Any) -> dict[str, Any]:
    sizes_by_name = dict(zip(_SIZES, sizes, strict=True))
    return {"model_type": family, "tie_word_embeddings": tied, **sizes_by_name, **more}


# fmt: off
KNOWN = (
    KnownBase(
        "Qwen/Qwen3-8B",
        _config("qwen3", 36, 4096, 32, 8, 128, 12288, 151936, 40960, tied=False),
    ),
    KnownBase(
        "meta-llama/Llama-3.1-8B-Instruct",
        _config("llama", 32, 4096, 32, 8, 128, 14336, 128256, 131072, tied=False),
        _LLAMA, gated=True,
    ),
    KnownBase(
        "Qwen/Qwen2.5-7B-Instruct",
        _config("qwen2", 28, 3584, 28, 4, 128, 18944, 152064, 32768, tied=False),
    ),
    KnownBase(
        "mistralai/Mistral-7B-Instruct-v0.3",
        _config("mistral", 32, 4096, 32, 8, 128, 14336, 32768, 32768, tied=False),
        gated=True,
    ),
    KnownBase(
        "Qwen/Qwen3-4B-Instruct-2507",
        _config("qwen3", 36, 2560, 32, 8, 128, 9728, 151936, 262144, tied=True),
    ),
    KnownBase(
        "meta-llama/Llama-3.2-3B-Instruct",
        _config("llama", 28, 3072, 24, 8, 128, 8192, 128256, 131072, tied=True),
        _LLAMA, gated=True,
    ),
    KnownBase(
        "Qwen/Qwen2.5-3B-Instruct",
        _config("qwen2", 36, 2048, 16, 2, 128, 11008, 151936, 32768, tied=True),
        "Qwen Research License", restricted=True,
    ),
    KnownBase(
        "Qwen/Qwen3-1.7B",
        _config("qwen3", 28, 2048, 16, 8, 128, 6144, 151936, 40960, tied=True),
    ),
    KnownBase(
        "HuggingFaceTB/SmolLM2-1.7B-Instruct",
        _config("llama", 24, 2048, 32, 32, 64, 8192, 49152, 8192, tied=True),
    ),
    KnownBase(
        "Qwen/Qwen2.5-1.5B-Instruct",
        _config("qwen2", 28, 1536, 12, 2, 128, 8960, 151936, 32768, tied=True),
    ),
    KnownBase(
        "meta-llama/Llama-3.2-1B-Instruct",
        _config("llama", 16, 2048, 32, 8, 64, 8192, 128256, 131072, tied=True),
        _LLAMA, gated=True,
    ),
    KnownBase(
        "google/gemma-3-1b-it",
        _config("gemma3_text", 26, 1152, 4, 1, 256, 6912, 262144, 32768, tied=True,
                sliding_window=512, sliding_window_pattern=6),
        "Gemma Terms of Use", gated=True,
    ),
    KnownBase(
        "Qwen/Qwen3-0.6B",
        _config("qwen3", 28, 1024, 16, 8, 128, 3072, 151936, 40960, tied=True),
    ),
    KnownBase(
        "Qwen/Qwen2.5-0.5B-Instruct",
        _config("qwen2", 24, 896, 14, 2, 64, 4864, 151936, 32768, tied=True),
    ),
    KnownBase(
        "HuggingFaceTB/SmolLM2-360M-Instruct",
        _config("llama", 32, 960, 15, 5, 64, 2560, 49152, 8192, tied=True),
    ),
)
# fmt: on
