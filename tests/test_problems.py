"""Question files as they come, and files as they should not come."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mipo_lite.errors import UsageError, UserError
from mipo_lite.problem_files import LONGEST_LINE
from mipo_lite.problems import (
    Problem,
    load_problems,
    normalized,
    parse_problems,
    split_problems,
)

EXAMPLES = Path(__file__).parents[1] / "examples"


def write(path: Path, *rows: object) -> Path:
    lines = (row if isinstance(row, str) else json.dumps(row) for row in rows)
    path.write_text("".join(f"{line}\n" for line in lines), "utf-8")
    return path


def only(path: Path) -> Problem:
    found = parse_problems(path)
    assert not found.bad
    assert len(found.problems) == 1
    return found.problems[0]


@pytest.mark.parametrize(
    ("row", "text", "answer"),
    [
        ({"question": "2+2?", "answer": "It is\n#### 4"}, "2+2?", "4"),
        ({"Problem": "2+2?", "solution": "$\\boxed{4}$"}, "2+2?", "4"),
        ({"prompt": "2+2?"}, "2+2?", None),
        ({"Body": "I have 2", "Question": "How many?", "Answer": 2.0}, "I have 2. How many?",
         "2"),
        # MMLU, and MMLU as Hugging Face has it
        ({"question": "Q?", "A": "x", "B": "y", "C": "z", "D": "w", "answer": "C"},
         "Q?\nA. x\nB. y\nC. z\nD. w", "C"),
        ({"question": "Q?", "choices": ["x", "y"], "answer": 1}, "Q?\nA. x\nB. y",
         "B"),
        # ARC as Hugging Face has it, with digits as labels, and as first published
        ({"question": "Q?", "choices": {"text": ["x", "y"], "label": ["A", "B"]},
          "answerKey": "B"}, "Q?\nA. x\nB. y", "B"),
        ({"question": "Q?", "choices": {"text": ["x", "y"], "label": ["1", "2"]},
          "answerKey": "1"}, "Q?\nA. x\nB. y", "A"),
        ({"question": {"stem": "Q?", "choices": [{"text": "x", "label": "A"},
                                                  {"text": "y", "label": "B"}]},
          "answerKey": "A"}, "Q?\nA. x\nB. y", "A"),
    ],
)  # fmt: skip
def test_layouts(tmp_path: Path, row: object, text: str, answer: str | None) -> None:
    problem = only(write(tmp_path / "q.jsonl", row))
    assert (problem.text, problem.answer) == (text, answer)
    assert problem.choices == tuple(line[3:] for line in text.split("\n")[1:])
    assert "answer" not in problem.as_row()
    assert Problem.from_row(problem.as_row(), answer) == problem


def test_csv(tmp_path: Path) -> None:
    path = write(
        tmp_path / "q.csv",
        "id,question,choices,answer",
        '7,"Two lines,\nwith a comma?",x|y,B',
        '8,Other?,"[""p"", ""q""]",p',
    )
    first, second = parse_problems(path).problems
    assert (first.id, first.line) == ("7", 2)
    assert first.text == "Two lines,\nwith a comma?\nA. x\nB. y"
    assert first.answer == "B"
    assert (second.line, second.answer) == (4, "A")


def test_csv_of_mmlu_has_no_header(tmp_path: Path) -> None:
    path = write(tmp_path / "q.csv", "Q one?,1,2,3,4,C", "Q two?,1,2,3,4,A")
    assert [problem.answer for problem in parse_problems(path).problems] == ["C", "A"]


def test_json_array_and_plain_text(tmp_path: Path) -> None:
    array = tmp_path / "q.json"
    array.write_text(json.dumps([{"question": "a?"}, {"question": "b?"}], indent=2), "utf-8")
    assert [(p.text, p.line) for p in parse_problems(array).problems] == [("a?", 2), ("b?", 5)]
    text = write(tmp_path / "q.txt", "\ufeffWhy?", "", "  How?  ")
    assert [(p.text, p.line) for p in parse_problems(text).problems] == [("Why?", 1), ("How?", 3)]


def test_named_columns(tmp_path: Path) -> None:
    path = write(tmp_path / "q.jsonl", {"question": "no", "Ask": "Yes?", "Key": "5"})
    found = parse_problems(path, "Ask", "key")
    assert (found.problems[0].text, found.problems[0].answer) == ("Yes?", "5")
    with pytest.raises(UsageError, match="no column 'asked'"):
        parse_problems(path, "asked")
    with pytest.raises(UsageError, match="Name it with --answer-column"):
        parse_problems(path, None, "asked")
    headless = tmp_path / "headless.csv"
    headless.write_text("Where did I leave my keys?,here\nAnd where my purse?,there\n")
    with pytest.raises(UsageError) as error:
        parse_problems(headless)
    assert "keys" not in str(error.value), "what stands there is not the name of a column"
    with pytest.raises(UsageError, match="no question column"):
        parse_problems(write(tmp_path / "other.jsonl", {"frage": "Wie?"}))


def test_bad_rows_have_line_and_reason(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    write(
        path,
        {"id": 1, "question": "What is 1 + 1?", "answer": "2"},
        {"id": 2, "answer": "3"},
        '{"id": 3, "question": "What',
        json.dumps({"id": 4, "question": "x" * 10 * 2**20}),
        {"id": 1, "question": "What is 2 + 2?"},
        {"id": 6, "question": "  what is 1 + 1 "},
        "[1, 2]",
        {"id": 8, "question": 12},
        {"id": 9, "question": "Which?", "choices": ["a"]},
        {"id": 10, "question": "Which?", "choices": ["a", "b"], "answer": "c"},
        {"id": 11, "question": "What is 9 - 4?", "answer": "5"},
    )
    path.write_bytes(path.read_bytes() + b'{"question": "\xff"}\n{"question": "a\0"}\n')
    found = parse_problems(path)
    assert [(row.line, row.reason) for row in found.bad] == [
        (2, "no question"),
        (3, "broken JSON at column 28"),
        (4, "the line is 10.0 MiB long"),
        (5, "the same id as line 1"),
        (6, "the same question as line 1"),
        (7, "not a JSON object"),
        (8, "question is not text"),
        (9, "choices are not a list of 2 to 10"),
        (12, "not UTF-8 text"),
        (13, "not text: it holds a NUL byte"),
    ]
    assert [problem.line for problem in found.problems] == [1, 10, 11]
    assert [(row.line, row.reason) for row in found.unscored] == [
        (10, "the answer is none of the choices")
    ]


def test_bad_rows_of_csv(tmp_path: Path) -> None:
    path = write(
        tmp_path / "q.csv",
        "question,answer",
        "a?,1",
        "b?,1,2",
        f"{'x' * (LONGEST_LINE + 1)},1",
        "c?,1",
        ",1",
        '"d?" more,1',
        '"e?,1',
        "f?,1",
    )
    found = parse_problems(path)
    assert [(problem.text, problem.line) for problem in found.problems] == [("a?", 2), ("c?", 5)]
    assert [(row.line, row.reason) for row in found.bad] == [
        (3, "3 fields where the header has 2"),
        (4, "the line is 0.1 MiB long"),
        (6, "no question"),
        (7, "broken CSV: text between a closing quote and the next comma"),
        (8, "a quote that is not closed; nothing after it can be read"),
    ]


def test_broken_array(tmp_path: Path) -> None:
    path = tmp_path / "q.json"
    path.write_text('[{"question": "a?"},\n{"question": "b?"} {"question": "c?"}]', "utf-8")
    found = parse_problems(path)
    assert [problem.text for problem in found.problems] == ["a?"]
    assert [row.line for row in found.bad] == [2]
    assert "nothing after it" in found.bad[0].reason


def test_the_user_is_told_before_the_rows_are_used(tmp_path: Path) -> None:
    rows = [{"question": f"{n}?", "answer": n} for n in range(6)]
    path = write(tmp_path / "q.jsonl", *rows, *["{"] * 12)
    said: list[str] = []
    found = load_problems(path, said.append)
    assert len(found.problems) == 6
    assert "12 of 18 rows can not be used" in said[0]
    assert said[1].strip().startswith("line 7: broken JSON")
    assert said[-1].strip() == "and 4 more"
    said.clear()
    with pytest.raises(UserError, match="1 usable question;"):
        load_problems(write(path, rows[0], "{"), said.append)
    assert "1 of 2 rows" in said[0], "told also where too few are left"


@pytest.mark.parametrize("name", ["missing.jsonl", ".", "q.parquet"])
def test_unreadable_files(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError):
        parse_problems(tmp_path / name)


def test_empty_files(tmp_path: Path) -> None:
    for name in ("q.jsonl", "q.csv", "q.json", "q.txt"):
        with pytest.raises(UserError, match="0 usable questions"):
            load_problems(write(tmp_path / name), print)


def test_normalized() -> None:
    assert normalized("  What is\n2 + 2 ?") == normalized("what is 2 + 2")
    assert normalized("３-2") == normalized("3-2")
    assert normalized("3-2") != normalized("3+2")


def problems(*texts: str) -> list[Problem]:
    return [Problem(f"q{n}", text, n) for n, text in enumerate(texts, start=1)]


def test_split_is_disjoint() -> None:
    one_file, left_out = split_problems(problems(*"abcdefghijkl"))
    held_out = [p for p in one_file if p.split == "held_out"]
    assert (len(one_file), len(held_out), left_out) == (12, 4, 0)
    both, left_out = split_problems(problems("A?", "b", "c"), problems("a", "x"))
    assert left_out == 1
    assert [(p.text, p.split) for p in both] == [
        ("b", "train"), ("c", "train"), ("a", "held_out"), ("x", "held_out"),
    ]  # fmt: skip
    assert len({p.id for p in both}) == 4


def test_answers_decide_nothing(tmp_path: Path) -> None:
    """Other answers, or none: the same questions, words and split."""
    rows = [{"question": f"What is {n} + 1?", "answer": str(n + 1)} for n in range(12)]
    rows += [{"question": f"Which {n}?", "choices": ["x", "y"], "answer": "A"} for n in range(6)]
    shuffled = [
        {**row, "answer": other["answer"]} for row, other in zip(rows, rows[::-1], strict=True)
    ]
    without = [{key: value for key, value in row.items() if key != "answer"} for row in rows]
    seen = []
    for name, variant in [("a", rows), ("b", shuffled), ("c", without)]:
        found = parse_problems(write(tmp_path / f"{name}.jsonl", *variant))
        split, _ = split_problems(found.problems)
        seen.append([(p.id, p.text, p.split) for p in split])
    assert seen[0] == seen[1] == seen[2]


def test_shipped_examples() -> None:
    math = parse_problems(EXAMPLES / "math.jsonl")
    assert len(math.problems) >= 60
    choices = parse_problems(EXAMPLES / "choices.csv")
    for found in (math, choices):
        assert not found.bad
        assert not found.unscored
    assert all(problem.choices for problem in choices.problems)


def test_answers_of_the_math_example() -> None:
    """Every step of every solution computes, and the last step gives the answer."""
    for line in (EXAMPLES / "math.jsonl").read_text("utf-8").splitlines():
        row = json.loads(line)
        steps, _, answer = row["answer"].partition("\n#### ")
        results = []
        for step in steps.split("\n"):
            _, _, formula = step.partition(": ")
            left, _, right = formula.partition(" = ")
            assert set(left) <= set("0123456789.+-*/() "), row["question"]
            assert eval(left) == pytest.approx(float(right)), row["question"]
            results.append(right)
        assert results and results[-1] == answer, row["question"]
