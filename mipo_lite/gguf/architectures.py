"""What llama.cpp needs to know of each model family: tensor names, layout, metadata.

One table a family, to be read against the paper or the modelling code; what several families
share is in one place. Nothing here reads or writes files. A family that is not in `FAMILIES`, a
tensor that is not in its table and a setting that llama.cpp can not compute are refused by name.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import gguf
import torch

from ..errors import UserError

_WAY_OUT = "Use the merged model with transformers, or export it with llama.cpp's own converter."

# Shared: module of a decoder layer -> its name in GGUF (both with ".weight" or ".bias").
_BLOCK = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_QK_NORM = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
_TOP = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}
_QKV_BIAS = frozenset({"attn_q", "attn_k", "attn_v"})


@dataclass(frozen=True)
class Architecture:
    """How llama.cpp computes one family.

    Attributes:
        name: general.architecture of the file.
        block: modules of a layer.
        biases: modules whose bias is added; another bias is refused.
        interleaved_rope: rotates neighbouring pairs of a head where transformers rotates its two
            halves, so the rows of q and k are permuted (Su et al., arXiv 2104.09864, eq. 34).
        norm_offset: added to every norm weight (Gemma stores w - 1).
        free_head_dim: the size of a head need not be hidden / heads.
        sliding: layers may attend to a window only; without it the context is cut to the window.
        nope_every: every n-th layer has no position encoding (0: none is without).
        activation: of the gated MLP, as transformers calls it.
    """

    name: str
    block: dict[str, str]
    biases: frozenset[str] = frozenset()
    interleaved_rope: bool = False
    norm_offset: float = 0.0
    free_head_dim: bool = True
    sliding: bool = False
    nope_every: int = 0
    activation: str = "silu"


LLAMA = Architecture(
    name="llama",
    block=_BLOCK,
    biases=_QKV_BIAS | {"attn_output", "ffn_gate", "ffn_up", "ffn_down"},
    interleaved_rope=True,
)
SMOLLM3 = Architecture(
    name="smollm3", block=_BLOCK, biases=_QKV_BIAS, interleaved_rope=True, nope_every=4
)
QWEN2 = Architecture(name="qwen2", block=_BLOCK, biases=_QKV_BIAS, free_head_dim=False)
QWEN3 = Architecture(name="qwen3", block=_BLOCK | _QK_NORM, biases=_QKV_BIAS)
GEMMA3 = Architecture(
    name="gemma3",
    block=_BLOCK
    | _QK_NORM
    | {
        "post_attention_layernorm": "post_attention_norm",
        "pre_feedforward_layernorm": "ffn_norm",
        "post_feedforward_layernorm": "post_ffw_norm",
    },
    norm_offset=1.0,
    sliding=True,
    activation="gelu_pytorch_tanh",
)

# model_type of config.json -> family. SmolLM2 and Llama 2 to 3.3 call themselves llama.
FAMILIES = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "smollm3": SMOLLM3,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "gemma3_text": GEMMA3,
}


def architecture(config: Any) -> Architecture:
    """The family of a transformers config.

    Raises UserError for a family that is not known and for settings that it can not express.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise UserError(
            f"Models of type {config.model_type} can not be exported to GGUF yet; known are "
            f"{', '.join(FAMILIES)}.",
            _WAY_OUT,
        )
    _check(family, config)
    return family


