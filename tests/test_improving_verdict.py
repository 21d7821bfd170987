"""The verdict on `improve` runs: each rule at work, and at its edge."""

from __future__ import annotations

from typing import Any

import pytest
from finished_run import entry

from mipo_lite.improving_verdict import conclude

STILL = entry(0.5, 0.5, -0.02, 0.02)
UP, DOWN = entry(0.50, 0.60, 0.02, 0.18), entry(0.50, 0.40, -0.18, -0.02)


def metrics(**changed: dict[str, float] | None) -> dict[str, Any]:
    """A run that changed nothing, but for mode__measure=...; None: it was not measured."""
    question: dict[str, Any] = {
        "sampled": {
            "exact_match": STILL,
            "bits": entry(3.0, 3.0, -0.01, 0.01),
            "own_bits": entry(3.0, 3.0, -0.01, 0.01),
            "ended": entry(1.0, 1.0, 0.0, 0.0),
            "length": entry(12.0, 12.0, -0.1, 0.1),
        },
        "greedy": {"exact_match": STILL},
        "majority": {"exact_match": STILL},
    }
    for where, value in changed.items():
        mode, measure = where.split("__")
        question[mode][measure] = value
        if value is None:
            del question[mode][measure]
    return {"question": question}


@pytest.mark.parametrize(
    ("changed", "word", "sentence"),
    [
        ({}, "no change", "No change measurable: neither information nor right answers rose beyond "
         "chance."),
        ({"sampled__bits": UP}, "improved", "Improved: it says more about the question; right "
         "answers did not change."),
        ({"sampled__own_bits": UP}, "improved", "Improved: it says more about the question; right "
         "answers did not change."),
        ({"sampled__exact_match": UP}, "improved", "Improved: it answers rightly more often."),
        ({"sampled__bits": UP, "sampled__exact_match": UP}, "improved",
         "Improved: it says more about the question and answers rightly more often."),
        # without reference answers, nothing is said of them
        ({"sampled__bits": UP, "sampled__exact_match": None, "greedy__exact_match": None},
         "improved", "Improved: it says more about the question."),
        ({"greedy__exact_match": UP}, "improved", "Improved: it answers rightly more often."),
        # the majority is no evidence of its own: it is made of the sampled answers
        ({"majority__exact_match": UP}, "no change",
         "No change measurable: neither information nor right answers rose beyond chance."),
        # harm outweighs
        ({"sampled__exact_match": DOWN}, "harmed", "Harmed: it answers wrongly more often."),
        ({"greedy__exact_match": DOWN}, "harmed", "Harmed: it answers wrongly more often."),
        ({"sampled__bits": UP, "greedy__exact_match": DOWN}, "harmed",
         "Harmed: it says more about the question, but answers wrongly more often."),
        ({"sampled__ended": entry(1.0, 0.7, -0.4, -0.2), "sampled__exact_match": DOWN}, "harmed",
         "Harmed: it answers wrongly more often and often does not come to an end."),
        ({"sampled__length": entry(12.0, 30.0, 15.0, 21.0)}, "harmed",
         "Harmed: it answers more than twice as long."),
        # not beyond chance, or not by enough
        ({"sampled__bits": entry(3.0, 3.2, 0.0, 0.4)}, "no change",
         "No change measurable: neither information nor right answers rose beyond chance."),
        ({"sampled__exact_match": entry(0.5, 0.3, -0.4, 0.0)}, "no change",
         "No change measurable: neither information nor right answers rose beyond chance."),
        ({"sampled__ended": entry(1.0, 0.95, -0.09, -0.01)}, "no change",
         "No change measurable: neither information nor right answers rose beyond chance."),
        ({"sampled__length": entry(12.0, 22.0, 8.0, 12.0)}, "no change",
         "No change measurable: neither information nor right answers rose beyond chance."),
    ],
)  # fmt: skip
def test_verdicts(changed: dict[str, Any], word: str, sentence: str) -> None:
    verdict = conclude(metrics(**changed))
    assert (verdict.word, verdict.sentence) == (word, sentence)
    assert bool(verdict.advice) == (word != "improved")


def test_the_figures_behind_it() -> None:
    reasons = conclude(metrics(sampled__exact_match=UP, sampled__own_bits=None)).reasons
    assert reasons == (
        "right answers, sampled: 0.50 to 0.60, 95 % interval of the change +0.02 to +0.18",
        "right answers, greedy: 0.50 to 0.50, 95 % interval of the change -0.02 to +0.02",
        "right answers by majority: 0.50 to 0.50, 95 % interval of the change -0.02 to +0.02",
        "I(y; x), bits: 3.00 to 3.00, 95 % interval of the change -0.01 to +0.01",
    )


def test_advice_is_given_once() -> None:
    both = metrics(sampled__exact_match=DOWN, greedy__exact_match=DOWN)
    assert len(conclude(both).advice) == 1
