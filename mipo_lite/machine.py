"""What this machine has: its GPU and its memory. Loads torch only where an NVIDIA driver is."""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass

import psutil


@dataclass(frozen=True)
class Gpu:
    """The CUDA device that torch would use. `total` and `free` are bytes.

    `free` is what it had before this process opened it, give or take its own CUDA context.
    """

    name: str
    total: int
    free: int


def has_driver() -> bool:
    """Whether an NVIDIA driver is installed and starts. Takes milliseconds."""
    library = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    try:
        return int(ctypes.CDLL(library).cuInit(0)) == 0
    except (OSError, AttributeError):
        return False


def find_gpu() -> Gpu | None:
    """The GPU, or None without one that torch can use."""
    if not has_driver():
        return None
    import torch

    if not torch.cuda.is_available():
        return None
    free, total = torch.cuda.mem_get_info()
    return Gpu(torch.cuda.get_device_name(), total, free)


def available_memory() -> int:
    """Bytes of main memory that can be taken without swapping."""
    return int(psutil.virtual_memory().available)
