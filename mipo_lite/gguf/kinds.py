"""The types of a GGUF file, by name; the one table for recipes, disk estimates and the quantizer.

Loads neither torch nor llama.cpp: a recipe is checked before anything heavy is loaded.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..errors import UsageError, UserError


@dataclass(frozen=True)
class Kind:
    """A quantization type.

    Attributes:
        bits: per weight, as llama.cpp's documentation gives them for an 8B model.
        needs_imatrix: llama.cpp refuses it without an importance matrix.
    """

    bits: float
    needs_imatrix: bool = False


PLAIN = ("F32", "F16", "BF16")  # written as they are, without a quantizer
KINDS = {
    "Q8_0": Kind(8.5),
    "Q6_K": Kind(6.56),
    "Q5_K_M": Kind(5.7),
    "Q5_K_S": Kind(5.57),
    "Q4_K_M": Kind(4.89),
    "Q4_K_S": Kind(4.67),
    "Q3_K_L": Kind(4.3),
    "Q3_K_M": Kind(4.0),
    "Q3_K_S": Kind(3.64),
    "Q2_K": Kind(3.16),
    "Q2_K_S": Kind(2.97, needs_imatrix=True),
    "IQ4_NL": Kind(4.68),
    "IQ4_XS": Kind(4.46),
    "IQ3_M": Kind(3.76),
    "IQ3_S": Kind(3.66),
    "IQ3_XS": Kind(3.5, needs_imatrix=True),
    "IQ3_XXS": Kind(3.25, needs_imatrix=True),
    "IQ2_M": Kind(2.93, needs_imatrix=True),
    "IQ2_S": Kind(2.74, needs_imatrix=True),
    "IQ2_XS": Kind(2.59, needs_imatrix=True),
    "IQ2_XXS": Kind(2.38, needs_imatrix=True),
    "IQ1_M": Kind(2.15, needs_imatrix=True),
    "IQ1_S": Kind(2.0, needs_imatrix=True),
}


def find_kind(name: str) -> Kind:
    """The quantization type called `name`, in any case; UsageError when there is none."""
    kind = KINDS.get(name.upper())
    if kind is None:
        raise UsageError(
            f"There is no quantization type {name}.",
            f"Known are {', '.join((*PLAIN, *KINDS))}.",
        )
    return kind


def needs_imatrix(name: str) -> bool:
    """Whether the type `name`, in any case, can not be made without an importance matrix.

    Raises UsageError when there is no such type.
    """
    return name.upper() not in PLAIN and find_kind(name).needs_imatrix


def require_imatrix(quants: Iterable[str], *, given: bool) -> None:
    """Raise UserError for a type that needs an importance matrix, unless one is `given`.

    Raises UsageError for a type that does not exist.
    """
    coarse = [kind for kind in quants if needs_imatrix(kind)]
    if coarse and not given:
        raise UserError(
            f"{coarse[0]} is too coarse to be made without an importance matrix.",
            "Export a run with --imatrix, or choose a type of 3.6 bits or more, such as Q3_K_M.",
        )
