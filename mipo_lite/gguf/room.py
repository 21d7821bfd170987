"""Is there memory for a whole 16-bit model? Asked before it is loaded.

Merging, export and quantization hold a tensor at a time; comparing a file with the model in torch
and measuring an importance matrix hold all of it: 16 GB for 8B parameters, which a machine that
trained it in 4 bits need not have.
"""

from __future__ import annotations

from pathlib import Path

import torch

from ..checkpoint import Checkpoint
from ..errors import UserError
from ..machine import available_memory, find_gpu

SLACK = 1.1  # what loading and a forward pass take beside the weights
KEPT = 1 << 30  # bytes: distributions to compare with, logits, merging a weight


class NoRoom(UserError):
    """Neither main memory nor the GPU holds the model."""


def memory_needed(model_dir: Path | str) -> int:
    """Bytes that the model takes in its stored dtype, with a forward pass. Reads headers only."""
    return int(SLACK * sum(e.nbytes for e in Checkpoint(model_dir).entries.values())) + KEPT


def find_device(model_dir: Path | str, purpose: str) -> str:
    """Where the whole model can be loaded: "cpu", else "cuda".

    Args:
        purpose: what it is needed for, the beginning of the message.

    Raises:
        NoRoom: neither has room for it.
    """
    needed, free = memory_needed(model_dir), available_memory()
    if needed <= free:
        return "cpu"
    if needed <= _gpu_memory():
        return "cuda"
    raise _no_room(purpose, needed, free)


def require_room(model_dir: Path | str, device: str, purpose: str) -> None:
    """Raise NoRoom unless the whole model can be loaded on `device`."""
    needed = memory_needed(model_dir)
    free = available_memory() if device == "cpu" else _gpu_memory()
    if needed > free:
        raise _no_room(purpose, needed, free)


def _gpu_memory() -> int:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # else what torch has freed still counts as taken
    gpu = find_gpu()
    return gpu.free if gpu else 0


def _no_room(purpose: str, needed: int, free: int) -> NoRoom:
    return NoRoom(
        f"{purpose} needs {needed / 2**30:.1f} GiB of memory for the whole model, "
        f"{free / 2**30:.1f} GiB are available.",
        "Close other programs, or do it on a machine with more memory.",
    )
