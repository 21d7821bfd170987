"""Rows of a file of problems: JSONL, a JSON array, CSV or TSV, or plain text.

Reads line by line within bounds and never gives up on a file for one bad row: what cannot be read
comes back as a `BadRow` with its line and the reason. What the columns mean is for `problems`.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from .errors import UserError

# Bytes. A longer line is no question: some 30,000 tokens. It is skipped without being held.
LONGEST_LINE = 128 * 1024
# Bytes of a file that is one JSON value and so cannot be read line by line.
LONGEST_JSON = 256 * 2**20

MMLU_COLUMNS = ("question", "a", "b", "c", "d", "answer")
_FIX = "Give JSONL, a JSON array, CSV, TSV, or text with one question a line, in UTF-8."


@dataclass(frozen=True)
class Row:
    """A row: its line in the file, from 1, and its values by column name in lower case."""

    line: int
    values: dict[str, Any]


@dataclass(frozen=True)
class BadRow:
    """A row that is not used, and why, without any of its text."""

    line: int
    reason: str


def read_rows(path: Path) -> Iterator[Row | BadRow]:
    """All rows of `path`, by its suffix and its first character; blank lines are no rows.

    Raises UserError when there is no such file or it is of another kind.
    """
    if path.suffix.lower() in (".parquet", ".arrow", ".xlsx", ".xls", ".gz", ".zip", ".zst"):
        raise UserError(f"{path} is of a kind that is not read.", _FIX)
    try:
        with path.open("rb") as file:
            if path.suffix.lower() in (".csv", ".tsv"):
                yield from _csv(file, "\t" if path.suffix.lower() == ".tsv" else ",")
            elif path.suffix.lower() in (".jsonl", ".json", ".ndjson"):
                start = file.read(4096)
                file.seek(0)
                is_array = start.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["
                yield from _array(file, path) if is_array else _jsonl(file)
            else:
                for row in _lines(file):
                    if isinstance(row, BadRow):
                        yield row
                    elif row[1].strip():
                        yield Row(row[0], {"question": row[1].strip()})
    except FileNotFoundError as error:
        raise UserError(f"There is no file {path}.", _FIX) from error
    except IsADirectoryError as error:
        raise UserError(f"{path} is a directory.", _FIX) from error
    except PermissionError as error:
        raise UserError(
            f"{path} can not be read.", "Give yourself permission to read it."
        ) from error


def _lines(file: BinaryIO) -> Iterator[tuple[int, str] | BadRow]:
    """Numbered lines with their line ends, none longer than `LONGEST_LINE`."""
    number = 0
    while line := file.readline(LONGEST_LINE + 1):
        number += 1
        if len(line) > LONGEST_LINE:
            size = len(line)
            while not line.endswith(b"\n") and (line := file.readline(LONGEST_LINE)):
                size += len(line)
            yield BadRow(number, f"the line is {size / 2**20:.1f} MiB long")
            continue
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError:
            yield BadRow(number, "not UTF-8 text")
            continue
        if "\0" in text:
            yield BadRow(number, "not text: it holds a NUL byte")
            continue
        yield number, text


def _jsonl(file: BinaryIO) -> Iterator[Row | BadRow]:
    for row in _lines(file):
        if isinstance(row, BadRow):
            yield row
            continue
        number, text = row
        if not text.strip():
            continue
        try:
            yield _row(number, json.loads(text))
        except json.JSONDecodeError as error:
            yield BadRow(number, f"broken JSON at column {error.colno}")
        except (ValueError, RecursionError):  # a number of 5,000 digits, brackets without end
            yield BadRow(number, "JSON that can not be read")


def _array(file: BinaryIO, path: Path) -> Iterator[Row | BadRow]:
    """The elements of one JSON array; after a broken one nothing can be told apart any more."""
    data = file.read(LONGEST_JSON + 1)
    if len(data) > LONGEST_JSON:
        raise UserError(
            f"{path} is one JSON array of more than {LONGEST_JSON // 2**20} MiB.",
            "Write it as JSONL, one object a line.",
        )
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not text in UTF-8.", _FIX) from error
    decoder = json.JSONDecoder()
    at = _skip(text, text.index("[") + 1)
    counted = line = 1
    start = 0
    while text[at : at + 1] != "]":
        line += text.count("\n", start, at)
        start = at
        counted = line
        try:
            value, at = decoder.raw_decode(text, at)
            at = _skip(text, at)
            if text[at : at + 1] not in (",", "]"):
                raise ValueError("no comma")
        except (ValueError, RecursionError):
            yield BadRow(counted, "broken JSON; nothing after it in this array can be read")
            return
        if at - start > LONGEST_LINE:
            yield BadRow(counted, f"the row is {(at - start) / 2**20:.1f} MiB long")
        else:
            yield _row(counted, value)
        if text[at] == ",":
            at = _skip(text, at + 1)


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at].isspace():
        at += 1
    return at


def _row(number: int, value: Any) -> Row | BadRow:
    if not isinstance(value, dict):
        return BadRow(number, "not a JSON object")
    return Row(number, {str(key).strip().lower(): item for key, item in value.items()})


def _csv(file: BinaryIO, delimiter: str) -> Iterator[Row | BadRow]:
    """Rows of a CSV file with a header, or of MMLU's own files, which have six columns and none."""
    bad: list[BadRow] = []
    taken: list[int] = []  # the lines of the record that is being read

    def lines() -> Iterator[str]:
        for row in _lines(file):
            if isinstance(row, BadRow):
                bad.append(row)
            else:
                taken.append(row[0])
                yield row[1]

    reader = csv.reader(lines(), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        taken.clear()
        try:
            fields = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            yield BadRow(taken[0], _csv_reason(str(error)))
            continue
        line = taken[0]
        if not any(field.strip() for field in fields):
            continue
        if header is None:
            if _is_mmlu(fields):
                header = list(MMLU_COLUMNS)
            else:
                header = [field.strip().lower() for field in fields]
                continue
        if len(fields) != len(header):
            yield BadRow(line, f"{len(fields)} fields where the header has {len(header)}")
            continue
        yield Row(line, dict(zip(header, fields, strict=True)))
    yield from bad


def _is_mmlu(fields: list[str]) -> bool:
    return len(fields) == len(MMLU_COLUMNS) and fields[-1].strip() in ("A", "B", "C", "D")


def _csv_reason(message: str) -> str:
    if "unexpected end" in message:
        return "a quote that is not closed; nothing after it can be read"
    if "field larger" in message:
        return "a field of more than 128 KiB; perhaps a quote is not closed"
    return "broken CSV: text between a closing quote and the next comma"
