"""The run directory: every file of a run, written so that a crash at any moment loses nothing.

A run directory holds personal text, so it is created with mode 0700 and its files with 0600.
Whole files go to a temporary name and are renamed when complete; JSONL files are appended
line by line and recovered to their last whole line. `run.json` records the resolved recipe and
the state of every stage. This module knows nothing about what the stages do.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

from .errors import UserError
from .machine import measure_peak

FORMAT = 1
_PARTIAL = ".partial"


def partial_path(path: Path) -> Path:
    """Where `path` lies until it is complete; whatever has such a name may be removed."""
    return path.with_name(f".{path.name}{_PARTIAL}")


@contextmanager
def atomic_write(path: Path, mode: int = 0o600) -> Iterator[Path]:
    """Give a temporary path; on success it becomes `path`, on failure it is removed.

    The temporary file lies beside `path` under a name that depends on `path` alone, so that
    what a killed process left behind is overwritten, or removed when the run is next opened.
    """
    partial = partial_path(path)
    try:
        yield partial
        partial.chmod(mode)
        _sync(partial)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Like `atomic_write` for a directory: filled under a temporary name, then renamed."""
    partial = partial_path(path)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(mode=0o700, parents=True)
    try:
        yield partial
        for file in partial.rglob("*"):
            if file.is_file():
                file.chmod(0o600)
                _sync(file)
        # A directory can not replace a full one: the old one steps aside first.
        shutil.rmtree(path, ignore_errors=True)
        partial.replace(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def write_json(path: Path, value: Any) -> None:
    with atomic_write(path) as partial:
        partial.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8")


def read_json(path: Path) -> Any:
    """Raises UserError when the file is not the JSON that this program wrote."""
    try:
        return json.loads(path.read_text("utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(
            f"{path} is damaged: it is not valid JSON.",
            "Restore it from a backup, or remove the run directory and start again.",
        ) from error


def append_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Append the rows in one write and flush them to the disk.

    What an interrupted write has left of a line is cut off first.
    """
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    new = not path.exists()
    with path.open("a+b") as file:
        file.truncate(_end_of_last_line(file))
        file.write(text.encode("utf-8"))
        file.flush()
        os.fsync(file.fileno())
    if new:
        path.chmod(0o600)


def _end_of_last_line(file: BinaryIO) -> int:
    """The position behind the last newline, in bytes from the start."""
    position = file.seek(0, os.SEEK_END)
    while position > 0:
        start = max(0, position - 2**16)
        file.seek(start)
        newline = file.read(position - start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        position = start
    return 0


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """All whole lines of `path`; [] when there is no such file.

    Raises UserError for a line that is complete but no JSON object: that is damage, not an
    interrupted write.
    """
    if not path.exists():
        return []
    rows = []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines[:-1], start=1):  # after the last newline: unfinished
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("not an object")
        except ValueError as error:
            raise UserError(
                f"{path} is damaged at line {number}.",
                "Remove the file and run again: a result is then made anew; what you wrote "
                "yourself, restore from a backup.",
            ) from error
        rows.append(row)
    return rows


def truncate_jsonl(path: Path, lines: int) -> None:
    """Keep the first `lines` lines of `path`; whatever follows was not finished."""
    if not path.exists():
        return
    kept = path.read_bytes().split(b"\n")[:lines]
    with atomic_write(path) as partial:
        partial.write_bytes(b"".join(line + b"\n" for line in kept))


def fingerprint(value: Any) -> str:
    """A short hash of any JSON-able value; equal values give equal hashes."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()[:16]


class Run:
    """A run directory that this process has opened.

    Attributes:
        path: the directory.
        meta: the content of run.json; call `save()` after changing it.
    """

    def __init__(self, path: Path | str) -> None:
        """Open an existing run directory.

        Raises:
            UserError: there is none, or it was written by a newer version.
        """
        self.path = Path(path)
        file = self.path / "run.json"
        if not file.is_file():
            raise UserError(
                f"{self.path} is not a run directory: it has no run.json.",
                "Name a directory that `mipo-lite personalize` made; they lie in runs/.",
            )
        self.meta: dict[str, Any] = read_json(file)
        if not isinstance(self.meta, dict) or self.meta.get("format") != FORMAT:
            raise UserError(
                f"{file} was written by another version of mipo-lite.",
                "Use that version, or start a new run with another --run.",
            )
        self._lock = FileLock(self.path / ".lock", mode=0o600)

    @classmethod
    def create(cls, path: Path | str, meta: dict[str, Any]) -> Run:
        """Make the directory (mode 0700) with its run.json."""
        path = Path(path)
        if path.exists() and not path.is_dir():
            raise UserError(f"{path} is a file, not a run directory.", "Choose another --run.")
        if path.is_dir() and any(p.name[0] != "." for p in path.iterdir()):
            raise UserError(
                f"{path} is not empty and not a run directory.",
                "Choose another --run; mipo-lite never mixes its files with yours.",
            )
        try:
            path.mkdir(parents=True, exist_ok=True)
            path.chmod(0o700)
            write_json(path / "run.json", {"format": FORMAT, "stages": {}, **meta})
        except (PermissionError, NotADirectoryError, FileExistsError) as error:
            raise UserError(f"{path} can not be written.", "Choose another --run.") from error
        return cls(path)

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def page(self) -> str | None:
        """The user's page; None for a run of improve."""
        file = self / "context.json"
        return str(read_json(file)["text"]) if file.is_file() else None

    def save(self) -> None:
        write_json(self.path / "run.json", self.meta)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run for this process and remove what a killed one left half-written.

        Meanwhile every file that the process makes is for its user alone (umask 077): libraries
        write into the run as well, and know no modes.

        Raises UserError when another process holds it.
        """
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise UserError(
                f"Another process is working on {self.path}.",
                "Wait until it has finished, or choose another --run.",
            ) from error
        before = os.umask(0o077)
        try:
            for left in self.path.rglob(f".*{_PARTIAL}"):
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            yield
        finally:
            os.umask(before)
            self._lock.release()

    def is_done(self, stage: str, inputs: str) -> bool:
        """Whether `stage` has finished with exactly these inputs (a fingerprint)."""
        state = self.meta["stages"].get(stage, {})
        return state.get("state") == "done" and state.get("inputs") == inputs

    @contextmanager
    def stage(self, stage: str, inputs: str) -> Iterator[dict[str, Any]]:
        """Record that `stage` runs, and that it is done when the block ends without an error.

        Yields the stage's entry of run.json, to which the stage may add what it found out.
        Seconds add up over interrupted starts; `peak_memory` is that of main memory, in bytes,
        where the system can say it.
        """
        entry = self.meta["stages"].get(stage, {})
        if entry.get("inputs") != inputs:
            entry = {"seconds": 0.0}
        entry |= {"state": "running", "inputs": inputs, "started": _now()}
        self.meta["stages"][stage] = entry
        self.save()
        start = time.monotonic()
        peak = measure_peak()
        try:
            yield entry
            entry |= {"state": "done", "finished": _now()}
        finally:
            entry["seconds"] = round(entry["seconds"] + time.monotonic() - start, 1)
            if (found := peak()) is not None:
                entry["peak_memory"] = max(found, entry.get("peak_memory", 0))
            # On a full disk this write fails like the one before it: the first error is the one
            # that the user needs to see.
            failing = sys.exc_info()[0] is not None
            try:
                self.save()
            except OSError:
                if not failing:
                    raise


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def _sync(path: Path) -> None:
    with path.open("rb+") as file:  # Windows syncs only what is open for writing
        os.fsync(file.fileno())
