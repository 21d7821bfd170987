"""Small sums: right, different, and in words that the built-in base was not taught."""

from __future__ import annotations

import random
import re
import sys
from pathlib import Path

import pytest
import typer

from mipo_lite.answers import find_answer
from mipo_lite.problems import parse_problems
from mipo_lite.small_sums import BARE, LESS, MORE, STORIES, main, questions, small_sum

EXAMPLE = Path(__file__).parents[1] / "examples" / "sums.jsonl"
LOSS = re.compile("|".join(rf"\b{what.split(' ')[0]}\b" for what in LESS) + r"|\bminus\b")


def solved(question: str) -> int:
    """The slow way: the two numbers, and whether the words take away."""
    first, second = map(int, re.findall(r"\d+", question))
    return first - second if LOSS.search(question) else first + second


@pytest.mark.parametrize("reworded", [False, True])
def test_answers_are_right(reworded: bool) -> None:
    rows = list(questions(400, seed=3, reworded=reworded))
    for row in rows:
        assert solved(row["question"]) == int(row["answer"]) >= 0, row
    assert len({row["question"] for row in rows}) == len({row["id"] for row in rows}) == 400
    assert {"plus", "minus"} <= set(" ".join(row["question"] for row in rows).split())
    assert list(questions(400, 3, reworded)) == rows
    assert list(questions(400, 4, reworded)) != rows


def test_responses_state_the_result() -> None:
    rng = random.Random(0)
    for _ in range(200):
        question, response, result = small_sum(rng)
        assert find_answer(response) == str(result) == str(solved(question))


def test_other_questions_repeat_none() -> None:
    known = [row["question"] for row in questions(300, 0, reworded=True)]
    same_seed = list(questions(300, 0, reworded=True, known=known))
    assert not {row["question"] for row in same_seed} & set(known)
    assert len({row["question"] for row in same_seed}) == 300
    assert (same_seed[0]["id"], same_seed[-1]["id"]) == ("sum-001", "sum-300")


def test_every_wording_is_used_and_none_is_taught() -> None:
    def shape(question: str) -> str:
        """The question without what it is filled with."""
        question = re.sub(r"\d+", "#", question)
        return re.sub(r"\b(?:plus|minus)\b", "+", question)

    rng = random.Random(1)
    taught = {shape(small_sum(rng)[0]) for _ in range(5000)}
    asked = {shape(row["question"]) for row in questions(2000, 0, reworded=True)}
    assert not taught & asked
    openings = [re.split(r"[{]", wording)[0] for wording in (*STORIES, *BARE)]
    for opening in filter(None, openings):
        assert any(question.startswith(opening) for question in asked), opening
    for what in (*MORE, *LESS):
        assert any(what.format("#") in question for question in asked), what


def test_the_example_is_what_the_command_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["small_sums", "--questions", str(tmp_path / "sums.jsonl")])
    with pytest.raises(SystemExit) as raised:
        typer.run(main)
    assert not raised.value.code
    assert (tmp_path / "sums.jsonl").read_bytes() == EXAMPLE.read_bytes()
    found = parse_problems(EXAMPLE)
    assert (len(found.problems), found.bad, found.unscored) == (300, (), ())
