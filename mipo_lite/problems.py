"""Problems: questions read from a file, with their reference answers where the file has them.

JSONL, JSON arrays, CSV and TSV, and plain text with one question a line; the columns of GSM8K,
MATH, SVAMP, MMLU and ARC are known by name. A row that cannot be used is left out, with its line
and the reason, and the caller is told before it gets the rows that can.

Answers are for the evaluation alone. Nothing in here lets an answer decide whether a question is
used, how it is worded, or on which side of the split it falls.
"""

from __future__ import annotations

import json
import random
import re
import unicodedata
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .answers import CHOICE_LABELS, parse_choice, reference_answer
from .contexts import Split
from .errors import UsageError, UserError
from .problem_files import BadRow, Row, read_rows
from .prompts import Prompt

# Looked for in this order, in any case; the first that the file has is taken.
QUESTION_COLUMNS = ("question", "problem", "prompt", "question_stem", "text")
ANSWER_COLUMNS = ("answer", "answerkey", "final_answer", "solution", "target")
ID_COLUMNS = ("id", "idx", "question_id")

SHOWN_BAD_ROWS = 8
HELD_OUT_SHARE = 1 / 3
LEAST = 4


@dataclass(frozen=True)
class Problem:
    """A question.

    Attributes:
        text: what the model is asked, with the choices if there are any.
        line: where it stands in the file, from 1.
        choices: their texts, A first; () for a free answer.
        answer: what the evaluation compares with, a number as "7/2" or "12", a letter where there
            are choices, else text; None when the file gives none that is usable.
    """

    id: str
    text: str
    line: int
    choices: tuple[str, ...] = ()
    answer: str | None = None
    split: Split = "train"

    @property
    def prompt(self) -> Prompt:
        """The question as what is trained on: without its answer."""
        return Prompt(self.id, self.text, split=self.split)

    def as_row(self) -> dict[str, Any]:
        """A line of the run's problems.jsonl; the answer is kept in a file of its own."""
        names = ("id", "text", "line", "split")
        return {name: getattr(self, name) for name in names} | {"choices": list(self.choices)}

    @classmethod
    def from_row(cls, row: dict[str, Any], answer: str | None = None) -> Problem:
        choices = tuple(row["choices"])
        return cls(row["id"], row["text"], row["line"], choices, answer, row["split"])


@dataclass(frozen=True)
class ProblemFile:
    """A file of problems as it was read.

    Attributes:
        problems: the rows that can be used, in the order of the file.
        bad: the rows that cannot, by line.
        unscored: rows that are used, but whose answer is missing or cannot be read.
    """

    path: Path
    problems: tuple[Problem, ...]
    bad: tuple[BadRow, ...]
    unscored: tuple[BadRow, ...]


def load_problems(
    path: Path,
    tell: Callable[[str], None],
    *,
    question_column: str | None = None,
    answer_column: str | None = None,
) -> ProblemFile:
    """Read the problems of `path`; `tell` hears what is not used before anything is returned.

    Raises:
        UserError: the file cannot be read, or holds fewer than `LEAST` different questions.
        UsageError: it has no question column, or not the one that was named.
    """
    found = parse_problems(path, question_column, answer_column)
    for line in describe(found):
        tell(line)
    if len(found.problems) < LEAST:
        count = _count(len(found.problems), "usable question")
        alone = [
            f" Line {only.line} has no other to be contrasted with." for only in found.problems
        ]
        raise UserError(
            f"{path} holds {count}; {LEAST} is the least.{alone[0] if len(alone) == 1 else ''}",
            "A question is contrasted with other ones: add some; a hundred are a good start.",
        )
    return found


