"""Rounds: which questions are watched, when they stop, what the reference of the next one is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from mipo_lite import rounds
from mipo_lite.base import Base
from mipo_lite.errors import NothingToLearn
from mipo_lite.filtering import score_pairs
from mipo_lite.negatives import make_pairs
from mipo_lite.problems import Problem
from mipo_lite.recipe import Recipe
from mipo_lite.rounds import FEWEST_WATCHED, more_rounds, set_aside
from mipo_lite.run import append_jsonl, read_json, read_jsonl
from mipo_lite.scoring import response_logprobs
from mipo_lite.training import train

RECIPE = Recipe(
    pairs=12,
    negatives="random",
    max_new_tokens=10,
    sampling_batch=12,
    min_contrast=0.0,
    learning_rate=3e-3,
    epochs=1,
    batch_size=4,
    micro_batch=4,
    evaluations=1,
    gradient_checkpointing=False,
    eval_prompts=4,
    eval_samples=1,
    eval_contexts=3,
)


def problems(count: int) -> list[Problem]:
    return [Problem(f"q{n}", f"What is {n % 9 + 1} plus {n // 9 + 1}?", n) for n in range(count)]


@pytest.mark.parametrize("count", [2, 4, 15, 16, 17, 54, 100, 1000])
def test_an_even_part_is_set_aside(count: int) -> None:
    training = problems(count)
    train_on, watched = set_aside(training)
    assert sorted([*train_on, *watched], key=lambda p: p.line) == training, "each on one side"
    assert len(watched) == min(max(FEWEST_WATCHED, round(0.15 * count)), count // 2)
    places = [problem.line for problem in watched]
    steps = {after - before for before, after in pairwise(places)}
    assert not steps or max(steps) - min(steps) <= 1
    assert places[-1] - places[0] > count - 2 * count / len(places), "spread over the whole file"
    renamed = [Problem(p.id, "another question", p.line) for p in training]
    assert [p.line for p in set_aside(renamed)[1]] == places, "whatever they say"


class Fake:
    """Stands in for sampling and training: a round's adapter is its number."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, bits: list[float]) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.acting: Path | None = None
        self.bits = bits
        for name in ("make_pairs", "score_pairs", "train", "_finish_round", "_acting"):
            monkeypatch.setattr(rounds, name, getattr(self, name))

    def make_pairs(
        self, base: Any, on: Any, negatives: Any, samples: Any, recipe: Recipe, out: Path
    ) -> None:
        self.calls.append(("pairs", out.name, self._policy(), recipe.seed, len(on)))
        append_jsonl(out / "pairs.jsonl", [{"id": 0}])

    def score_pairs(self, base: Any, pairs: Any, recipe: Any, path: Path, advance: Any) -> None:
        self.calls.append(("scores", path.parent.name, self._policy()))
        append_jsonl(path, [{"kept": True}])

    def train(
        self, base: Any, pairs: Any, scores: Any, recipe: Any, adapter: Path, *_: Any, start: Path
    ) -> None:
        self.calls.append(("train", adapter.parent.name, start.parent.name))
        adapter.mkdir()
        (adapter / "number").write_text(adapter.parent.name)

    def _finish_round(
        self, base: Any, watched: Any, recipe: Any, directory: Path, entry: dict[str, Any]
    ) -> dict[str, Any]:
        return entry | {"bits": self.bits[int(directory.name) - 1]}

    @contextmanager
    def _acting(self, base: Any, adapter: Path | None) -> Iterator[None]:
        self.acting = adapter
        yield
        self.acting = None

    def _policy(self) -> str | None:
        return self.acting.parent.name if self.acting else None


def run_fake(run: Path, reference: Any = "previous", most: int = 5) -> list[dict[str, Any]]:
    if not (run / "adapter").exists():
        (run / "adapter").mkdir(parents=True)
        (run / "adapter" / "number").write_text("1")
    base: Any = None
    return more_rounds(
        base,
        problems(30),
        RECIPE,
        rounds=most,
        reference=reference,
        negatives="random",
        samples=2,
        run=run,
    )


