"""`python -m mipo_lite.builtin.measure [--model DIR]`: what the built-in base can and cannot do.

Prints, for profiles made afresh with values that were never trained on: how often a direct question
is answered greedily with the value, by topic and for phrasings kept from training; and for the
three evaluation contexts, on held-out prompts sampled at temperature 1: fact use and wrong facts.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mipo_lite.answers import find_answer
from mipo_lite.base import Base, BaseSource, load_base
from mipo_lite.builtin import values
from mipo_lite.builtin.chats import expand
from mipo_lite.builtin.corpus import PROMPTS, Mix, Profile, blocks, make_profile
from mipo_lite.builtin.facts import contains, fact_use, wrong_fact
from mipo_lite.small_sums import questions

MODEL = Path(__file__).with_name("model")
MADE_UP = Mix(topics=(4, 8), fillers=(0, 4), freer=True)


def invented_value(rng: random.Random, topic: str) -> str:
    """A value with at least one word that stands in none of the value tables."""
    tables = values.table_words()
    while True:
        value = values.TOPICS[topic](rng)
        if topic == "tone" or not set(value.lower().split()) <= tables:
            return value


def fresh_profile(rng: random.Random, held_out: bool) -> Profile:
    return make_profile(rng, replace(MADE_UP, held_out=held_out), draw=invented_value)


@torch.inference_mode()
def answers(
    base: Base,
    requests: list[tuple[str, str]],
    sampled: bool = False,
    seed: int = 0,
    batch_size: int = 64,
) -> list[str]:
    """Answers to (context, request) pairs, greedy or at temperature 1; an empty context is none."""
    torch.manual_seed(seed)
    texts = []
    for start in range(0, len(requests), batch_size):
        chats = []
        for context, request in requests[start : start + batch_size]:
            messages = [{"role": "system", "content": context}] if context else []
            chats.append([*messages, {"role": "user", "content": request}])
        batch = base.tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        )
        choice = {"do_sample": True, "top_k": 0} if sampled else {"do_sample": False}
        out = base.model.generate(**batch, max_new_tokens=48, **choice)
        width = batch["input_ids"].shape[1]
        texts += base.tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)
    return texts


def evaluation_people() -> list[dict[str, Any]]:
    lines = values.EVAL_CONTEXTS.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def direct_questions(rng: random.Random, topic: str, kind: str, count: int) -> list[str]:
    """`count` ways to ask for the fact itself."""
    block = next(block for block in blocks() if block.direct and block.topics == [topic])
    asks = []
    for _ in range(count):
        ask = expand(rng, rng.choice(block.asks)).replace("{kind}", kind)
        if topic == "pet":
            for animal in ("dog", "cat", "rabbit", "parrot"):
                ask = ask.replace(animal, kind)
        asks.append(ask)
    return asks


def count_right(
    base: Base, rows: list[tuple[str, list[str], str, str]]
) -> tuple[Counter[str], Counter[str]]:
    """(right answers, questions) by topic, of rows (topic, accepted, context, question)."""
    told = answers(base, [(row[2], row[3]) for row in rows])
    right: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    for (topic, accepted, _, _), answer in zip(rows, told, strict=True):
        asked[topic] += 1
        right[topic] += any(contains(answer, value) for value in accepted)
    return right, asked


def copying(
    base: Base, profiles: int, held_out: bool, seed: int
) -> tuple[Counter[str], Counter[str]]:
    """Direct questions about made-up values of fresh profiles, answered greedily."""
    rng = random.Random(seed)
    rows = []
    for _ in range(profiles):
        profile = fresh_profile(rng, held_out)
        for topic, value in profile.facts.items():
            if topic in values.TOPICS and topic != "tone":
                kind = profile.kinds.get(topic, "")
                [ask] = direct_questions(rng, topic, kind, 1)
                rows.append((topic, [value], profile.text, ask))
    return count_right(base, rows)


def copying_of_people(base: Base, seed: int) -> list[tuple[Counter[str], Counter[str]]]:
    """The same for the evaluation contexts, six questions for each fact."""
    rng = random.Random(seed)
    results = []
    for person in evaluation_people():
        rows = [
            (topic, accepted, person["text"], ask)
            for topic, accepted in person["facts"].items()
            for ask in direct_questions(rng, topic, person["kinds"].get(topic, ""), 6)
        ]
        results.append(count_right(base, rows))
    return results


def sampled_use(
    base: Base,
    times: int,
    seed: int,
    sampled: bool = True,
) -> list[dict[str, float]]:
    """Per evaluation context: share of held-out answers with a fitting fact, with a wrong one."""
    prompts = [json.loads(line) for line in PROMPTS.read_text(encoding="utf-8").splitlines()]
    prompts = [row for row in prompts if row["split"] == "held_out"] * times
    results = []
    for person in evaluation_people():
        requests = [(person["text"], row["text"]) for row in prompts]
        told = answers(base, requests, sampled, seed)
        uses, wrong = [], []
        for row, answer in zip(prompts, told, strict=True):
            use = fact_use(answer, person["facts"], row["topics"])
            if use is not None:
                uses.append(use)
                wrong.append(wrong_fact(answer, person["facts"], person["text"], row["text"]))
        results.append(
            {
                "answers": len(uses),
                "fact_use": sum(uses) / len(uses),
                "wrong_fact": sum(wrong) / len(wrong),
            }
        )
    return results


def leaks(base: Base, seed: int) -> float:
    """Share of sampled answers without any context that contain a fact of an evaluation person."""
    prompts = [json.loads(line) for line in PROMPTS.read_text(encoding="utf-8").splitlines()]
    prompts = [row for row in prompts if row["topics"]]
    told = answers(base, [("", row["text"]) for row in prompts], True, seed)
    facts = [person["facts"] for person in evaluation_people()]
    found = [
        fact_use(answer, person, row["topics"]) is True
        for row, answer in zip(prompts, told, strict=True)
        for person in facts
    ]
    return sum(found) / len(found)


def sums(base: Base, count: int, seed: int, sampled: bool) -> int:
    """Small sums answered with the right result, of `count`."""
    asked = list(questions(count, seed))
    told = answers(base, [("", row["question"]) for row in asked], sampled, seed)
    return sum(
        find_answer(answer) == row["answer"] for answer, row in zip(told, asked, strict=True)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--nf4", action="store_true", help="quantized as personalize uses it")
    parser.add_argument("--profiles", type=int, default=60)
    parser.add_argument("--seed", type=int, default=12345)
    given = parser.parse_args()
    base = load_base(BaseSource("builtin", given.model), quantized=given.nf4)
    print(f"{given.model}, {'NF4' if given.nf4 else 'float32'}")
    for held_out in (False, True):
        right, asked = copying(base, given.profiles, held_out, given.seed)
        print(
            f"\nmade-up values copied greedily, phrasings {'not ' if held_out else ''}trained on:"
        )
        print(f"  all {right.total()} of {asked.total()} = {right.total() / asked.total():.3f}")
        print("  " + ", ".join(f"{topic} {right[topic]}/{asked[topic]}" for topic in sorted(asked)))
    print("\nvalues of the evaluation contexts copied greedily, six direct questions for each:")
    for right, asked in copying_of_people(base, given.seed):
        print(
            f"  {right.total()} of {asked.total()} = {right.total() / asked.total():.3f}  ", end=""
        )
        print(", ".join(f"{topic} {right[topic]}/{asked[topic]}" for topic in sorted(asked)))
    for sampled in (True, False):
        times = 2 if sampled else 1
        print(f"\nevaluation contexts, held-out prompts, {'sampled' if sampled else 'greedy'}:")
        rows = sampled_use(base, times, given.seed, sampled)
        for row in rows:
            print("  " + ", ".join(f"{name} {figure:.3f}" for name, figure in row.items()))
        for name in ("fact_use", "wrong_fact"):
            print(f"  mean {name} {sum(row[name] for row in rows) / len(rows):.3f}")
    print(f"\nfacts without context, sampled: {leaks(base, given.seed):.4f}")
    results = [sums(base, 100, given.seed, sampled) for sampled in (False, True)]
    print(f"small sums: {results[0]} of 100 greedy, {results[1]} of 100 sampled")


if __name__ == "__main__":
    main()
