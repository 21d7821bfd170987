"""The comparison: what its methods share, what its table says, where information is said to lie."""

from __future__ import annotations

import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest
import typer

from mipo_lite import baselines
from mipo_lite.base import Base
from mipo_lite.baselines import (
    CHANGES,
    COLUMNS,
    TABLES,
    Method,
    answer_start,
    change,
    run_seed,
    table,
    where_information_lies,
)
from mipo_lite.metrics import compare
from mipo_lite.negatives import NEGATIVES
from mipo_lite.problems import Problem
from mipo_lite.recipe import Recipe
from mipo_lite.run import append_jsonl, read_jsonl
from mipo_lite.scoring import response_logprobs

RECIPE = Recipe(
    pairs=12,
    negatives="random",
    max_new_tokens=12,
    sampling_batch=12,
    min_contrast=0.0,
    learning_rate=1e-3,
    epochs=1,
    batch_size=4,
    micro_batch=4,
    evaluations=1,
    gradient_checkpointing=False,
    eval_prompts=4,
    eval_samples=2,
    eval_contexts=3,
)


def problems() -> list[Problem]:
    return [
        Problem(
            f"q{n}",
            f"What is {n % 9 + 1} plus {n // 9 + 1}?",
            n,
            answer=str(n % 9 + n // 9 + 2),
            split="held_out" if n % 3 == 0 else "train",
        )
        for n in range(24)
    ]


# --- what is made ------------------------------------------------------------------------------


def test_every_method_names_settings_that_exist() -> None:
    for methods in TABLES.values():
        assert len({method.name for method in methods}) == len(methods)
        for method in methods:
            assert method.negatives in NEGATIVES
            assert method.settings.keys() <= Recipe.model_fields.keys()


def test_only_settings_of_pairs_keep_pairs_apart() -> None:
    out = Path("out")
    assert Method("a").pairs_in(out) == Method("b", loss="sft").pairs_in(out) == out / "random"
    assert Method("c", settings={"learning_rate": 1.0}).pairs_in(out) == out / "random"
    assert Method("d", settings={"rounds": 2}).pairs_in(out) == out / "random-rounds-2"
    assert Method("e", "near").pairs_in(out) == out / "near"


LOSSES = [method for method in TABLES["baselines"] if method.loss in ("infonce", "ipo")]


@pytest.fixture(scope="module")
def seed_run(builtin_base: Base, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """One seed of two losses and of two rounds, on the built-in base."""
    out = tmp_path_factory.mktemp("seed-0")
    methods = (*LOSSES, Method("two rounds", settings={"rounds": 2}))
    return out, run_seed(builtin_base, problems(), methods, RECIPE, out)


def test_a_seed_of_all_methods(seed_run: tuple[Path, Any], builtin_base: Base) -> None:
    out, found = seed_run
    assert {path.parent.name for path in out.rglob("pairs.jsonl")} == {
        "random", "random-rounds-2", "2",
    }  # fmt: skip
    names = [method.name for method in LOSSES]
    assert list(found["baselines"]) == [*names, "two rounds"]
    for block in found["baselines"].values():
        assert block["question"]["sampled"]["bits"]["n"] == 8
    trained = {(out / name / "adapter_model.safetensors").read_bytes() for name in names}
    assert len(trained) == len(names), "each learns something else"

    before = {path: path.stat().st_mtime_ns for path in out.rglob("adapter_model.safetensors")}
    again = run_seed(builtin_base, problems(), LOSSES[:1], RECIPE, out)
    assert before == {p: p.stat().st_mtime_ns for p in before}, "nothing is made again"
    assert again["baselines"].keys() == {names[0]}


# --- what is said ------------------------------------------------------------------------------


def test_where_an_answer_starts(builtin_base: Base) -> None:
    def ids(text: str) -> list[int]:
        return list(builtin_base.tokenizer(text, add_special_tokens=False)["input_ids"])

    whole = "4 plus 9 is 13. Kim has 13 stamps."
    start = answer_start(builtin_base, ids(whole), "13")
    assert start is not None
    before = builtin_base.decode(ids(whole)[:start])
    assert before.split() == ["4", "plus", "9", "is"] or before.strip() == "4 plus 9 is 1"
    assert answer_start(builtin_base, ids(whole), "14") is None
    assert answer_start(builtin_base, ids(whole), None) is None


def test_where_information_lies_the_slow_way(
    seed_run: tuple[Path, Any], builtin_base: Base
) -> None:
    pairs = read_jsonl(seed_run[0] / "random" / "pairs.jsonl")[:3]
    # What the base answers is left to it: these answers are given, one right and two wrong.
    for pair, result in zip(pairs, ("right", "100", "200"), strict=True):
        problem = next(p for p in problems() if p.id == pair["prompt_id"])
        pair["chosen"] = f"It is {problem.answer if result == 'right' else result}."
        pair["chosen_ids"] = builtin_base.tokenizer(pair["chosen"], add_special_tokens=False)[
            "input_ids"
        ]
    found = where_information_lies(builtin_base, problems(), pairs)

    def pmi(pair: dict[str, Any], start: int, end: int | None) -> float:
        own, other = (
            response_logprobs(builtin_base.model, [(pair[ids], pair["chosen_ids"])])[0][start:end]
            for ids in ("prompt_ids", "without_ids")
        )
        return float(own.sum() - other.sum())

    starts = []
    for pair in pairs:
        answer = pair["chosen"].split()[-1].rstrip(".")
        start = answer_start(builtin_base, pair["chosen_ids"], answer)
        assert start is not None
        starts.append(start)
    assert found["share right"] == pytest.approx(1 / 3)
    assert found["PMI, all"] == pytest.approx(mean(pmi(p, 0, None) for p in pairs), abs=1e-3)
    assert found["PMI, words before the answer"] == pytest.approx(
        mean(pmi(p, 0, s) for p, s in zip(pairs, starts, strict=True)), abs=1e-3
    )
    assert found["PMI, the answer itself, right"] == pytest.approx(
        pmi(pairs[0], starts[0], None), abs=1e-3
    )
    assert found["PMI, the answer itself, wrong"] == pytest.approx(
        mean(pmi(p, s, None) for p, s in zip(pairs[1:], starts[1:], strict=True)), abs=1e-3
    )


METHODS = (Method("one"), Method("two"))


def result(right: float) -> dict[str, Any]:
    """metrics of a seed: the base gets `right`, method "one" .1 more, "two" has no answers."""
    blocks = {}
    for method, more in (("one", 0.1), ("two", 0.0)):
        value = {"before": right, "after": right + more}
        modes: dict[str, Any] = {mode: {"exact_match": value} for mode in ("greedy", "majority")}
        modes["sampled"] = dict.fromkeys(("exact_match", "bits", "own_bits", "length"), value)
        if method == "two":
            del modes["majority"]["exact_match"]
        blocks[method] = {"question": modes}
    return {"baselines": blocks}


def rows(seed: int) -> list[dict[str, Any]]:
    """evaluation.jsonl of a seed: "one" gains in question "a" alone, differently by seed."""
    gains = {"before": {}, "one": {"a": 0.2 + seed}, "two": {}}
    return [
        {
            "model": model,
            "mode": mode,
            "prompt_id": question,
            "measures": {name: gain.get(question, 0.0) for name in ("exact_match", "bits")}
            if mode == "sampled"
            else {"exact_match": 9.0},
        }
        for model, gain in gains.items()
        for mode in ("sampled", "greedy")
        for question in "abc"
    ]


def test_the_table_by_hand() -> None:
    rights = [0.5, 0.6, 0.7]
    lines = table([result(r) for r in rights], [rows(seed) for seed in range(3)], METHODS).split(
        "\n"
    )
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == ["", *COLUMNS, *CHANGES]
    assert [row[0] for row in cells[2:]] == ["the base, prompted", "one", "two"]
    assert {len(row) for row in cells} == {1 + len(COLUMNS) + len(CHANGES)}
    spread = f"± {stdev(rights):.2f}"
    assert cells[2][1] == f"{mean(rights):.2f} {spread}"
    assert cells[3][1] == f"{mean(rights) + 0.1:.2f} {spread}"
    assert cells[4][1 + list(COLUMNS).index("right, majority")] == "not measured"
    assert cells[2][-len(CHANGES) :] == ["", "", ""]
    assert cells[3][-1] == "not measured", "no row has its own bits"


def test_an_interval_is_over_questions_not_over_seeds() -> None:
    seeds = [rows(seed) for seed in range(3)]
    slow = compare([0.0] * 9, [0.2, 0, 0, 1.2, 0, 0, 2.2, 0, 0], list("abcabcabc"))
    assert slow is not None
    assert slow.groups == 3
    assert change(seeds, "one", "bits") == f"{slow.low:+.2f} to {slow.high:+.2f}"
    assert slow.low == 0.0, "question a, which alone gains, may not be drawn"
    assert change(seeds, "two", "bits") == "+0.00 to +0.00"


def test_the_command_prints_and_does_not_measure_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = []

    def fake(base: Any, found: Any, methods: Any, recipe: Recipe, out: Path) -> dict[str, Any]:
        made.append(recipe.seed)
        out.mkdir(parents=True)
        append_jsonl(out / "evaluation.jsonl", rows(recipe.seed))
        why = {"why": {"PMI, all": float(recipe.seed)}}
        counts = {"questions": 3, "samples_per_question": 1, "prompts_ranked": 2}
        return result(0.5) | counts | why

    monkeypatch.setattr(baselines, "run_seed", fake)
    monkeypatch.setattr(baselines, "load_base", lambda source: None)
    monkeypatch.setitem(TABLES, "baselines", METHODS)
    example = Path(__file__).parents[1] / "examples" / "sums.jsonl"
    given = ["baselines", "--prompts", str(example), "--out", str(tmp_path), "--seeds", "2"]
    monkeypatch.setattr(sys, "argv", given)
    for _ in range(2):
        with pytest.raises(SystemExit) as raised:
            typer.run(baselines.main)
        assert not raised.value.code
        output = capsys.readouterr().out
        assert "| one | 0.60 ± 0.00 |" in output
        assert "3 held-out questions, 1 samples each, 2 prompts ranked, 2 seeds," in output
        assert f"- PMI, all: 0.50 ± {stdev([0.0, 1.0]):.2f}" in output
    assert made == [0, 1]
