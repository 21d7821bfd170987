"""The closing summary in the terminal."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from ..console import console
from ..run import Run, read_json
from .rows import measured_rows
from .stages import current, stages_run, took_in_all


def print_summary(run: Run) -> None:
    """What came out, where it lies, how long it took, and how to talk to it."""
    stages = current(run.meta["stages"])
    if "evaluate" in stages and (run / "metrics.json").is_file():
        metrics = read_json(run / "metrics.json")
        console.print(_table(metrics))
        console.print(f"\n[bold]{metrics['verdict']['sentence']}[/]")
        for advice in metrics["verdict"]["advice"]:
            console.print(f"  Try: {advice}")
    times = [f"{name} {entry['seconds']:.0f} s" for name, entry in stages_run(stages).items()]
    console.print(f"\n{', '.join(times)}: {took_in_all(stages)}")
    for stage, pattern, what in (
        ("train", "adapter", "LoRA adapter"),
        ("export", "merged", "merged model"),
        ("pairs", "report.html", "report"),
        ("export", "gguf/*.gguf", "GGUF"),
    ):
        if stage in stages:
            for path in sorted(run.path.glob(pattern)):
                console.print(f"{what + ':':<14}{path}", soft_wrap=True)
    if stages.get("export", {}).get("state") == "done":
        console.print(f"{'Talk to it:':<14}mipo-lite chat {run.path}", soft_wrap=True)
    # The page is written by every command.
    outdated = [name for name in stages_run(run.meta["stages"]) if name not in {*stages, "report"}]
    if outdated:
        console.print(
            f"Not made anew yet: {', '.join(outdated)}. The command that started the run makes"
            " them, given the same settings."
        )


def _table(metrics: dict[str, Any]) -> Table:
    prompts = metrics.get("prompts", metrics.get("questions", 0))
    each = metrics.get("samples_per_prompt", metrics.get("samples_per_question", 0))
    table = Table(
        title=f"Held-out prompts: {prompts}, sampled answers: {prompts * each}",
        title_justify="left",
    )
    table.add_column("")
    for column in ("before", "after", "change", "95 % interval"):
        table.add_column(column, justify="right")
    for title, rows in measured_rows(metrics):
        table.add_section()
        table.add_row(f"[dim]{title}[/]")
        for row, entry in rows:
            unit = f", {row.unit}" if row.unit not in ("%", "exp") else ""
            table.add_row(
                row.name + unit,
                row.show(entry["before"]),
                row.show(entry["after"]),
                row.show_change(entry["difference"]),
                row.show_interval(entry),
            )
    return table
