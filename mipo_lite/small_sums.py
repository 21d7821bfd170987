"""Small sums in words: as the built-in base was taught them, and in words that it was not.

`small_sum` writes a sum as the corpus of the built-in base has it: the base gets those right. Asked
in other words it gets some right, some by chance, and some not at all, as real models do at the
edge of what they can. `reworded_sum` is of that kind; `examples/sums.jsonl` was written by

    python -m mipo_lite.small_sums --questions examples/sums.jsonl

and with `--seed 1 --other-than examples/sums.jsonl` it writes others of the same kind.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated

import typer

from .run import atomic_write, read_jsonl

NAMES = [
    "Ada",
    "Ben",
    "Cleo",
    "Dan",
    "Eva",
    "Finn",
    "Gus",
    "Hanna",
    "Ida",
    "Jon",
    "Kim",
    "Leo",
    "Mia",
    "Nora",
    "Otto",
    "Pia",
    "Rob",
    "Sue",
    "Tom",
    "Una",
]
THINGS = [
    "apples",
    "books",
    "coins",
    "stamps",
    "cards",
    "eggs",
    "pens",
    "cups",
    "keys",
    "balls",
    "chairs",
    "flowers",
]
MORE = ("buys {} more", "finds {} more", "gets {} from a friend", "makes {}")
LESS = ("loses {}", "sells {}", "gives away {}", "breaks {}")


# Wordings that stand in no training text of the built-in base.
STORIES = (
    "First {who} has {a} {things}, then {who} {happens}. How many {things} does {who} have?",
    "In the morning {who} has {a} {things} and in the evening {who} {happens}. "
    "How many {things} does {who} have now?",
    "{who} has {a} {things}. Then {who} {happens}. How many {things} does {who} have now?",
    "{who} has {a} {things} and {happens}. Tell me how many {things} {who} has now.",
    "Good morning! I need some help with a sum. {who} has {a} {things} and {happens}. "
    "How many {things} does {who} have now?",
)
BARE = (
    "What is the result of {a} {word} {b}?",
    "I forgot how much {a} {word} {b} is. Help me.",
    "Work out {a} {word} {b}.",
)


def small_sum(rng: random.Random) -> tuple[str, str, int]:
    """(question, response, result) as the built-in base was taught them."""
    a, b, word, result = _draw(rng)
    rng.random()  # drawn for nothing: the shipped weights' corpus was made in this order
    if rng.random() < 0.4:
        ask = rng.choice(("What is {} {} {}?", "How much is {} {} {}?", "Tell me {} {} {}."))
        return ask.format(a, word, b), f"{a} {word} {b} is {result}.", result
    who, things = rng.choice(NAMES), rng.choice(THINGS)
    happens = rng.choice(MORE if word == "plus" else LESS).format(b)
    ask = f"{who} has {a} {things} and {happens}. How many {things} does {who} have now?"
    return ask, f"{a} {word} {b} is {result}. {who} has {result} {things}.", result


def reworded_sum(rng: random.Random) -> tuple[str, int]:
    """(question, result) in words that the built-in base was not taught."""
    a, b, word, result = _draw(rng)
    happens = rng.choice(MORE if word == "plus" else LESS).format(b)
    who, things = rng.choice(NAMES), rng.choice(THINGS)
    wording = rng.choice((*STORIES, *BARE))
    return wording.format(a=a, b=b, word=word, happens=happens, who=who, things=things), result


def questions(
    count: int, seed: int, reworded: bool = False, known: Iterable[str] = ()
) -> Iterator[dict[str, str]]:
    """`count` different sums with their answers, none of `known`, as rows of a problem file."""
    rng = random.Random(f"small sums {seed}")
    seen = set(known)
    number = 0
    while number < count:
        ask, result = reworded_sum(rng) if reworded else small_sum(rng)[::2]
        if ask not in seen:
            seen.add(ask)
            number += 1
            yield {"id": f"sum-{number:03d}", "question": ask, "answer": str(result)}


def _draw(rng: random.Random) -> tuple[int, int, str, int]:
    """a, b, plus or minus, and the result, which is never negative."""
    a, b = rng.randint(1, 9), rng.randint(1, 9)
    if rng.random() < 0.6 or a < b:
        return a, b, "plus", a + b
    return a, b, "minus", a - b


def main(
    path: Annotated[Path, typer.Option("--questions", help="Write them to this file.")],
    count: Annotated[int, typer.Option("--count")] = 300,
    seed: Annotated[int, typer.Option("--seed")] = 0,
    other_than: Annotated[
        Path | None, typer.Option("--other-than", help="A file whose questions not to repeat.")
    ] = None,
) -> None:
    """Write a file of reworded sums."""
    known = [row["question"] for row in read_jsonl(other_than)] if other_than else []
    with atomic_write(path, 0o644) as partial:
        rows = questions(count, seed, reworded=True, known=known)
        lines = (json.dumps(row) + "\n" for row in rows)
        partial.write_text("".join(lines), "utf-8")


if __name__ == "__main__":
    typer.run(main)
