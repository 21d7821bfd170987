"""report.html: one self-contained page about a run, to look at.

Shows whatever the run directory holds, finished or not. The page asks the network for nothing and
runs no script; it contains personal text, like everything else in the run directory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from ..compare import load_comparisons
from ..quality import pair_quality
from ..recipe import make_recipe
from ..run import Run, atomic_write, read_json, read_jsonl
from . import plots
from .rows import measured_rows
from .stages import current, stages_run, took, took_in_all

# Answers shown side by side, of each condition.
SHOWN = 8
_STAGES = ("pairs", "scores", "train", "evaluate", "export")
_CONDITIONS = (
    ("with_context", "greedy", "With your page"),
    ("without_context", "sampled", "Without your page"),
    ("other_context", "sampled", "With somebody else's page"),
    ("neutral", "sampled", "Where your page is no matter"),
    ("question", "greedy", "Held-out questions"),
)
_FILES = (
    ("train", "adapter", "the LoRA adapter, to load with PEFT"),
    ("export", "merged", "the merged model, a Hugging Face directory"),
    ("export", "gguf", "for llama.cpp, Ollama and others"),
    ("pairs", "pairs.jsonl", "the preference pairs, with all that the base was given"),
    ("scores", "scores.jsonl", "log-probs and PMI of each pair"),
    ("evaluate", "evaluation.jsonl", "every answer of the evaluation"),
    ("evaluate", "metrics.json", "every figure of this page"),
    ("pairs", "choices.jsonl", "your choices in the blind test"),
    ("pairs", "run.json", "settings, versions, times"),
)

Parts = list[tuple[bool, str]]


@dataclass(frozen=True)
class SideBySide:
    """An answer before and after; each part says whether it differs from the other side."""

    prompt: str
    before: Parts
    after: Parts


def write_page(run: Run) -> Path:
    """Write report.html from what `run` holds so far, and return its path."""
    environment = Environment(
        loader=PackageLoader("mipo_lite.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    html = environment.get_template("page.html.jinja").render(page_content(run))
    path = run / "report.html"
    with atomic_write(path) as partial:
        partial.write_text(html, "utf-8")
    return path


def page_content(run: Run) -> dict[str, Any]:
    """What the template shows; parts that the run does not hold yet are None or empty."""
    stages = current(run.meta["stages"])
    evaluated = "evaluate" in stages and (run / "metrics.json").is_file()
    metrics = read_json(run / "metrics.json") if evaluated else None
    answers = _answers(run) if metrics else []
    ranked = metrics.get("contexts", metrics.get("prompts_ranked", 2)) if metrics else 2
    scores = read_jsonl(run / "scores.jsonl")
    quality = pair_quality(read_jsonl(run / "pairs.jsonl"), scores) if scores else None
    train = stages.get("train", {})
    return {
        "name": run.name,
        "base": run.meta["base"]["name"],
        "verdict": metrics["verdict"] if metrics else None,
        "unfinished": [s for s in _STAGES if stages.get(s, {}).get("state") != "done"],
        "improve": run.meta["command"] == "improve",
        "asked": metrics.get("prompts", metrics.get("questions", 0)) if metrics else 0,
        "samples": _samples(metrics) if metrics else 0,
        "ranked": ranked,
        "groups": list(measured_rows(metrics)) if metrics else [],
        "baselines": _baselines(metrics) if metrics else [],
        "most_bits": math.log2(ranked),
        "quality": quality,
        "plots": _plots(quality, train.get("history", []), answers, ranked),
        "answers": [
            (title, *found)
            for condition, mode, title in _CONDITIONS
            if (found := side_by_side(answers, condition, mode))[1]
        ],
        "shown": SHOWN,
        "choices": stages.get("scores", {}).get("choices", 0),
        "stages": [(name, took(entry)) for name, entry in stages_run(stages).items()],
        "in_all": took_in_all(stages),
        "train": train,
        "departures": make_recipe(run.meta["recipe"]).departures,
        "recipe": run.meta["recipe"],
        "versions": run.meta["versions"],
        "device": run.meta["device"],
        "blind_test": _blind_test(run) if metrics else None,
        "exports": metrics.get("export", []) if metrics else [],
        "unchecked": metrics.get("export_skipped", []) if metrics else [],
        "merges": metrics.get("merge", {}) if metrics else {},
        "files": [
            (name, what, _size(run / name))
            for stage, name, what in _FILES
            if stage in stages and (run / name).exists()
        ],
    }


def side_by_side(
    answers: Sequence[dict[str, Any]], condition: str, mode: str
) -> tuple[list[SideBySide], int]:
    """First answers before and after to the same prompts: those that differ; how many in all."""
    sides: dict[tuple[str, str], dict[str, str]] = {}
    for row in answers:
        if (row["condition"], row["mode"], row["sample"]) == (condition, mode, 0):
            key = (row["prompt_id"], row["prompt"])
            sides.setdefault(key, {})[row["model"]] = row["text"]
    pairs = [
        (prompt, texts["before"], texts["after"])
        for (_, prompt), texts in sides.items()
        if {"before", "after"} <= texts.keys()
    ]
    differing = [SideBySide(prompt, *mark_differences(b, a)) for prompt, b, a in pairs if b != a]
    return differing, len(pairs)


def mark_differences(before: str, after: str) -> tuple[Parts, Parts]:
    """Both texts cut into (differs, text), compared word by word."""
    b, a = before.split(), after.split()
    left: Parts = []
    right: Parts = []
    for tag, i, j, k, n in SequenceMatcher(None, b, a, autojunk=False).get_opcodes():
        if i < j:
            left.append((tag != "equal", " ".join(b[i:j])))
        if k < n:
            right.append((tag != "equal", " ".join(a[k:n])))
    return left, right


def _plots(
    quality: Any, history: list[dict[str, float]], answers: list[dict[str, Any]], ranked: int
) -> dict[str, str]:
    found = {}
    if quality is not None:
        found["pairs"] = plots.pair_plot(quality.pmi_chosen, quality.pmi_rejected)
    if history:
        found["training"] = plots.training_plot(history)
    before, after = (_measured(answers, model, "bits") for model in ("before", "after"))
    if before and after:
        found["bits"] = plots.bits_plot(before, after, ranked)
    before, after = (_measured(answers, model, "length") for model in ("before", "after"))
    if before and after:
        found["length"] = plots.length_plot(before, after)
    return found


def _measured(answers: list[dict[str, Any]], model: str, name: str) -> list[float]:
    """One measure of the sampled answers: with the user's page, or to the held-out questions."""
    return [
        row["measures"][name]
        for row in answers
        if (row["model"], row["mode"]) == (model, "sampled")
        and row["condition"] in ("with_context", "question")
        and row["measures"].get(name) is not None
    ]


