"""Prompt sets: everyday requests, split into those to train on and those held out.

The shipped list is used for every base. A user's own file holds one request a line, or JSONL
with a "text" field (and optionally "topics" and "split").
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .contexts import Persona, Split
from .errors import UserError

if TYPE_CHECKING:
    from .base import Base

HELD_OUT_SHARE = 1 / 3


@dataclass(frozen=True)
class Prompt:
    """A request.

    Attributes:
        topics: the kinds of fact that fit it, for scoring by string match; () when no fact
            about the user should matter.
    """

    id: str
    text: str
    topics: tuple[str, ...] = ()
    split: Split = "train"

    def as_row(self) -> dict[str, Any]:
        row = {"id": self.id, "text": self.text, "topics": list(self.topics)}
        return row | {"split": self.split}


@dataclass(frozen=True)
class Condition:
    """What a response is conditioned on: a prompt, and a context or none."""

    prompt: Prompt
    context: Persona | None = None

    def encode(self, base: Base) -> list[int]:
        """Token ids of the chat, up to where the assistant's answer begins."""
        return base.encode(self.prompt.text, self.context.text if self.context else None)


@cache
def shipped_prompts() -> tuple[Prompt, ...]:
    text = (resources.files("mipo_lite") / "data/prompts.jsonl").read_text("utf-8")
    return tuple(from_row(json.loads(line)) for line in text.splitlines())


def from_row(row: dict[str, Any]) -> Prompt:
    return Prompt(row["id"], row["text"], tuple(row["topics"]), row["split"])


def load_prompts(path: Path | None) -> tuple[Prompt, ...]:
    """The user's prompts, or the shipped ones when `path` is None.

    Where the file does not say which prompts are held out, a third is, chosen by a fixed seed.

    Raises UserError for a file that can not be read, a broken line, or fewer than 6 prompts.
    """
    if path is None:
        return shipped_prompts()
    fix = 'Write one request a line, or JSONL with a "text" field.'
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The prompts {path} can not be read as text.", fix) from error
    is_jsonl = path.suffix in (".jsonl", ".json")
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        row: Any = {"text": line}
        if is_jsonl:
            try:
                row = json.loads(line)
                if not isinstance(row, dict) or not isinstance(row.get("text"), str):
                    raise ValueError("no text")
            except (ValueError, RecursionError) as error:
                raise UserError(f'{path}, line {number}, has no "text".', fix) from error
            _check_row(row, f"{path}, line {number},")
        if row["text"].strip():
            rows.append(row)
    unique = {row["text"].strip(): row for row in rows}
    if len(unique) < 6:
        raise UserError(f"{path} holds {len(unique)} different prompts; 6 is the least.", fix)
    held_out = _choose_held_out(list(unique))
    prompts = tuple(
        Prompt(
            id=f"p{number:04d}",
            text=text,
            topics=tuple(row.get("topics", ())),
            split=row.get("split", "held_out" if text in held_out else "train"),
        )
        for number, (text, row) in enumerate(unique.items(), start=1)
    )
    for split in ("train", "held_out"):
        if all(prompt.split != split for prompt in prompts):
            raise UserError(
                f"{path} has no prompt whose split is {split}.",
                "Give some of each, or leave the splits out.",
            )
    return prompts


def may_matter(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Those that a fact about the user may fit.

    A user's own prompts do not say which facts fit them: all of them may then.
    """
    marked = any(prompt.topics for prompt in prompts)
    return [prompt for prompt in prompts if prompt.topics or not marked]


def _check_row(row: dict[str, Any], where: str) -> None:
    """Raises UserError for a split or topics that are not what they have to be."""
    if row.get("split", "train") not in ("train", "held_out"):
        raise UserError(f"{where} has a split that does not exist.", "Use train or held_out.")
    topics = row.get("topics", [])
    if not isinstance(topics, list) or not all(isinstance(topic, str) for topic in topics):
        raise UserError(f"{where} has topics that are no list of words.", 'For example: ["pet"].')


def _choose_held_out(texts: list[str]) -> set[str]:
    return set(random.Random(0).sample(texts, max(2, round(len(texts) * HELD_OUT_SHARE))))
