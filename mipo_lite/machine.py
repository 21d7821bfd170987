"""What this machine has: its GPU and its memory. Loads torch only where an NVIDIA driver is."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

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


def measure_peak() -> Callable[[], int | None]:
    """Begin to measure the peak of this process's resident set; what is returned reads it, bytes.

    None where the system can only say the peak since the process began (all but Linux).
    """
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return lambda: None
    return resident_peak


def resident_peak() -> int:
    """The peak of this process's resident set since it began, or since `measure_peak`, in bytes.

    Linux counts VmHWM per program image; getrusage would hand a child its parent's peak.
    """
    status = Path("/proc/self/status")
    if status.exists():
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    info = psutil.Process().memory_info()
    return int(getattr(info, "peak_wset", info.rss))
