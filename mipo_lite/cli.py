"""The command line: one short function per command, heavy imports inside."""

from __future__ import annotations

import errno
import signal
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer

from .console import console, quiet_libraries
from .errors import UserError

app = typer.Typer(
    name="mipo-lite",
    help="A language model that knows you, trained on your own machine from one page about you.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")]
BaseOption = Annotated[
    str | None,
    typer.Option("--base", help="auto, builtin, a Hugging Face id, or a directory."),
]
RecipeOption = Annotated[
    str | None, typer.Option("--recipe", help="A shipped recipe's name, or a YAML file.")
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one setting.")
]
SeedOption = Annotated[int | None, typer.Option("--seed", help="Seeds everything random.")]
TrustOption = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run code that the base's repository brings along."),
]


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    quiet_libraries()


@app.command()
def personalize(
    user_context: Annotated[
        Path, typer.Option("--user-context", metavar="FILE", help="A page about you, as text.")
    ],
    base: BaseOption = None,
    prompts: Annotated[
        Path | None,
        typer.Option("--prompts", metavar="FILE", help="Your own requests, a line each."),
    ] = None,
    recipe: RecipeOption = None,
    settings: SetOption = None,
    run: Annotated[
        Path | None, typer.Option("--run", metavar="DIR", help="Run directory; default runs/FILE.")
    ] = None,
    seed: SeedOption = None,
    trust_remote_code: TrustOption = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done; do nothing.")
    ] = False,
) -> None:
    """Make the base use your page: pairs, training, evaluation, merged model and GGUF.

    Run it again with the same --run and it goes on where it stopped.
    """
    from . import pipeline
    from .report.summary import print_plan, print_summary

    arguments: dict[str, Any] = {
        "base": base,
        "prompts": prompts,
        "recipe": recipe,
        "settings": settings or [],
        "seed": seed,
        "run": run,
    }
    if dry_run:
        print_plan(pipeline.preview(user_context, **arguments))
        return
    finished = pipeline.personalize(user_context, **arguments, trust_remote_code=trust_remote_code)
    print_summary(finished)


@app.command()
def improve(
    prompts: Annotated[
        Path,
        typer.Option("--prompts", metavar="FILE", help="Questions: JSONL, CSV, or text lines."),
    ],
    eval_prompts: Annotated[
        Path | None,
        typer.Option("--eval-prompts", metavar="FILE", help="Questions to hold out; default: a third of them."),
    ] = None,
    question_column: Annotated[
        str | None, typer.Option("--question-column", help="Where it is not found by name.")
    ] = None,
    answer_column: Annotated[
        str | None, typer.Option("--answer-column", help="Only the evaluation reads it.")
    ] = None,
    negatives: Annotated[
        str | None, typer.Option("--negatives", help="random, near, far or answers.")
    ] = None,
    rounds: Annotated[
        int | None, typer.Option("--rounds", help="How often the policy writes new pairs.")
    ] = None,
    base: BaseOption = None,
    recipe: RecipeOption = None,
    settings: SetOption = None,
    run: Annotated[
        Path | None, typer.Option("--run", metavar="DIR", help="Run directory; default runs/FILE.")
    ] = None,
    seed: SeedOption = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Make answers say more about their question: sums, multiple choice; no answers needed.

    Run it again with the same --run and it goes on where it stopped.
    """
    from .improve_flow import improve as start
    from .report.summary import print_summary

    finished = start(
        prompts,
        eval_prompts=eval_prompts,
        question_column=question_column,
        answer_column=answer_column,
        negatives=negatives,
        rounds=rounds,
        base=base,
        recipe=recipe,
        settings=settings or [],
        run=run,
        seed=seed,
        trust_remote_code=trust_remote_code,
    )
    print_summary(finished)


@app.command()
def pairs(run: RunArgument, settings: SetOption = None) -> None:
    """Sample and score the pairs of a run, nothing more."""
    _stage(run, settings, "scores")


@app.command()
def train(run: RunArgument, settings: SetOption = None) -> None:
    """Train the adapter of a run; with --set, anew with another setting."""
    _stage(run, settings, "train")


@app.command()
def evaluate(run: RunArgument, settings: SetOption = None) -> None:
    """Measure a run before and after."""
    _stage(run, settings, "evaluate")


def _stage(path: Path, settings: list[str] | None, name: str) -> None:
    from .pipeline import execute, open_flow
    from .report.summary import print_summary

    flow = open_flow(path, settings or [])
    with flow.run.locked():
        execute(flow, only=name)
    print_summary(flow.run)


@app.command()
def chat(
    model: Annotated[
        Path, typer.Argument(metavar="RUN|FILE.gguf", help="A run directory or a GGUF file.")
    ],
    message: Annotated[
        str | None, typer.Option("--message", "-m", help="Ask this, print the answer, and end.")
    ] = None,
    plain: Annotated[
        bool, typer.Option("--plain", help="The base without the adapter, to compare.")
    ] = False,
    temperature: Annotated[
        float, typer.Option(min=0.0, max=5.0, help="0 takes the likeliest token always.")
    ] = 0.7,
    seed: Annotated[int, typer.Option("--seed", help="Same seed, same answers.")] = 0,
) -> None:
    """Talk to the result through llama.cpp, with your page as its system message."""
    from .pipeline import chat_model

    chat_model(model, message=message, plain=plain, temperature=temperature, seed=seed)


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(help="The recipe to print.")] = None,
) -> None:
    """List the recipes, or print one to copy."""
    from .recipe import recipe_names, recipe_text

    if name is not None:
        print(recipe_text(name), end="")
        return
    for known in recipe_names():
        first = recipe_text(known).splitlines()[0].lstrip("# ")
        console.print(f"[bold]{known:<12}[/] {first}")


def main() -> None:
    """The entry point: runs a command, and turns what a user can mend into two lines.

    Exit codes: 0 done, 1 an error, 2 wrong usage, 130 interrupted (as a shell expects).
    """
    debug = "--debug" in sys.argv
    # Let a closed terminal and a polite kill end the same way as Ctrl-C: files closed, run saved.
    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.default_int_handler)
    try:
        app()
    except UserError as error:
        _fail(error.what, error.fix, debug)
        raise SystemExit(error.exit_code) from None
    except KeyboardInterrupt:
        _fail("Stopped.", "What was finished is kept: run the same command again to go on.", debug)
        raise SystemExit(130) from None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        _fail(
            "The disk is full.",
            "Free some space and run the same command again: it goes on where it stopped.",
            debug,
        )
        raise SystemExit(1) from None


def _fail(what: str, fix: str, debug: bool) -> None:
    if debug:
        traceback.print_exc()
    print(f"Error: {what}\n{fix}", file=sys.stderr)
