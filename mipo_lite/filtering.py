"""Scores of pairs: reference log-probs for training, PMI, and which pairs teach anything.

Everything here is measured by the base with no adapter. A pair whose two responses carry the same
information about the context has no contrast: it is dropped, and counted. That filter is ours,
not the paper's.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .base import Base
from .recipe import Recipe
from .run import append_jsonl, read_jsonl
from .scoring import response_logprobs

# Pairs scored between two writes to scores.jsonl; an interrupted run repeats one chunk at most.
CHUNK = 64


def score_pairs(
    base: Base,
    pairs: Sequence[dict[str, Any]],
    recipe: Recipe,
    path: Path,
    advance: Callable[[int], None] = lambda n: None,
) -> None:
    """Append the scores of all pairs that `path` does not hold yet.

    A line holds, in nats and summed over the response: `ref_chosen` and `ref_rejected`, the
    log-probs given the pair's own prompt, which DPO needs as its reference; `pmi_chosen` and
    `pmi_rejected`, those minus the log-probs given the prompt without its context (for improve:
    given the other prompt).
    """
    done = len(read_jsonl(path))
    advance(done)
    for start in range(done, len(pairs), CHUNK):
        chunk = pairs[start : start + CHUNK]
        rows = [
            (pair[prompt], pair[response])
            for pair in chunk
            for response in ("chosen_ids", "rejected_ids")
            for prompt in ("prompt_ids", "without_ids")
        ]
        logprobs = response_logprobs(base.model, rows, max_tokens=recipe.scoring_tokens)
        sums = [float(tokens.double().sum()) for tokens in logprobs]
        append_jsonl(
            path, [_row(pair, sums[4 * i : 4 * i + 4], recipe) for i, pair in enumerate(chunk)]
        )
        advance(len(chunk))


def _row(pair: dict[str, Any], logprobs: Sequence[float], recipe: Recipe) -> dict[str, Any]:
    """A line of scores.jsonl."""
    chosen, chosen_without, rejected, rejected_without = logprobs
    pmi_chosen, pmi_rejected = chosen - chosen_without, rejected - rejected_without
    # Two answers to one question are contrasted by their answers, as the pair itself says.
    contrast = pair.get("contrast", pmi_chosen - pmi_rejected)
    if pair.get("chosen_by") == "user":
        contrast = math.inf  # somebody saw one, be it about the context or not
    why = drop_reason(pair["chosen_ids"], pair["rejected_ids"], contrast, recipe.min_contrast)
    other_question = pair["negative"]["prompt_id"] != pair["prompt_id"]
    if why is None and other_question and pmi_rejected > -recipe.min_contrast:
        why = "false negative"
    return {
        "id": pair["id"],
        "ref_chosen": chosen,
        "ref_rejected": rejected,
        "pmi_chosen": pmi_chosen,
        "pmi_rejected": pmi_rejected,
        "kept": why is None,
        "why": why,
    }


def drop_reason(
    chosen: Sequence[int], rejected: Sequence[int], contrast: float, min_contrast: float
) -> str | None:
    """Why a pair is dropped: "identical", "little contrast" (in nats), or None: it is kept.

    Beside these, `score_pairs` drops a "false negative": a response to another question that is
    as likely under this one.
    """
    if list(chosen) == list(rejected):
        return "identical"
    if abs(contrast) < min_contrast:
        return "little contrast"
    return None


def dropped(scores: Sequence[dict[str, Any]]) -> Counter[str]:
    """How many pairs were dropped, by reason."""
    return Counter(score["why"] for score in scores if not score["kept"])
