"""Out of memory is an event, not an end: what is done at once is halved, and the work goes on.

The one place that knows what running out of memory looks like, lets go of what the failed attempt
held, says what was halved, and remembers it, so that a run that is gone on with begins with sizes
that fit (`remembering`). A size never decides what comes out, only how much of it is computed at a
time. Assumes that the work can be repeated from its beginning.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from .console import console
from .errors import UserError

T = TypeVar("T")

# What is done at once, by the setting that bounds it.
_SINGLE = {
    "sampling_batch": "Sampling a single response",
    "scoring_tokens": "Scoring a single response",
    "micro_batch": "Training on a single pair",
}
# CUDA's allocator and libraries, and PyTorch's allocator on a CPU.
_MESSAGES = (
    "out of memory",
    "not enough memory",
    "can't allocate memory",
    "ALLOC_FAILED",
)

_sizes: dict[str, int] = {}
_limits: dict[str, int] = {}
_changed: Callable[[], None] | None = None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the error says that memory, of a GPU or of the machine, did not suffice.

    Looks at the message, since only torch's own allocator on a GPU has an error of its own.
    """
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _MESSAGES)


def fitting(setting: str, size: int) -> int:
    """`size`, or what was planned or found to fit instead."""
    return min(size, _sizes.get(setting, size), _limits.get(setting, size))


def found_sizes() -> dict[str, int]:
    """Setting -> size, of all that had to be halved."""
    return dict(_sizes)


def halving(
    setting: str,
    size: int,
    work: Callable[[int], T],
    smaller: Callable[[int], int] = lambda size: size // 2,
) -> T:
    """`work(size)`; whenever that runs out of memory, again with a smaller size.

    Args:
        setting: the recipe's setting that bounds the size.
        size: to begin with, unless a smaller one is remembered.
        smaller: the next size to try; 0 when there is none.

    Raises UserError when the smallest size does not fit either.
    """
    size = fitting(setting, size)
    while True:
        try:
            return work(size)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            # Its traceback holds the frames, and so the tensors, of the failed attempt.
            cause = error.with_traceback(None)
        _let_go()
        fewer = smaller(size)
        if fewer < 1:
            raise UserError(
                f"{_SINGLE[setting]} needs more memory than there is.",
                "Close what else uses it; or start a new run with a shorter user context, a lower "
                "max_new_tokens, or a smaller --base.",
            ) from cause
        console.print(
            f"Out of memory with {setting} {size}: going on with {fewer}, which changes the "
            "speed and not the result.",
            soft_wrap=True,
        )
        size = fewer
        _sizes[setting] = size
        if _changed is not None:
            _changed()


@contextmanager
def remembering(
    sizes: dict[str, int], save: Callable[[], None], limits: dict[str, int] | None = None
) -> Iterator[None]:
    """While the block runs, begin with these sizes; a new one goes into them and `save` is called.

    Without it, sizes are remembered until the process ends. `limits` are not exceeded and not
    changed.
    """
    global _sizes, _changed, _limits
    before = _sizes, _changed, _limits
    _sizes, _changed, _limits = sizes, save, limits or {}
    try:
        yield
    finally:
        _sizes, _changed, _limits = before


def _let_go() -> None:
    """Give unused memory back, and forget the peak that the failed attempt has left."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
