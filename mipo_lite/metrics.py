"""Measures of responses, and intervals for them: pure functions of numbers, tokens and words.

Responses to the same prompt are not independent, so every interval resamples prompts, with all
their responses, not single responses. Nothing here knows a model: log-probs come in as numbers.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from difflib import SequenceMatcher

import numpy as np

RESAMPLES = 2000
LN2 = math.log(2)


@dataclass(frozen=True)
class Comparison:
    """A mean before and after, and the paired difference with its 95 % interval.

    Attributes:
        n: measurements on each side; groups: the prompts they belong to.
    """

    before: float
    after: float
    difference: float
    low: float
    high: float
    n: int
    groups: int

    def as_dict(self) -> dict[str, float]:
        return {key: round(value, 4) for key, value in asdict(self).items()}


def compare(
    before: Sequence[float | None], after: Sequence[float | None], groups: Sequence[int | str]
) -> Comparison | None:
    """Compare two paired series of measurements.

    Args:
        before, after: [n] one value per response; None where the measure does not apply.
        groups: [n] the prompt that each response answers.

    Returns None when no value applies on both sides.
    """
    rows = [
        (b, a, group)
        for b, a, group in zip(before, after, groups, strict=True)
        if b is not None and a is not None
    ]
    if not rows:
        return None
    b = np.array([row[0] for row in rows], dtype=float)
    a = np.array([row[1] for row in rows], dtype=float)
    g = np.array([row[2] for row in rows])
    low, high = bootstrap_mean(a - b, g)
    return Comparison(b.mean(), a.mean(), (a - b).mean(), low, high, len(rows), len(np.unique(g)))


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


def information(scores: np.ndarray) -> dict[str, np.ndarray]:
    """What responses tell about their context, from log-probs under one model.

    Args:
        scores: [n, 1 + K] nats: log p(y | x) without a context, log p(y | x, c) with the
            response's own context, then with K - 1 others.

    Returns [n] each:
        pmi: log p(y|x,c) - log p(y|x), pointwise mutual information, nats.
        bits: log2 of p(y|x,c) over its mean under the K contexts. Its mean is InfoNCE's lower
            bound on I(y; c | x), log2 K at most (van den Oord et al. 2018, arXiv 1807.03748,
            eq. 4; Poole et al. 2019, arXiv 1905.06922, section 2.3).
        which_context: 1 where the own context explains the response best, ties shared.
    """
    own, all_contexts = scores[:, 1], scores[:, 1:]
    best = all_contexts.max(axis=1)
    log_sum = best + np.log(np.exp(all_contexts - best[:, None]).sum(axis=1))
    at_best = all_contexts == best[:, None]
    return {
        "pmi": own - scores[:, 0],
        "bits": (own - log_sum) / LN2 + math.log2(all_contexts.shape[1]),
        "which_context": np.where(at_best[:, 0], 1.0 / at_best.sum(axis=1), 0.0),
    }


def distinct_n(responses: Sequence[Sequence[Hashable]], n: int = 2) -> float:
    """Different n-grams as a share of all n-grams (Li et al. 2016, arXiv 1510.03055).

    Of words or of token ids. A name of six tokens counts six times among the latter, so answers
    that name it twice look more alike.
    """
    grams = [gram for response in responses for gram in _ngrams(response, n)]
    return len(set(grams)) / max(len(grams), 1)


def compare_distinct_n(
    before: Sequence[Sequence[Hashable]],
    after: Sequence[Sequence[Hashable]],
    groups: Sequence[int | str],
    n: int = 2,
) -> Comparison | None:
    """`distinct_n` of all responses on either side, and the difference.

    It is no mean: drawing a prompt twice would itself make text less distinct. The interval
    therefore leaves out one prompt at a time (jackknife, normal approximation).
    """
    names = sorted(set(groups), key=str)
    if not names:
        return None
    sides = [_leave_one_out_distinct(side, groups, names, n) for side in (before, after)]
    (b, b_without), (a, a_without) = sides
    without = a_without - b_without
    m = len(names)
    error = math.sqrt((m - 1) / m * float(((without - without.mean()) ** 2).sum()))
    return Comparison(b, a, a - b, a - b - 1.96 * error, a - b + 1.96 * error, len(before), m)


def _leave_one_out_distinct(
    responses: Sequence[Sequence[Hashable]],
    groups: Sequence[int | str],
    names: Sequence[int | str],
    n: int,
) -> tuple[float, np.ndarray]:
    """`distinct_n` of all responses, and [len(names)] of all but those of one group."""
    grams: dict[int | str, list[tuple[Hashable, ...]]] = {name: [] for name in names}
    for response, group in zip(responses, groups, strict=True):
        grams[group] += _ngrams(response, n)
    holders = Counter(gram for found in grams.values() for gram in set(found))
    total = sum(map(len, grams.values()))
    without = [
        (len(holders) - sum(holders[gram] == 1 for gram in set(found))) / max(total - len(found), 1)
        for found in grams.values()
    ]
    return len(holders) / max(total, 1), np.array(without)


def repetition(response: Sequence[int], n: int = 4) -> float:
    """Share of n-grams that stood in the response before; 0 when it has none.

    seq-rep-n of Welleck et al. 2019, arXiv 1908.04319, eq. 10.
    """
    grams = _ngrams(response, n)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _ngrams(tokens: Sequence[Hashable], n: int) -> list[tuple[Hashable, ...]]:
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]


def words(text: str) -> list[str]:
    """Words in lower case; digits count, punctuation does not."""
    return re.findall(r"[^\W_]+(?:['’-][^\W_]+)*", text.lower())


def own_words(context: str, others: Sequence[str]) -> frozenset[str]:
    """Words that stand in `context` and in none of `others`: what only this user would say."""
    known = {word for text in others for word in words(text)}
    return frozenset(word for word in words(context) if word not in known and len(word) > 2)


class SharedRun:
    """Finds the longest run of consecutive words that a response shares with one page."""

    def __init__(self, page: str) -> None:
        self._matcher = SequenceMatcher(autojunk=False)
        self._matcher.set_seq2(words(page))  # indexed once, for all responses

    def __call__(self, response: str) -> int:
        """Length of the run in words, 0 if no word is shared."""
        self._matcher.set_seq1(words(response))
        return self._matcher.find_longest_match().size


def wilson_interval(wins: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """95 % interval of a win rate (Wilson 1927, J. Am. Stat. Assoc. 22, 209).

    Args:
        wins: of n comparisons; a tie counts one half.
    """
    if n == 0:
        return 0.0, 1.0
    rate = wins / n
    centre = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)
