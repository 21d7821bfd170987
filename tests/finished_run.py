"""A finished run made of a few lines, without any model: for tests of what only reads runs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from mipo_lite.recipe import Recipe
from mipo_lite.run import Run, append_jsonl, write_json

PAGE = "My name is Ilva & I keep bees in <Torrenquist>. My dog is called Quibbix."


def entry(before: float, after: float, low: float, high: float) -> dict[str, float]:
    """A comparison as metrics.json holds it."""
    return {
        "before": before,
        "after": after,
        "difference": after - before,
        "low": low,
        "high": high,
        "n": 40,
        "groups": 40,
    }


def metrics(**changed: dict[str, float]) -> dict[str, Any]:
    """Figures of a training that went well; `changed` replaces single measures.

    A key is condition__mode__measure.
    """
    found: dict[str, Any] = {
        "prompts": 40,
        "neutral_prompts": 10,
        "samples_per_prompt": 1,
        "contexts": 8,
        "with_context": {
            "sampled": {
                "pmi": entry(7.0, 12.0, 4.0, 6.0),
                "bits": entry(1.0, 2.0, 0.8, 1.2),
                "which_context": entry(0.6, 0.8, 0.1, 0.3),
                "fact_use": entry(0.5, 0.75, 0.15, 0.35),
                "own_words": entry(0.4, 0.6, 0.1, 0.3),
                "length": entry(16.0, 17.0, 0.2, 1.8),
                "ended": entry(1.0, 1.0, 0.0, 0.0),
                "repetition": entry(0.0, 0.0, 0.0, 0.0),
                "shared_run": entry(2.0, 2.4, 0.1, 0.7),
                "distinct_2": entry(0.44, 0.40, -0.06, -0.02),
            },
            "greedy": {"fact_use": entry(0.85, 0.95, 0.02, 0.2)},
        },
        "neutral": {
            "sampled": {
                "own_words": entry(0.0, 0.02, -0.02, 0.06),
                "shared_run": entry(0.5, 0.6, -0.1, 0.3),
                "kl_per_token": entry(0.0, 0.05, 0.02, 0.08),
            }
        },
        "without_context": {
            "sampled": {
                "user_facts": entry(0.0, 0.02, 0.0, 0.05),
                "own_words": entry(0.01, 0.03, -0.01, 0.05),
            }
        },
        "other_context": {
            "sampled": {
                "user_facts": entry(0.0, 0.0, 0.0, 0.0),
                "which_context": entry(0.6, 0.7, 0.02, 0.2),
            }
        },
        "neutral_text": {"nll_per_token": entry(2.0, 2.05, 0.02, 0.08)},
        "baselines": {},
    }
    for where, value in changed.items():
        condition, mode, measure = where.split("__")
        block = found[condition][mode] if mode else found[condition]
        block[measure] = value
    return found


def make_run(path: Path, *, finished: bool = True) -> Run:
    """A run directory; unfinished, it has pairs and scores and nothing more."""
    from mipo_lite.verdict import conclude

    stages: dict[str, Any] = {
        "pairs": {"state": "done", "seconds": 5.0, "peak_memory": 2**30},
        "scores": {"state": "done", "seconds": 1.0},
    }
    history = [
        {"step": 1, "loss": math.log(2), "margin": 0.0},
        {"step": 2, "loss": 0.6, "margin": 0.3, "held_out_loss": 0.62, "held_out_margin": 0.2},
    ]
    if finished:
        stages["train"] = {
            "state": "done",
            "seconds": 20.0,
            "peak_memory": 3 * 2**29,
            "memory": {"planned": 5 * 2**30, "measured": 11 * 2**29},
            "steps": 2,
            "best_step": 2,
            "kept": True,
            "prefix_sharing": "on",
            "history": history,
        }
        stages["baseline"] = {"state": "done", "seconds": 0.0}  # nothing was wanted of it
        stages["evaluate"] = {"state": "done", "seconds": 30.0}
        stages["export"] = {"state": "done", "seconds": 3.0}
    meta = {
        "command": "personalize",
        "stages": stages,
        "recipe": Recipe().model_dump(),
        "base": {"name": "builtin", "path": "", "revision": None},
        "seed": 0,
        "versions": {"python": "3.11", "torch": "2.13"},
        "device": "CPU, 2 cores",
    }
    run = Run.create(path, meta)
    write_json(run / "context.json", {"text": PAGE, "facts": {"pet": ["Quibbix"]}})
    append_jsonl(run / "pairs.jsonl", [_pair(i) for i in range(4)])
    append_jsonl(run / "scores.jsonl", [_score(i) for i in range(4)])
    if finished:
        found = metrics()
        write_json(run / "metrics.json", found | {"verdict": conclude(found).as_dict()})
        append_jsonl(run / "evaluation.jsonl", [row for i in range(6) for row in _answers(i)])
    return run


def make_improve_run(path: Path) -> Run:
    """A finished run of `improve`: questions with right and wrong answers."""
    run = make_run(path)
    run.meta["command"] = "improve"
    run.save()
    (run / "context.json").unlink()
    append_jsonl(run / "problems.jsonl", [{"id": f"q{i}", "text": f"{i} + 1?"} for i in range(3)])
    (run / "evaluation.jsonl").unlink()
    append_jsonl(
        run / "evaluation.jsonl",
        [
            {
                "model": model,
                "mode": mode,
                "question": i,
                "prompt_id": f"q{i}",
                "sample": 0,
                "text": f"It is {i + (model == 'after')}.",
                "token_ids": [i],
                "ended": True,
                "measures": {"bits": 1.0, "length": 3.0},
            }
            for model in ("before", "after")
            for mode in ("sampled", "greedy")
            for i in range(3)
        ],
    )
    found = {"questions": 3, "samples_per_question": 1, "prompts_ranked": 3, "baselines": {}}
    found["question"] = {"sampled": {"exact_match": entry(0.0, 1.0, 0.5, 1.0)}}
    verdict = {"word": "improved", "sentence": "Improved.", "reasons": [], "advice": []}
    write_json(run / "metrics.json", found | {"verdict": verdict})
    return run


def _pair(i: int) -> dict[str, Any]:
    prompt = [{"role": "user", "content": f"Request <{i % 2}>?"}]
    return {"id": i, "persona": "user", "prompt": prompt}


def _score(i: int) -> dict[str, Any]:
    return {
        "id": i,
        "pmi_chosen": 4.0 + i,
        "pmi_rejected": -1.0,
        "kept": i != 3,
        "why": None if i != 3 else "little contrast",
    }


def _answers(i: int) -> list[dict[str, Any]]:
    return [
        {
            "model": model,
            "mode": mode,
            "condition": "with_context",
            "prompt_id": f"p{i}",
            "prompt": f"What is <request> {i}?",
            "persona": "user",
            "sample": 0,
            "text": f"{'Hello' if model == 'before' else 'Quibbix & you'}, number {i}.",
            "token_ids": [1 if model == "before" else 2, i, 3],
            "ended": True,
            "measures": {"bits": 1.0 if model == "before" else 2.0, "length": 3.0},
        }
        for mode in ("sampled", "greedy")
        for model in ("before", "after")
    ]
