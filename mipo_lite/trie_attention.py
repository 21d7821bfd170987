"""Attention over the slots of a trie, without computing what the mask would throw away.

A dense mask makes SDPA compute all size x size scores, of which sibling branches need none. Here
the queries are cut into blocks; a block needs the keys of its own slots and of the ancestors of
its first slot, and nothing else (see `plan_blocks`). On a GPU with a long row, FlexAttention gets
the same facts as a block mask.

Registered with transformers as an attention implementation: while it is switched on, the
`layout` keyword of a forward reaches every layer's attention. Calls without one get plain SDPA.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .trie import Trie

IMPLEMENTATION = "mipo_trie"

# Queries at once. Of 64, 128, 256 and 512 the fastest on two CPU cores, by a little.
BLOCK = 256

# On CUDA, rows of at least this many slots go to FlexAttention.
FLEX_FROM = 1024
FLEX_BLOCK = 128


class UnsupportedModel(ValueError):
    """The model's attention cannot be run on a trie; the message says why."""


@dataclass(frozen=True)
class QueryBlock:
    """Queries `start:stop`, the slices of keys they need, and who sees whom.

    mask: boolean [1, 1, stop - start, keys]; None where it is the causal triangle.
    """

    start: int
    stop: int
    keys: list[slice]
    mask: torch.Tensor | None


class Layout:
    """A trie on a device, with what attention needs of it: computed once, used by all layers."""

    def __init__(self, trie: Trie, device: torch.device) -> None:
        self.trie = trie
        self.device = device
        self._blocks: dict[int | None, list[QueryBlock]] = {}
        self._block_masks: dict[int | None, Any] = {}

    def blocks(self, window: int | None) -> list[QueryBlock]:
        if window not in self._blocks:
            self._blocks[window] = plan_blocks(self.trie, window, self.device)
        return self._blocks[window]

    def block_mask(self, window: int | None) -> Any:
        if window not in self._block_masks:
            self._block_masks[window] = flex_block_mask(self.trie, window, self.device)
        return self._block_masks[window]


@contextmanager
def switched_on(config: Any) -> Iterator[None]:
    """Let a model with SDPA run layouts inside the block; others are left alone."""
    previous = config._attn_implementation
    if previous == "sdpa":
        config._attn_implementation = IMPLEMENTATION
    try:
        yield
    finally:
        config._attn_implementation = previous


def layout_mask() -> torch.Tensor:
    """The 4-D mask to pass beside a layout: it stops transformers from building one, and fits
    no attention, so that a layer which does not see the layout fails instead of seeing too much.
    """
    return torch.empty(1, 1, 0, 0, dtype=torch.bool)


