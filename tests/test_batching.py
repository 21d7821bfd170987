from __future__ import annotations

from mipo_lite.batching import SharedContextSampler


def pairs(contexts=3, each=10):
    return [
        {
            "prompt_ids": [*range(100 * k, 100 * k + 40), 7, i],
            "chosen_ids": [1, 2],
            "rejected_ids": [3],
        }
        for i in range(each)
        for k in range(contexts)
    ]


def batches(sampler):
    order = list(sampler)
    return [order[at : at + sampler.batch_size] for at in range(0, len(order), sampler.batch_size)]


def test_every_pair_once_and_contexts_together():
    sampler = SharedContextSampler(pairs(), batch_size=5, seed=0)
    assert sorted(sampler) == list(range(30))
    assert len(sampler) == 30
    for batch in batches(sampler):
        assert len({i % 3 for i in batch}) == 1


def test_the_batch_that_is_not_full_comes_last():
    sampler = SharedContextSampler(pairs(contexts=2, each=6), batch_size=5, seed=4)
    mixed = [batch for batch in batches(sampler) if len({i % 2 for i in batch}) > 1]
    assert len(mixed) <= 2  # where one context ends and the other begins


def test_order_is_a_function_of_seed_and_epoch():
    sampler = SharedContextSampler(pairs(), batch_size=5, seed=0)
    first = list(sampler)
    assert list(sampler) == first
    sampler.set_epoch(1)
    assert list(sampler) != first
    sampler.set_epoch(0)
    assert list(sampler) == first
    assert list(SharedContextSampler(pairs(), batch_size=5, seed=1)) != first
