"""personalize(): from a page about the user to a GGUF file, stage by stage.

How stages are run and gone on with is `flow`'s business; `improve_flow` has the same for problem
solving and shares most stages.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .base import check_context_fits
from .bases import recorded_source
from .console import console, progress
from .contexts import load_facts, load_user_context, persona_pool
from .errors import UsageError, UserError
from .flow import (
    Flow,
    Preview,
    Stage,
    execute,
    foresee,
    open_or_create,
    recorded_recipe,
    resolve,
)
from .prompts import Prompt, load_prompts, may_matter
from .recipe import Recipe, given_settings, load_recipe
from .run import Run, append_jsonl, fingerprint, read_jsonl, truncate_jsonl, write_json

NEGATIVES = ("missing", "random", "mixed")  # of personalize


def personalize(
    user_context: str | Path,
    *,
    base: str | None = None,
    prompts: str | Path | None = None,
    recipe: str | None = None,
    settings: Iterable[str] = (),
    seed: int | None = None,
    run: str | Path | None = None,
    trust_remote_code: bool = False,
) -> Run:
    """Train an adapter that makes the base use the user's page more; measure, merge, export.

    Called again, it goes on where it stopped; what is not stated anew is as it was in the run.

    Args:
        user_context: a text file about the user.
        base: auto, builtin, a Hugging Face id, or a directory.
        prompts: everyday requests, a line each (or JSONL); None takes the shipped ones.
        recipe: the name of a shipped recipe, or a YAML file.
        settings: further settings as "key=value".
        run: the run directory; None takes runs/ and the name of the context file.

    Raises:
        UserError: for anything that the user can mend.
    """
    flow = prepare(
        Path(user_context),
        base=base,
        prompts=Path(prompts) if prompts else None,
        recipe=recipe,
        settings=settings,
        seed=seed,
        run=Path(run) if run else None,
        trust_remote_code=trust_remote_code,
    )
    with flow.run.locked():
        execute(flow)
    return flow.run


def preview(user_context: Path, **arguments: Any) -> Preview:
    """What `personalize` would do with these arguments, without doing any of it.

    Whether the context fits a base that has to be downloaded shows only in the run.

    Raises UserError for bad input, as `personalize` does.
    """
    text = load_user_context(user_context)
    prompts = load_prompts(arguments["prompts"])
    flags = {"base": arguments["base"], "seed": arguments["seed"]}
    path = arguments["run"] or Path("runs") / user_context.stem
    recipe, offer = foresee(path, arguments["recipe"], arguments["settings"], flags, text=text)
    _check_settings(recipe)
    if offer.path is not None:
        check_context_fits(offer.fetch(), text, recipe.max_new_tokens)
    train = sum(prompt.split == "train" for prompt in prompts)
    return Preview(path, offer, recipe, (train, len(prompts) - train), STAGES, len(text.split()))


def prepare(
    user_context: Path,
    *,
    base: str | None,
    prompts: Path | None,
    recipe: str | None,
    settings: Iterable[str],
    seed: int | None,
    run: Path | None,
    trust_remote_code: bool = False,
) -> Flow:
    """Check every input and create the run directory, or open the one to go on with."""
    from .gguf import require_exportable

    text = load_user_context(user_context)
    facts = load_facts(user_context)
    chosen_prompts = load_prompts(prompts)
    settings = list(settings)
    path = run or Path("runs") / user_context.stem
    chosen, source = resolve(path, recipe, settings, {"base": base, "seed": seed}, text=text)
    _check_settings(chosen)
    check_context_fits(source, text, chosen.max_new_tokens, trust_remote_code)
    require_exportable(source.path)  # now, and not after the training
    inputs = {
        "command": "personalize",
        "context": fingerprint([text, facts]),
        "prompts": fingerprint([prompt.as_row() for prompt in chosen_prompts]),
    }

    def write(created: Run) -> None:
        write_json(created / "context.json", {"text": text, "facts": facts})
        (created / "prompts.jsonl").unlink(missing_ok=True)
        append_jsonl(created / "prompts.jsonl", (prompt.as_row() for prompt in chosen_prompts))

    return open_or_create(
        path,
        inputs,
        chosen,
        source,
        write,
        STAGES,
        text=text,
        trust_remote_code=trust_remote_code,
    )


def _check_settings(recipe: Recipe) -> None:
    """Raises UsageError for contexts or negatives that `personalize` does not have."""
    others = len(persona_pool("held_out"))
    if recipe.eval_contexts > others:
        raise UsageError(
            f"eval_contexts can not be {recipe.eval_contexts} for personalize.",
            f"{others} people are held out to compare with: choose at most as many.",
        )
    if recipe.negatives not in NEGATIVES:
        raise UsageError(
            f"negatives can not be {recipe.negatives!r} for personalize.",
            f"Choose one of: {', '.join(NEGATIVES)}.",
        )


def open_flow(path: Path, settings: Iterable[str] = (), trust_remote_code: bool = False) -> Flow:
    """The flow of an existing run, with some settings changed.

    Raises UserError for use_choices where nothing was chosen.
    """
    run = Run(path)
    settings = list(settings)
    recipe = recorded_recipe(run, load_recipe(None, settings))
    if run.meta["command"] == "personalize":
        _check_settings(recipe)
    source = recorded_source(run.meta["base"])
    flow = Flow(run, recipe, source, stages_of(run), trust_remote_code)
    if "use_choices" in given_settings(settings) and recipe.use_choices and not _choices(flow):
        raise UserError(
            f"{path} holds no choices to train on.",
            f"Make some: `mipo-lite compare {path}`. A tie teaches nothing."
            if run.meta["command"] == "personalize"
            else "Only a run of personalize has a blind test.",
        )
    return flow


def stages_of(run: Run) -> tuple[Stage, ...]:
    if run.meta["command"] == "improve":
        from .improve_flow import IMPROVE_STAGES

        return IMPROVE_STAGES
    return STAGES


def _make_pairs(flow: Flow, entry: dict[str, Any]) -> None:
    from .pairs import plan_personalize, sample_pairs

    prompts = [prompt for prompt in flow.prompts if prompt.split == "train"]
    plans = plan_personalize(flow.recipe, prompts, flow.user, persona_pool("train"))
    base = flow.base
    with progress("Sampling pairs", len(plans)) as advance:
        sample_pairs(base, plans, flow.recipe, flow.run / "pairs.jsonl", advance)
    entry["pairs"] = len(plans)


def _choices(flow: Flow) -> list[dict[str, Any]] | None:
    """The choices of the blind test that are trained on; None for none."""
    from .compare import usable_choices

    return usable_choices(flow.run) or None if flow.recipe.use_choices else None


def _prompts_to_measure(flow: Flow) -> tuple[Prompt, ...]:
    """The prompts of the run without those that are trained on as choices.

    Raises UserError when nothing is left to measure on.
    """
    from .compare import judged_prompts

    judged = judged_prompts(flow.run) if flow.recipe.use_choices else ()
    left = tuple(prompt for prompt in flow.prompts if prompt.text not in judged)
    if not any(prompt.split == "held_out" for prompt in may_matter(left)):
        raise UserError(
            "Every held-out prompt was judged in the blind test, so none is left to measure on.",
            "Set use_choices=false, or start a run with more prompts.",
        )
    return left


def _append_choices(flow: Flow, entry: dict[str, Any]) -> list[dict[str, Any]]:
    """The pairs to score: pairs.jsonl, in which the choices follow the pairs that were sampled.

    They are not the business of the stage that samples: a new choice must not repeat it.
    """
    from .compare import choice_pairs

    file = flow.run / "pairs.jsonl"
    sampled = flow.run.meta["stages"]["pairs"]["pairs"]
    pairs = read_jsonl(file)
    chosen = []
    if _choices(flow):
        _prompts_to_measure(flow)  # before time is spent on a training that can not be measured
        chosen = choice_pairs(flow.run, flow.base, first_id=sampled)
        entry["choices"] = len(chosen)
    if pairs[sampled:] != chosen:
        truncate_jsonl(file, sampled)
        append_jsonl(file, chosen)
    return pairs[:sampled] + chosen


def _score_pairs(flow: Flow, entry: dict[str, Any]) -> None:
    from .filtering import dropped, score_pairs
    from .quality import pair_quality, print_quality

    pairs = _append_choices(flow, entry)
    base = flow.base
    with progress("Scoring pairs", len(pairs)) as advance:
        score_pairs(base, pairs, flow.recipe, flow.run / "scores.jsonl", advance)
    scores = read_jsonl(flow.run / "scores.jsonl")
    entry["dropped"] = dict(dropped(scores))
    print_quality(pair_quality(pairs, scores))


def _train(flow: Flow, entry: dict[str, Any]) -> None:
    entry |= _train_adapter(flow, flow.recipe, "Training", "adapter")


def _train_baseline(flow: Flow, entry: dict[str, Any]) -> None:
    """SFT on the same chosen responses, with the same budget and no early stop."""
    if flow.recipe.sft_baseline:
        recipe = flow.recipe.model_copy(
            update={"loss": "sft", "patience": flow.recipe.evaluations + 1}
        )
        entry |= _train_adapter(flow, recipe, "Training the SFT baseline", "sft")


def _train_adapter(flow: Flow, recipe: Recipe, what: str, name: str) -> dict[str, Any]:
    from .training import train

    run = flow.run
    base = flow.base
    with progress(what, 1) as bar:
        result = train(
            base,
            read_jsonl(run / "pairs.jsonl"),
            read_jsonl(run / "scores.jsonl"),
            recipe,
            run / name,
            run / "checkpoints",
            bar.set,
        )
    if not result.kept:
        console.print(
            "[yellow]What was learned does not carry over to pairs held out[/] "
            f"(margins: {result.carry_over}): the adapter is left as it began.\n"
            "  Set more pairs, give it a longer page or other prompts, or change learning_rate."
        )
    return asdict(result)


def _evaluate(flow: Flow, entry: dict[str, Any]) -> None:
    from .evaluation import evaluate

    run = flow.run
    adapters = {"after": run / "adapter"}
    if flow.recipe.sft_baseline:
        adapters["SFT on chosen"] = run / "sft"
    metrics = evaluate(
        flow.base,
        flow.user,
        _prompts_to_measure(flow),
        flow.recipe,
        adapters,
        run / "evaluation.jsonl",
    )
    write_json(run / "metrics.json", metrics)
    entry["verdict"] = metrics["verdict"]["word"]


def _export(flow: Flow, entry: dict[str, Any]) -> None:
    from .delivery import compare_merges, export_run
    from .merging import merge

    run = flow.run
    merge(flow.source.path, run / "adapter", run / "merged", progress=progress)
    if flow.recipe.compare_merges:
        compare_merges(run, flow.base)
    (run / "gguf").mkdir(mode=0o700, exist_ok=True)
    files = export_run(run, flow.source.path, run / "gguf", flow.recipe.quants)
    entry["files"] = [str(file.relative_to(run.path)) for file in files]


def _report(flow: Flow, entry: dict[str, Any]) -> None:
    from .report.page import write_page

    write_page(flow.run)


STAGES = (
    Stage(
        "pairs",
        _make_pairs,
        (
            "base",
            "seed",
            "pairs",
            "negatives",
            "pool_positives",
            "temperature",
            "top_p",
            "max_new_tokens",
            "sampling_batch",
        ),
        ("pairs.jsonl",),
    ),
    Stage(
        "scores",
        _score_pairs,
        ("min_contrast", "scoring_tokens"),
        ("scores.jsonl",),
        reads=_choices,
    ),
    Stage(
        "train",
        _train,
        (
            "loss",
            "sft_weight",
            "beta",
            "learning_rate",
            "warmup",
            "epochs",
            "batch_size",
            "micro_batch",
            "lora_rank",
            "lora_alpha",
            "optimizer",
            "activation_offload",
            "gradient_checkpointing",
            "prefix_sharing",
            "held_out",
            "patience",
            "evaluations",
        ),
        ("adapter", "checkpoints", "compare.jsonl"),  # answers of the adapter to own requests
    ),
    Stage("baseline", _train_baseline, ("sft_baseline",), ("sft",)),
    Stage(
        "evaluate",
        _evaluate,
        ("eval_prompts", "eval_samples", "eval_contexts"),
        ("evaluation.jsonl", "metrics.json"),
    ),
    Stage("export", _export, ("quants", "compare_merges"), ("merged", "gguf")),
    Stage("report", _report, (), ("report.html",)),
)
