"""More than one round of `improve`: the trained policy writes the next pairs.

Round n samples from the policy of round n - 1 and goes on from its adapter. The reference of DPO
moves with it ("previous") or stays the base ("base"). Questions that are set aside and never
trained on tell after each round how much the policy's responses say about their question; when
that stops rising, the rounds stop and the best adapter so far is kept. The questions of the
evaluation are not touched.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any, Literal

from .base import Base
from .console import console, progress
from .errors import NothingToLearn
from .evaluation import AFTER, answer, policies
from .filtering import score_pairs
from .improving import held_out_questions, measure
from .negatives import Negatives, make_pairs
from .problems import Problem
from .recipe import Recipe
from .run import atomic_directory, read_json, read_jsonl, write_json
from .training import train

# Of the training questions, those that are set aside to watch the rounds.
WATCHED_SHARE = 0.15
FEWEST_WATCHED = 8


def set_aside(training: Sequence[Problem]) -> tuple[list[Problem], list[Problem]]:
    """(to train on, to watch): an even part of the questions, whatever they say."""
    count = min(max(FEWEST_WATCHED, round(len(training) * WATCHED_SHARE)), len(training) // 2)
    every = len(training) / max(count, 1)
    watched = {int((i + 0.5) * every) for i in range(count)}
    return (
        [problem for i, problem in enumerate(training) if i not in watched],
        [problem for i, problem in enumerate(training) if i in watched],
    )


def more_rounds(
    base: Base,
    training: Sequence[Problem],
    recipe: Recipe,
    *,
    rounds: int,
    reference: Literal["previous", "base"],
    negatives: Negatives,
    samples: int,
    run: Path,
) -> list[dict[str, Any]]:
    """Rounds 2 to `rounds` after the first, whose adapter lies in adapter/ of the directory `run`.

    A round's files are in rounds/N; a finished round is not made again. In the end adapter/ holds
    the best round's adapter.

    Args:
        training: the questions to train on, those that `set_aside` keeps back among them.

    Returns one entry per round: `round`, `bits` (the InfoNCE bound on the watched questions, as
    the policy itself scores its responses) and `pairs` (kept, from round 2 on).
    """
    train_on, watched = set_aside(training)
    for directory in (run / "rounds", run / "rounds" / "1"):
        directory.mkdir(mode=0o700, exist_ok=True)
    first = run / "rounds" / "1"
    if not (first / "adapter").exists():
        with atomic_directory(first / "adapter") as partial:
            shutil.copytree(run / "adapter", partial, dirs_exist_ok=True)
    history = [_finish_round(base, watched, recipe, first, {"round": 1})]
    best = first
    for number in range(2, rounds + 1):
        directory = run / "rounds" / str(number)
        directory.mkdir(mode=0o700, exist_ok=True)
        previous = best / "adapter"
        # Other samples than in the round before, and the same ones when the run goes on.
        varied = recipe.model_copy(update={"seed": (recipe.seed + 7919 * (number - 1)) % 2**31})
        try:
            if not (directory / "adapter").exists():
                with _acting(base, previous):
                    make_pairs(base, train_on, negatives, samples, varied, directory)
                pairs = read_jsonl(directory / "pairs.jsonl")
                with (
                    _acting(base, previous if reference == "previous" else None),
                    progress("Scoring pairs", len(pairs)) as advance,
                ):
                    score_pairs(base, pairs, varied, directory / "scores.jsonl", advance)
                with progress(f"Training, round {number}", 1) as bar:
                    train(
                        base,
                        pairs,
                        read_jsonl(directory / "scores.jsonl"),
                        varied,
                        directory / "adapter",
                        directory / "checkpoints",
                        bar.set,
                        start=previous,
                    )
        except NothingToLearn as error:
            console.print(f"  round {number} is not made: {error.what}")
            break
        kept = sum(score["kept"] for score in read_jsonl(directory / "scores.jsonl"))
        entry = {"round": number, "pairs": kept}
        history.append(_finish_round(base, watched, recipe, directory, entry))
        rise = history[-1]["bits"] - history[-2]["bits"]
        console.print(f"  round {number}: {history[-1]['bits']:.3f} bits held out, {rise:+.3f}")
        if rise <= 0:
            break
        best = directory
    with atomic_directory(run / "adapter") as partial:
        shutil.copytree(best / "adapter", partial, dirs_exist_ok=True)
    return history


def _finish_round(
    base: Base, watched: Sequence[Problem], recipe: Recipe, directory: Path, entry: dict[str, Any]
) -> dict[str, Any]:
    """Measure a round's adapter on the watched questions, once."""
    file = directory / "round.json"
    if not file.exists():
        asked = [replace(problem, split="held_out") for problem in watched]
        questions = held_out_questions(asked, recipe)
        path = directory / "watched.jsonl"
        with policies(base, {AFTER: directory / "adapter"}) as use:
            rows = answer(base, use, [AFTER], questions, recipe, path)
            measures = measure(base, use, questions, rows)
        bits = [found["own_bits"] for found in measures if "own_bits" in found]
        write_json(file, entry | {"bits": round(mean(b for b in bits if b is not None), 4)})
    found: dict[str, Any] = read_json(file)
    return found


@contextmanager
def _acting(base: Base, adapter: Path | None) -> Iterator[None]:
    """`base.model` acts as this adapter says while the block runs; None: as itself."""
    if adapter is None:
        yield
        return
    with policies(base, {AFTER: adapter}) as use, use(AFTER):
        yield
