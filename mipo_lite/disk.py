"""Enough room on the disk, asked before the work starts and said in bytes; and what if not."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

from .errors import UserError

ELSEWHERE = "write to another disk: a new run with --run, exports and merges with --out"


def require_disk(path: Path, needed: int, what: str, instead: str = ELSEWHERE) -> None:
    """Raise UserError unless `needed` bytes are free where `path` will be written.

    Args:
        path: a file or directory that need not exist yet.
        needed: bytes.
        what: the thing that will be written, for the message.
        instead: how to write it elsewhere, the end of the message.
    """
    place = path.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise UserError(
            f"Too little disk for {what}: it needs {needed:,} bytes, {place} has {free:,} free.",
            f"Free {needed - free:,} bytes there, or {instead}.",
        )


def is_disk_full(error: BaseException) -> bool:
    """Whether a write failed for lack of room, as Python, safetensors, torch and numpy say it.

    torch (inline_container) and numpy ("requested") only say that less was written than was to be.
    """
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    said = str(error)
    if "No space left" in said or "os error 28" in said:
        return True
    short = "inline_container" in said and "unexpected pos" in said
    short |= "PytorchStreamWriter failed writing" in said
    return short or (isinstance(error, OSError) and " requested and " in said)
