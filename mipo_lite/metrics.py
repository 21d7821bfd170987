"""Measures of sets of responses, and intervals for them: pure functions of numbers and tokens.

Responses to the same prompt are not independent, so every interval resamples prompts, with all
their responses, not single responses.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

RESAMPLES = 2000


@dataclass(frozen=True)
class Comparison:
    """A mean before and after, and the paired difference with its 95 % bootstrap interval."""

    before: float
    after: float
    difference: float
    low: float
    high: float
    n: int

    def as_dict(self) -> dict[str, float]:
        return {key: round(value, 4) for key, value in asdict(self).items()}


def compare(
    before: Sequence[float | None], after: Sequence[float | None], groups: Sequence[int]
) -> Comparison | None:
    """Compare two paired series of measurements.

    Args:
        before, after: [n] one value per response; None where the measure does not apply.
        groups: [n] the prompt that each response answers.

    Returns None when no value applies on both sides.
    """
    rows = [(b, a, g) for b, a, g in zip(before, after, groups, strict=True) if None not in (b, a)]
    if not rows:
        return None
    b, a, g = (np.array(column, dtype=float) for column in zip(*rows, strict=True))
    low, high = bootstrap_mean(a - b, g)
    return Comparison(b.mean(), a.mean(), (a - b).mean(), low, high, len(rows))


def bootstrap_mean(
    values: np.ndarray, groups: np.ndarray, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of the mean when whole groups are drawn again (cluster bootstrap).

    Args:
        values: [n]; groups: [n] the group of each value.
    """
    _, index = np.unique(groups, return_inverse=True)
    sums = np.bincount(index, weights=values)
    counts = np.bincount(index)
    rng = np.random.default_rng(seed)
    draws = rng.integers(len(sums), size=(RESAMPLES, len(sums)))
    means = sums[draws].sum(axis=1) / counts[draws].sum(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def distinct_n(responses: Sequence[Sequence[int]], n: int = 2) -> float:
    """Different n-grams as a share of all n-grams (Li et al. 2016, arXiv 1510.03055)."""
    grams = [tuple(r[i : i + n]) for r in responses for i in range(len(r) - n + 1)]
    return len(set(grams)) / max(len(grams), 1)


def words(text: str) -> list[str]:
    """Words in lower case; digits count, punctuation does not."""
    return re.findall(r"[^\W_]+(?:['’-][^\W_]+)*", text.lower())


def own_words(context: str, others: Sequence[str]) -> frozenset[str]:
    """Words that stand in `context` and in none of `others`: what only this user would say."""
    known = {word for text in others for word in words(text)}
    return frozenset(word for word in words(context) if word not in known and len(word) > 2)
