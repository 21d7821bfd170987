"""The order in which pairs are trained, so that batches have prefixes to share.

Prefix sharing works within a batch. This sampler keeps pairs of one context (one user, one persona
of the pool) together, batch by batch, and is random in every other way.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch.utils.data import Sampler

from .trie import pack


class SharedContextSampler(Sampler[int]):
    """Indices of pairs in an order whose consecutive runs of `batch_size` share contexts.

    pairs: rows with prompt_ids, chosen_ids and rejected_ids. The order depends on `seed` and the
    epoch alone, so that a resumed run skips exactly what was trained.
    """

    def __init__(self, pairs: Sequence[Mapping[str, Any]], batch_size: int, seed: int) -> None:
        self.items = [
            [[*pair["prompt_ids"], *pair[key]] for key in ("chosen_ids", "rejected_ids")]
            for pair in pairs
        ]
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate at the start of each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[int]:
        everything = sum(len(row) for item in self.items for row in item)
        batches = pack(
            self.items,
            max_tokens=everything,
            max_items=self.batch_size,
            seed=self.seed * 10_007 + self.epoch,
        )
        # The one batch that is not full goes last, or the others would be cut across.
        batches.sort(key=len, reverse=True)
        return (i for batch in batches for i in batch)
