"""`python -m mipo_lite.builtin.verdicts --out DIR`: does the verdict say what is true?

Trains adapters whose worth is known beforehand on the built-in base, evaluates each, and prints a
table of verdicts beside what they ought to be:

- MIPO as the recipe has it: improved;
- an adapter of zeros, and one trained on pairs whose chosen and rejected response come from the
  same distribution: no change;
- MIPO at fifty times the learning rate, and an adapter that has learned the page by heart: harmed.

Three invented users, three seeds. What is in DIR already is not done again.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from ..base import Base, find_base, load_base
from ..console import console, quiet_libraries
from ..contexts import Persona, accepted, persona_pool
from ..prompts import shipped_prompts
from ..recipe import Recipe, load_recipe
from ..run import append_jsonl, read_json, read_jsonl, write_json

CONTEXTS = Path(__file__).with_name("eval_contexts.jsonl")


@dataclass(frozen=True)
class Case:
    """One user and seed.

    Attributes:
        directory: holds the pairs and, in a directory each, the adapters.
    """

    base: Base
    user: Persona
    recipe: Recipe
    directory: Path


def mipo(case: Case, adapter: Path) -> None:
    _train(case, adapter, *_pairs(case, "pairs"))


def zeros(case: Case, adapter: Path) -> None:
    from peft import get_peft_model

    from ..training import lora_config

    model = get_peft_model(case.base.model, lora_config(case.recipe))  # B starts at zero
    model.save_pretrained(str(adapter))
    model.unload()


def same_distribution(case: Case, adapter: Path) -> None:
    _train(case, adapter, *_pairs(case, "same", same=True))


def fast(case: Case, adapter: Path) -> None:
    recipe = case.recipe.model_copy(update={"learning_rate": 50 * case.recipe.learning_rate})
    # Training would not keep it; here the verdict has to see it.
    _train(replace(case, recipe=recipe), adapter, *_pairs(case, "pairs"), keep_any=True)


def by_heart(case: Case, adapter: Path) -> None:
    """SFT on the page itself as the answer to every request."""
    page = case.base.tokenizer(case.user.text, add_special_tokens=False)["input_ids"]
    pairs, scores = _pairs(case, "pairs")
    pairs = [pair | {"chosen_ids": [*page, case.base.eos_ids[0]]} for pair in pairs]
    recipe = case.recipe.model_copy(update={"loss": "sft"})
    _train(replace(case, recipe=recipe), adapter, pairs, scores)


Maker = Callable[[Case, Path], None]
KINDS: dict[str, tuple[Maker, str]] = {
    "MIPO": (mipo, "improved"),
    "zeros": (zeros, "no change"),
    "same distribution": (same_distribution, "no change"),
    "50 x learning rate": (fast, "harmed"),
    "page by heart": (by_heart, "harmed"),
}


def main(
    out: Annotated[Path, typer.Option(help="Where adapters and results are kept.")],
    base: Annotated[str, typer.Option(help="builtin, or a directory.")] = "builtin",
    contexts: Annotated[str, typer.Option(help="Users, from 0.")] = "0,1,2",
    seeds: Annotated[str, typer.Option(help="Seeds.")] = "0,1,2",
    kinds: Annotated[str, typer.Option(help="Which of the adapters.")] = ",".join(KINDS),
) -> None:
    quiet_libraries()
    loaded = load_base(find_base(base))
    users = [
        Persona(row["id"], row["text"], accepted(row["facts"]))
        for row in map(json.loads, CONTEXTS.read_text("utf-8").splitlines())
    ]
    wanted = kinds.split(",")
    numbers, all_seeds = ([int(n) for n in text.split(",")] for text in (contexts, seeds))
    for kind in wanted:
        for seed in all_seeds:
            recipe = load_recipe("builtin", flags={"seed": seed, "base": base})
            for number in numbers:
                directory = out / f"context-{number}-seed-{seed}"
                directory.mkdir(parents=True, exist_ok=True)
                case = Case(loaded, users[number], recipe, directory)
                file = directory / kind.replace(" ", "-") / "metrics.json"
                if not file.is_file():
                    _run(case, kind, file)
    print(table(out, numbers, all_seeds, wanted))


def table(out: Path, contexts: list[int], seeds: list[int], kinds: list[str]) -> str:
    """Markdown: verdicts found beside the one expected, and what they say."""
    lines = ["| adapter | ought to be | verdicts | as in |", "|---|---|---|---|"]
    for kind in kinds:
        found = [
            read_json(file)["verdict"]
            for seed in seeds
            for number in contexts
            if (
                file := out
                / f"context-{number}-seed-{seed}"
                / kind.replace(" ", "-")
                / "metrics.json"
            ).is_file()
        ]
        expected = KINDS[kind][1]
        right = [verdict["word"] == expected for verdict in found]
        example = found[right.index(False) if False in right else 0]["sentence"] if found else ""
        lines.append(f"| {kind} | {expected} | {sum(right)} of {len(found)} | {example} |")
    return "\n".join(lines)


def _run(case: Case, kind: str, file: Path) -> None:
    from ..evaluation import evaluate

    console.print(f"[bold]{kind}[/], {case.user.id}, seed {case.recipe.seed}")
    adapter = file.parent / "adapter"
    file.parent.mkdir(exist_ok=True)
    if not adapter.is_dir():
        KINDS[kind][0](case, adapter)
    answers = file.parent / "evaluation.jsonl"
    shared = case.directory / "before.jsonl"
    if shared.is_file() and not answers.is_file():
        shutil.copy(shared, answers)  # the base's answers are the same for every adapter
    prompts = shipped_prompts()
    metrics = evaluate(case.base, case.user, prompts, case.recipe, {"after": adapter}, answers)
    if not shared.is_file():
        append_jsonl(shared, (row for row in read_jsonl(answers) if row["model"] == "before"))
    write_json(file, metrics)
    console.print(metrics["verdict"]["sentence"])


def _pairs(
    case: Case, name: str, same: bool = False
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Sampled and scored pairs; with `same`, both responses of a pair saw the user's page."""
    from ..filtering import score_pairs
    from ..pairs import plan_personalize, sample_pairs

    prompts = [prompt for prompt in shipped_prompts() if prompt.split == "train"]
    plans = plan_personalize(case.recipe, prompts, case.user, persona_pool("train"))
    if same:
        plans = [replace(plan, negative=plan.positive) for plan in plans]
    file, scores = case.directory / f"{name}.jsonl", case.directory / f"{name}-scores.jsonl"
    sample_pairs(case.base, plans, case.recipe, file)
    pairs = read_jsonl(file)
    score_pairs(case.base, pairs, case.recipe, scores)
    return pairs, read_jsonl(scores)


def _train(
    case: Case,
    adapter: Path,
    pairs: list[dict[str, Any]],
    scores: list[dict[str, Any]],
    keep_any: bool = False,
) -> None:
    from ..training import train

    checkpoints = adapter.with_name("checkpoints")
    train(case.base, pairs, scores, case.recipe, adapter, checkpoints, keep_any=keep_any)


if __name__ == "__main__":
    typer.run(main)
