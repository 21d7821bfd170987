"""The closing summary in the terminal, and the preview of --dry-run."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from ..console import console
from ..run import Run, read_json

# (condition, mode, measure) -> how the row is called; in the order of the table.
ROWS = (
    ("with_context", "sampled", "pmi", "information about you (PMI), nats"),
    ("with_context", "sampled", "which_context", "tells you from 7 others"),
    ("with_context", "sampled", "own_words", "uses a word only your page has"),
    ("with_context", "sampled", "fact_use", "uses a fact that fits"),
    ("with_context", "greedy", "fact_use", "uses a fact that fits, greedy"),
    ("with_context", "sampled", "wrong_fact", "states a wrong fact"),
    ("with_context", "sampled", "length", "length, tokens"),
    ("with_context", "sampled", "distinct_2", "variety (distinct-2)"),
    ("without_context", "sampled", "own_words", "your words without your page"),
    ("without_context", "sampled", "user_facts", "your facts without your page"),
    ("other_context", "sampled", "user_facts", "your facts told to somebody else"),
    ("other_context", "sampled", "which_context", "still follows somebody else's page"),
)


def print_summary(run: Run) -> None:
    """What came out, where it lies, how long it took, and how to talk to it."""
    stages = run.meta["stages"]
    if (run / "metrics.json").is_file():
        console.print(_table(read_json(run / "metrics.json")))
    times = ", ".join(f"{name} {entry['seconds']:.0f} s" for name, entry in stages.items())
    total = sum(entry["seconds"] for entry in stages.values())
    console.print(f"\n{times}: {total:.0f} s in all")
    for name, what in (
        ("adapter", "LoRA adapter"),
        ("merged", "merged model"),
        ("report.html", "report"),
    ):
        if (run / name).exists():
            console.print(f"{what + ':':<14}{run / name}", soft_wrap=True)
    for file in sorted((run / "gguf").glob("*.gguf")):
        console.print(f"{'GGUF:':<14}{file}", soft_wrap=True)
    if stages.get("export", {}).get("state") == "done":
        console.print(f"{'Talk to it:':<14}mipo-lite chat {run.path}", soft_wrap=True)


def print_plan(plan: dict[str, Any]) -> None:
    """What `personalize --dry-run` would do."""
    source, recipe = plan["base"], plan["recipe"]
    train, held_out = plan["prompts"]
    console.print(f"Run:      {plan['run']}", soft_wrap=True)
    console.print(f"Base:     {source.name}")
    console.print(f"Context:  {plan['words']} words")
    console.print(f"Prompts:  {train} to train on, {held_out} held out")
    console.print(
        f"Pairs:    {recipe.pairs}, negatives {recipe.negatives}, "
        f"{recipe.pool_positives:.0%} about other personas"
    )
    console.print(
        f"Training: LoRA r {recipe.lora_rank}, {recipe.epochs:g} epochs at "
        f"{recipe.learning_rate:g}, {recipe.batch_size} pairs a step"
    )
    for name in plan["stages"]:
        console.print(f"  {name}: {'done already' if name in plan['done'] else 'to do'}")
    console.print("Nothing was started.")


def _table(metrics: dict[str, Any]) -> Table:
    answers = metrics["prompts"] * metrics["samples_per_prompt"]
    table = Table(
        title=f"Held-out prompts: {metrics['prompts']}, sampled answers: {answers}",
        title_justify="left",
    )
    table.add_column("")
    for column in ("before", "after", "change", "95 % interval"):
        table.add_column(column, justify="right")
    for condition, mode, measure, name in ROWS:
        entry = metrics[condition][mode].get(measure)
        if entry is not None:
            interval = f"{entry['low']:+.2f} to {entry['high']:+.2f}" if "low" in entry else ""
            table.add_row(
                name,
                f"{entry['before']:.2f}",
                f"{entry['after']:.2f}",
                f"{entry['difference']:+.2f}",
                interval,
            )
    return table
