"""Pairs with scores that nothing had to be sampled for: to train on in a second or two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from mipo_lite.base import Base
from mipo_lite.recipe import Recipe
from mipo_lite.scoring import response_logprobs
from mipo_lite.training import TrainingResult, train

PAGE = "My name is Anouk. I live in Gent. I have a dog called Biscuit."
ASKED = ("What is my dog called?", "Where do I live?", "Hello!", "Any tip for the weekend?")
# 18 pairs, 16 of them to train on: two steps an epoch, and as many evaluations as steps.
RECIPE = Recipe(
    learning_rate=1e-3,
    batch_size=8,
    micro_batch=8,
    epochs=2.0,
    evaluations=4,
    patience=9,
    held_out=0.1,
    gradient_checkpointing=False,
)

Rows = list[dict[str, Any]]


def make_pairs(base: Base) -> tuple[Rows, Rows]:
    """Lines as of pairs.jsonl and scores.jsonl."""
    pairs = []
    for n in range(18):
        chosen, rejected = (
            [*base.tokenizer(text, add_special_tokens=False)["input_ids"], base.eos_ids[0]]
            for text in (f"Your dog Biscuit would like {n} walks.", f"I do not know, {n} perhaps.")
        )
        prompt = base.encode(ASKED[n % 4], PAGE)
        pairs.append({"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected})
    rows = [(p["prompt_ids"], p[key]) for p in pairs for key in ("chosen_ids", "rejected_ids")]
    sums = [float(tokens.sum()) for tokens in response_logprobs(base.model, rows)]
    scores = [
        {"ref_chosen": chosen, "ref_rejected": rejected, "kept": True}
        for chosen, rejected in zip(sums[::2], sums[1::2], strict=True)
    ]
    return pairs, scores


def train_on(
    base: Base, pairs_and_scores: tuple[Rows, Rows], where: Path, **options: Any
) -> tuple[TrainingResult, dict[str, Any]]:
    """What training did, and the adapter's weights."""
    recipe = options.pop("recipe", RECIPE)
    arguments = (recipe, where / "adapter", where / "checkpoints")
    result = train(base, *pairs_and_scores, *arguments, **options)
    return result, load_file(where / "adapter" / "adapter_model.safetensors")


def assert_same(found: tuple[TrainingResult, dict], whole: tuple[TrainingResult, dict]) -> None:
    """The same losses and margins, to 1e-5 (of the value where that is above 1), and adapter.

    A margin of 3 is the difference of float32 sums of tens of nats: its last digits are rounding.
    """
    assert found[0].steps == whole[0].steps
    assert found[0].best_step == whole[0].best_step
    for mine, theirs in zip(found[0].history, whole[0].history, strict=True):
        # Accuracies count signs, and the first margins are rounding.
        names = [name for name in theirs if "accuracy" not in name]
        assert [mine[name] for name in names] == pytest.approx(
            [theirs[name] for name in names], abs=1e-5, rel=1e-5
        )
    # Adam divides by the size of a gradient: where that is all rounding, a tensor may differ.
    equal = [
        bool((tensor - whole[1][name]).norm() < 1e-3 * whole[1][name].norm())
        for name, tensor in found[1].items()
    ]
    assert sum(equal) >= 0.9 * len(equal)
