"""The rule behind each word, one figure at a time."""

from __future__ import annotations

import pytest
from finished_run import entry, metrics

from mipo_lite.verdict import HARMS, conclude


def test_a_training_that_went_well() -> None:
    verdict = conclude(metrics())
    assert verdict.word == "improved"
    assert verdict.sentence == "Improved: clearer about you, no leak found."
    assert verdict.advice == ()
    assert "answers that use a fact that fits: 50 % → 75 %" in verdict.reasons


def test_nothing_changed() -> None:
    same = metrics()
    for block in (same["with_context"]["sampled"], same["other_context"]["sampled"]):
        for name, found in block.items():
            block[name] = entry(found["before"], found["before"], 0.0, 0.0)
    verdict = conclude(same)
    assert verdict.word == "no change"
    assert "neither rose nor fell" in verdict.sentence
    assert verdict.advice


def test_information_alone_convinces_nobody() -> None:
    """PMI is scored by the base that was optimized against: it needs a witness."""
    flat = entry(0.5, 0.5, -0.1, 0.1)
    names = ("fact_use", "own_words", "which_context")
    verdict = conclude(metrics(**{f"with_context__sampled__{name}": flat for name in names}))
    assert verdict.word == "no change"
    assert "no other measure confirms it" in verdict.sentence


def test_a_rise_below_a_tenth_is_no_change() -> None:
    verdict = conclude(metrics(with_context__sampled__pmi=entry(7.0, 7.5, 0.2, 0.8)))
    assert verdict.word == "no change"
    assert "less than 10%" in verdict.sentence


def test_facts_that_fall_are_no_improvement() -> None:
    verdict = conclude(metrics(with_context__sampled__fact_use=entry(0.5, 0.47, -0.05, -0.01)))
    assert verdict.word == "no change"


def test_side_effects_are_said() -> None:
    verdict = conclude(
        metrics(
            with_context__sampled__length=entry(16, 19, 2, 4),
            with_context__sampled__distinct_2=entry(0.46, 0.35, -0.14, -0.08),
            without_context__sampled__user_facts=entry(0.0, 0.1, 0.05, 0.15),
        )
    )
    assert verdict.word == "improved"
    assert (
        verdict.sentence
        == "Improved: clearer about you, a little longer, less varied, a small leak of your facts."
    )
    assert "pool_positives" in verdict.advice[0]


@pytest.mark.parametrize("rule", HARMS, ids=lambda rule: f"{rule.where}{rule.limit:+.2f}")
def test_every_harm_is_called_harm_beyond_its_limit_only(rule) -> None:
    before = 10.0 if rule.relative else 0.5
    limit = rule.limit * before if rule.relative else rule.limit
    key = "__".join(rule.where)

    def changed(share: float, sure: bool = True):
        change = share * limit
        spread = 0.1 * abs(change) if sure else 2 * abs(change)
        return conclude(
            metrics(**{key: entry(before, before + change, change - spread, change + spread)})
        )

    beyond = changed(1.1)
    assert beyond.word == "harmed"
    assert rule.clause in beyond.sentence
    assert beyond.advice
    assert changed(0.9).word != "harmed"
    assert changed(1.1, sure=False).word != "harmed", "within chance"


def test_a_user_without_facts_is_judged_by_words() -> None:
    found = metrics()
    for condition in ("with_context", "without_context", "other_context"):
        for block in found[condition].values():
            block.pop("fact_use", None)
            block.pop("user_facts", None)
    assert conclude(found).word == "improved"
