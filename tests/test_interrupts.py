"""Ctrl-C once, twice, a polite kill, a closed terminal: what is kept, and what is said."""

from __future__ import annotations

import os
import pty
import signal
from contextlib import suppress
from pathlib import Path

import pytest
from forked import needs_fork, personalize, start, wait_until
from handmade_pairs import RECIPE, assert_same, make_pairs, train_on

from mipo_lite.base import Base
from mipo_lite.interrupts import finish_step, stoppable
from mipo_lite.run import Run, read_jsonl
from mipo_lite.training_state import newest_checkpoint

pytestmark = needs_fork
SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.fixture(autouse=True)
def default_handlers():
    """As in a shell's foreground, however the tests were started."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:
        signal.signal(number, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number: int = signal.SIGINT) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_stops_in_good_order(number: int) -> None:
    tidied = False
    with pytest.raises(KeyboardInterrupt), stoppable():
        try:
            send(number)
        finally:
            tidied = True
    assert tidied
    assert signal.getsignal(number) is signal.default_int_handler


def test_the_second_leaves_at_once(monkeypatch, capfd) -> None:
    class Left(BaseException):
        pass

    def leave(code: int) -> None:
        raise Left(code)

    monkeypatch.setattr("mipo_lite.interrupts.os._exit", leave)
    with pytest.raises(Left) as left, stoppable():
        try:
            send()
        except KeyboardInterrupt:
            send(signal.SIGTERM)
    assert left.value.args == (130,)
    assert "Stopped at once. Run the same command again to go on." in capfd.readouterr().err


def test_what_was_ignored_stays_ignored() -> None:
    """As under nohup, and for a job in the background of a script."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with stoppable():
        send(signal.SIGHUP)
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_a_step_is_finished_first(capfd) -> None:
    with stoppable():
        with finish_step() as asked:
            assert not asked()
            send()
            assert asked()
        assert "Stopping after this step" in capfd.readouterr().err
    with stoppable(), finish_step() as asked:
        assert not asked()


def test_training_stops_after_a_step_and_goes_on_from_it(builtin_base: Base, tmp_path) -> None:
    pairs_and_scores = make_pairs(builtin_base)
    # One evaluation, at the end: no checkpoint but the one of the stop.
    recipe = RECIPE.model_copy(update={"evaluations": 1})
    whole = train_on(builtin_base, pairs_and_scores, tmp_path / "whole", recipe=recipe)

    def stop(step: int, steps: int) -> None:
        if step == 3:
            send()

    run = tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt), stoppable():
        train_on(builtin_base, pairs_and_scores, run, recipe=recipe, watch=stop)
    assert newest_checkpoint(run / "checkpoints") == run / "checkpoints" / "checkpoint-3"
    assert_same(train_on(builtin_base, pairs_and_scores, run, recipe=recipe), whole)


def test_a_closed_terminal(tmp_path: Path) -> None:
    run = tmp_path / "run"
    ours, theirs = pty.openpty()
    process = start(personalize(run), tmp_path / "output", os.ttyname(theirs))
    os.set_blocking(ours, False)

    def some_pairs() -> bool:
        with suppress(BlockingIOError):
            os.read(ours, 65536)  # or the terminal fills up and the program waits
        return len(read_jsonl(run / "pairs.jsonl")) >= 4

    wait_until(some_pairs, process)
    os.close(theirs)
    os.close(ours)
    process.join(30)
    assert process.exitcode == 130
    with Run(run).locked():
        assert Run(run).meta["stages"]["pairs"]["state"] == "running"
    assert list(run.rglob("*.partial")) == []
