"""Does what was learned carry over to pairs held out of training? Margins before and after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from peft import PeftModel

from .metrics import bootstrap_mean
from .scoring import response_logprobs

# Fewer held-out pairs say too little to discard an adapter on.
MIN_WATCHED = 10


@dataclass(frozen=True)
class CarryOver:
    """How much the margin of held-out pairs rose in training.

    Attributes:
        gain: mean over pairs, in the unit of the margin: beta times nats.
        low, high: its 95 % interval, bootstrapped over pairs.
        pairs: how many were held out.
    """

    gain: float
    low: float
    high: float
    pairs: int

    def __str__(self) -> str:
        return f"{self.gain:+.2f}, 95 % interval {self.low:+.2f} to {self.high:+.2f}"


def margins(model: PeftModel, rows: Sequence[dict[str, Any]], beta: float) -> np.ndarray:
    """[len(rows)] DPO's implicit reward margins: beta times the difference of two log-ratios.

    Rafailov et al., arXiv 2305.18290, section 4. `rows` are those of `split_pairs`.
    """
    responses = [
        (row["prompt_ids"], row[side]) for row in rows for side in ("chosen_ids", "rejected_ids")
    ]
    policy = [float(logprobs.sum()) for logprobs in response_logprobs(model, responses)]
    reference = [[row["ref_chosen_logps"], row["ref_rejected_logps"]] for row in rows]
    ratios = np.array(policy).reshape(-1, 2) - np.array(reference)
    return beta * (ratios[:, 0] - ratios[:, 1])


def carry_over_of(gains: np.ndarray) -> CarryOver:
    """From [pairs] how much the margin of each rose."""
    low, high = bootstrap_mean(gains, np.arange(len(gains)))
    return CarryOver(float(gains.mean()), low, high, len(gains))