def head_dim(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def gguf_name(family: Architecture, name: str) -> str:
    """Name in the file of the checkpoint tensor `name`.

    Raises UserError when llama.cpp has no use for such a tensor.
    """
    module, _, kind = name.removeprefix("model.").rpartition(".")
    layer = re.fullmatch(r"layers\.(\d+)\.(.+)", module)
    table = family.block if layer else _TOP
    mapped = table.get(layer[2] if layer else module)
    if mapped is None or kind not in ("weight", "bias"):
        raise UserError(f"{family.name} models have no tensor {name} in llama.cpp.", _WAY_OUT)
    if kind == "bias" and mapped not in family.biases:
        raise UserError(f"llama.cpp's {family.name} has no bias at {name}.", _WAY_OUT)
    return f"blk.{layer[1]}.{mapped}.{kind}" if layer else f"{mapped}.{kind}"


def convert(family: Architecture, config: Any, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The checkpoint tensor `name` as llama.cpp wants it; shape and dtype stay.

    Rows of q and k are permuted where the family says so; also right for LoRA B, whose rows are
    those of the weight.
    """
    if family.interleaved_rope and ".q_proj." in name:
        return interleave(tensor, config.num_attention_heads)
    if family.interleaved_rope and ".k_proj." in name:
        return interleave(tensor, config.num_key_value_heads)
    if family.norm_offset and name.endswith("norm.weight"):
        return tensor.float() + family.norm_offset
    return tensor


def interleave(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorder each head's rows from (first half, second half) to neighbouring pairs.

    Args:
        rows: [heads * head_dim, ...].
    """
    pairs = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def extra_tensors(config: Any) -> dict[str, torch.Tensor]:
    """Tensors that no checkpoint has: the frequency divisors of Llama 3's rope scaling, f32."""
    rope = _rope(config)
    if rope["rope_type"] != "llama3":
        return {}
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    dim = head_dim(config)
    plain = rope["rope_theta"] ** -(torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    return {"rope_freqs.weight": plain / scaled.float()}


def context_length(family: Architecture, config: Any) -> int:
    """Positions that the file claims: the sliding window where llama.cpp would ignore it."""
    window = _window(config)
    limit: int = config.max_position_embeddings
    return limit if family.sliding or window is None else min(limit, window)


def write_metadata(writer: gguf.GGUFWriter, family: Architecture, config: Any) -> None:
    """Everything llama.cpp needs beside tensors and vocabulary."""
    rope = _rope(config)
    dim = head_dim(config)
    writer.add_context_length(context_length(family, config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(dim)
    writer.add_value_length(dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(dim)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        writer.add_rope_scaling_orig_ctx_len(original)
    if family.sliding:
        _write_sliding(writer, config)
    if getattr(config, "final_logit_softcapping", None):
        writer.add_final_logit_softcapping(config.final_logit_softcapping)


def _write_sliding(writer: gguf.GGUFWriter, config: Any) -> None:
    pattern = [kind == "sliding_attention" for kind in config.layer_types]
    if not any(pattern):
        return
    writer.add_sliding_window(config.sliding_window)
    writer.add_rope_freq_base_swa(config.rope_parameters["sliding_attention"]["rope_theta"])
    # Readers older than the key assume that every sixth layer is a full one.
    if pattern != [(i + 1) % 6 != 0 for i in range(len(pattern))]:
        writer.add_sliding_window_pattern(pattern)


def _rope(config: Any) -> dict[str, Any]:
    """Rope parameters of the layers with full attention."""
    parameters: dict[str, Any] = config.rope_parameters
    return parameters.get("full_attention", parameters)


def _window(config: Any) -> int | None:
    """The sliding window if any layer uses it."""
    window: int | None = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    return window if kinds is None or "sliding_attention" in kinds else None


def _check(family: Architecture, config: Any) -> None:
    problems = []
    rope = _rope(config)
    if rope["rope_type"] not in ("default", "linear", "yarn", "llama3"):
        problems.append(f"rope_type {rope['rope_type']}")
    if rope["rope_type"] == "yarn" and any(
        rope.get(key) not in (None, usual)
        for key, usual in (
            ("attention_factor", None),
            ("mscale", None),
            ("mscale_all_dim", None),
            ("beta_fast", 32),
            ("beta_slow", 1),
        )
    ):
        problems.append("yarn with its own attention factor or betas")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        problems.append("partial rotary embedding")
    activation = getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", None)
    if activation != family.activation:
        problems.append(f"activation {activation} instead of {family.activation}")
    if not family.free_head_dim and head_dim(config) * config.num_attention_heads != (
        config.hidden_size
    ):
        problems.append("head_dim that is not hidden_size / num_attention_heads")
    if family.nope_every and list(config.no_rope_layers) != [
        int((i + 1) % family.nope_every != 0) for i in range(config.num_hidden_layers)
    ]:
        problems.append(f"no_rope_layers other than every {family.nope_every}th")
    if family.name == GEMMA3.name:
        # llama.cpp derives the scale from the shape, and takes 62 layers for the 27B model.
        is_27b = config.num_hidden_layers == 62
        per_head = config.hidden_size // config.num_attention_heads
        if config.query_pre_attn_scalar != (per_head if is_27b else head_dim(config)):
            problems.append("query_pre_attn_scalar other than the size of a head")
        if getattr(config, "use_bidirectional_attention", False):
            problems.append("bidirectional attention")
        sliding = config.rope_parameters.get("sliding_attention", {"rope_type": "default"})
        if sliding["rope_type"] != "default":
            problems.append("rope scaling in sliding layers")
        if getattr(config, "attn_logit_softcapping", None):
            problems.append("attention softcapping")
    if problems:
        raise UserError(
            f"llama.cpp's {family.name} can not compute this model: {', '.join(problems)}.",
            _WAY_OUT,
        )
