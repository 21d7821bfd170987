"""Quantize a GGUF file with llama.cpp's own code, inside this process: no binaries, no checkout.

Memory stays bounded: llama.cpp maps the source, releases each tensor when it is done, and is told
to work in slabs. What it decides per tensor (a row that is no multiple of the block length) is
taken from its log and returned.
"""

from __future__ import annotations

import ctypes
import re
import threading
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from numpy.typing import NDArray

from ..disk import require_disk
from ..errors import UsageError, UserError
from ..merging import Progress
from ..run import atomic_write
from .llama import last_words, listening, threads

Imatrix = Mapping[str, NDArray[np.float32]]

SLAB = 64 << 20  # bytes of a tensor's rows in memory at once


@dataclass(frozen=True)
class Kind:
    """A quantization type.

    Attributes:
        ftype: llama_ftype.
        bits: per weight, as llama.cpp's documentation gives them for an 8B model.
        needs_imatrix: llama.cpp refuses it without an importance matrix.
    """

    ftype: int
    bits: float
    needs_imatrix: bool = False


KINDS = {
    "Q8_0": Kind(llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, 8.5),
    "Q6_K": Kind(llama_cpp.LLAMA_FTYPE_MOSTLY_Q6_K, 6.56),
    "Q5_K_M": Kind(llama_cpp.LLAMA_FTYPE_MOSTLY_Q5_K_M, 5.7),
    "Q5_K_S": Kind(llama_cpp.LLAMA_FTYPE_MOSTLY_Q5_K_S, 5.57),
    "Q4_K_M": Kind(llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M, 4.89),
    "Q4_K_S": Kind(llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_S, 4.67),
    "Q3_K_L": Kind(llama_cpp.LLAMA_FTYPE_MOSTLY_Q3_K_L, 4.3),
    "Q3_K_M": Kind(llama_cpp.LLAMA_FTYPE_MOSTLY_Q3_K_M, 4.0),
    "Q3_K_S": Kind(llama_cpp.LLAMA_FTYPE_MOSTLY_Q3_K_S, 3.64),
    "Q2_K": Kind(llama_cpp.LLAMA_FTYPE_MOSTLY_Q2_K, 3.16),
    "Q2_K_S": Kind(llama_cpp.LLAMA_FTYPE_MOSTLY_Q2_K_S, 2.97, needs_imatrix=True),
    "IQ4_NL": Kind(llama_cpp.LLAMA_FTYPE_MOSTLY_IQ4_NL, 4.68),
    "IQ4_XS": Kind(llama_cpp.LLAMA_FTYPE_MOSTLY_IQ4_XS, 4.46),
    "IQ3_M": Kind(llama_cpp.LLAMA_FTYPE_MOSTLY_IQ3_M, 3.76),
    "IQ3_S": Kind(llama_cpp.LLAMA_FTYPE_MOSTLY_IQ3_S, 3.66),
    "IQ3_XS": Kind(llama_cpp.LLAMA_FTYPE_MOSTLY_IQ3_XS, 3.5, needs_imatrix=True),
    "IQ3_XXS": Kind(llama_cpp.LLAMA_FTYPE_MOSTLY_IQ3_XXS, 3.25, needs_imatrix=True),
    "IQ2_M": Kind(llama_cpp.LLAMA_FTYPE_MOSTLY_IQ2_M, 2.93, needs_imatrix=True),
    "IQ2_S": Kind(llama_cpp.LLAMA_FTYPE_MOSTLY_IQ2_S, 2.74, needs_imatrix=True),
    "IQ2_XS": Kind(llama_cpp.LLAMA_FTYPE_MOSTLY_IQ2_XS, 2.59, needs_imatrix=True),
    "IQ2_XXS": Kind(llama_cpp.LLAMA_FTYPE_MOSTLY_IQ2_XXS, 2.38, needs_imatrix=True),
    "IQ1_M": Kind(llama_cpp.LLAMA_FTYPE_MOSTLY_IQ1_M, 2.15, needs_imatrix=True),
    "IQ1_S": Kind(llama_cpp.LLAMA_FTYPE_MOSTLY_IQ1_S, 2.0, needs_imatrix=True),
}


def find_kind(name: str) -> Kind:
    """The type called `name`, in any case; UsageError when there is none."""
    kind = KINDS.get(name.upper())
    if kind is None:
        raise UsageError(
            f"There is no quantization type {name}.",
            f"Known are F32, F16, BF16, {', '.join(KINDS)}.",
        )
    return kind


