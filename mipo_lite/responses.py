"""Responses of the base: what every stage that samples asks for in the same way."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

from .base import Base
from .recipe import Recipe
from .sampling import Sample, SampleRequest, sample


def respond(
    base: Base,
    requests: Sequence[SampleRequest],
    recipe: Recipe,
    *,
    temperature: float = 1.0,
    top_p: float = 1.0,
) -> Iterator[Sample]:
    """Yield the answer to each request, in their order, as `base.model` acts now.

    Length and batch are the recipe's; `temperature=0` is greedy. Raises as `sampling.sample` does.
    """
    return sample(
        base.model,
        requests,
        max_new_tokens=recipe.max_new_tokens,
        eos_ids=base.eos_ids,
        pad_id=base.pad_id,
        temperature=temperature,
        top_p=top_p,
        batch_size=recipe.sampling_batch,
    )


def seed_of(*parts: object) -> int:
    """A sampling seed of a response's own, whatever else is in its batch: below 2**56."""
    digest = hashlib.sha256(" ".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:7], "big")
