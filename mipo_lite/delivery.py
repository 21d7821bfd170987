"""What becomes of a trained adapter: merged models, GGUF files, chat, and the blind test.

The export stage of a run and the commands export, merge, chat and compare meet here. Formats are
`gguf`'s business, weights `merging`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from .base import Base, load_base, load_tokenizer
from .bases import BaseSource, check_weights, recorded_source
from .console import console, progress
from .contexts import Messages, build_messages, has_system_role
from .errors import UsageError, UserError
from .gguf import (
    check_exports,
    export_lora,
    export_model,
    imatrix_effect,
    importance_matrix,
    load_model,
    merge_fidelity,
    start_lines,
)
from .gguf.export import OUTTYPES
from .gguf.verify import check_rows
from .merging import Onto, merge
from .recipe import Recipe
from .run import Run, read_json, read_jsonl, write_json

# Held-out answers that an export is checked on; more take longer and tell no more.
CHECKED = 50
MERGES: tuple[Onto, ...] = ("full", "dequantized")
HELD_OUT = ("with_context", "question")  # conditions of personalize and of improve


def export_run(
    run: Run,
    base: Path,
    out: Path,
    quants: Sequence[str],
    *,
    onto: Onto = "full",
    imatrix: bool = False,
    lora: bool = True,
) -> list[Path]:
    """Write the GGUF files of a run, compare each with the model in torch, and say so.

    What was found goes into metrics.json under "export".

    Args:
        base: directory of the base's original weights.
        imatrix: weigh the quantization by activations on held-out prompts with the user's page.
        lora: write the adapter alone, too.
    """
    adapter = run / "adapter"
    tokenizer, chats, responses = _held_out(run, base)
    rows = check_rows(tokenizer, chats, responses)
    matrix = None
    if imatrix:
        model = load_model(base, adapter)
        matrix = importance_matrix(model, [[*p, *r] for p, r in rows], progress=progress)
        del model
    files = export_model(
        base,
        out,
        run.name,
        quants=quants,
        adapter_dir=adapter,
        onto=onto,
        context=_page(run),
        imatrix=matrix,
        progress=progress,
    )
    if lora:
        export_lora(base, adapter, out / f"{run.name}-lora.gguf")
    with console.status("Comparing the files with the model in torch"):
        checks = check_exports(files, base, chats, responses, adapter_dir=adapter, onto=onto)
        if matrix is not None:
            for check, kind in zip(checks, quants, strict=True):
                if kind.lower() not in OUTTYPES:
                    check["imatrix"] = imatrix_effect(
                        base, kind.upper(), matrix, rows, adapter_dir=adapter, onto=onto
                    )
    for check in checks:
        console.print(
            f"  {check['file']}: same next token as in torch at {check['greedy_agreement']:.1%} of "
            f"{check['positions']} positions, mean KL {check['mean_kl']:.2g} nats, "
            f"{check['ended']} of {check['answers']} answers end by themselves"
            + ("" if check["template_equal"] else "; the chat template is rendered DIFFERENTLY"),
            soft_wrap=True,
        )
        if "imatrix" in check:
            kl = {key: f"{value:.2g}" for key, value in check["imatrix"].items() if value}
            console.print(f"  its KL to F16, nats, without and with the importance matrix: {kl}")
    if (run / "metrics.json").is_file():
        metrics = read_json(run / "metrics.json")
        write_json(run / "metrics.json", metrics | {"export": checks})
    return files


def compare_merges(run: Run, base: Base) -> dict[str, Any]:
    """Which merge reproduces the trained policy better on held-out answers, by KL.

    Both merges are made in a temporary directory of the run. The result goes into metrics.json
    under "merge": "full" and "dequantized", each as `gguf.verify.agreement`.
    """
    from peft import PeftModel

    adapter = run / "adapter"
    tokenizer, chats, responses = _held_out(run, base.source.path)
    rows = check_rows(tokenizer, chats, responses)
    policy = PeftModel.from_pretrained(base.model, str(adapter))
    try:
        # The suffix: should the process be killed, the next start removes the directory.
        with TemporaryDirectory(dir=run.path, prefix=".merges-", suffix=".partial") as work:
            merged: dict[str, Path] = {
                onto: merge(base.source.path, adapter, Path(work) / onto, onto=onto)
                for onto in MERGES
            }
            found = merge_fidelity(policy.get_base_model(), merged, rows)
    finally:
        policy.unload()
    metrics = read_json(run / "metrics.json")
    write_json(run / "metrics.json", metrics | {"merge": found})
    better = min(found, key=lambda onto: found[onto]["mean_kl"])
    console.print(
        "  KL to the 4-bit model that was trained: "
        + ", ".join(f"{found[onto]['mean_kl']:.2g} nats merged onto {onto}" for onto in found)
        + f"; {better} is closer"
    )
    return found


def _held_out(run: Run, base: Path) -> tuple[Any, list[Messages], list[list[int]]]:
    """The base's tokenizer, and chats of held-out prompts with the trained model's answers."""
    tokenizer = load_tokenizer(BaseSource(str(base), base))
    system_role, page = has_system_role(tokenizer), _page(run)
    answers = [
        row
        for row in read_jsonl(run / "evaluation.jsonl")
        if (row["model"], row["mode"]) == ("after", "greedy") and row["condition"] in HELD_OUT
    ][:CHECKED]
    if not answers:
        raise UserError(
            f"{run.path} has not been evaluated yet, so an export can not be checked.",
            f"Run `mipo-lite evaluate {run.path}` first.",
        )
    chats = [build_messages(row["prompt"], page, system_role) for row in answers]
    return tokenizer, chats, [row["token_ids"] for row in answers]


def _page(run: Run) -> str | None:
    """The user's page; None for a run of improve."""
    file = run / "context.json"
    return str(read_json(file)["text"]) if file.is_file() else None


