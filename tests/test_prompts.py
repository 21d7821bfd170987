"""Prompt sets: the shipped one, and a user's own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mipo_lite.errors import UserError
from mipo_lite.metrics import words
from mipo_lite.prompts import load_prompts, shipped_prompts

REQUESTS = [f"Request number {i}" for i in range(9)]


def test_the_shipped_list_is_large_split_and_disjoint() -> None:
    prompts = shipped_prompts()
    train = {" ".join(words(p.text)) for p in prompts if p.split == "train"}
    held_out = {" ".join(words(p.text)) for p in prompts if p.split == "held_out"}
    assert len(train) + len(held_out) == len(prompts) >= 200
    assert len(held_out) >= 80
    assert not train & held_out
    assert len({p.id for p in prompts}) == len(prompts)


def test_plain_lines_are_split_once_and_for_all(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join([*REQUESTS, "", REQUESTS[0]]))
    first, second = load_prompts(file), load_prompts(file)
    assert first == second
    assert [p.text for p in first] == REQUESTS
    assert sum(p.split == "held_out" for p in first) == 3


def test_jsonl_may_say_its_own_split(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    rows = [{"text": text, "split": "held_out"} for text in REQUESTS[:3]]
    rows += [{"text": text, "split": "train", "topics": ["pet"]} for text in REQUESTS[3:]]
    file.write_text("\n".join(map(json.dumps, rows)))
    prompts = load_prompts(file)
    assert [p.split for p in prompts] == ["held_out"] * 3 + ["train"] * 6
    assert prompts[-1].topics == ("pet",)


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("p.txt", b"one\ntwo\n", "{} holds 2 different prompts; 6 is the least."),
        ("p.txt", b"\xff\xfe\x00", "The prompts {} can not be read as text."),
        ("p.jsonl", b'{"text": "a"}\n{"txt": "b"}\n', '{}, line 2, has no "text".'),
        ("p.jsonl", b"{", '{}, line 1, has no "text".'),
    ],
)
def test_bad_prompt_files(tmp_path: Path, name: str, content: bytes, what: str) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(UserError) as error:
        load_prompts(file)
    assert error.value.what == what.format(file)
    assert error.value.fix == 'Write one request a line, or JSONL with a "text" field.'
