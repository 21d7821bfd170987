"""Enough room on the disk, asked before the work starts and said in bytes."""

from __future__ import annotations

import shutil
from pathlib import Path

from .errors import UserError


def require_disk(path: Path, needed: int, what: str) -> None:
    """Raise UserError unless `needed` bytes are free where `path` will be written.

    Args:
        path: a file or directory that need not exist yet.
        needed: bytes.
        what: the thing that will be written, for the message.
    """
    place = path.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise UserError(
            f"Too little disk for {what}: it needs {needed:,} bytes, {place} has {free:,} free.",
            f"Free {needed - free:,} bytes there, or write to another disk with --out.",
        )
