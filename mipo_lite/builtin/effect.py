"""`python -m mipo_lite.builtin.effect --out DIR`: what MIPO does to the built-in base.

Runs the whole flow, with the SFT baseline, for three invented users whose values stand in no
training text and for the page in examples/prose.txt, which no phrasing of the corpus fits, with
three seeds each; then lets the Q4_K_M files answer the same held-out prompts in llama.cpp. Prints
the tables of the README. What is in DIR already is not done again.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from ..console import progress, quiet_libraries
from ..contexts import Persona, accepted
from ..pipeline import personalize
from ..report.rows import Row
from ..run import Run, read_json, read_jsonl
from .facts import fact_use

CONTEXTS = Path(__file__).with_name("eval_contexts.jsonl")
PROSE = Path(__file__).parents[2] / "examples" / "prose.txt"
WITH, GREEDY = ("with_context", "sampled"), ("with_context", "greedy")
SFT = "SFT on chosen"
ENOUGH = 200  # pieces of text: an answer that has not ended by then does not end by itself
ROWS = (
    Row((*WITH, "fact_use"), "fact use, sampled", "", 1),
    Row((*GREEDY, "fact_use"), "fact use, greedy", "", 1),
    Row((*WITH, "wrong_fact"), "wrong fact, sampled", "", -1),
    Row((*WITH, "which_context"), "which of 8 contexts", "", 1),
    Row((*WITH, "pmi"), "PMI, nats", "", 1),
    Row((*WITH, "length"), "length, tokens", "", 0),
    Row((*WITH, "distinct_2_words"), "distinct-2 of words", "", 1),
    Row((*WITH, "distinct_2"), "distinct-2 of tokens", "", 1),
    Row(("without_context", "sampled", "user_facts"), "user's facts without context", "", -1),
    Row(("other_context", "sampled", "fact_use"), "others' fact use under theirs", "", 1),
)


def main(
    out: Annotated[Path, typer.Option(help="Where the runs are kept.")],
    seeds: Annotated[str, typer.Option(help="Each a run of its own for every page.")] = "0,1,2",
    base: Annotated[str, typer.Option(help="builtin, or a directory.")] = "builtin",
) -> None:
    quiet_libraries()
    if not PROSE.is_file():
        raise SystemExit(f"{PROSE} is not here: run this in a checkout, not from an installation.")
    out.mkdir(parents=True, exist_ok=True)
    pages = [_write(row, out) for row in _rows()]
    wanted = [int(seed) for seed in seeds.split(",")]
    invented = [[_run(page, out, seed, base) for page in pages] for seed in wanted]
    prose = [[_run(PROSE, out, seed, base)] for seed in wanted]
    print(table([list(map(_metrics, runs)) for runs in invented]))
    print("\nexamples/prose.txt\n")
    print(table([list(map(_metrics, runs)) for runs in prose]))
    print("\n| Q4_K_M in llama.cpp, sampled | fact use | adapter's | ended by itself |")
    print("|---|---|---|---|")
    for run in (*chain.from_iterable(invented), *chain.from_iterable(prose)):
        print(_quantized(run))


def table(seeds: Sequence[Sequence[dict[str, Any]]]) -> str:
    """Markdown: base, SFT and MIPO, means over the runs, and how sure the change is.

    Args:
        seeds: for each seed the metrics of its runs.
    """
    runs = list(chain.from_iterable(seeds))
    lines = [
        "| | base | SFT on chosen | MIPO | change | of each seed | rose or fell beyond chance |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in ROWS:
        entries = [_entry(metrics, row) for metrics in runs]
        if not all(entries):
            continue
        other = statistics.fmean(_entry(m["baselines"][SFT], row)["after"] for m in runs)
        before, after, change = (
            statistics.fmean(entry[key] for entry in entries)
            for key in ("before", "after", "difference")
        )
        each = ", ".join(
            f"{statistics.fmean(_entry(metrics, row)['difference'] for metrics in of_seed):+.2f}"
            for of_seed in seeds
        )
        rose = sum(entry.get("low", 0) > 0 for entry in entries)
        fell = sum(entry.get("high", 0) < 0 for entry in entries)
        lines.append(
            f"| {row.name} | {before:.2f} | {other:.2f} | {after:.2f} | {change:+.3f} | {each} "
            f"| {rose} rose, {fell} fell |"
        )
    answers = sum(metrics["with_context"]["sampled"]["fact_use"]["n"] for metrics in runs)
    lines.append(f"\n{len(runs)} runs, {answers} sampled answers that a fact fits")
    return "\n".join(lines)


def _metrics(run: Run) -> dict[str, Any]:
    metrics: dict[str, Any] = read_json(run / "metrics.json")
    return metrics


def _entry(metrics: dict[str, Any], row: Row) -> Any:
    condition, mode, measure = row.where
    return metrics[condition][mode].get(measure)


def _rows() -> list[dict[str, Any]]:
    return [json.loads(line) for line in CONTEXTS.read_text("utf-8").splitlines()]


def _write(row: dict[str, Any], out: Path) -> Path:
    """The page and its facts as the files that a user would have."""
    page = out / f"{row['id']}.txt"
    page.write_text(row["text"] + "\n", "utf-8")
    facts = yaml.safe_dump(accepted(row["facts"]), allow_unicode=True)
    page.with_suffix(".facts.yaml").write_text(facts, "utf-8")
    return page


def _run(page: Path, out: Path, seed: int, base: str) -> Run:
    settings = ["sft_baseline=true", "quants=[q4_k_m]"]
    path = out / f"{page.stem}-seed-{seed}"
    return personalize(page, base=base, run=path, seed=seed, settings=settings)


def _quantized(run: Run) -> str:
    """A table row: the Q4_K_M file's own sampled answers, with the evaluation's prompts."""
    from ..chat import Conversation
    from ..gguf.llama import open_gguf

    user = Persona("user", **read_json(run / "context.json"))
    topics = {row["text"]: row["topics"] for row in read_jsonl(run / "prompts.jsonl")}
    asked = [
        row
        for row in read_jsonl(run / "evaluation.jsonl")
        if row["condition"] == "with_context"
        and (row["mode"], row["model"]) == ("sampled", "after")
    ]
    used, ended = [], 0
    file = run / "gguf" / f"{run.name}-Q4_K_M.gguf"
    with open_gguf(file, n_ctx=1024) as llama, progress("Asking the GGUF", len(asked)) as advance:
        for number, row in enumerate(asked):
            talk = Conversation(llama, context=user.text, temperature=1.0, seed=number)
            pieces = list(islice(talk.answer(row["prompt"]), ENOUGH))
            ended += len(pieces) < ENOUGH
            use = fact_use("".join(pieces), user.facts, topics[row["prompt"]])
            used += [] if use is None else [use]
            advance(1)
    adapter = read_json(run / "metrics.json")["with_context"]["sampled"]["fact_use"]["after"]
    return (
        f"| {run.name} | {statistics.fmean(used):.2f} | {adapter:.2f} | {ended} of {len(asked)} |"
    )


if __name__ == "__main__":
    typer.run(main)
