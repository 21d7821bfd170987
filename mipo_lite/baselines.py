"""The comparison: ways to learn from a base's own responses, on the same questions.

    python -m mipo_lite.baselines --prompts examples/sums.jsonl

trains one adapter per method and seed, asks all of them the same held-out questions, and prints a
Markdown table: means over the seeds, with the standard deviation; and where in a response the
information about its question stands. `--table tried` compares what was tried to make answers
better, not only more informative. Methods of one seed that need the same pairs share them. What is
there already in --out is not made again.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from .answers import find_answer, is_right
from .base import Base, find_base, load_base
from .console import console, progress, quiet_libraries
from .evaluation import BEFORE
from .filtering import score_pairs
from .improving import evaluate
from .infonce import train_infonce
from .metrics import compare, words
from .negatives import Negatives, make_pairs
from .problems import Problem, load_problems, split_problems
from .recipe import Recipe, load_recipe
from .rounds import more_rounds, set_aside
from .run import read_json, read_jsonl, write_json
from .scoring import response_logprobs
from .training import train


@dataclass(frozen=True)
class Method:
    """A row of a table.

    Attributes:
        loss: one of TRL's, or "infonce".
        settings: what differs from the recipe.
    """

    name: str
    negatives: Negatives = "random"
    loss: str = "sigmoid"
    settings: dict[str, Any] = field(default_factory=dict)

    def pairs_in(self, out: Path) -> Path:
        """Where its pairs lie: those of later rounds are its own, others may be shared."""
        own = [f"{key}-{self.settings[key]}" for key in PAIR_SETTINGS if key in self.settings]
        return out / "-".join([self.negatives, *own])


# As math-builtin has it.
DEFAULT = Method("answers contrasted, 16 samples", "answers", settings={"answers_per_question": 16})
PAIR_SETTINGS = ("pairs", "answers_per_question", "rounds")
TABLES = {
    "baselines": (
        Method("SFT on chosen", loss="sft"),
        Method("InfoNCE", loss="infonce"),
        Method("MIPO"),
        Method("MIPO, IPO loss", loss="ipo"),
    ),
    "tried": (
        Method("random negatives"),
        Method("random, learning rate 1e-3", settings={"learning_rate": 1e-3}),
        Method("random, 3 rounds", settings={"rounds": 3}),
        Method("near negatives", "near"),
        Method("far negatives", "far"),
        Method("answers contrasted, 8 samples", "answers", settings={"answers_per_question": 8}),
        DEFAULT,
    ),
    "default": (DEFAULT,),  # for questions that had no part in the choice of it
}

# Column -> mode and measure of the summary, and the digits shown.
COLUMNS = {
    "right, sampled": ("sampled", "exact_match", 2),
    "right, greedy": ("greedy", "exact_match", 2),
    "right, majority": ("majority", "exact_match", 2),
    "I(y; x), bits": ("sampled", "bits", 2),
    "by itself, bits": ("sampled", "own_bits", 2),
    "tokens": ("sampled", "length", 1),
}
# Column -> measure of the sampled answers whose change from the base is given as an interval.
CHANGES = {
    "change, right": "exact_match",
    "change, I(y; x)": "bits",
    "change, by itself": "own_bits",
}
BASE_ROW = "the base, prompted"


def run_seed(
    base: Base,
    problems: Sequence[Problem],
    methods: Sequence[Method],
    recipe: Recipe,
    out: Path,
) -> dict[str, Any]:
    """Make what is missing of one seed, and measure: what `improving.evaluate` returns."""
    training = [problem for problem in problems if problem.split == "train"]
    adapters = {}
    for method in methods:
        varied = recipe.model_copy(update={"loss": method.loss, **method.settings})
        adapters[method.name] = _adapter(base, training, method, varied, out)
    metrics = evaluate(base, problems, recipe, adapters, out / "evaluation.jsonl")
    pairs = read_jsonl(methods[0].pairs_in(out) / "pairs.jsonl")
    return metrics | {"why": where_information_lies(base, training, pairs)}


def _adapter(
    base: Base, training: Sequence[Problem], method: Method, recipe: Recipe, out: Path
) -> Path:
    """Where the method's adapter lies, made where it is missing."""
    directory = method.pairs_in(out)
    train_on = set_aside(training)[0] if recipe.rounds > 1 else training
    pairs, scores = _scored_pairs(base, train_on, method.negatives, recipe, directory)
    adapter = directory / "adapter" if recipe.rounds > 1 else out / method.name
    if not adapter.exists():
        with progress(method.name[:28], 1) as bar:
            if method.loss == "infonce":
                kept = [p for p, s in zip(pairs, scores, strict=True) if s["kept"]]
                train_infonce(base, kept, recipe, adapter, bar.set)
            else:
                train(base, pairs, scores, recipe, adapter, out / "checkpoints", bar.set)
    if recipe.rounds > 1:
        more_rounds(
            base,
            training,
            recipe,
            rounds=recipe.rounds,
            reference=recipe.reference,
            negatives=method.negatives,
            samples=recipe.answers_per_question,
            run=directory,
        )
    return adapter