@pytest.mark.parametrize(
    ("bits", "made", "best"),
    [
        ([1.0, 1.2, 1.3, 1.3, 9.0], 4, "3"),  # as much as before is no rise
        ([1.0, 0.9, 9.0], 2, "1"),
        ([1.0, 1.1, 1.2, 1.3, 1.4], 5, "5"),
    ],
)
def test_rounds_stop_when_information_does(
    bits: list[float], made: int, best: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = Fake(monkeypatch, bits)
    history = run_fake(tmp_path)
    assert [entry["round"] for entry in history] == list(range(1, made + 1))
    assert [entry["bits"] for entry in history] == bits[:made]
    assert (tmp_path / "adapter" / "number").read_text() == best
    trained = [call[1:] for call in fake.calls if call[0] == "train"]
    assert trained == [(str(n), str(n - 1)) for n in range(2, made + 1)], "each from the last one"


@pytest.mark.parametrize("reference", ["previous", "base"])
def test_who_writes_and_who_is_the_reference(
    reference: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = Fake(monkeypatch, [1.0, 2.0, 3.0])
    run_fake(tmp_path, reference, most=3)
    pairs = [call for call in fake.calls if call[0] == "pairs"]
    assert [call[2] for call in pairs] == ["1", "2"], "the policy of the round before writes"
    assert len({RECIPE.seed, *(call[3] for call in pairs)}) == 3, "other samples in every round"
    assert {call[4] for call in pairs} == {len(set_aside(problems(30))[0])}
    scored = [call[2] for call in fake.calls if call[0] == "scores"]
    assert scored == (["1", "2"] if reference == "previous" else [None, None])


def test_rounds_end_where_nothing_is_left_to_contrast(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = Fake(monkeypatch, [1.0, 2.0, 3.0])

    def nothing(*arguments: Any) -> None:
        if arguments[-1].name == "3":
            raise NothingToLearn("All samples say the same.", "Use others.")
        fake.make_pairs(*arguments)

    monkeypatch.setattr(rounds, "make_pairs", nothing)
    assert [entry["round"] for entry in run_fake(tmp_path)] == [1, 2]
    assert (tmp_path / "adapter" / "number").read_text() == "2"


def test_a_finished_round_is_not_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_fake_once = Fake(monkeypatch, [1.0, 2.0])
    history = run_fake(tmp_path, most=2)
    assert len(run_fake_once.calls) == 3
    # The adapter of the run is by now that of round 2; round 1 stays what it was.
    again = Fake(monkeypatch, [1.0, 2.0])
    assert run_fake(tmp_path, most=2) == history
    assert again.calls == []
    assert (tmp_path / "rounds" / "1" / "adapter" / "number").read_text() == "1"


@pytest.fixture(scope="module")
def first_round(builtin_base: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose first round is trained, on the built-in base."""
    run = tmp_path_factory.mktemp("run")
    train_on, _ = set_aside(problems(20))
    make_pairs(builtin_base, train_on, "random", 2, RECIPE, run)
    pairs = read_jsonl(run / "pairs.jsonl")
    score_pairs(builtin_base, pairs, RECIPE, run / "scores.jsonl")
    scores = read_jsonl(run / "scores.jsonl")
    train(builtin_base, pairs, scores, RECIPE, run / "adapter", run / "checkpoints")
    # So few steps hardly move it: make it a policy that differs plainly from the base.
    file = run / "adapter" / "adapter_model.safetensors"
    weights = load_file(file)
    save_file({k: v * (20.0 if "lora_B" in k else 1.0) for k, v in weights.items()}, file)
    return run


def test_a_second_round_with_the_built_in_base(builtin_base: Base, first_round: Path) -> None:
    """Its reference log-probs are those of the first round's policy, computed the slow way."""
    before = {k: v.clone() for k, v in builtin_base.model.state_dict().items()}
    history = more_rounds(
        builtin_base,
        problems(20),
        RECIPE,
        rounds=2,
        reference="previous",
        negatives="random",
        samples=2,
        run=first_round,
    )
    second = first_round / "rounds" / "2"
    assert [entry["round"] for entry in history] == [1, 2]
    assert history[1]["pairs"] == sum(s["kept"] for s in read_jsonl(second / "scores.jsonl"))
    assert read_json(second / "round.json") == history[1]
    watched = {problem.id for problem in set_aside(problems(20))[1]}
    assert {row["prompt_id"] for row in read_jsonl(second / "watched.jsonl")} <= watched
    assert not watched & {pair["prompt_id"] for pair in read_jsonl(second / "pairs.jsonl")}

    rows = [(p["prompt_ids"], p["chosen_ids"]) for p in read_jsonl(second / "pairs.jsonl")][:4]
    recorded = [score["ref_chosen"] for score in read_jsonl(second / "scores.jsonl")][:4]
    by_base = response_logprobs(builtin_base.model, rows)
    policy = PeftModel.from_pretrained(
        builtin_base.model, str(first_round / "rounds" / "1" / "adapter")
    )
    by_policy = response_logprobs(builtin_base.model, rows)
    policy.unload()
    assert recorded == pytest.approx([float(t.sum()) for t in by_policy], abs=2e-2)
    assert recorded != pytest.approx([float(t.sum()) for t in by_base], abs=0.2)

    kept = "2" if history[1]["bits"] > history[0]["bits"] else "1"
    file = "adapter_model.safetensors"
    chosen = load_file(first_round / "adapter" / file)
    for name, tensor in load_file(first_round / "rounds" / kept / "adapter" / file).items():
        assert torch.equal(chosen[name], tensor)
    after = builtin_base.model.state_dict()
    assert after.keys() == before.keys(), "the base is given back without adapters"
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