def quantize(
    source: Path | str,
    out_path: Path | str,
    name: str,
    *,
    imatrix: Imatrix | None = None,
    progress: Progress | None = None,
) -> list[str]:
    """Quantize `source` (F32, F16 or BF16) to `out_path`.

    Args:
        name: one of `KINDS`.
        imatrix: tensor name in the file -> importance of each column, see `imatrix`.
        progress: e.g. `console.progress`; counts tensors.

    Returns:
        What got another type than llama.cpp's plan for `name`, because its rows are no multiple of
        the block length: a line for each such type, with the tensors.

    Raises:
        UserError: the type needs an importance matrix, too little disk, or llama.cpp failed.
    """
    source, out_path, kind = Path(source), Path(out_path), find_kind(name)
    if kind.needs_imatrix and not imatrix:
        raise UserError(
            f"{name} is too coarse to be made without an importance matrix.",
            "Add --imatrix, or choose a type of 3.6 bits or more, such as Q3_K_M.",
        )
    require_disk(out_path, estimate(source.stat().st_size, name), out_path.name)
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = kind.ftype
    params.nthread = threads()
    params.max_buf_size = SLAB
    keep = _give_imatrix(params, imatrix) if imatrix else None
    with atomic_write(out_path) as partial, ExitStack() as stack:
        log = _Log(stack, progress, f"quantizing {name.upper()}")
        stack.enter_context(listening(log))
        status = _in_thread(str(source).encode(), str(partial).encode(), params)
        if status != 0 or log.error:
            raise UserError(
                f"llama.cpp could not quantize to {name}: {log.error or last_words()}",
                "Choose another type.",
            )
    del keep  # llama.cpp reads it until here
    return log.fallbacks()


def estimate(source_bytes: int, name: str) -> int:
    """About how many bytes the file will have, from the bytes of the 16-bit file."""
    return int(source_bytes * find_kind(name).bits / 16 * 1.15)


class _Log:
    """Follows llama.cpp's log: progress, fallbacks, the error."""

    _TENSOR = re.compile(r"\[\s*(\d+)/\s*(\d+)\]")
    _FALLBACK = re.compile(
        r"(?:blk\.\d+\.)?(\S+?)(?:\.weight)?\s+- ncols\s+(\d+) not divisible by\s+(\d+) "
        r"\(required for type\s+(\w+)\).*-> falling back to\s+(\w+)"
    )

    def __init__(self, stack: ExitStack, progress: Progress | None, title: str) -> None:
        self._stack, self._progress, self._title = stack, progress, title
        self._advance: Any = None
        self._line = ""
        self._fallbacks: dict[str, Counter[str]] = {}
        self.error = ""

    def __call__(self, level: int, text: str) -> None:
        self._line += text
        tensor = self._TENSOR.search(text)
        if tensor and self._progress:
            if self._advance is None:
                bar = self._progress(self._title, int(tensor[2]))
                self._advance = self._stack.enter_context(bar)
            self._advance(1)
        if self._line.endswith("\n"):
            fallback = self._FALLBACK.search(self._line)
            if fallback:
                name, columns, block, wanted, got = fallback.groups()
                reason = (
                    f"{got} instead of {wanted}, since {columns} columns are no multiple of {block}"
                )
                self._fallbacks.setdefault(reason, Counter())[name] += 1
            if "failed to quantize" in self._line:
                self.error = self._line.strip()
            self._line = ""

    def fallbacks(self) -> list[str]:
        return [
            ", ".join(f"{count} {name}" for name, count in names.items()) + f": {reason}"
            for reason, names in self._fallbacks.items()
        ]


def _in_thread(source: bytes, target: bytes, params: Any) -> int:
    # In the main thread Ctrl-C would only be seen when llama.cpp has finished. As a daemon it may
    # be left behind: it then writes to a file that has no name any more.
    status: list[int] = []
    worker = threading.Thread(
        target=lambda: status.append(
            llama_cpp.llama_model_quantize(source, target, ctypes.byref(params))
        ),
        daemon=True,
    )
    worker.start()
    while worker.is_alive():
        worker.join(0.1)
    return status[0] if status else 1


def _give_imatrix(params: Any, imatrix: Imatrix) -> list[Any]:
    """Point `params` to the matrix; returns what has to stay alive while it is used."""
    entries = (llama_cpp.llama_model_imatrix_data * (len(imatrix) + 1))()  # ends with a null name
    keep: list[Any] = [entries]
    for entry, (name, values) in zip(entries, imatrix.items(), strict=False):
        data = np.ascontiguousarray(values, dtype=np.float32)
        entry.name = name.encode()
        entry.data = data.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        entry.size = data.size
        keep += [data, entry.name]
    params.imatrix = entries
    return keep
