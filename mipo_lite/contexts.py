"""Contexts: the user's page, the persona pool, and the messages for (context, prompt).

A context is the system message, the request is the user turn. Families whose chat template
knows no system role get both in the user turn. What a context *says* is never interpreted here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml

from .errors import UserError

Messages = list[dict[str, str]]
Facts = Mapping[str, str | Sequence[str]]  # topic -> what counts as using that fact
Split = Literal["train", "held_out"]


@dataclass(frozen=True)
class Persona:
    """A page about somebody.

    Attributes:
        id: "user" for the user's own page.
        text: the page.
        facts: topic -> strings that count as using that fact; only for scoring by string match.
    """

    id: str
    text: str
    facts: dict[str, list[str]] = field(default_factory=dict, compare=False)


def load_user_context(path: Path) -> str:
    """The text of me.txt.

    Raises UserError when it is missing, a directory, empty, or not UTF-8 text.
    """
    fix = "Write a text file about yourself (examples/me.txt shows one) and name it."
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"There is no file {path}.", fix) from error
    except IsADirectoryError as error:
        raise UserError(f"{path} is a directory.", fix) from error
    except PermissionError as error:
        raise UserError(
            f"{path} can not be read.", "Give yourself permission to read it."
        ) from error
    try:
        text = data.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not text in UTF-8.", "Save it as plain UTF-8 text.") from error
    if "\0" in text:
        raise UserError(f"{path} is not text in UTF-8.", "Save it as plain UTF-8 text.")
    if not text:
        raise UserError(f"{path} is empty.", fix)
    return text.replace("\r\n", "\n")


@cache
def persona_pool(split: Split) -> tuple[Persona, ...]:
    """The shipped personas of one split: every third is held out for the evaluation."""
    lines = (resources.files("mipo_lite") / "data/personas.jsonl").read_text("utf-8")
    rows = map(json.loads, lines.splitlines())
    return tuple(
        Persona(row["id"], row["text"].strip(), accepted(row["facts"]))
        for number, row in enumerate(rows)
        if (number % 3 == 2) == (split == "held_out")
    )


def load_facts(path: Path) -> dict[str, list[str]]:
    """Facts of a page, for scoring only: `me.facts.yaml` beside `me.txt`; {} without one.

    Raises UserError when the file is not a mapping of topics to strings.
    """
    file = path.with_suffix(".facts.yaml")
    if not file.is_file():
        return {}
    try:
        facts = yaml.safe_load(file.read_text("utf-8"))
        if not isinstance(facts, dict):
            raise ValueError("not a mapping")
        if any(value in (None, "", []) for value in facts.values()):
            raise ValueError("a topic without a fact")
        return accepted({str(topic): values for topic, values in facts.items()})
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise UserError(
            f"{file} is not a mapping of topics to strings.",
            "Write lines such as `pet: Biscuit`, or remove the file: it is only for scoring.",
        ) from error


def accepted(facts: Facts) -> dict[str, list[str]]:
    """Facts as topic -> list of accepted strings, however briefly they were written."""
    return {
        topic: [str(v) for v in (values if isinstance(values, (list, tuple)) else [values])]
        for topic, values in facts.items()
    }


def build_messages(prompt: str, context: str | None, system_role: bool = True) -> Messages:
    """The chat of one request, with or without a context.

    Args:
        system_role: False for a template without one; the context then opens the user turn.
    """
    if context is None:
        return [{"role": "user", "content": prompt}]
    if not system_role:
        return [{"role": "user", "content": f"{context}\n\n{prompt}"}]
    return [{"role": "system", "content": context}, {"role": "user", "content": prompt}]


def has_system_role(tokenizer: Any) -> bool:
    """Whether the chat template renders a system message (some raise, some leave it out)."""
    mark = "a-mark-that-no-template-contains"
    try:
        text = tokenizer.apply_chat_template(build_messages("x", mark), tokenize=False)
    except Exception:  # templates refuse with jinja's own error types
        return False
    return mark in text


def encode_prompt(tokenizer: Any, messages: Messages) -> list[int]:
    """Token ids of the messages, up to where the assistant's answer begins.

    Thinking, where a template offers it, is off: the pairs are about answers.
    """
    encoded = tokenizer.apply_chat_template(
        messages,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        enable_thinking=False,
    )
    return list(encoded["input_ids"])
