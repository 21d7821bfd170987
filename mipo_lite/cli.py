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
from .interrupts import INTERRUPTED, stoppable

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
OntoOption = Annotated[
    str, typer.Option("--onto", help="full: the 16-bit weights; dequantized: the 4-bit ones.")
]
SeedOption = Annotated[int | None, typer.Option("--seed", help="Seeds everything random.")]
TrustOption = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run code that a base's directory brings along."),
]
DryRunOption = Annotated[
    bool, typer.Option("--dry-run", help="Say what would be done; do nothing.")
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
    dry_run: DryRunOption = False,
) -> None:
    """Make the base use your page: pairs, training, evaluation, merged model and GGUF.

    Run it again with the same --run and it goes on where it stopped.
    """
    from . import pipeline
    from .plan_report import print_preview
    from .report.summary import print_summary

    arguments: dict[str, Any] = {
        "base": base,
        "prompts": prompts,
        "recipe": recipe,
        "settings": settings or [],
        "seed": seed,
        "run": run,
    }
    if dry_run:
        print_preview(pipeline.preview(user_context, **arguments))
        return
    with stoppable():
        finished = pipeline.personalize(
            user_context, **arguments, trust_remote_code=trust_remote_code
        )
    print_summary(finished)


@app.command()
def improve(
    prompts: Annotated[
        Path,
        typer.Option("--prompts", metavar="FILE", help="Questions: JSONL, CSV, or text lines."),
    ],
    eval_prompts: Annotated[
        Path | None,
        typer.Option(
            "--eval-prompts", metavar="FILE", help="Questions to hold out; default: a third."
        ),
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
    dry_run: DryRunOption = False,
) -> None:
    """Make answers say more about their question: sums, multiple choice; no answers needed.

    Run it again with the same --run and it goes on where it stopped.
    """
    from . import improve_flow
    from .plan_report import print_preview
    from .report.summary import print_summary

    arguments: dict[str, Any] = {
        "eval_prompts": eval_prompts,
        "question_column": question_column,
        "answer_column": answer_column,
        "negatives": negatives,
        "rounds": rounds,
        "base": base,
        "recipe": recipe,
        "settings": settings or [],
        "run": run,
        "seed": seed,
    }
    if dry_run:
        print_preview(improve_flow.preview(prompts, **arguments))
        return
    with stoppable():
        finished = improve_flow.improve(prompts, **arguments, trust_remote_code=trust_remote_code)
    print_summary(finished)


@app.command()
def pairs(run: RunArgument, settings: SetOption = None) -> None:
    """Sample and score the pairs of a run, nothing more."""
    _stage(run, settings, "scores")


@app.command()
def train(
    run: RunArgument,
    settings: SetOption = None,
    use_choices: Annotated[
        bool,
        typer.Option("--use-choices", help="Also on your choices in the blind test (compare)."),
    ] = False,
) -> None:
    """Train the adapter of a run; with --set, anew with another setting."""
    _stage(run, [*(settings or []), *["use_choices=true"] * use_choices], "train")


@app.command()
def evaluate(run: RunArgument, settings: SetOption = None) -> None:
    """Measure a run before and after."""
    _stage(run, settings, "evaluate")


def _stage(path: Path, settings: list[str] | None, name: str) -> None:
    from .flow import execute
    from .pipeline import open_flow
    from .report.page import write_page
    from .report.summary import print_summary

    flow = open_flow(path, settings or [])
    with stoppable(), flow.run.locked():
        execute(flow, only=name)
        write_page(flow.run)
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
    window: Annotated[
        int | None,
        typer.Option(
            "--window", min=64, metavar="TOKENS", help="Context; by default what your page needs."
        ),
    ] = None,
) -> None:
    """Talk to the result through llama.cpp, with your page as its system message."""
    from .chat import chat_model

    chat_model(
        model, message=message, plain=plain, temperature=temperature, seed=seed, window=window
    )


@app.command()
def compare(
    run: RunArgument,
    prompts: Annotated[
        Path | None,
        typer.Option("--prompts", metavar="FILE", help="Your own requests, a line each."),
    ] = None,
    web: Annotated[bool, typer.Option("--web", help="On a local page.")] = False,
    judge: Annotated[
        str | None,
        typer.Option("--judge", metavar="URL", help="Let a model on a local server choose."),
    ] = None,
    judge_model: Annotated[
        str | None,
        typer.Option("--judge-model", metavar="NAME", help="Where the server has several."),
    ] = None,
    allow_remote: Annotated[
        bool, typer.Option("--allow-remote", help="Send your page to a judge elsewhere.")
    ] = False,
) -> None:
    """Blind test: before or after, which answer is better? You choose; go on any time."""
    from .delivery import compare_run

    compare_run(
        run,
        prompts=prompts,
        web=web,
        judge=judge,
        judge_model=judge_model,
        allow_remote=allow_remote,
    )


