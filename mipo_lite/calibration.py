"""How far the memory plan was off on this machine: measured peaks, kept for the next plan.

A small JSON file in the user's cache directory, by device and stage. It holds the device's name
and ratios, nothing about models or texts. What it learns is a factor on the part of a plan that
varies with batch and length; weights and optimizer are exact anyway. The largest of the last few
measurements counts, since a plan that is too small ends in an out-of-memory error.

`planning.watch_memory` records, `planning.plan` asks for the factor.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from .run import atomic_write

KEEP = 5
# A ratio outside is a mistake (another process on the GPU, a stage that did nothing), not news.
PLAUSIBLE = (0.2, 5.0)
# Answers are mostly shorter than a plan has to allow for: a small ratio promises little.
FLOOR = 0.9


def cache_directory() -> Path:
    """Where mipo-lite keeps what can be found out again; it need not exist."""
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData/Local") / "mipo-lite"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mipo-lite"


def record(device: str, stage: str, *, planned: int, fixed: int, measured: int) -> float | None:
    """Remember a measured peak; returns the ratio kept, or None when it is not plausible.

    Args:
        device: name of the GPU.
        stage: pairs, scores or train.
        planned: bytes of the plan for this stage, made with factor 1 and without CUDA context.
        fixed: bytes of it that do not vary: `Stage.fixed`.
        measured: `torch.cuda.max_memory_reserved()`.

    A cache directory that can not be written is no reason to stop a run: nothing is remembered.
    """
    if planned <= fixed:
        return None
    ratio = (measured - fixed) / (planned - fixed)
    if not PLAUSIBLE[0] <= ratio <= PLAUSIBLE[1]:
        return None
    file = cache_directory() / "calibration.json"
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with FileLock(file.with_suffix(".lock"), timeout=2):
            known = _read(file)
            ratios = _ratios(known, device, stage)
            known.setdefault(device, {})[stage] = [*ratios, round(ratio, 4)][-KEEP:]
            with atomic_write(file) as partial:
                partial.write_text(json.dumps(known, indent=2) + "\n", "utf-8")
    except (OSError, Timeout):
        return None
    return ratio


def factor(device: str, stage: str) -> float | None:
    """The factor to plan with; None when nothing was measured on this device yet."""
    ratios = _ratios(_read(cache_directory() / "calibration.json"), device, stage)
    return max(FLOOR, *ratios) if ratios else None


def _read(file: Path) -> dict[str, Any]:
    """The content; {} for a file that is missing or damaged: it is only a memory."""
    try:
        known = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(known, dict):
        return {}
    return {device: stages for device, stages in known.items() if isinstance(stages, dict)}


def _ratios(known: dict[str, Any], device: str, stage: str) -> list[float]:
    ratios = known.get(device, {}).get(stage)
    if not isinstance(ratios, list):
        return []
    return [r for r in ratios if isinstance(r, float) and PLAUSIBLE[0] <= r <= PLAUSIBLE[1]]
