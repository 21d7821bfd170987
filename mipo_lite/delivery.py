"""What becomes of a trained adapter: merged models, GGUF files, chat, and the blind test.

The export stage of a run and the commands export, merge and compare meet here. Formats are
`gguf`'s business, weights `merging`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from .base import Base, load_base, load_tokenizer
from .bases import BaseSource, check_weights, recorded_source
from .chat import gguf_files
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
from .gguf.kinds import PLAIN, require_imatrix
from .gguf.quantize import Imatrix
from .gguf.room import NoRoom, find_device, require_room
from .gguf.verify import Row, check_rows
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

    What was found goes into metrics.json under "export"; where memory is too small for the model in
    torch, that comparison is left out and what is left goes under "export_skipped".

    Args:
        base: directory of the base's original weights.
        imatrix: weigh the quantization by activations on held-out prompts with the user's page.
        lora: write the adapter alone, too.

    Raises:
        UserError: as `gguf.export_model`; too little memory for `imatrix`; a run that has not been
            evaluated.
    """
    adapter, kinds = run / "adapter", list(dict.fromkeys(kind.upper() for kind in quants))
    require_imatrix(kinds, given=imatrix)
    tokenizer, chats, responses = _held_out(run, base)
    rows = check_rows(tokenizer, chats, responses)
    matrix = _importance(base, adapter, onto, rows) if imatrix else None
    files = export_model(
        base,
        out,
        run.name,
        quants=kinds,
        adapter_dir=adapter,
        onto=onto,
        context=run.page,
        imatrix=matrix,
        progress=progress,
    )
    if lora:
        export_lora(base, adapter, out / f"{run.name}-lora.gguf", over=files[0])
    with console.status("Comparing the files with the model in torch"):
        checks = check_exports(files, base, chats, responses, adapter_dir=adapter, onto=onto)
        for check, kind in zip(checks, kinds, strict=True):
            if matrix is not None and kind not in PLAIN:
                check["imatrix"] = imatrix_effect(
                    base, kind, matrix, rows, adapter_dir=adapter, onto=onto, work_dir=out
                )
    for check in checks:
        _show(check)
    if (run / "metrics.json").is_file():
        metrics = read_json(run / "metrics.json")
        write_json(run / "metrics.json", metrics | _sorted_checks(checks))
    return files


def _importance(base: Path, adapter: Path, onto: Onto, rows: Sequence[Row]) -> Imatrix:
    device = find_device(base, "The importance matrix")
    model = load_model(base, adapter, onto=onto, device=device)
    return importance_matrix(model, [[*p, *r] for p, r in rows], progress=progress)


def _show(check: dict[str, Any]) -> None:
    """A line of what was found about a file, and one for each warning."""
    ended = f"{check['ended']} of {check['answers']} answers end by themselves"
    if "skipped" in check:
        found = f"{ended}. {check['skipped']}"
    else:
        found = (
            f"same next token as in torch at {check['greedy_agreement']:.1%} of "
            f"{check['positions']} positions, mean KL {check['mean_kl']:.2g} nats, {ended}"
        )
    console.print(f"  {check['file']}: {found}", soft_wrap=True)
    if "imatrix" in check:
        kl = {key: f"{value:.2g}" for key, value in check["imatrix"].items() if value}
        console.print(f"  its KL to F16, nats, without and with the importance matrix: {kl}")
    for warning in check["warnings"]:
        console.print(f"  [yellow]{check['file']}: {warning}[/]", soft_wrap=True)


def _sorted_checks(checks: list[dict[str, Any]]) -> dict[str, Any]:
    """Entries of metrics.json: files compared with torch, and files that no memory was left for."""
    return {
        "export": [check for check in checks if "skipped" not in check],
        "export_skipped": [check for check in checks if "skipped" in check],
    }


def compare_merges(run: Run, base: Base) -> dict[str, Any]:
    """Which merge reproduces the trained policy better on held-out answers, by KL.

    Both merges are made in a temporary directory of the run. The result goes into metrics.json
    under "merge": "full" and "dequantized", each as `gguf.verify.agreement`. Left out (returns {})
    where no memory holds a merged model beside the base.
    """
    from peft import PeftModel

    try:
        require_room(base.source.path, base.model.device.type, "Comparing the merges")
    except NoRoom as error:
        console.print(f"  {error.what}", soft_wrap=True)
        return {}
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
    system_role, page = has_system_role(tokenizer), run.page
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
        _refuse_adapter(model, adapter)
        run = Run(model)
        with run.locked():
            where = out or run / "gguf"
            base = recorded_source(run.meta["base"]).path
            if lora:
                over = next(iter(gguf_files(run)), None)
                files = [
                    export_lora(base, run / "adapter", where / f"{run.name}-lora.gguf", over=over)
                ]
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
        _refuse_adapter(model, adapter)
        run = Run(model)
        model, adapter = recorded_source(run.meta["base"]).path, run / "adapter"
    if adapter is None:
        raise UsageError("There is no adapter to merge.", "Name one with --adapter DIR.")
    merge(check_weights(model), adapter, out, onto=checked, progress=progress)
    console.print(f"Merged model: {out}", soft_wrap=True)


def _refuse_adapter(run: Path, adapter: Path | None) -> None:
    if adapter is not None:
        raise UsageError(
            f"{run} is a run and has its own adapter; --adapter is for a model directory.",
            "Leave it out, or name the directory of the base instead of the run.",
        )


def _onto(given: str) -> Onto:
    if given == "full":
        return "full"
    if given == "dequantized":
        return "dequantized"
    raise UsageError(f"--onto can not be {given!r}.", "Choose full or dequantized.")


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
    from .report.page import write_page

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
            with suppress(KeyboardInterrupt):
                CompareServer(comparisons).serve(
                    lambda url: console.print(f"Open {url}  (Ctrl-C ends)", soft_wrap=True)
                )
            compare.print_result(comparisons)
        else:
            compare.compare_in_terminal(comparisons)
        write_page(opened)