@app.command()
def export(
    model: Annotated[
        Path, typer.Argument(metavar="RUN|MODEL_DIR", help="A run, or a Hugging Face directory.")
    ],
    adapter: Annotated[
        Path | None, typer.Option("--adapter", metavar="DIR", help="A LoRA adapter to merge.")
    ] = None,
    quants: Annotated[
        list[str] | None,
        typer.Option("--quant", metavar="TYPE", help="Repeatable; default q4_k_m."),
    ] = None,
    lora: Annotated[bool, typer.Option("--lora", help="The adapter alone, as GGUF.")] = False,
    onto: OntoOption = "full",
    imatrix: Annotated[
        bool, typer.Option("--imatrix", help="Weigh quantization by your own held-out prompts.")
    ] = False,
    out: Annotated[Path | None, typer.Option("--out", metavar="DIR", help="Where to.")] = None,
) -> None:
    """Write GGUF files, each loaded by llama.cpp before it gets its name."""
    from .delivery import export_files

    with stoppable():
        export_files(
            model, adapter=adapter, quants=quants, lora=lora, onto=onto, imatrix=imatrix, out=out
        )


@app.command()
def merge(
    model: Annotated[
        Path, typer.Argument(metavar="RUN|MODEL_DIR", help="A run, or a Hugging Face directory.")
    ],
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="The merged model.")],
    adapter: Annotated[
        Path | None, typer.Option("--adapter", metavar="DIR", help="A LoRA adapter to merge.")
    ] = None,
    onto: OntoOption = "full",
) -> None:
    """Merge an adapter into a Hugging Face directory, shard by shard."""
    from .delivery import merge_adapter

    with stoppable():
        merge_adapter(model, adapter=adapter, out=out, onto=onto)


@app.command()
def plan(
    base: BaseOption = None,
    vram: Annotated[
        float | None, typer.Option("--vram", metavar="GB", min=0.5, help="Plan for such a GPU.")
    ] = None,
    user_context: Annotated[
        Path | None, typer.Option("--user-context", metavar="FILE", help="Your page.")
    ] = None,
    recipe: RecipeOption = None,
    settings: SetOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """What fits: base, batch, length, memory by part. Starts nothing."""
    from .plan_report import report

    report(
        base,
        vram_gib=vram,
        user_context=user_context,
        recipe=recipe,
        settings=settings or [],
        as_json=as_json,
    )


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """What of this machine and installation works, and how to mend what does not."""
    from .doctor import diagnose, print_checks

    if not print_checks(diagnose(), as_json):
        raise SystemExit(1)


@app.command()
def bench(
    context_tokens: Annotated[int, typer.Option(min=0, help="Tokens of the user context.")] = 1200,
    batch: Annotated[int, typer.Option(min=1, help="Pairs a batch.")] = 4,
    response_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a response.")] = 96,
    base: BaseOption = None,
    shape: Annotated[
        str | None, typer.Option(help="Random weights of a shape, such as qwen2.5-1.5b.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Measurements of each.")] = 5,
    json_path: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write everything measured.")
    ] = None,
) -> None:
    """Training and sampling speed here, against plain TRL."""
    from .bench import run_bench

    run_bench(
        context_tokens=context_tokens,
        batch=batch,
        response_tokens=response_tokens,
        base=base,
        shape=shape,
        repeats=repeats,
        json_path=json_path,
    )


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
        console.print(f"[bold]{known:<16}[/] {first}")


def main() -> None:
    """The entry point: runs a command, and turns what a user can mend into two lines.

    Exit codes: 0 done, 1 an error, 2 wrong usage, 130 interrupted (as a shell expects).
    """
    debug = "--debug" in sys.argv
    # Let a closed terminal and a polite kill end the same way as Ctrl-C: files closed, run saved.
    # (Under nohup a closed terminal is ignored, and stays so.)
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)
    try:
        app()
    except UserError as error:
        _fail(error.what, error.fix, debug)
        raise SystemExit(error.exit_code) from None
    except (KeyboardInterrupt, SystemExit) as error:
        # The library under the command line turns Ctrl-C into a silent exit.
        if isinstance(error, SystemExit) and error.code != INTERRUPTED:
            raise
        _fail("Stopped.", "What was finished is kept: run the same command again to go on.", debug)
        raise SystemExit(INTERRUPTED) from None
    except Exception as error:
        known = _mendable(error)
        if known is None:
            raise
        _fail(known.what, known.fix, debug)
        raise SystemExit(known.exit_code) from None


def _mendable(error: Exception) -> UserError | None:
    """What the machine has refused, as an error that a user can mend; None for anything else."""
    from .disk import is_disk_full
    from .out_of_memory import is_out_of_memory

    if is_disk_full(error):
        return UserError(
            "The disk is full.",
            "Free some space and run the same command again: it goes on where it stopped.",
        )
    if is_out_of_memory(error):
        return UserError(
            "There is not enough memory.",
            "Close other programs and run the same command again: it goes on where it stopped.",
        )
    if isinstance(error, PermissionError) or getattr(error, "errno", None) == errno.EROFS:
        return UserError(
            f"There is no permission for {getattr(error, 'filename', None) or 'a file'}.",
            "Give yourself permission to read and write it, or choose another place.",
        )
    return None


def _fail(what: str, fix: str, debug: bool) -> None:
    if debug:
        traceback.print_exc()
    print(f"Error: {what}\n{fix}", file=sys.stderr)
