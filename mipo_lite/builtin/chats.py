"""Reads `requests.txt`: kinds of everyday request with the answers that fit them.

The format is described at the top of that file.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, field
from pathlib import Path

REQUESTS = Path(__file__).with_name("requests.txt")


@dataclass
class Block:
    """A kind of request: the facts that fit, ways to ask, answers with and without a fact."""

    id: str
    topics: list[str]
    asks: list[str] = field(default_factory=list)
    facts: list[str] = field(default_factory=list)
    generic: list[str] = field(default_factory=list)
    pairs: list[tuple[str, list[str]]] = field(default_factory=list)

    @property
    def direct(self) -> bool:
        return self.id.startswith("direct ")

    @property
    def neutral(self) -> bool:
        return self.id.startswith("neutral ")


def expand(rng: random.Random, template: str) -> str:
    """One alternative for every `[a|b]`."""
    return re.sub(r"\[([^\]]*)\]", lambda found: rng.choice(found[1].split("|")), template)


def load_blocks(path: Path = REQUESTS) -> tuple[Block, ...]:
    """All blocks of the file, in its order."""
    blocks: list[Block] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        mark, text = line[: line.index(" ")], line[line.index(" ") + 1 :].strip()
        if mark == "==":
            name, _, topics = text.partition("|")
            blocks.append(Block(name.strip(), topics.split()))
        elif mark == "=":
            ask, *answers = re.split(r"\|(?![^\[]*\])", text)
            blocks[-1].pairs.append((ask, answers))
        else:
            kinds = {"?": blocks[-1].asks, "+": blocks[-1].facts, "-": blocks[-1].generic}
            kinds[mark].append(text)
    return tuple(blocks)
