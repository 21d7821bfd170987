"""A thin, quiet layer over llama-cpp-python: open a file, encode, evaluate.

Everything else in this package that needs llama.cpp goes through here, so there is one place that
knows its log callback and its parameters. What it logs is kept instead of printed; the last
warnings go into the error when something fails.
"""

from __future__ import annotations

import ctypes
import os
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError

try:
    import llama_cpp
except (ImportError, OSError, RuntimeError) as error:
    raise UserError(
        f"llama-cpp-python can not be loaded: {error}.",
        "Install it with `pip install llama-cpp-python` (needs cmake and a C++ compiler).",
    ) from error

Listener = Callable[[int, str], None]
WARN, ERROR, CONTINUED = 2, 3, 5  # ggml_log_level

_recent: deque[str] = deque(maxlen=20)
_listener: Listener | None = None
_level = 0


@llama_cpp.llama_log_callback
def _log(level: int, text: bytes, user_data: Any) -> None:
    global _level
    if level != CONTINUED:
        _level = level
    line = text.decode("utf-8", "replace")
    if level != CONTINUED and _level in (WARN, ERROR):
        _recent.append(line)
    if _listener is not None:
        _listener(_level, line)


llama_cpp.llama_log_set(_log, ctypes.c_void_p(0))


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Give every log line of llama.cpp to `listener(level, text)` as well."""
    global _listener
    _listener = listener
    try:
        yield
    finally:
        _listener = None


def last_words() -> str:
    """The most recent errors and warnings, in one line."""
    return " ".join(" ".join(_recent).split())[-300:] or "no reason given"


@contextmanager
def open_gguf(path: Path | str, **options: Any) -> Iterator[llama_cpp.Llama]:
    """`llama_cpp.Llama` without its chatter, closed at the end.

    Raises UserError when llama.cpp can not load the file.
    """
    if not Path(path).is_file():
        raise UserError(f"There is no file {path}.", "Export it first: mipo-lite export RUN.")
    _recent.clear()
    options = {"n_threads": threads(), "n_threads_batch": threads()} | options
    try:
        llama = llama_cpp.Llama(str(path), verbose=False, **options)
    except (ValueError, RuntimeError, OSError) as error:
        raise UserError(
            f"llama.cpp can not load {path}: {last_words()}", "Export the file again."
        ) from error
    finally:
        llama_cpp.llama_log_set(_log, ctypes.c_void_p(0))  # verbose=False took it away
    try:
        yield llama
    finally:
        llama.close()


def encode(llama: llama_cpp.Llama, text: str, *, special: bool = True) -> list[int]:
    """Token ids without bos and eos; special tokens in the text count as such."""
    tokens: list[int] = llama.tokenize(text.encode("utf-8"), add_bos=False, special=special)
    return tokens


def is_end(llama: llama_cpp.Llama, token: int) -> bool:
    """Whether llama.cpp stops at this token."""
    vocab = llama_cpp.llama_model_get_vocab(llama._model.model)
    return bool(llama_cpp.llama_vocab_is_eog(vocab, token))


def logits(llama: llama_cpp.Llama, tokens: list[int]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Next-token logits at every position, [len(tokens), vocabulary].

    Needs a `llama` that was opened with `logits_all=True` and room for the tokens.
    """
    llama.reset()
    llama.eval(tokens)
    return np.asarray(llama.scores[: len(tokens)])


def threads() -> int:
    """How many threads llama.cpp may use: the processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
