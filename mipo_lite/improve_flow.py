"""improve(): the stages for I(y; x), with the machinery and most stages of `pipeline`.

The questions lie in problems.jsonl of the run and their reference answers in answers.jsonl, which
only the evaluation reads.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from .base import BaseSource, load_tokenizer
from .console import console
from .contexts import build_messages, encode_prompt
from .errors import UsageError, UserError
from .flow import Flow, Preview, Stage, execute, foresee, open_or_create, resolve
from .negatives import NEGATIVES, make_pairs
from .pipeline import STAGES
from .problems import LEAST, Problem, load_problems, split_problems
from .recipe import Recipe
from .run import Run, append_jsonl, fingerprint, read_jsonl, write_json


def improve(
    prompts: str | Path,
    *,
    eval_prompts: str | Path | None = None,
    question_column: str | None = None,
    answer_column: str | None = None,
    base: str | None = None,
    recipe: str | None = None,
    settings: Iterable[str] = (),
    negatives: str | None = None,
    rounds: int | None = None,
    seed: int | None = None,
    run: str | Path | None = None,
    trust_remote_code: bool = False,
) -> Run:
    """Train an adapter that makes responses say more about their question; measure, export.

    Called again with the same arguments, it goes on where it stopped. Reference answers are used
    for the evaluation alone.

    Args:
        prompts: questions as JSONL, a JSON array, CSV, TSV, or text with one a line.
        eval_prompts: a file of questions to hold out; None holds out a third of `prompts`.
        question_column, answer_column: where the columns are not found by name.
        base, recipe, settings, seed, run: as for `personalize`; without a recipe, the
            built-in base takes math-builtin, others math or multiple-choice.
        negatives: random, near, far or answers; None: as the recipe says.
        rounds: how many times the policy writes new pairs at most; None: as the recipe says.

    Raises:
        UserError: for anything that the user can mend.
    """
    flow = prepare(
        Path(prompts),
        eval_prompts=Path(eval_prompts) if eval_prompts else None,
        columns=(question_column, answer_column),
        base=base,
        recipe=recipe,
        settings=settings,
        flags={"negatives": negatives, "rounds": rounds, "seed": seed},
        run=Path(run) if run else None,
        trust_remote_code=trust_remote_code,
    )
    with flow.run.locked():
        execute(flow)
    return flow.run


def preview(
    prompts: Path,
    *,
    eval_prompts: Path | None,
    question_column: str | None,
    answer_column: str | None,
    base: str | None,
    recipe: str | None,
    settings: Iterable[str],
    negatives: str | None,
    rounds: int | None,
    seed: int | None,
    run: Path | None,
) -> Preview:
    """What `improve` would do with these arguments, without doing any of it.

    Which questions a base has no room for shows only once it is downloaded.

    Raises UserError for bad input, as `improve` does.
    """
    problems: Sequence[Problem] = _read(prompts, eval_prompts, (question_column, answer_column))
    flags = {"base": base, "negatives": negatives, "rounds": rounds, "seed": seed}
    path = run or Path("runs") / prompts.stem
    chosen, offer = foresee(path, recipe, settings, flags, _defaults(problems))
    _check_negatives(chosen)
    if offer.path is not None:
        problems = _fitting(offer.fetch(), problems, chosen, trust_remote_code=False)
    train = sum(problem.split == "train" for problem in problems)
    return Preview(path, offer, chosen, (train, len(problems) - train), IMPROVE_STAGES)


def prepare(
    prompts: Path,
    *,
    eval_prompts: Path | None,
    columns: tuple[str | None, str | None],
    base: str | None,
    recipe: str | None,
    settings: Iterable[str],
    flags: dict[str, Any],
    run: Path | None,
    trust_remote_code: bool,
) -> Flow:
    """Check every input and create the run directory, or open the one to go on with."""
    from .gguf import require_exportable

    settings = list(settings)
    path = run or Path("runs") / prompts.stem
    problems = _read(prompts, eval_prompts, columns)
    chosen, source = resolve(path, recipe, settings, flags | {"base": base}, _defaults(problems))
    _check_negatives(chosen)
    fitting = _fitting(source, problems, chosen, trust_remote_code)
    require_exportable(source.path)  # now, and not after the training
    inputs = {
        "command": "improve",
        "prompts": fingerprint([problem.as_row() for problem in fitting]),
        "answers": fingerprint([problem.answer for problem in fitting]),
    }

    def write(created: Run) -> None:
        for name in ("problems.jsonl", "answers.jsonl"):
            (created / name).unlink(missing_ok=True)
        append_jsonl(created / "problems.jsonl", (problem.as_row() for problem in fitting))
        answers = ({"id": p.id, "answer": p.answer} for p in fitting if p.answer is not None)
        append_jsonl(created / "answers.jsonl", answers)

    return open_or_create(
        path,
        inputs,
        chosen,
        source,
        write,
        IMPROVE_STAGES,
        trust_remote_code=trust_remote_code,
    )


def _defaults(problems: Sequence[Problem]) -> tuple[str, str]:
    """The recipe where none is named: for the built-in base, and for others."""
    choices = any(problem.choices for problem in problems)
    return "math-builtin", "multiple-choice" if choices else "math"


def _check_negatives(recipe: Recipe) -> None:
    """Raises UsageError for negatives that improve does not have."""
    if recipe.negatives not in NEGATIVES:
        raise UsageError(
            f"negatives={recipe.negatives} is for personalize: a question has no context.",
            f"Use one of: {', '.join(NEGATIVES)}.",
        )


def _read(
    prompts: Path, eval_prompts: Path | None, columns: tuple[str | None, str | None]
) -> tuple[Problem, ...]:
    """The problems with their split; what is not used is said before."""

    def load(path: Path) -> Sequence[Problem]:
        question, answer = columns
        return load_problems(path, _say, question_column=question, answer_column=answer).problems

    problems = load(prompts)
    held_out = load(eval_prompts) if eval_prompts is not None else None
    split, left_out = split_problems(problems, held_out)
    if left_out:
        _say(
            f"{prompts}: {left_out} of {len(problems)} questions are left out: they are held out "
            "as well."
        )
    if sum(problem.split == "train" for problem in split) < 2:
        raise UserError(
            f"{prompts} holds fewer than two questions that are not held out as well.",
            "A question is contrasted with other ones: add some.",
        )
    return split


def _fitting(
    source: BaseSource, problems: Sequence[Problem], recipe: Recipe, trust_remote_code: bool
) -> list[Problem]:
    """The problems as they are asked, without those that the base has no room for."""
    from transformers import AutoConfig

    tokenizer = load_tokenizer(source, trust_remote_code)
    config = AutoConfig.from_pretrained(source.path, trust_remote_code=trust_remote_code)
    room = config.get_text_config().max_position_embeddings - recipe.max_new_tokens
    asked = [
        replace(problem, text="\n\n".join(filter(None, [problem.text, recipe.instruction])))
        for problem in problems
    ]
    fitting = [
        problem
        for problem in asked
        if len(encode_prompt(tokenizer, build_messages(problem.text, None))) <= room
    ]
    if left_out := len(asked) - len(fitting):
        _say(
            f"{left_out} of {len(asked)} questions are left out: {source.name} has room for "
            f"{room} tokens beside the answer."
        )
    if sum(problem.split == "train" for problem in fitting) < LEAST // 2:
        raise UserError(
            "Hardly a question is left that fits.", "Use shorter ones, or lower max_new_tokens."
        )
    return fitting


def _say(text: str) -> None:
    """Print it as it is: a file's name may hold brackets, and a reason stays on its line."""
    console.print(text, markup=False, soft_wrap=True)


