"""The command line in processes that start at once, to be killed, stopped or starved.

They are forked from a process that has imported everything and computed nothing.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ME = ROOT / "examples" / "me.txt"
# Small enough for seconds, large enough for several chunks of pairs and several checkpoints.
SMALL = (
    "pairs=16",
    "sampling_batch=4",
    "max_new_tokens=12",
    "epochs=2",
    "batch_size=4",
    "micro_batch=4",
    "evaluations=4",
    "patience=9",
    "eval_prompts=4",
    "eval_samples=1",
    "eval_contexts=2",
    "min_contrast=0",
)

needs_fork = pytest.mark.skipif(os.name == "nt", reason="fork and POSIX signals")


def personalize(run: Path, *settings: str) -> list[str]:
    arguments = ["personalize", "--user-context", str(ME), "--base", "builtin", "--run", str(run)]
    for setting in (*SMALL, *settings):
        arguments += ["--set", setting]
    return arguments


def start(arguments: list[str], output: Path, terminal: str | None = None) -> BaseProcess:
    """Start `mipo-lite ARGUMENTS`; what it prints goes to the end of `output`, or to a terminal."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        [
            "mipo_lite.cli",
            "mipo_lite.pipeline",
            "mipo_lite.training",
            "mipo_lite.evaluation",
            "mipo_lite.delivery",
            "mipo_lite.report.page",
            "transformers.integrations.bitsandbytes",
            "transformers.models.qwen2.modeling_qwen2",
        ]
    )
    process = context.Process(target=_main, args=(arguments, str(output), terminal))
    process.start()
    return process


def finish(arguments: list[str], output: Path, within: float = 120) -> str:
    """Run to the end; what it printed."""
    process = start(arguments, output)
    process.join(within)
    printed = output.read_text("utf-8")
    assert process.exitcode == 0, printed
    return printed


def wait_until(ready: Callable[[], bool], process: BaseProcess, within: float = 60) -> None:
    deadline = time.monotonic() + within
    while not ready():
        assert process.is_alive(), f"it ended with {process.exitcode}"
        assert time.monotonic() < deadline, "the moment never came"
        time.sleep(0.005)


def _main(arguments: list[str], output: str, terminal: str | None) -> None:
    # Whoever started the tests may have had signals ignored: a job in the background does.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if terminal is None:
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    else:
        os.setsid()
        file = os.open(terminal, os.O_RDWR)  # a session's first terminal is its own
        os.dup2(file, 0)
    os.dup2(file, 1)
    os.dup2(file, 2)
    from mipo_lite import cli

    sys.argv = ["mipo-lite", *arguments]
    cli.main()
