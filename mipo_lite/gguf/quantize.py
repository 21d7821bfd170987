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
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from numpy.typing import NDArray

from ..disk import require_disk
from ..errors import UserError
from ..merging import Progress
from ..run import atomic_write
from .kinds import find_kind, require_imatrix
from .llama import last_words, listening, read_back, threads
from .proof import prove_loads

Imatrix = Mapping[str, NDArray[np.float32]]

SLAB = 64 << 20  # bytes of a tensor's rows in memory at once


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
        name: one of `kinds.KINDS`.
        imatrix: tensor name in the file -> importance of each column, see `imatrix`.
        progress: e.g. `console.progress`; counts tensors.

    Returns:
        What got another type than llama.cpp's plan for `name`, because its rows are no multiple of
        the block length: a line for each such type, with the tensors.

    Raises:
        UserError: the type needs an importance matrix, too little disk, or llama.cpp failed or can
            not load what it wrote.
    """
    source, out_path = Path(source), Path(out_path)
    require_imatrix([name], given=bool(imatrix))
    require_disk(out_path, estimate(source.stat().st_size, name), out_path.name)
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{name.upper()}")
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
        prove_loads(partial, read_back(source))
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