def parse_problems(
    path: Path, question_column: str | None = None, answer_column: str | None = None
) -> ProblemFile:
    """Like `load_problems`, silently and with no least number of questions."""
    rows: list[Row] = []
    bad: list[BadRow] = []
    for row in read_rows(path):
        rows.append(row) if isinstance(row, Row) else bad.append(row)
    read_question = _question_reader(path, rows, question_column)
    read_answer = _answer_reader(path, rows, answer_column)
    problems: list[Problem] = []
    unscored: list[BadRow] = []
    first_line: dict[str, int] = {}
    for row in rows:
        try:
            problem, why_unscored = _problem(row, read_question, read_answer)
            keys = {f"question {normalized(problem.text)}": "the same question as line"}
            if _value(row, ID_COLUMNS) is not None:
                keys[f"id {problem.id}"] = "the same id as line"
            for key, words in keys.items():
                if key in first_line:
                    raise ValueError(f"{words} {first_line[key]}")
        except ValueError as error:
            bad.append(BadRow(row.line, str(error)))
            continue
        first_line |= dict.fromkeys(keys, row.line)
        problems.append(problem)
        if why_unscored is not None:
            unscored.append(BadRow(row.line, why_unscored))
    bad.sort(key=lambda row: row.line)
    return ProblemFile(path, tuple(problems), tuple(bad), tuple(unscored))


def describe(found: ProblemFile) -> list[str]:
    """What the user has to know before the good rows are used, as lines of text."""
    lines = []
    if found.bad:
        rows = _count(len(found.bad) + len(found.problems), "row")
        lines.append(f"{found.path}: {len(found.bad)} of {rows} can not be used.")
        lines += [f"  line {row.line}: {row.reason}" for row in found.bad[:SHOWN_BAD_ROWS]]
        if len(found.bad) > SHOWN_BAD_ROWS:
            lines.append(f"  and {len(found.bad) - SHOWN_BAD_ROWS} more")
    if 0 < len(found.unscored) < len(found.problems):
        first = found.unscored[0]
        lines.append(
            f"{found.path}: {_count(len(found.unscored), 'answer')} can not be scored; the "
            f"questions are used (line {first.line}: {first.reason})."
        )
    return lines


def split_problems(
    problems: Sequence[Problem], evaluation: Sequence[Problem] | None = None
) -> tuple[tuple[Problem, ...], int]:
    """Mark the questions to train on and those held out; the two sides share no question.

    Args:
        evaluation: the questions of another file, to hold out; None holds out a third of
            `problems`, chosen by a fixed seed from their number alone.

    Returns all problems with their split, and how many of `problems` were left out because they
    are also held out.
    """
    if evaluation is None:
        held_out = max(2, round(len(problems) * HELD_OUT_SHARE))
        chosen = set(random.Random(0).sample(range(len(problems)), held_out))
        return tuple(
            replace(problem, split="held_out" if number in chosen else "train")
            for number, problem in enumerate(problems)
        ), 0
    asked = {normalized(problem.text) for problem in evaluation}
    train = [
        replace(problem, split="train")
        for problem in problems
        if normalized(problem.text) not in asked
    ]
    held = [replace(problem, id=f"eval-{problem.id}", split="held_out") for problem in evaluation]
    return (*train, *held), len(problems) - len(train)


def normalized(text: str) -> str:
    """What two wordings of the same question share: no case, spacing or closing punctuation."""
    text = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(text.split()).rstrip(" .?!:")


def _problem(
    row: Row, read_question: Callable[[Row], str], read_answer: Callable[[Row], Any]
) -> tuple[Problem, str | None]:
    """The problem of a row, and why its answer cannot be scored. ValueError for a bad row."""
    question = read_question(row)
    labels, choices = _choices(row)
    text = question
    if choices:
        letters = CHOICE_LABELS[: len(choices)]
        text = "\n".join([question, *map("{}. {}".format, letters, choices)])
    given = read_answer(row)
    answer = why = None
    if given is None or not str(given).strip():
        why = "no answer"
    elif choices:
        answer = parse_choice(given, labels, choices)
        why = "the answer is none of the choices" if answer is None else None
    else:
        answer = reference_answer(str(given))
    row_id = _value(row, ID_COLUMNS)
    name = f"q{row.line}" if row_id is None else str(row_id)
    return Problem(name, text, row.line, choices, answer), why


