"""The verdict on an `improve` run: from measured figures to words, by rules that stand here.

- "harmed": right answers fell, sampled or greedy; or answers no longer end; or they are more than
  twice as long.
- "improved": nothing is harmed, and the information bound rose, or right answers did, sampled or
  greedy.
- "no change": anything else.

"Rose" and "fell" mean that the 95 % interval of the paired difference, over questions, lies above
or below zero.
"""

from __future__ import annotations

from typing import Any

from .verdict import GENTLER, Rule, Verdict, figure

SAMPLED = ("question", "sampled")
ANSWERS = "try negatives=answers, which contrasts answers instead of words"
HARMS = (
    Rule((*SAMPLED, "exact_match"), -1e-9, "answers wrongly more often", ANSWERS),
    Rule(("question", "greedy", "exact_match"), -1e-9, "answers wrongly more often", ANSWERS),
    Rule((*SAMPLED, "ended"), -0.10, "often does not come to an end", GENTLER),
    Rule((*SAMPLED, "length"), 1.00, "answers more than twice as long", GENTLER, relative=True),
)


def conclude(metrics: dict[str, Any]) -> Verdict:
    """The verdict on the content of metrics.json of an `improve` run."""
    harms = [rule for rule in HARMS if rule.holds(metrics)]
    right = any(_rose(metrics, mode, "exact_match") for mode in ("sampled", "greedy"))
    informative = any(_rose(metrics, "sampled", name) for name in ("bits", "own_bits"))
    gains = [
        *(["says more about the question"] if informative else []),
        *(["answers rightly more often"] if right else []),
    ]
    reasons = tuple(_reasons(metrics))
    if harms:
        clauses = dict.fromkeys(rule.clause for rule in harms)
        advice = dict.fromkeys(rule.advice[0].upper() + rule.advice[1:] + "." for rule in harms)
        sentence = "Harmed: it " + ", but ".join([*gains[:1], " and ".join(clauses)]) + "."
        return Verdict("harmed", sentence, reasons, tuple(advice))
    if gains:
        unclear = "" if right or not _measured(metrics) else "; right answers did not change"
        sentence = f"Improved: it {' and '.join(gains)}{unclear}."
        return Verdict("improved", sentence, reasons, ())
    return Verdict(
        "no change",
        "No change measurable: neither information nor right answers rose beyond chance.",
        reasons,
        ("Set more pairs, or a higher learning_rate or more epochs.",),
    )


def _rose(metrics: dict[str, Any], mode: str, name: str) -> bool:
    entry = figure(metrics, "question", mode, name)
    return entry is not None and entry["low"] > 0


def _measured(metrics: dict[str, Any]) -> bool:
    return figure(metrics, *SAMPLED, "exact_match") is not None


def _reasons(metrics: dict[str, Any]) -> list[str]:
    found = []
    for mode, name, words in (
        ("sampled", "exact_match", "right answers, sampled"),
        ("greedy", "exact_match", "right answers, greedy"),
        ("majority", "exact_match", "right answers by majority"),
        ("sampled", "bits", "I(y; x), bits"),
        ("sampled", "own_bits", "I(y; x) as scored by the writer, bits"),
    ):
        entry = figure(metrics, "question", mode, name)
        if entry:
            found.append(
                f"{words}: {entry['before']:.2f} to {entry['after']:.2f}, "
                f"95 % interval of the change {entry['low']:+.2f} to {entry['high']:+.2f}"
            )
    return found
