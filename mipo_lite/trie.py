"""The trie of a batch of token rows: every shared prefix stands in it once.

Knows about lists of token ids and nothing about models, masks or padding. The trie is laid out
in preorder ("slots"): a node's subtree is one contiguous run of slots, so a single number per
slot, `end`, says who may look back at it.

Also here: packing rows that belong together into batches by the tokens a trie computes.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

TokenIds = Sequence[int]


@dataclass(frozen=True)
class Trie:
    """A batch of rows as one row of `size` slots in preorder. All arrays are int64.

    tokens:    [size] token id of each slot
    positions: [size] depth of each slot, the position id it had in its row
    end:       [size] slot after the last one of this slot's subtree: slot i sees slot j
               (j is i's ancestor or i itself) exactly if j <= i < end[j]
    paths:     for each row, the slots of its tokens, [len(row)]
    """

    tokens: np.ndarray
    positions: np.ndarray
    end: np.ndarray
    paths: list[np.ndarray]

    @property
    def size(self) -> int:
        """Tokens computed."""
        return len(self.tokens)

    @property
    def tokens_in(self) -> int:
        """Tokens of the rows before sharing."""
        return sum(len(path) for path in self.paths)

    @property
    def ratio(self) -> float:
        """Tokens in the rows per token computed; 1.0 when nothing is shared."""
        return self.tokens_in / max(self.size, 1)


def build_trie(rows: Sequence[TokenIds | np.ndarray]) -> Trie:
    """Lay `rows` out as a trie. Rows may be equal, empty, or prefixes of each other."""
    arrays = [np.asarray(row, dtype=np.int64) for row in rows]
    paths: list[np.ndarray] = [np.empty(0, dtype=np.int64)] * len(arrays)
    tokens: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    end = np.empty(sum(len(row) for row in arrays), dtype=np.int64)
    size = 0
    previous = np.empty(0, dtype=np.int64)
    path = np.empty(0, dtype=np.int64)  # slots of the previous row
    for i in sorted_order(arrays):
        row = arrays[i]
        shared = common_prefix(previous, row)
        end[path[shared:]] = size  # the previous row's own branch closes here
        new = np.arange(size, size + len(row) - shared)
        path = np.concatenate([path[:shared], new])
        tokens.append(row[shared:])
        positions.append(np.arange(shared, len(row)))
        size += len(new)
        paths[i] = path
        previous = row
    end[path] = size
    empty = [np.empty(0, dtype=np.int64)]
    return Trie(
        np.concatenate(tokens or empty), np.concatenate(positions or empty), end[:size], paths
    )


def sorted_order(rows: Sequence[TokenIds | np.ndarray]) -> list[int]:
    """Indices of `rows` in lexicographic order; rows with a common prefix become neighbours."""
    # Big-endian bytes compare as the numbers do, and memcmp is faster than comparing lists.
    keys = [np.asarray(row, dtype=">u4").tobytes() for row in rows]
    return sorted(range(len(rows)), key=keys.__getitem__)


def common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """Length of the longest common prefix of two token arrays."""
    n = min(len(a), len(b))
    different = a[:n] != b[:n]
    return int(different.argmax()) if different.any() else n


def pack(
    items: Sequence[Sequence[TokenIds]],
    *,
    max_tokens: int,
    max_items: int | None = None,
    seed: int | None = None,
) -> list[list[int]]:
    """Batches (lists of indices into `items`) of at most `max_tokens` tokens computed each.

    An item is a tuple of rows that stay in one batch: a pair's chosen and rejected, or a single
    row. Items whose first rows share at least half of the shorter one (the same user context)
    form a group, and a group is packed before the next one starts. Every index occurs once; an
    item larger than `max_tokens` gets a batch of its own.

    With `seed`, items are shuffled within their group, groups among themselves, and finally the
    batches: a training epoch. Without it the order is lexicographic and saves most.
    """
    arrays = [[np.asarray(row, dtype=np.int64) for row in item] for item in items]
    groups = _groups([rows[0] for rows in arrays])
    rng = random.Random(seed)
    if seed is not None:
        rng.shuffle(groups)
        for group in groups:
            rng.shuffle(group)

    batches: list[list[int]] = []
    rows_in_batch: list[np.ndarray] = []
    used = 0
    for i in (i for group in groups for i in group):
        cost = _added_tokens(rows_in_batch, arrays[i])
        full = not batches or used + cost > max_tokens or len(batches[-1]) == max_items
        if full:
            rows_in_batch, used = [], 0
            cost = _added_tokens([], arrays[i])
            batches.append([])
        batches[-1].append(i)
        rows_in_batch.extend(arrays[i])
        used += cost
    if seed is not None:
        rng.shuffle(batches)
    return batches


def _groups(rows: list[np.ndarray]) -> list[list[int]]:
    """Lexicographic order cut where two neighbours share less than half of the shorter one."""
    groups: list[list[int]] = []
    for i in sorted_order(rows):
        if groups:
            last = rows[groups[-1][-1]]
            if 2 * common_prefix(last, rows[i]) >= min(len(last), len(rows[i])):
                groups[-1].append(i)
                continue
        groups.append([i])
    return groups


def _added_tokens(present: list[np.ndarray], new: list[np.ndarray]) -> int:
    """Slots that `new` rows add to the trie of the rows that are `present`."""
    present = list(present)
    added = 0
    for row in new:
        added += len(row) - max((common_prefix(row, other) for other in present), default=0)
        present.append(row)
    return added
