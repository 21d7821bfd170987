"""A thin, quiet layer over llama-cpp-python: open a file, encode, evaluate.

Everything else in this package that needs llama.cpp goes through here, so there is one place that
knows its log callback and its parameters. What it logs is kept instead of printed; the last
warnings go into the error when something fails.
"""

from __future__ import annotations

import ctypes
import os
import unicodedata
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

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
NORMALIZER_KEY = "tokenizer.mipo_lite.normalizer"  # ours; others ignore keys they do not know

_ON_CPU = {"n_gpu_layers": 0, "offload_kqv": False, "op_offload": False}
ON_GPU = {"n_gpu_layers": -1, "offload_kqv": True, "op_offload": True}  # all layers

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


def has_gpu() -> bool:
    """Whether llama.cpp was built for a GPU and finds one."""
    return bool(llama_cpp.llama_supports_gpu_offload())


def last_words() -> str:
    """The most recent errors and warnings, in one line."""
    return " ".join(" ".join(_recent).split())[-300:] or "no reason given"


@contextmanager
def open_gguf(path: Path | str, **options: Any) -> Iterator[llama_cpp.Llama]:
    """`llama_cpp.Llama` without its chatter, closed at the end.

    On the CPU, where figures do not depend on the machine's GPU, unless `options` say otherwise:
    see `ON_GPU`.

    Raises UserError when llama.cpp can not load the file.
    """
    if not Path(path).is_file():
        raise UserError(f"There is no file {path}.", "Export it first: mipo-lite export RUN.")
    _recent.clear()
    options = _ON_CPU | {"n_threads": threads(), "n_threads_batch": threads()} | options
    try:
        llama = llama_cpp.Llama(str(path), verbose=False, **options)
    except (ValueError, RuntimeError, OSError) as error:
        raise UserError(
            f"llama.cpp can not load {path}: {last_words()}", "Export the file again."
        ) from error
    try:
        yield llama
    finally:
        llama.close()


def read_back(path: Path, *, lora: Path | None = None) -> tuple[str, int]:
    """Architecture and number of parameters of a file, as llama.cpp loads it.

    All is done but to read the weights: each tensor has to be there, in its shape, and lie inside
    the file. It takes no memory, however large the file is.

    Args:
        lora: a LoRA GGUF that has to fit the file.

    Raises:
        UserError: llama.cpp can not load the file, or not put the adapter on it.
    """
    _recent.clear()
    params = llama_cpp.llama_model_default_params()
    params.no_alloc, params.load_mode = True, llama_cpp.LLAMA_LOAD_MODE_NONE
    params.n_gpu_layers = 0
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
    if not model:
        raise UserError(
            f"llama.cpp can not load {path.name}: {last_words()}", "Export the file again."
        )
    try:
        if lora and not llama_cpp.llama_adapter_lora_init(model, str(lora).encode()):
            raise UserError(
                f"llama.cpp can not put {lora.name} on {path.name}: {last_words()}",
                "Export both again, from the same base.",
            )
        name = ctypes.create_string_buffer(64)
        llama_cpp.llama_model_meta_val_str(model, b"general.architecture", name, len(name))
        return name.value.decode(), int(llama_cpp.llama_model_n_params(model))
    finally:
        llama_cpp.llama_model_free(model)  # and the adapter with it


def encode(llama: llama_cpp.Llama, text: str) -> list[int]:
    """Token ids without bos and eos; special tokens in the text count as such.

    The text is normalized first where the file says that its tokenizer does, because llama.cpp does
    not.
    """
    form = llama.metadata.get(NORMALIZER_KEY)
    if form == "NFC":
        text = unicodedata.normalize("NFC", text)
    tokens: list[int] = llama.tokenize(text.encode("utf-8"), add_bos=False, special=True)
    return tokens


def is_end(llama: llama_cpp.Llama, token: int) -> bool:
    """Whether llama.cpp stops at this token."""
    vocab = llama_cpp.llama_model_get_vocab(llama._model.model)
    return bool(llama_cpp.llama_vocab_is_eog(vocab, token))


class Reader:
    """Evaluates token rows one after another; a prefix shared with the row before is kept.

    Uses the C interface, because `Llama` either computes no logits or stores those of all
    positions, which for a long context and a large vocabulary is more than the model.
    """

    def __init__(self, llama: llama_cpp.Llama) -> None:
        self._context = llama.ctx
        self._memory = llama_cpp.llama_get_memory(llama.ctx)
        self._size = min(llama.n_batch, llama.n_ctx())
        self._window = llama.n_ctx()
        self._vocab = llama.n_vocab()
        self._past: list[int] = []

    def logits(self, prompt: list[int], response: list[int]) -> NDArray[np.float32]:
        """Logits that predict each response token, [len(response), vocabulary].

        Raises ValueError when the row is longer than the context of the `Llama`.
        """
        tokens, first = prompt + response[:-1], len(prompt) - 1
        if len(tokens) > self._window:
            raise ValueError(f"row of {len(tokens)} tokens, context of {self._window}")
        kept = min(_common(self._past, tokens), first)
        # Sliding-window caches forget what a shorter prefix would need: then all is done again.
        if not llama_cpp.llama_memory_seq_rm(self._memory, 0, kept, -1):
            llama_cpp.llama_memory_clear(self._memory, True)
            kept = 0
        found: list[NDArray[np.float32]] = []
        batch = llama_cpp.llama_batch_init(self._size, 0, 1)
        try:
            for start in range(kept, len(tokens), self._size):
                found += self._decode(batch, tokens, start, first)
        finally:
            llama_cpp.llama_batch_free(batch)
        self._past = tokens
        return np.stack(found)

    def _decode(
        self, batch: Any, tokens: list[int], start: int, first: int
    ) -> list[NDArray[np.float32]]:
        places = range(start, min(start + self._size, len(tokens)))
        batch.n_tokens = len(places)
        for i, place in enumerate(places):
            batch.token[i], batch.pos[i] = tokens[place], place
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
            batch.logits[i] = place >= first
        if llama_cpp.llama_decode(self._context, batch) != 0:
            self._past = []
            raise UserError(f"llama.cpp failed: {last_words()}", "Use a smaller context.")
        shape = (self._vocab,)
        return [
            np.ctypeslib.as_array(
                llama_cpp.llama_get_logits_ith(self._context, i), shape=shape
            ).copy()
            for i, place in enumerate(places)
            if place >= first
        ]


def _common(a: list[int], b: list[int]) -> int:
    """Length of the common prefix."""
    pairs = zip(a, b, strict=False)
    return next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))


def threads() -> int:
    """How many threads llama.cpp may use: OMP_NUM_THREADS, else the processors of this process.

    Its threads wait for each other by spinning, so more of them than free processors is slow.
    """
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    if wanted.isdigit() and int(wanted) > 0:
        return int(wanted)
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
