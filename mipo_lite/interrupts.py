"""Ctrl-C: once to stop in good order, twice to stop now. SIGTERM and SIGHUP are the same.

SIGHUP is what a closed terminal sends. A signal that whoever started the program chose to ignore
(nohup, or a job in the background of a script) stays ignored. Only the command line asks for this
(`stoppable`): a program that uses the library keeps its own handlers.
"""

from __future__ import annotations

import os
import signal
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from .console import console

INTERRUPTED = 130  # exit code, as a shell expects

_asked = False
_finishing = False


@contextmanager
def stoppable() -> Iterator[None]:
    """While the block runs, a signal raises KeyboardInterrupt, and a second one ends the process.

    Must be entered in the main thread, as Python's signal handlers must.
    """
    global _asked
    names = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows has no SIGHUP
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, _handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _asked = False


@contextmanager
def finish_step() -> Iterator[Callable[[], bool]]:
    """While the block runs, a first signal raises nothing: the block is to look, and to stop soon.

    Yields what says whether to stop. The block raises KeyboardInterrupt itself when it has.
    """
    global _finishing
    _finishing = True
    try:
        yield lambda: _asked
    finally:
        _finishing = False


def _handle(number: int, frame: Any) -> None:
    global _asked
    if number == getattr(signal, "SIGHUP", None):
        _leave_terminal()
    if _asked:
        # Nothing is lost: files are whole under their names, and the next start tidies up.
        _say("Stopped at once. Run the same command again to go on.")
        with suppress(OSError, RuntimeError):
            console.show_cursor()
        os._exit(INTERRUPTED)
    _asked = True
    if not _finishing:
        raise KeyboardInterrupt
    _say("Stopping after this step, so that nothing of it is lost. Once more stops at once.")


def _leave_terminal() -> None:
    """Print nowhere: on a terminal that is closed every further line would be an error."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        if stat.S_ISCHR(os.fstat(descriptor).st_mode):  # not where it is a file or a pipe
            os.dup2(nowhere, descriptor)
    os.close(nowhere)


def _say(text: str) -> None:
    """To stderr without Python's buffers, which the interrupted code may be writing to."""
    with suppress(OSError):
        os.write(2, f"\n{text}\n".encode())
