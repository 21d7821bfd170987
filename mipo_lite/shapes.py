"""The shape of a decoder, read from its config.json: sizes, parameter counts, nothing loaded.

Knows the dense families this program trains and exports (Llama, Mistral, Qwen2, Qwen3, Gemma,
Phi-3) and counts their parameters exactly. A family it does not know is read as if it were Llama.
Mixtures of experts are refused. No torch, no transformers: `plan` has to answer at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .errors import UserError

# Families whose embedding is the LM head when the config does not say.
_TIED = {"gemma", "gemma2", "gemma3", "gemma3_text"}
_QK_NORM = {"qwen3", "gemma3", "gemma3_text"}
_FOUR_NORMS = {"gemma2", "gemma3", "gemma3_text"}
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder-only transformer.

    Attributes:
        family: `model_type` of the config.
        window: positions it was made for (max_position_embeddings).
        sliding_window: tokens that its sliding-window layers see; None without such layers.
        sliding_layers: how many of `layers` those are.
        biases: elements of all biases of one layer.
    """

    family: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    tied: bool
    window: int
    sliding_window: int | None = None
    sliding_layers: int = 0
    biases: int = 0

    @property
    def query(self) -> int:
        """Width of the queries, and of what attention gives back."""
        return self.heads * self.head_dim

    @property
    def key(self) -> int:
        """Width of the keys; the values are as wide."""
        return self.kv_heads * self.head_dim

    @property
    def qk_norm(self) -> bool:
        return self.family in _QK_NORM

    @property
    def hidden_norms(self) -> int:
        """Norms over the hidden width in one layer."""
        return 4 if self.family in _FOUR_NORMS else 2

    @property
    def linears(self) -> tuple[tuple[int, int], ...]:
        """(inputs, outputs) of the linear layers of one decoder layer: what NF4 and LoRA cover."""
        h, q, k, i = self.hidden, self.query, self.key, self.intermediate
        if self.family == "phi3":
            return ((h, q + 2 * k), (q, h), (h, 2 * i), (i, h))
        return ((h, q), (h, k), (h, k), (q, h), (h, i), (h, i), (i, h))

    @property
    def linear_parameters(self) -> int:
        """Weights of all linear layers but the LM head."""
        return self.layers * sum(n * m for n, m in self.linears)

    @property
    def embedding_parameters(self) -> int:
        """The embedding, and the LM head where it is not the same matrix."""
        return self.vocab * self.hidden * (1 if self.tied else 2)

    @property
    def small_parameters(self) -> int:
        """Norms and biases."""
        norms = self.hidden_norms * self.hidden + (2 * self.head_dim if self.qk_norm else 0)
        return self.layers * (norms + self.biases) + self.hidden

    @property
    def parameters(self) -> int:
        return self.linear_parameters + self.embedding_parameters + self.small_parameters

    def lora_parameters(self, rank: int) -> int:
        """LoRA on every linear layer but the LM head: A is [r, inputs], B is [outputs, r]."""
        return self.layers * rank * sum(n + m for n, m in self.linears)


def shape_of(config: Mapping[str, Any] | Any) -> Shape:
    """The shape in a config.json (a mapping), or in a transformers config object.

    What a published config leaves out is what transformers takes for its family.

    Raises UserError for a mixture of experts, or a config without the sizes of a decoder.
    """
    values: Mapping[str, Any] = config if isinstance(config, Mapping) else config.to_dict()
    values = values.get("text_config") or values
    if any(values.get(name) for name in _EXPERTS):
        raise UserError(
            "This model is a mixture of experts, which mipo-lite does not plan for.",
            "Choose a dense instruct model; `mipo-lite plan` lists some.",
        )
    try:
        return _shape(values)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(
            "The model's config.json lacks the sizes of a decoder-only language model "
            f"(looked for {error}).",
            "Choose an instruct model that transformers loads as a causal LM.",
        ) from error


def _shape(values: Mapping[str, Any]) -> Shape:
    family = str(values["model_type"])
    layers = int(values["num_hidden_layers"])
    hidden = int(values["hidden_size"])
    heads = int(values["num_attention_heads"])
    kv_heads = int(values.get("num_key_value_heads") or heads)
    head_dim = int(values.get("head_dim") or hidden // heads)
    window, sliding_layers = _sliding(family, layers, values)
    tied = values.get("tie_word_embeddings")
    shape = Shape(
        family=family,
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate=int(values["intermediate_size"]),
        vocab=int(values["vocab_size"]),
        tied=family in _TIED if tied is None else bool(tied),
        window=int(values["max_position_embeddings"]),
        sliding_window=window if sliding_layers else None,
        sliding_layers=sliding_layers,
        biases=_biases(family, values, hidden, heads * head_dim, kv_heads * head_dim),
    )
    if min(layers, hidden, heads, kv_heads, head_dim, shape.intermediate, shape.vocab) < 1:
        raise ValueError("positive sizes")
    return shape


def _sliding(family: str, layers: int, values: Mapping[str, Any]) -> tuple[int | None, int]:
    """(sliding window, layers that have it)."""
    window = values.get("sliding_window")
    if window is None or values.get("use_sliding_window") is False:
        return None, 0
    types = values.get("layer_types")
    if types is not None:
        return int(window), sum(kind == "sliding_attention" for kind in types)
    if family in ("gemma2", "gemma3", "gemma3_text"):  # every n-th layer sees everything
        every = int(values.get("sliding_window_pattern") or (2 if family == "gemma2" else 6))
        return int(window), layers - layers // every
    return (int(window), layers) if family in ("mistral", "phi3") else (None, 0)


def _biases(family: str, values: Mapping[str, Any], hidden: int, query: int, key: int) -> int:
    if family == "qwen2":  # on q, k and v, always
        return query + 2 * key
    biases = query + 2 * key + hidden if values.get("attention_bias") else 0
    if values.get("mlp_bias"):
        biases += 2 * int(values["intermediate_size"]) + hidden
    return biases
