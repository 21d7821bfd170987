"""A decoder run on the trie of its batch, so that no shared prefix is computed twice.

`share_prefixes(model)` replaces the forward of the decoder backbone. A right-padded batch is laid
out as one row (see `mipo_lite.trie`), with position id = depth and a mask that lets every token
see exactly its own prefix; the backbone runs once on that row, and its hidden states are gathered
back to [batch, length, hidden]. Whatever sits on top (LM head, loss, metrics) never notices, and
the gradients of shared tokens add up through the gather. It is exact up to floating-point order.

Assumes a decoder-only backbone whose tokens meet only in attention, which reads `position_ids`
and takes a 4-D mask. Sliding-window layers get their window in positions, not in slots. Anything
else (other layer types, flash attention) is refused with `UnsupportedModel`.

Leaves alone: calls with a cache, with input embeddings, with left padding, calls that want
attentions or all hidden states, and batches that share too little to gain.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .trie import Trie, build_trie
from .trie_attention import IMPLEMENTATION, Layout, UnsupportedModel, layout_mask, switched_on

# Below this many batch tokens per token computed the longer row's attention eats the gain.
MIN_RATIO = 1.3

# Relative difference of hidden states, shared against plain, that mere rounding can reach.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass
class Stats:
    """Tokens (without padding) of all batches that could share, and what was computed for them."""

    tokens_in: int = 0
    tokens_computed: int = 0

    @property
    def ratio(self) -> float:
        return self.tokens_in / max(self.tokens_computed, 1)


@contextmanager
def share_prefixes(model: torch.nn.Module, *, min_ratio: float = MIN_RATIO) -> Iterator[Stats]:
    """Share prefixes in every forward of `model` (a causal LM or a PeftModel) inside the block.

    A backward pass under gradient checkpointing runs forwards again: keep it inside too.
    Raises `UnsupportedModel`.
    """
    sharing = install(model, min_ratio=min_ratio)
    try:
        yield sharing.stats
    finally:
        sharing.remove()


def install(model: torch.nn.Module, *, min_ratio: float = MIN_RATIO) -> PrefixSharing:
    """`share_prefixes` as a lasting patch; undo with `.remove()`. Raises `UnsupportedModel`."""
    return PrefixSharing(backbone_of(model), min_ratio)


class PrefixSharing:
    """The patched forward of one backbone, with its `stats`."""

    def __init__(self, backbone: Any, min_ratio: float = MIN_RATIO) -> None:
        check_supported(backbone)
        self.backbone = backbone
        self.min_ratio = min_ratio
        self.stats = Stats()
        self._original = original = backbone.forward
        self._switch = switched_on(backbone.config.get_text_config())
        self._switch.__enter__()

        @functools.wraps(original)  # callers inspect the signature
        def forward(*args: Any, **kwargs: Any) -> Any:
            return self._forward(*args, **kwargs)

        backbone.forward = forward

    def remove(self) -> None:
        self.backbone.forward = self._original
        self._switch.__exit__(None, None, None)

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        trie = None if args else self._plan(**kwargs)
        if trie is None:
            return self._original(*args, **kwargs)
        outputs = run_trie(self._original, self.backbone, trie, use_cache=False)
        outputs.last_hidden_state = gather_rows(
            outputs.last_hidden_state[0], trie, length=kwargs["input_ids"].shape[1]
        )
        return outputs

    def _plan(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: Any = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        **others: Any,
    ) -> Trie | None:
        """The trie to run instead of this batch, or None to take the plain path."""
        if input_ids is None or input_ids.dim() != 2 or len(input_ids) < 2:
            return None
        if use_cache or return_dict is False:
            return None
        if any(value is not None and value is not False for value in others.values()):
            return None  # a cache, positions, embeddings, or outputs that have no row shape
        rows = unpadded_rows(input_ids, attention_mask)
        if rows is None:
            return None
        trie = build_trie(rows)
        share = trie.size > 0 and trie.ratio >= self.min_ratio
        self.stats.tokens_in += trie.tokens_in
        self.stats.tokens_computed += trie.size if share else trie.tokens_in
        return trie if share else None


def backbone_of(model: Any) -> Any:
    """The decoder stack under the LM head (and under PEFT's wrappers)."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return base.base_model


def check_supported(backbone: Any) -> None:
    """Raise `UnsupportedModel` unless `backbone` can run on a trie."""
    config = backbone.config.get_text_config()
    name = type(backbone).__name__
    if config._attn_implementation not in ("eager", "sdpa", IMPLEMENTATION):
        raise UnsupportedModel(
            f"{name} uses {config._attn_implementation}, which takes no 4-D mask; "
            "load it with attn_implementation='sdpa'"
        )
    unknown = layer_types(config) - {"full_attention", "sliding_attention"}
    if unknown:
        raise UnsupportedModel(f"{name} has layers of type {', '.join(sorted(unknown))}")
    accepted = inspect.signature(backbone.forward).parameters
    if not {"input_ids", "attention_mask", "position_ids"} <= accepted.keys():
        raise UnsupportedModel(f"{name} does not take position_ids and an attention mask")


def layer_types(config: Any) -> set[str]:
    """The kinds of attention layers of a model, in the terms of transformers' masks."""
    types = getattr(config, "layer_types", None)
    if types is not None:
        return set(types)
    window = getattr(config, "sliding_window", None)
    return {"full_attention"} if window is None else {"sliding_attention"}


def unpadded_rows(input_ids: torch.Tensor, attention_mask: Any) -> list[np.ndarray] | None:
    """The rows of a right-padded batch without their padding; None if it is padded otherwise."""
    ids = input_ids.cpu().numpy()
    if attention_mask is None:
        return list(ids)
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.shape != input_ids.shape:
        return None
    mask = attention_mask.cpu().numpy() != 0
    lengths = mask.sum(axis=1)
    if not (mask == (np.arange(mask.shape[1]) < lengths[:, None])).all():
        return None
    return [row[:length] for row, length in zip(ids, lengths, strict=True)]


def run_trie(forward: Any, backbone: Any, trie: Trie, **kwargs: Any) -> Any:
    """Outputs of the backbone's own `forward` on a trie: hidden states are [1, size, hidden]."""
    embedding = backbone.get_input_embeddings().weight
    config = backbone.config.get_text_config()
    with switched_on(config):
        if config._attn_implementation == IMPLEMENTATION:
            kwargs |= {
                "attention_mask": layout_mask(),
                "layout": Layout(trie, embedding.device),
            }
        else:
            kwargs["attention_mask"] = additive_masks(config, trie, embedding)
        return forward(
            input_ids=torch.from_numpy(trie.tokens)[None].to(embedding.device),
            position_ids=torch.from_numpy(trie.positions)[None].to(embedding.device),
            **kwargs,
        )


def additive_masks(config: Any, trie: Trie, like: torch.Tensor) -> Any:
    """What eager attention takes as `attention_mask` to see a trie, in the dtype of `like`.

    One [1, 1, size, size] mask, or one for each layer type where layers differ.
    """
    masks = {}
    for layer_type in layer_types(config):
        window = config.sliding_window if layer_type == "sliding_attention" else None
        hidden = ~visible(trie, window).to(like.device)[None, None]
        mask = torch.zeros(hidden.shape, dtype=like.dtype, device=like.device)
        masks[layer_type] = mask.masked_fill(hidden, torch.finfo(like.dtype).min)
    return masks if len(masks) > 1 else masks.popitem()[1]


def visible(trie: Trie, window: int | None = None) -> torch.Tensor:
    """Boolean [size, size]: may slot i (row) see slot j (column)? `window` counts positions."""
    slot = torch.arange(trie.size)
    seen = (slot <= slot[:, None]) & (slot[:, None] < torch.from_numpy(trie.end))
    if window is not None:
        position = torch.from_numpy(trie.positions)
        seen &= position[:, None] - position < window
    return seen


def gather_rows(hidden: torch.Tensor, trie: Trie, length: int) -> torch.Tensor:
    """[size, hidden] of the slots to [rows, length, hidden]; padding repeats slot 0."""
    index = np.zeros((len(trie.paths), length), dtype=np.int64)
    for row, path in zip(index, trie.paths, strict=True):
        row[: len(path)] = path
    flat = torch.from_numpy(index.reshape(-1)).to(hidden.device)
    return hidden.index_select(0, flat).view(*index.shape, -1)


@dataclass(frozen=True)
class SelfCheck:
    """Shared against plain on one batch: `difference` is relative, in hidden states."""

    ok: bool
    difference: float
    tolerance: float
    message: str


def self_check(
    model: Any, batch: Mapping[str, torch.Tensor], tolerance: float | None = None
) -> SelfCheck:
    """Run `batch` (right-padded input_ids and attention_mask) both ways and compare.

    Compares the backbone's hidden states of all real tokens, ||shared - plain|| / ||plain||, in
    eval mode and without gradients, against a tolerance that depends on the dtype. Does not raise
    for a model that cannot share: the result says so.
    """
    backbone = backbone_of(model)
    if tolerance is None:
        tolerance = TOLERANCE[backbone.get_input_embeddings().weight.dtype]
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    real = inputs["attention_mask"].bool()
    was_training = backbone.training
    backbone.eval()
    try:
        with torch.no_grad():
            plain = backbone(**inputs, use_cache=False).last_hidden_state[real].float()
            with share_prefixes(model, min_ratio=0.0):
                shared = backbone(**inputs, use_cache=False).last_hidden_state[real].float()
    except UnsupportedModel as error:
        return SelfCheck(False, float("nan"), tolerance, f"prefix sharing is off: {error}")
    finally:
        backbone.train(was_training)
    difference = float((shared - plain).norm() / plain.norm())
    ok = difference <= tolerance  # False for NaN
    message = (
        f"prefix sharing {'agrees with' if ok else 'is off: it differs from'} the plain path, "
        f"relative difference {difference:.1e}, tolerance {tolerance:.0e}"
    )
    return SelfCheck(ok, difference, tolerance, message)
