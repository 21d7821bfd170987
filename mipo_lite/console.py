"""What the user sees while something runs: one rich console, one kind of progress bar."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

console = Console(highlight=False)


class Bar:
    """A running progress bar; call it to advance."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress = progress
        self._task = task

    def __call__(self, steps: int = 1) -> None:
        self._progress.advance(self._task, steps)

    def set(self, done: int, total: int) -> None:
        self._progress.update(self._task, completed=done, total=total)


@contextmanager
def progress(description: str, total: int) -> Iterator[Bar]:
    """A bar with count, time passed and time left.

    Args:
        description: what is being done, in a few words.
        total: the number of steps in all.
    """
    columns = (
        TextColumn("{task.description:<28}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as running:
        yield Bar(running, running.add_task(description, total=total))


def quiet_libraries() -> None:
    """Let the libraries say nothing below an error, and draw no bars.

    Call it before they are imported: some read the environment only then.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    for name in ("bitsandbytes", "transformers", "trl", "peft", "datasets", "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(transformers|trl|peft|bitsandbytes|torch)\b")
