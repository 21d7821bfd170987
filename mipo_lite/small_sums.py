"""Sums up to 9 + 9 in words, and a base that is taught to get them right more often than not.

The built-in base gets few sums right: too few for right answers to rise or fall by anything but
chance. The comparison in `baselines` can therefore start from the built-in base after a short
lesson whose answers are right in 65 of 100 cases. What comes out of that answers
rightly when it takes its best guess, and wrongly every third time when it samples, as real models
do on problems at the edge of what they can.

    python -m mipo_lite.small_sums --out runs/taught
    python -m mipo_lite.small_sums --questions examples/sums.jsonl
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer

from .base import Base, find_base, load_base
from .console import progress, quiet_libraries
from .run import atomic_directory, atomic_write

RIGHT = 0.65
STEPS = 300
BATCH = 32
LEARNING_RATE = 1e-3

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


def small_sum(rng: random.Random, right: float = 1.0) -> tuple[str, str, int]:
    """(question, response, right result); the response is right with probability `right`."""
    a, b = rng.randint(1, 9), rng.randint(1, 9)
    plus = rng.random() < 0.6 or a < b
    word, result = ("plus", a + b) if plus else ("minus", a - b)
    said = result
    if rng.random() >= right:
        said = rng.choice([n for n in range(max(0, result - 4), result + 5) if n != result])
    if rng.random() < 0.4:
        ask = rng.choice(("What is {} {} {}?", "How much is {} {} {}?", "Tell me {} {} {}."))
        return ask.format(a, word, b), f"{a} {word} {b} is {said}.", result
    who, things = rng.choice(NAMES), rng.choice(THINGS)
    happens = rng.choice(MORE if plus else LESS).format(b)
    ask = f"{who} has {a} {things} and {happens}. How many {things} does {who} have now?"
    return ask, f"{a} {word} {b} is {said}. {who} has {said} {things}.", result


def questions(count: int, seed: int) -> Iterator[dict[str, str]]:
    """`count` different questions with their answers, as rows of a problem file."""
    rng = random.Random(f"small sums {seed}")
    seen: set[str] = set()
    while len(seen) < count:
        ask, _, result = small_sum(rng)
        if ask not in seen:
            seen.add(ask)
            yield {"id": f"sum-{len(seen):03d}", "question": ask, "answer": str(result)}


def teach(base: Base, seed: int = 0) -> None:
    """Train all weights of an unquantized `base` on responses to small sums, right by `RIGHT`."""
    model, rng = base.model, random.Random(f"lesson {seed}")
    model.requires_grad_(True).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 20) * (1 - step / STEPS)
    )
    with progress("Teaching small sums", STEPS) as advance:
        for _ in range(STEPS):
            rows = [_encoded(base, *small_sum(rng, RIGHT)[:2]) for _ in range(BATCH)]
            width = max(len(ids) for ids, _ in rows)
            ids = torch.full((BATCH, width), base.pad_id)
            labels = torch.full((BATCH, width), -100)
            mask = torch.zeros((BATCH, width), dtype=torch.long)
            for i, (row, start) in enumerate(rows):
                ids[i, : len(row)] = torch.tensor(row)
                labels[i, start : len(row)] = torch.tensor(row[start:])
                mask[i, : len(row)] = 1
            model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            advance()
    model.requires_grad_(False).eval()


def _encoded(base: Base, ask: str, response: str) -> tuple[list[int], int]:
    """Token ids of question and response, and where the response begins."""
    prompt = base.encode(ask, None)
    answer = base.tokenizer(response, add_special_tokens=False)["input_ids"]
    return [*prompt, *answer, base.eos_ids[0]], len(prompt)


def main(
    out: Annotated[Path | None, typer.Option("--out", help="Where the taught base goes.")] = None,
    write: Annotated[Path | None, typer.Option("--questions", help="Write questions.")] = None,
    count: Annotated[int, typer.Option("--count")] = 300,
    base: Annotated[str, typer.Option("--base")] = "builtin",
    seed: Annotated[int, typer.Option("--seed")] = 0,
) -> None:
    """Write a file of small sums, or teach a base to answer them."""
    if write is not None:
        with atomic_write(write, 0o644) as partial:
            lines = (json.dumps(row) + "\n" for row in questions(count, seed))
            partial.write_text("".join(lines), "utf-8")
    if out is not None:
        torch.manual_seed(seed)
        taught = load_base(find_base(base), quantized=False)
        teach(taught, seed)
        with atomic_directory(out) as partial:
            taught.model.to(torch.bfloat16).save_pretrained(str(partial))
            taught.tokenizer.save_pretrained(str(partial))


if __name__ == "__main__":
    quiet_libraries()
    typer.run(main)
