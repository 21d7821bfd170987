"""Pair quality: whether the pairs hold anything to learn, said before time is spent on training.

Works on the lines of pairs.jsonl and scores.jsonl; needs no model.
"""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .console import console

# Below these, training was seen to change little (60 pairs of the built-in base taught nothing).
FEW_PAIRS = 64
LOW_CONTRAST = 1.0
MANY_ALIKE = 0.5
LISTED = 5
BARS = " ▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class PairQuality:
    """What the scores say about the pairs.

    Attributes:
        sampled, kept: pairs.
        reasons: why pairs were dropped, with counts.
        pmi_chosen, pmi_rejected: [sampled] nats, in the order of the file.
        contrast: median of PMI(chosen) - PMI(rejected) over the kept pairs, nats.
        aligned: share of the kept pairs whose chosen response says more about its context.
        most, least: (mean PMI of chosen, prompt), the prompts that depend most and least on the
            context.
        warnings: why training may teach nothing; () when nothing speaks against it.
        context: what PMI is about: "your page", or for improve "the question".
    """

    sampled: int
    kept: int
    reasons: dict[str, int]
    pmi_chosen: tuple[float, ...]
    pmi_rejected: tuple[float, ...]
    contrast: float
    aligned: float
    most: tuple[tuple[float, str], ...]
    least: tuple[tuple[float, str], ...]
    warnings: tuple[str, ...]
    context: str = "your page"

    @property
    def dropped_share(self) -> float:
        return 1 - self.kept / max(self.sampled, 1)


def pair_quality(pairs: Sequence[dict[str, Any]], scores: Sequence[dict[str, Any]]) -> PairQuality:
    """Summarize pairs and their scores (same order; scores may lag behind)."""
    rows = list(zip(pairs, scores, strict=False))
    contrasts = [s["pmi_chosen"] - s["pmi_rejected"] for _, s in rows if s["kept"]]
    by_prompt: dict[str, list[float]] = defaultdict(list)
    for pair, score in rows:
        by_prompt[pair["prompt"][-1]["content"]].append(score["pmi_chosen"])
    ranked = sorted(((statistics.fmean(v), text) for text, v in by_prompt.items()), reverse=True)
    contrast = statistics.median(contrasts) if contrasts else 0.0
    aligned = sum(c > 0 for c in contrasts) / max(len(contrasts), 1)
    personal = not pairs or any(pair.get("persona") is not None for pair in pairs)
    context = "your page" if personal else "the question"
    warnings = []
    if len(contrasts) < FEW_PAIRS:
        warnings.append(
            f"Only {len(contrasts)} pairs to learn from; below {FEW_PAIRS} little was ever learned."
            " Set more pairs."
        )
    if rows and sum(_alike(*row) for row in rows) / len(rows) > MANY_ALIKE:
        warnings.append(
            f"Most pairs show no contrast: the base answers alike whatever {context} says."
            f" {'Write more about yourself, or ask' if personal else 'Ask'} other things."
        )
    # Answers of one question are contrasted by another measure, which the pairs carry.
    by_pmi = not any("contrast" in pair for pair in pairs)
    if contrasts and by_pmi and contrast < LOW_CONTRAST:
        warnings.append(
            f"The median contrast is {contrast:.1f} nats: the base hardly uses {context},"
            " so there is little to amplify. A larger base may."
        )
    return PairQuality(
        sampled=len(rows),
        kept=len(contrasts),
        reasons=dict(Counter(s["why"] for _, s in rows if not s["kept"])),
        pmi_chosen=tuple(s["pmi_chosen"] for _, s in rows),
        pmi_rejected=tuple(s["pmi_rejected"] for _, s in rows),
        contrast=contrast,
        aligned=aligned,
        most=tuple(ranked[:LISTED]),
        least=tuple(reversed(ranked[-LISTED:])),
        warnings=tuple(warnings),
        context=context,
    )


def _alike(pair: dict[str, Any], score: dict[str, Any]) -> bool:
    """Whether a pair has no contrast to speak of, however much the recipe asks for."""
    contrast = pair.get("contrast", score["pmi_chosen"] - score["pmi_rejected"])
    return not score["kept"] and (score["why"] == "identical" or abs(contrast) < LOW_CONTRAST)


def print_quality(quality: PairQuality) -> None:
    """A few lines for the terminal; warnings last, where they are seen."""
    why = ", ".join(f"{count} {reason}" for reason, count in quality.reasons.items())
    console.print(
        f"  {quality.kept} of {quality.sampled} pairs kept"
        + (f" ({quality.dropped_share:.0%} dropped: {why})" if why else "")
    )
    values = [*quality.pmi_chosen, *quality.pmi_rejected]
    if values:
        low, high = min(values), max(values)
        for name, side in (("chosen", quality.pmi_chosen), ("rejected", quality.pmi_rejected)):
            console.print(
                f"  PMI of {name:<8} {low:6.1f} ▕{_histogram(side, low, high)}▏ {high:.1f} nats,"
                f" mean {statistics.fmean(side):.1f}"
            )
    for title, prompts in (("most", quality.most[:2]), ("least", quality.least[:2])):
        for pmi, prompt in prompts:
            line = " ".join(prompt.split())[:60]
            console.print(
                f"  depends {title} on {quality.context}: {line} ({pmi:.1f})", markup=False
            )
    for warning in quality.warnings:
        console.print(f"  [yellow]Warning:[/] {warning}")


def _histogram(values: Sequence[float], low: float, high: float, bins: int = 32) -> str:
    counts = [0] * bins
    for value in values:
        counts[min(bins - 1, int((value - low) / ((high - low) or 1) * bins))] += 1
    most = max(counts)
    return "".join(BARS[-(-count * (len(BARS) - 1) // most)] for count in counts)