def export_files(
    model: Path,
    *,
    adapter: Path | None,
    quants: Sequence[str] | None,
    lora: bool,
    onto: str,
    imatrix: bool,
    out: Path | None,
) -> None:
    """`mipo-lite export`: of a run, or of any directory with any LoRA adapter.

    Raises UserError and UsageError as `gguf` and `merging` do.
    """
    kinds = list(quants or ["q4_k_m"])
    checked = _onto(onto)
    if (model / "run.json").is_file():
        run = Run(model)
        with run.locked():
            where = out or run / "gguf"
            base = recorded_source(run.meta["base"]).path
            if lora:
                files = [export_lora(base, run / "adapter", where / f"{run.name}-lora.gguf")]
            else:
                files = export_run(
                    run, base, where, kinds, onto=checked, imatrix=imatrix, lora=False
                )
    else:
        if imatrix:
            raise UsageError(
                "--imatrix needs a run: its held-out prompts say what matters.",
                "Leave it out, or name a run directory.",
            )
        path = check_weights(model)
        where = out or Path.cwd()
        name = model.resolve().name
        if lora:
            if adapter is None:
                raise UsageError("--lora needs an adapter.", "Name one with --adapter DIR.")
            files = [export_lora(path, adapter, where / f"{name}-lora.gguf")]
        else:
            files = export_model(
                path,
                where,
                name,
                quants=kinds,
                adapter_dir=adapter,
                onto=checked,
                progress=progress,
            )
    for file in files:
        console.print(f"GGUF: {file}", soft_wrap=True)
    if not lora:
        for line in start_lines(files[0]):
            console.print(f"      {line}", soft_wrap=True, markup=False)


def merge_adapter(model: Path, *, adapter: Path | None, out: Path, onto: str) -> None:
    """`mipo-lite merge`: of a run, or of any directory with any LoRA adapter."""
    checked = _onto(onto)
    if (model / "run.json").is_file():
        run = Run(model)
        model, adapter = recorded_source(run.meta["base"]).path, run / "adapter"
    if adapter is None:
        raise UsageError("There is no adapter to merge.", "Name one with --adapter DIR.")
    merge(check_weights(model), adapter, out, onto=checked, progress=progress)
    console.print(f"Merged model: {out}", soft_wrap=True)