def _scored_pairs(
    base: Base,
    problems: Sequence[Problem],
    negatives: Negatives,
    recipe: Recipe,
    directory: Path,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Lines of pairs.jsonl and scores.jsonl in `directory`, made where they are missing."""
    directory.mkdir(parents=True, exist_ok=True)
    if not (directory / "scores.jsonl").exists():
        make_pairs(base, problems, negatives, recipe.answers_per_question, recipe, directory)
        pairs = read_jsonl(directory / "pairs.jsonl")
        with progress("Scoring pairs", len(pairs)) as advance:
            score_pairs(base, pairs, recipe, directory / "scores.jsonl", advance)
    return read_jsonl(directory / "pairs.jsonl"), read_jsonl(directory / "scores.jsonl")


def where_information_lies(
    base: Base, problems: Sequence[Problem], pairs: Sequence[dict[str, Any]]
) -> dict[str, float]:
    """Means over the chosen responses that give an answer, in nats: PMI with their question, and
    how much of it stands in the words before the final answer and in the answer itself, given
    those words; the same for right and wrong answers. Reads reference answers: it explains.
    """
    reference = {problem.id: problem for problem in problems}
    parts: dict[str, list[float]] = {}
    scored = response_logprobs(
        base.model,
        [
            (pair[ids], pair["chosen_ids"])
            for pair in pairs
            for ids in ("prompt_ids", "without_ids")
        ],
    )
    for number, pair in enumerate(pairs):
        problem = reference[pair["prompt_id"]]
        given = find_answer(pair["chosen"], problem.choices)
        pmi = (scored[2 * number] - scored[2 * number + 1]).tolist()
        start = answer_start(base, pair["chosen_ids"], given)
        if start is None or problem.answer is None:
            continue
        which = "right" if is_right(given, problem.answer) else "wrong"
        for name, values in (
            ("PMI, all", pmi),
            ("PMI, words before the answer", pmi[:start]),
            (f"PMI, the answer itself, {which}", pmi[start:]),
            (f"PMI, all, {which}", pmi),
        ):
            parts.setdefault(name, []).append(sum(values))
        parts.setdefault("share right", []).append(float(which == "right"))
    return {name: statistics.mean(values) for name, values in sorted(parts.items())}


def answer_start(base: Base, token_ids: Sequence[int], answer: str | None) -> int | None:
    """The token with which a response first writes its final answer; None if it never does."""
    if answer is None:
        return None
    for end in range(1, len(token_ids) + 1):
        if answer in words(base.decode(list(token_ids[:end]))):
            return end - 1
    return None


def table(
    results: Sequence[dict[str, Any]],
    answers: Sequence[Sequence[dict[str, Any]]],
    methods: Sequence[Method],
) -> str:
    """A Markdown table of all seeds: mean ± standard deviation over the seeds; and changes against
    the base, as 95 % intervals over questions.

    Args:
        results, answers: of each seed, what `run_seed` returned and its evaluation.jsonl.
    """
    lines = [
        "| | " + " | ".join([*COLUMNS, *CHANGES]) + " |",
        "|---" * (1 + len(COLUMNS) + len(CHANGES)) + "|",
    ]
    for name in (BASE_ROW, *(method.name for method in methods)):
        side = "before" if name == BASE_ROW else "after"
        source = methods[0].name if name == BASE_ROW else name
        cells = [name]
        for mode, measure, digits in COLUMNS.values():
            summaries = [result["baselines"][source]["question"][mode] for result in results]
            values = [s[measure][side] for s in summaries if measure in s]
            cells.append(_cell(values, digits))
        cells += ["" if name == BASE_ROW else change(answers, name, m) for m in CHANGES.values()]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def change(answers: Sequence[Sequence[dict[str, Any]]], name: str, measure: str) -> str:
    """The 95 % interval of the change in sampled answers of all seeds.

    Whole questions are drawn again, with their answers under all seeds: another seed is no new
    question.
    """

    def values(which: str) -> tuple[list[float | None], list[str]]:
        rows = [
            row
            for of_seed in answers
            for row in of_seed
            if (row["model"], row["mode"]) == (which, "sampled")
        ]
        return [row["measures"].get(measure) for row in rows], [row["prompt_id"] for row in rows]

    before, questions = values(BEFORE)
    found = compare(before, values(name)[0], questions)
    return "not measured" if found is None else f"{found.low:+.2f} to {found.high:+.2f}"


def _cell(values: Sequence[float], digits: int) -> str:
    if not values:
        return "not measured"
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def main(
    prompts: Annotated[Path, typer.Option("--prompts", help="Questions with answers.")],
    base: Annotated[str, typer.Option("--base")] = "builtin",
    which: Annotated[str, typer.Option("--table", help=", ".join(TABLES))] = "baselines",
    seeds: Annotated[int, typer.Option("--seeds", min=1)] = 3,
    recipe: Annotated[str, typer.Option("--recipe")] = "math-builtin",
    settings: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE")] = None,
    out: Annotated[Path, typer.Option("--out")] = Path("runs/baselines"),
) -> None:
    """Compare methods on the same questions and print a table."""
    problems, _ = split_problems(load_problems(prompts, console.print).problems)
    methods = TABLES[which]
    results, answers = [], []
    for seed in range(seeds):
        directory = out / which / f"seed-{seed}"
        if not (directory / "metrics.json").exists():
            start = time.monotonic()
            chosen = load_recipe(recipe, settings or [], {"seed": seed})
            loaded = load_base(find_base(base))
            found = run_seed(loaded, problems, methods, chosen, directory)
            found["seconds"] = round(time.monotonic() - start)
            write_json(directory / "metrics.json", found)
        results.append(read_json(directory / "metrics.json"))
        answers.append(read_jsonl(directory / "evaluation.jsonl"))
    counts = results[0]
    print(table(results, answers, methods))
    print(
        f"\n{counts['questions']} held-out questions, {counts['samples_per_question']} samples "
        f"each, {counts['prompts_ranked']} prompts ranked, {seeds} seeds, "
        f"{sum(result['seconds'] for result in results) / 60:.0f} minutes."
    )
    print(f"\nChosen responses of the {methods[0].negatives} pairs, means over the seeds:\n")
    for name in counts["why"]:
        values = [result["why"][name] for result in results if name in result["why"]]
        print(f"- {name}: {_cell(values, 2)}")


if __name__ == "__main__":
    quiet_libraries()
    typer.run(main)
