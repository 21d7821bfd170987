"""Does what was learned carry over to pairs held out of training? Margins before and after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from peft import PeftModel

from .metrics import wilson_interval
from .scoring import response_logprobs

# Fewer held-out pairs say too little to discard an adapter on.
MIN_WATCHED = 10


@dataclass(frozen=True)
class CarryOver:
    """In how many held-out pairs the margin rose in training.

    Counted, not averaged: single pairs have margins of ten times the others', so that the mean of
    thirty is no judge. Without anything to learn it rises in half of them.

    Attributes:
        gain: mean rise over pairs, in the unit of the margin: beta times nats.
        rose: in how many pairs it rose.
        pairs: how many were held out.
    """

    gain: float
    rose: int
    pairs: int

    @property
    def beyond_chance(self) -> bool:
        """Whether the 95 % interval of the share in which it rose lies above one half."""
        low, _ = wilson_interval(self.rose, self.pairs)
        return low > 0.5

    def __str__(self) -> str:
        return f"{self.rose} of {self.pairs} rose"


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
    return CarryOver(float(gains.mean()), int((gains > 0).sum()), len(gains))