def _question_reader(path: Path, rows: Sequence[Row], given: str | None) -> Callable[[Row], str]:
    """How to get the question out of a row of this file."""
    columns = {column for row in rows for column in row.values}
    if given is not None:
        if rows and given.lower() not in columns:
            raise UsageError(f"{path} has no column {given!r}.", _columns(columns))
        names: tuple[str, ...] = (given.lower(),)
    elif {"body", "question"} <= columns:
        names = ("body", "question")
    else:
        names = tuple(name for name in QUESTION_COLUMNS if name in columns)[:1]
    if rows and not names:
        raise UsageError(f"{path} has no question column.", _columns(columns))

    def read(row: Row) -> str:
        parts = []
        for name in names:
            part = row.values.get(name)
            if isinstance(part, dict):  # ARC as first published
                part = part.get("stem")
            if part is None or part == "":
                raise ValueError(f"no {name}")
            if not isinstance(part, str):
                raise ValueError(f"{name} is not text")
            if not part.strip():
                raise ValueError(f"no {name}")
            parts.append(part.strip())
        if len(parts) == 2 and parts[0][-1].isalnum():  # SVAMP leaves the full stop out
            parts[0] += "."
        return " ".join(parts)

    return read


def _answer_reader(path: Path, rows: Sequence[Row], given: str | None) -> Callable[[Row], Any]:
    columns = {column for row in rows for column in row.values}
    if given is not None and rows and given.lower() not in columns:
        raise UsageError(f"{path} has no column {given!r}.", _columns(columns, "--answer-column"))
    names = ANSWER_COLUMNS if given is None else (given.lower(),)
    name = next((name for name in names if name in columns), None)
    return lambda row: None if name is None else row.values.get(name)


def _choices(row: Row) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The labels that the file gives the choices, and their texts; both () without choices.

    Raises ValueError when they are not what any known layout has.
    """
    found: Any = row.values.get("choices", row.values.get("options"))
    if found is None and isinstance(row.values.get("question"), dict):
        found = row.values["question"].get("choices")
    if found is None:
        letters = [label for label in CHOICE_LABELS if row.values.get(label.lower())]
        texts: list[Any] = [row.values[label.lower()] for label in letters]
        if len(letters) < 2:
            return (), ()
        return tuple(letters), _texts(texts)
    labels: Any = None
    if isinstance(found, str):
        found = _listed(found)
    if isinstance(found, dict):
        labels, found = found.get("label"), found.get("text")
    elif isinstance(found, list) and found and all(isinstance(part, dict) for part in found):
        labels = [part.get("label") for part in found]
        found = [part.get("text") for part in found]
    if not isinstance(found, list) or not 2 <= len(found) <= len(CHOICE_LABELS):
        raise ValueError(f"choices are not a list of 2 to {len(CHOICE_LABELS)}")
    if labels is None:
        labels = CHOICE_LABELS[: len(found)]
    if not isinstance(labels, Sequence) or len(labels) != len(found):
        raise ValueError("not as many labels as choices")
    return tuple(map(str, labels)), _texts(found)


def _listed(text: str) -> Any:
    """The choices in one field of a CSV file: as JSON, or with `|` between them."""
    if text[:1] in ("[", "{"):
        with suppress(ValueError):
            return json.loads(text)
    return [part.strip() for part in text.split("|")]


def _texts(choices: Sequence[Any]) -> tuple[str, ...]:
    texts = tuple(
        str(choice).strip() for choice in choices if isinstance(choice, str | int | float)
    )
    if len(texts) < len(choices) or not all(texts):
        raise ValueError("a choice is empty")
    return texts


def _value(row: Row, names: Sequence[str]) -> Any:
    return next((row.values[n] for n in names if row.values.get(n) not in (None, "")), None)


def _columns(columns: set[str], flag: str = "--question-column") -> str:
    """What to do; names of columns only if they look like names, and not like a first row."""
    if not all(re.fullmatch(r"[\w.+-]+( [\w.+-]+)?", column) for column in columns):
        return f"Name it with {flag}; a CSV file needs the names of its columns in the first line."
    return f"Name it with {flag}; the file's columns: {', '.join(sorted(columns)[:12]) or 'none'}."


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