def _onto(given: str) -> Onto:
    if given == "full":
        return "full"
    if given == "dequantized":
        return "dequantized"
    raise UsageError(f"--onto can not be {given!r}.", "Choose full or dequantized.")


def chat_model(
    model: Path, *, message: str | None, plain: bool, temperature: float, seed: int
) -> None:
    """Talk to a run's GGUF (with the user's page as system message) or to any GGUF file.

    Raises UserError when there is no GGUF to talk to.
    """
    from .chat import chat

    page = None
    file = model
    if model.is_dir():
        run = Run(model)
        page = _page(run)
        file = _plain_gguf(run) if plain else _best_gguf(run)
        if not plain and run.meta["stages"].get("export", {}).get("state") == "stale":
            console.print(
                "[yellow]This file is older than the adapter; the command that started the run "
                "renews it.[/]"
            )
    chat(file, context=page, message=message, plain=plain, temperature=temperature, seed=seed)


def _best_gguf(run: Run) -> Path:
    files = [
        file
        for file in sorted((run / "gguf").glob(f"{run.name}-*.gguf"))
        if not file.stem.endswith("-lora")
    ]
    if not files:
        raise UserError(
            f"{run.path} holds no GGUF file yet.",
            "Finish the run: the command that started it goes on where it stopped.",
        )
    return files[0]


def _plain_gguf(run: Run) -> Path:
    """The base without the adapter as GGUF, made when first asked for."""
    directory = run / "gguf" / "base"
    file = directory / "base-Q4_K_M.gguf"
    if not file.is_file():
        base = recorded_source(run.meta["base"]).path
        export_model(base, directory, "base", modelfile=False, progress=progress)
    return file


def compare_run(
    run: Path,
    *,
    prompts: Path | None,
    web: bool,
    judge: str | None,
    judge_model: str | None,
    allow_remote: bool,
) -> None:
    """`mipo-lite compare`: in the terminal, on a local page, or by a model on a local server.

    Raises UserError and UsageError as `compare` and `judge` do.
    """
    from . import compare
    from .compare_web import CompareServer
    from .judge import DEFAULT_MODEL, Judge, judge_all

    if judge is None and (judge_model is not None or allow_remote):
        raise UsageError(
            "--judge-model and --allow-remote need a judge.",
            "Name its server, for example: --judge http://127.0.0.1:8080/v1",
        )
    if judge is not None and web:
        raise UsageError("Either you choose (--web) or the judge does.", "Leave one of them out.")
    opened = Run(run)
    if opened.meta["command"] == "improve":
        raise UserError(
            f"{run} answers questions, and which answer is right is no matter of taste.",
            f"{run / 'report.html'} says how many are right before and after.",
        )
    judging = None
    if judge is not None:  # a wrong address is said before anything is sampled
        judging = Judge(judge, judge_model or DEFAULT_MODEL, allow_remote=allow_remote)
    with opened.locked():
        if prompts is not None:
            own = compare.read_prompts(prompts)
            base = load_base(recorded_source(opened.meta["base"]))
            compare.answer_own(opened, base, own, Recipe(**opened.meta["recipe"]))
        comparisons = compare.load_comparisons(opened)
        if judging is not None:
            with progress("Judging", len(comparisons.all)) as advance:
                result = judge_all(judging, comparisons, advance)
            console.print(f"The judge: {result}.", soft_wrap=True)
        elif web:
            CompareServer(comparisons).serve(
                lambda url: console.print(f"Open {url}  (Ctrl-C ends)", soft_wrap=True)
            )
            compare.print_result(comparisons)
        else:
            compare.compare_in_terminal(comparisons)