def trie_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    layout: Layout | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention function: [1, heads, size, dim] to [1, size, heads, dim]."""
    if layout is None:
        if attention_mask is not None and attention_mask.numel() == 0:
            raise UnsupportedModel(
                f"{type(module).__name__} hides keyword arguments from attention"
            )
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        raise UnsupportedModel(
            f"{type(module).__name__} caps its scores or has sinks; "
            "load the model with attn_implementation='eager'"
        )
    if query.is_cuda and layout.trie.size >= FLEX_FROM and dropout == 0.0:
        mask = layout.block_mask(sliding_window)
        enable_gqa = query.shape[1] != key.shape[1]
        output = _compiled_flex_attention()(
            query, key, value, block_mask=mask, scale=scaling, enable_gqa=enable_gqa
        )
    else:
        groups = query.shape[1] // key.shape[1]
        output = attend(
            query,
            repeat_kv(key, groups),
            repeat_kv(value, groups),
            layout.blocks(sliding_window),
            dropout=dropout,
            scale=scaling,
        )
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register(IMPLEMENTATION, trie_attention)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    blocks: list[QueryBlock],
    *,
    dropout: float = 0.0,
    scale: float | None = None,
) -> torch.Tensor:
    """Softmax attention of all query blocks, [1, heads, size, dim]."""

    def pick(x: torch.Tensor, parts: list[slice]) -> torch.Tensor:
        slices = [x[:, :, part] for part in parts]
        return slices[0] if len(slices) == 1 else torch.cat(slices, dim=2)

    outputs = [
        F.scaled_dot_product_attention(
            query[:, :, block.start : block.stop],
            pick(key, block.keys),
            pick(value, block.keys),
            attn_mask=block.mask,
            is_causal=block.mask is None,
            dropout_p=dropout,
            scale=scale,
        )
        for block in blocks
    ]
    return torch.cat(outputs, dim=2)


def plan_blocks(
    trie: Trie, window: int | None, device: torch.device | str = "cpu", size: int = BLOCK
) -> list[QueryBlock]:
    """Cut the slots into runs of `size` queries with the keys each can see.

    Of the slots before a run, only ancestors of its first slot are seen from it: subtrees are
    contiguous, so whatever holds a later slot of the run and starts before the run holds the
    first slot too.
    """
    blocks = []
    for start in range(0, trie.size, size):
        stop = min(start + size, trie.size)
        ancestors = np.flatnonzero(trie.end[:start] > start)
        keys = np.concatenate([ancestors, np.arange(start, stop)])
        queries = np.arange(start, stop)[:, None]
        seen = (keys <= queries) & (queries < trie.end[keys])
        if window is not None:
            seen &= trie.positions[start:stop, None] - trie.positions[keys] < window
            needed = seen.any(axis=0)
            keys, seen = keys[needed], seen[:, needed]
        causal = len(ancestors) == 0 and seen.shape[0] == seen.shape[1]
        causal = causal and np.array_equal(seen, np.tri(len(seen), dtype=bool))
        mask = None if causal else torch.from_numpy(seen)[None, None].to(device)
        blocks.append(QueryBlock(start, stop, runs(keys), mask))
    return blocks


def runs(indices: np.ndarray) -> list[slice]:
    """Increasing indices as slices of consecutive ones."""
    breaks = np.flatnonzero(np.diff(indices) != 1) + 1
    return [slice(int(part[0]), int(part[-1]) + 1) for part in np.split(indices, breaks)]


def flex_block_mask(trie: Trie, window: int | None, device: torch.device | str) -> Any:
    """The trie as a BlockMask of FlexAttention, built without a dense mask.

    Of key block c, query block [a, b) sees something if some end in c is beyond a, and everything
    if all of c lies before a and every end in c is at b or beyond. Overestimating is safe: in
    blocks that are not full the mask is applied slot by slot.
    """
    from torch.nn.attention.flex_attention import BlockMask

    count = -(-trie.size // FLEX_BLOCK)
    end = np.full(count * FLEX_BLOCK, 0, dtype=np.int64)
    end[: trie.size] = trie.end
    by_block = end.reshape(count, FLEX_BLOCK)
    block = np.arange(count)
    begin = block[:, None] * FLEX_BLOCK
    some = (block <= block[:, None]) & (by_block.max(axis=1) > begin)
    full = (block < block[:, None]) & (by_block.min(axis=1) >= begin + FLEX_BLOCK)
    if window is not None:
        full[:] = False
    ends = torch.from_numpy(trie.end).to(device)
    positions = torch.from_numpy(trie.positions).to(device)

    def mask_mod(b: Any, h: Any, q: Any, kv: Any) -> Any:
        seen = (kv <= q) & (q < ends[kv])
        if window is not None:
            seen = seen & (positions[q] - positions[kv] < window)
        return seen

    def indices(chosen: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        # Per query block: how many key blocks, and which (chosen ones first).
        order = np.argsort(~chosen, axis=1, kind="stable").astype(np.int32)
        counts = chosen.sum(axis=1).astype(np.int32)
        return (
            torch.from_numpy(counts)[None, None].to(device),
            torch.from_numpy(order)[None, None].to(device),
        )

    return BlockMask.from_kv_blocks(
        *indices(some & ~full),
        *indices(full),
        BLOCK_SIZE=FLEX_BLOCK,
        mask_mod=mask_mod,
        seq_lengths=(trie.size, trie.size),
    )


@cache
def _compiled_flex_attention() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    # dynamic: a new length does not compile again
    return torch.compile(flex_attention, dynamic=True)