def read_problems(run: Run, with_answers: bool = False) -> list[Problem]:
    """The questions of a run; their reference answers only where they are asked for."""
    answers = (
        {row["id"]: row["answer"] for row in read_jsonl(run / "answers.jsonl")}
        if with_answers
        else {}
    )
    rows = read_jsonl(run / "problems.jsonl")
    return [Problem.from_row(row, answers.get(row["id"])) for row in rows]


def _training(flow: Flow) -> list[Problem]:
    return [problem for problem in read_problems(flow.run) if problem.split == "train"]


def _make_pairs(flow: Flow, entry: dict[str, Any]) -> None:
    from .rounds import set_aside

    recipe, problems = flow.recipe, _training(flow)
    if recipe.rounds > 1:
        problems, watched = set_aside(problems)
        entry["watched"] = len(watched)
    make_pairs(
        flow.base,
        problems,
        recipe.negatives,  # type: ignore[arg-type]  # checked in prepare
        recipe.answers_per_question,
        recipe,
        flow.run.path,
    )
    entry["pairs"] = len(read_jsonl(flow.run / "pairs.jsonl"))


def _more_rounds(flow: Flow, entry: dict[str, Any]) -> None:
    from .rounds import more_rounds

    recipe = flow.recipe
    if recipe.rounds > 1:
        entry["history"] = more_rounds(
            flow.base,
            _training(flow),
            recipe,
            rounds=recipe.rounds,
            reference=recipe.reference,
            negatives=recipe.negatives,  # type: ignore[arg-type]
            samples=recipe.answers_per_question,
            run=flow.run.path,
        )


def _evaluate(flow: Flow, entry: dict[str, Any]) -> None:
    from .improving import evaluate

    run = flow.run
    problems = read_problems(run, with_answers=True)
    adapters = {"after": run / "adapter"}
    if flow.recipe.sft_baseline:
        adapters["SFT on chosen"] = run / "sft"
    metrics = evaluate(flow.base, problems, flow.recipe, adapters, run / "evaluation.jsonl")
    write_json(run / "metrics.json", metrics)
    entry["verdict"] = metrics["verdict"]["word"]


_OWN = {
    "pairs": Stage(
        "pairs",
        _make_pairs,
        (
            "base",
            "seed",
            "pairs",
            "negatives",
            "answers_per_question",
            "rounds",  # questions are set aside to watch them
            "reference",  # here, since later rounds replace the first one's adapter
            "temperature",
            "top_p",
            "max_new_tokens",
            "sampling_batch",
        ),
        ("pairs.jsonl", "samples.jsonl"),
    ),
    "evaluate": Stage(
        "evaluate",
        _evaluate,
        ("eval_prompts", "eval_samples", "eval_contexts"),
        ("evaluation.jsonl", "metrics.json"),
    ),
}
_ROUNDS = Stage("rounds", _more_rounds, ("rounds", "reference"), ("rounds",))


def _stages() -> Iterator[Stage]:
    for stage in STAGES:
        yield _OWN.get(stage.name, stage)
        if stage.name == "train":
            yield _ROUNDS


IMPROVE_STAGES = tuple(_stages())
