from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import flex_attention

from mipo_lite.prefix_sharing import visible
from mipo_lite.trie import build_trie
from mipo_lite.trie_attention import FLEX_BLOCK, attend, flex_block_mask, plan_blocks, runs

ROWS = st.lists(st.lists(st.integers(0, 2), max_size=12), min_size=1, max_size=6).filter(
    lambda rows: any(rows)
)
WINDOW = st.one_of(st.none(), st.integers(1, 6))


def random_heads(size, heads=2, dim=16):
    torch.manual_seed(0)
    return [torch.randn(1, heads, size, dim, requires_grad=True) for _ in range(3)]


@settings(deadline=None)
@given(ROWS, WINDOW, st.integers(1, 20))
def test_blocks_give_what_the_dense_mask_gives(rows, window, size):
    trie = build_trie(rows)
    heads = random_heads(trie.size)
    dense = F.scaled_dot_product_attention(*heads, attn_mask=visible(trie, window))
    blocks = attend(*heads, plan_blocks(trie, window, size=size))
    torch.testing.assert_close(blocks, dense, atol=1e-6, rtol=1e-5)
    weights = torch.randn_like(dense)
    expected = torch.autograd.grad((dense * weights).sum(), heads)
    for got, want in zip(
        torch.autograd.grad((blocks * weights).sum(), heads), expected, strict=True
    ):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


def test_blocks_leave_out_what_no_query_sees():
    context, branches = list(range(1000)), [[2000 + i, *range(50)] for i in range(8)]
    trie = build_trie([context + branch for branch in branches])
    scores = sum(
        (block.stop - block.start) * sum(part.stop - part.start for part in block.keys)
        for block in plan_blocks(trie, None, size=64)
    )
    assert scores < 0.8 * trie.size**2
    assert plan_blocks(trie, None, size=500)[0].mask is None  # the context itself is causal


def test_runs():
    assert runs(np.array([0, 1, 2, 5, 8, 9])) == [slice(0, 3), slice(5, 6), slice(8, 10)]
    assert runs(np.array([4])) == [slice(4, 5)]


LONG = build_trie(
    [[*range(300), 1000 + i, *range(2000, 2000 + 40 * i)] for i in range(6)] + [[7, 8, 9] * 50]
)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("window", [None, 200])
def test_flex_block_mask(window):
    """On a GPU FlexAttention skips by block; here its reference checks the mask itself."""
    mask = flex_block_mask(LONG, window, "cpu")
    heads = [x.detach() for x in random_heads(LONG.size, heads=1)]
    expected = F.scaled_dot_product_attention(*heads, attn_mask=visible(LONG, window))
    got = flex_attention(*heads, block_mask=mask)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("window", [None, 200])
def test_flex_blocks_cover_what_is_seen_and_full_ones_hold_nothing_hidden(window):
    mask = flex_block_mask(LONG, window, "cpu")
    seen = visible(LONG, window)
    count = -(-LONG.size // FLEX_BLOCK)

    def chosen(counts, order, q):
        return set(order[0, 0, q, : counts[0, 0, q]].tolist())

    for q in range(count):
        partial = chosen(mask.kv_num_blocks, mask.kv_indices, q)
        full = chosen(mask.full_kv_num_blocks, mask.full_kv_indices, q)
        assert not partial & full
        for k in range(count):
            block = seen[
                q * FLEX_BLOCK : (q + 1) * FLEX_BLOCK, k * FLEX_BLOCK : (k + 1) * FLEX_BLOCK
            ]
            if block.any():
                assert k in partial | full
            if k in full:
                assert block.all()
    if window is None:
        dense = count * (count + 1) // 2
        assert mask.kv_num_blocks.sum() + mask.full_kv_num_blocks.sum() < dense
        assert mask.full_kv_num_blocks.sum() > 0
