"""What conditions the two responses of a pair, decided before anything is sampled."""

from __future__ import annotations

from collections import Counter

import pytest

from mipo_lite.contexts import Persona
from mipo_lite.errors import UserError
from mipo_lite.pairs import PairPlan, plan_improve, plan_personalize
from mipo_lite.prompts import Prompt
from mipo_lite.recipe import Recipe

PROMPTS = [Prompt(f"p{i}", f"Request {i}") for i in range(7)]
USER = Persona("user", "I am the user.")
POOL = [Persona(f"persona-{i}", f"I am persona {i}.") for i in range(10)]


def plan(**settings: object) -> list[PairPlan]:
    return plan_personalize(Recipe(pairs=400, **settings), PROMPTS, USER, POOL)


def test_same_seed_same_plan_and_another_seed_another() -> None:
    assert plan(seed=1) == plan(seed=1)
    assert plan(seed=1) != plan(seed=2)


def test_missing_negatives_saw_the_prompt_alone() -> None:
    for pair in plan(negatives="missing"):
        assert pair.negative.context is None
        assert pair.negative.prompt is pair.positive.prompt


def test_random_negatives_saw_another_persona_and_never_their_own() -> None:
    for pair in plan(negatives="random"):
        assert pair.negative.context is not None
        assert pair.negative.context != pair.positive.context
        assert pair.negative.prompt is pair.positive.prompt


def test_mixed_negatives_are_about_half_missing() -> None:
    missing = sum(pair.negative.context is None for pair in plan(negatives="mixed"))
    assert 160 < missing < 240


def test_pool_positives_have_their_share_and_their_leak_negatives() -> None:
    pairs = plan(pool_positives=0.25, negatives="random")
    about_pool = [pair for pair in pairs if pair.positive.context is not USER]
    assert len(about_pool) == 100
    # Half of their negatives saw the user's page: that is the leak to unlearn.
    assert 30 < sum(pair.negative.context is USER for pair in about_pool) < 70
    assert all(pair.negative.context is not USER for pair in pairs if pair not in about_pool)


def test_all_prompts_are_used_evenly() -> None:
    counts = Counter(pair.positive.prompt.id for pair in plan())
    assert set(counts.values()) <= {400 // 7, 400 // 7 + 1}


def test_pmi_of_personalize_compares_with_the_prompt_alone() -> None:
    for pair in plan():
        assert pair.without.context is None
        assert pair.without.prompt is pair.positive.prompt


def test_improve_contrasts_a_prompt_with_another_one() -> None:
    for pair in plan_improve(Recipe(pairs=50), PROMPTS):
        assert pair.negative.prompt.text != pair.positive.prompt.text
        assert pair.without == pair.negative
        assert pair.positive.context is pair.negative.context is None


def test_improve_needs_two_prompts() -> None:
    with pytest.raises(UserError, match="no other one to contrast it with"):
        plan_improve(Recipe(), [PROMPTS[0], PROMPTS[0]])
