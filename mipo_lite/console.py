"""What the user sees while something runs: one rich console, one kind of progress bar."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

console = Console(highlight=False)

Advance: TypeAlias = Callable[[int], None]


@contextmanager
def progress(description: str, total: int, done: int = 0) -> Iterator[Advance]:
    """A bar with count, time passed and time left; yields `advance(n)`.

    Args:
        description: what is being done, in a few words.
        total: the number of steps in all.
        done: how many of them an earlier start has already done.
    """
    columns = (
        TextColumn("{task.description:<28}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(description, total=total, completed=done)
        yield lambda n: bar.advance(task, n)
