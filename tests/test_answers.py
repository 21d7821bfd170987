"""Answers are found where models and reference solutions put them."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import pytest

from mipo_lite.answers import find_answer, is_right, majority, parse_choice
from mipo_lite.answers import reference_answer as ref
from mipo_lite.problems import parse_problems

CITIES = ("Paris", "London", "Rome", "New London")


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        # the last number
        ("15 + 7 = 23", "23"),
        ("It is 15 + 7 = 22 apples.", "22"),
        ("12 apples and 3 pears, so 15.", "15"),
        ("So she has $1,234.50 left.", "2469/2"),
        ("Pi is about 3.14.", "157/50"),
        ("3 1/2", "7/2"),
        ("6/8", "3/4"),
        ("50%", "50"),
        ("1,2,3", "3"),
        ("٣", "3"),
        # signs
        ("9-5", "5"),
        ("9 - 5", "5"),
        ("= -3", "-3"),
        ("it is −4", "-4"),
        ("x is -$3", "-3"),
        # markers win over what follows them
        ("#### 1,000", "1000"),
        ("He has 4.\n#### 72", "72"),
        ("The answer is 12 because 3 < 4.", "12"),
        ("The answer is 15 + 7 = 22.", "22"),
        ("The answer is 5. It took 30 seconds.", "5"),
        ("Answer: 5 (out of 10)", "5"),
        ("\\boxed{7} and not 8", "7"),
        ("first \\boxed{1}, no, \\boxed{2}", "2"),
        ("\\boxed{\\frac{1}{2}}", "1/2"),
        ("\\boxed{\\frac12}", "1/2"),
        ("\\boxed{22 \\text{ apples}}", "22"),
        ("\\boxed{10{,}000}", "10000"),
        ("\\boxed{x^{2}+1}", "x^{2}+1"),
        # text
        ("Answer: Paris", "paris"),
        ("I think so.\nParis.", "paris"),
        ("H2O", "h2o"),
        # nothing, and nonsense
        ("", None),
        ("\\boxed{", "\\boxed{"),
        ("1/0", "1/0"),
        ("9" * 5000, "9" * 5000),
    ],
)
def test_final_answers(response: str, answer: str | None) -> None:
    assert find_answer(response) == answer


@pytest.mark.parametrize(
    ("response", "letter"),
    [
        ("B", "B"),
        ("b", "B"),
        ("(c)", "C"),
        ("C. Rome", "C"),
        ("D) New London", "D"),
        ("**Answer: C**", "C"),
        ("The answer is (B).", "B"),
        ("The correct option is C", "C"),
        ("The answer is A because it is big", "A"),
        ("Answer: d) it is far", "D"),
        ("\\boxed{B}", "B"),
        ("$\\boxed{\\text{(A) Paris}}$", "A"),
        ("#### D", "D"),
        ("I think it is B because A is wrong", "B"),
        ("Let me see.\nA is wrong.\nB. London\n", "B"),
        ("A dog barks. So B.", "B"),
        # the text of a choice
        ("It is Rome.", "C"),
        ("It is New London.", "D"),
        ("The answer is London, not Paris", "B"),
        # no answer, or two
        ("A or B", None),
        ("Rome or Paris", None),
        ("no idea", None),
        ("A dog barks.", None),
        ("E", None),
        ("", None),
    ],
)
def test_choices(response: str, letter: str | None) -> None:
    assert find_answer(response, CITIES) == letter


def test_reference_answers() -> None:
    assert ref("She buys 3 * 4 = <<3*4=12>>12 eggs.\n#### 12") == "12"
    assert ref("51.0") == "51"
    assert ref("18 apples") == "18"
    assert ref("Paris") == "paris"
    assert ref("So we get $\\boxed{\\frac{3}{4}}$ at last.") == "3/4"
    assert ref("They have 3 and 4, that is 7 in all.") == "7"


@pytest.mark.parametrize(
    ("given", "letter"),
    [
        ("B", "B"),
        ("b", "B"),
        (0, "A"),
        ("3", "D"),
        ("Rome", "C"),
        ("E", None),
        (4, None),
        (-1, None),
    ],
)
def test_reference_choices(given: object, letter: str | None) -> None:
    assert parse_choice(given, "ABCD", CITIES) == letter


def test_reference_choices_with_digits_as_labels() -> None:
    assert parse_choice("1", "1234", CITIES) == "A"
    assert parse_choice(4, "1234", CITIES) == "D"
    assert parse_choice("2", "ABCD", ("1", "2", "3", "4")) == "B"
    assert parse_choice(True, "ABCD", CITIES) is None


def test_right_and_wrong() -> None:
    assert is_right(find_answer("It is 0.5"), "1/2")
    assert not is_right(find_answer("It is 5"), "1/2")
    assert not is_right(None, "1/2")
    assert is_right("B", "B")
    assert not is_right("A", "B")


def test_latex_by_math_verify() -> None:
    pytest.importorskip("math_verify")
    assert is_right(find_answer("\\boxed{\\frac{\\sqrt{12}}{2}}"), ref("\\sqrt{3}"))
    assert is_right("x^2+1", "1+x^2")
    assert not is_right("x^3", "x^2")


def test_latex_without_math_verify(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mipo_lite.answers.find_spec", lambda name: None)
    assert is_right("x^2+1", "x^2+1")
    assert not is_right("x^2+1", "1+x^2")


def test_majority() -> None:
    assert majority(["3", "4", "4", None, None, None]) == "4"
    assert majority(["3", "4"]) == "3"
    assert majority([None, None]) is None
    assert majority([]) is None


@pytest.mark.parametrize(("name", "rows"), [("train", 7473), ("test", 1319)])
def test_every_solution_of_gsm8k(shared_data: Path, name: str, rows: int) -> None:
    file = shared_data / "gsm8k" / f"{name}.jsonl"
    found = parse_problems(file)
    solutions = [json.loads(line)["answer"] for line in file.read_text("utf-8").splitlines()]
    assert (len(found.problems), found.bad, found.unscored) == (rows, (), ())
    for problem, solution in zip(found.problems, solutions, strict=True):
        number = solution.rpartition("####")[2].strip().replace(",", "")
        assert problem.answer == str(Fraction(number))
        assert is_right(find_answer(solution), problem.answer)


def test_every_row_of_svamp(shared_data: Path) -> None:
    file = shared_data / "svamp" / "SVAMP.json"
    found = parse_problems(file)
    rows = json.loads(file.read_text("utf-8"))
    assert (len(found.problems), found.bad, found.unscored) == (1000, (), ())
    for problem, row in zip(found.problems, rows, strict=True):
        assert problem.answer == str(Fraction(row["Answer"]))
        assert row["Body"].strip() in problem.text and row["Question"].strip() in problem.text
