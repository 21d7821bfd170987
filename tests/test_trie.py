from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from mipo_lite.trie import build_trie, pack

# A small alphabet makes shared prefixes, equal rows and rows that are prefixes common.
ROWS = st.lists(st.lists(st.integers(0, 2), max_size=8), max_size=8)


@given(ROWS)
def test_each_row_reads_back_along_its_path(rows):
    trie = build_trie(rows)
    for row, path in zip(rows, trie.paths, strict=True):
        assert trie.tokens[path].tolist() == row
        assert trie.positions[path].tolist() == list(range(len(row)))


@given(ROWS)
def test_every_prefix_stands_once(rows):
    prefixes = {tuple(row[:n]) for row in rows for n in range(1, len(row) + 1)}
    assert build_trie(rows).size == len(prefixes)


@given(ROWS)
def test_a_slot_sees_exactly_its_own_prefix(rows):
    trie = build_trie(rows)
    prefix_of = {}
    for row, path in zip(rows, trie.paths, strict=True):
        for depth, slot in enumerate(path):
            prefix_of[int(slot)] = tuple(row[: depth + 1])
    for i in range(trie.size):
        for j in range(trie.size):
            sees = j <= i < trie.end[j]
            assert sees == (prefix_of[i][: len(prefix_of[j])] == prefix_of[j])


@given(ROWS, st.integers(1, 12), st.one_of(st.none(), st.integers(0, 3)))
def test_pack_keeps_every_item_and_the_limit(rows, max_tokens, seed):
    items = [[row, [*row, 1]] for row in rows]
    batches = pack(items, max_tokens=max_tokens, max_items=3, seed=seed)
    assert sorted(i for batch in batches for i in batch) == list(range(len(items)))
    for batch in batches:
        assert 1 <= len(batch) <= 3
        computed = build_trie([row for i in batch for row in items[i]]).size
        assert computed <= max_tokens or len(batch) == 1


def test_pack_puts_a_context_together_even_when_shuffled():
    contexts = [list(range(100 * k, 100 * k + 50)) for k in range(4)]
    items = [[[*contexts[i % 4], 1000 + i]] for i in range(40)]
    for batch in pack(items, max_tokens=60, seed=0):
        assert len({i % 4 for i in batch}) == 1
        assert len(batch) == 10


def test_pack_is_a_function_of_the_seed():
    items = [[[i]] for i in range(50)]
    assert pack(items, max_tokens=8, seed=1) == pack(items, max_tokens=8, seed=1)
    assert pack(items, max_tokens=8, seed=1) != pack(items, max_tokens=8, seed=2)


def test_tokens_beyond_16_bits_sort_as_numbers():
    trie = build_trie([[256, 1], [1, 2], [256, 3], [70_000]])
    assert trie.size == 6
    assert np.array_equal(trie.tokens, [1, 2, 256, 1, 3, 70_000])
