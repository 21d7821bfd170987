"""What was learned must carry over to pairs held out, or the adapter is left as it began."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from handmade_pairs import RECIPE, Rows, make_pairs, train_on
from peft import PeftModel
from safetensors.torch import load_file

from mipo_lite.base import Base
from mipo_lite.carry_over import MIN_WATCHED, carry_over_of, margins
from mipo_lite.training import split_pairs

# 11 of 18 pairs are held out.
WATCHED = RECIPE.model_copy(update={"held_out": 0.6})


@pytest.fixture(scope="module")
def pairs(builtin_base: Base) -> tuple[Rows, Rows]:
    return make_pairs(builtin_base)


@pytest.fixture(scope="module")
def learned(builtin_base: Base, pairs, tmp_path_factory: pytest.TempPathFactory):
    """What a training did whose pairs all say the same, its weights, and where they lie."""
    where = tmp_path_factory.mktemp("learned")
    return *train_on(builtin_base, pairs, where, recipe=WATCHED), where / "adapter"


def noise(pairs: tuple[Rows, Rows]) -> tuple[Rows, Rows]:
    """The same pairs, every other one turned round: nothing to learn in them."""
    turned = [dict(row) for row in pairs[0]], [dict(row) for row in pairs[1]]
    for number, (pair, score) in enumerate(zip(*turned, strict=True)):
        if number // 4 % 2:
            pair |= {"chosen_ids": pair["rejected_ids"], "rejected_ids": pair["chosen_ids"]}
            score |= {"ref_chosen": score["ref_rejected"], "ref_rejected": score["ref_chosen"]}
    return turned


def test_what_carries_over_is_kept(learned) -> None:
    result, weights, _ = learned
    assert result.kept
    assert result.carry_over.pairs >= MIN_WATCHED
    assert result.carry_over.gain > 0
    assert result.carry_over.beyond_chance
    assert all(tensor.any() for name, tensor in weights.items() if "lora_B" in name)


@pytest.mark.parametrize(
    ("gains", "beyond"),
    [
        ([0.4] * 22 + [-7.0] + [-0.2] * 8, True),  # one bad pair does not outweigh the others
        ([9.0] * 3 + [0.1] * 8 + [-0.1] * 9, False),  # nor do a few good ones
        ([0.0] * 20, False),
    ],
)
def test_pairs_are_counted_and_not_averaged(gains: list[float], beyond: bool) -> None:
    assert carry_over_of(np.array(gains)).beyond_chance is beyond


def test_what_does_not_is_not_kept(builtin_base: Base, pairs, tmp_path: Path) -> None:
    result, weights = train_on(builtin_base, noise(pairs), tmp_path, recipe=WATCHED)
    assert not result.kept
    assert result.carry_over is not None
    assert not result.carry_over.beyond_chance
    assert all(not tensor.any() for name, tensor in weights.items() if "lora_B" in name)


def test_too_few_held_out_pairs_say_nothing(builtin_base: Base, pairs, tmp_path: Path) -> None:
    result, weights = train_on(builtin_base, noise(pairs), tmp_path)
    assert result.kept
    assert result.carry_over is None
    assert any(tensor.any() for name, tensor in weights.items() if "lora_B" in name)


def test_any_is_kept_on_request(builtin_base: Base, pairs, tmp_path: Path) -> None:
    result, weights = train_on(builtin_base, noise(pairs), tmp_path, recipe=WATCHED, keep_any=True)
    assert result.kept
    assert any(tensor.any() for name, tensor in weights.items() if "lora_B" in name)


def test_a_later_round_must_gain_on_the_round_before(
    builtin_base: Base, pairs, learned, tmp_path: Path
) -> None:
    start = learned[2]
    recipe = WATCHED.model_copy(update={"learning_rate": 1e-9})
    result, weights = train_on(builtin_base, noise(pairs), tmp_path, recipe=recipe, start=start)
    assert not result.kept
    for name, tensor in load_file(start / "adapter_model.safetensors").items():
        assert torch.equal(tensor, weights[name]), name


def test_margins_are_those_the_trainer_reports(builtin_base: Base, pairs, learned) -> None:
    result, _, adapter = learned
    _, held_out = split_pairs(*pairs, WATCHED)
    model = PeftModel.from_pretrained(builtin_base.model, adapter)
    try:
        found = margins(model, held_out, WATCHED.beta).mean()
    finally:
        model.unload()
    best = next(row for row in result.history if row["step"] == result.best_step)
    assert found == pytest.approx(best["held_out_margin"], abs=1e-3)
    assert found == pytest.approx(result.carry_over.gain, abs=1e-3)