def _answers(run: Run) -> list[dict[str, Any]]:
    """evaluation.jsonl; those of an improve run name their question by its id only."""
    questions = {row["id"]: row["text"] for row in read_jsonl(run / "problems.jsonl")}
    return [
        row
        if "condition" in row
        else row | {"condition": "question", "prompt": questions[row["prompt_id"]]}
        for row in read_jsonl(run / "evaluation.jsonl")
    ]


def _samples(metrics: dict[str, Any]) -> int:
    return int(metrics.get("samples_per_prompt", metrics.get("samples_per_question", 0)))


def _baselines(metrics: dict[str, Any]) -> list[tuple[str, list[tuple[str, list[str]]]]]:
    """Beside the trained model: what the page in the prompt does alone, no page, and others.

    Returns (name of a row, values as text) under the heads of the first list's columns.
    """
    rows = measured_rows(metrics)
    _, with_page = next(rows, ("", []))
    wanted = [(row, entry) for row, entry in with_page if row.where[1] == "sampled"]
    table: list[tuple[str, list[tuple[str, list[str]]]]] = []
    for row, entry in wanted:
        untrained = "page in the prompt" if "with_context" in metrics else "untrained"
        columns = [(untrained, [row.show(entry["before"])])]
        for name, block in metrics.get("baselines", {}).items():
            other = block.get(row.where[0], {}).get(row.where[1], {}).get(row.where[2])
            columns.append((name, [row.show(other["after"]) if other else ""]))
        columns.append(("trained", [row.show(entry["after"])]))
        table.append((row.name, columns))
    return table if metrics.get("baselines") else []


def _blind_test(run: Run) -> str | None:
    """What the user has chosen so far in `mipo-lite compare`; None where nothing was."""
    if not (run / "choices.jsonl").is_file() or run.meta["command"] == "improve":
        return None
    result = load_comparisons(run).win_rate()
    return f"{result}" if result.n else None


def _size(path: Path) -> str:
    files = path.rglob("*") if path.is_dir() else [path]
    size = float(sum(file.stat().st_size for file in files if file.is_file()))
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"
