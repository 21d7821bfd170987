"""The run directory survives crashes, damage, a full disk and a second process."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import stat
import sys
from pathlib import Path

import pytest

from mipo_lite import run as run_module
from mipo_lite.errors import UserError
from mipo_lite.run import (
    Run,
    append_jsonl,
    atomic_directory,
    atomic_write,
    fingerprint,
    read_jsonl,
    truncate_jsonl,
    write_json,
)

posix = pytest.mark.skipif(os.name == "nt", reason="modes are POSIX")


def leftovers(path: Path) -> list[str]:
    return [file.name for file in path.rglob("*.partial")]


def test_atomic_write_leaves_the_old_file_when_the_new_one_fails(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    write_json(file, {"old": 1})
    with pytest.raises(RuntimeError), atomic_write(file) as partial:
        partial.write_text("half")
        raise RuntimeError
    assert json.loads(file.read_text()) == {"old": 1}
    assert leftovers(tmp_path) == []


def test_atomic_directory_replaces_a_full_one_or_nothing(tmp_path: Path) -> None:
    target = tmp_path / "adapter"
    with atomic_directory(target) as partial:
        (partial / "a").write_text("1")
    with pytest.raises(RuntimeError), atomic_directory(target) as partial:
        (partial / "b").write_text("2")
        raise RuntimeError
    assert [file.name for file in target.iterdir()] == ["a"]
    with atomic_directory(target) as partial:
        (partial / "c").write_text("3")
    assert [file.name for file in target.iterdir()] == ["c"]
    assert leftovers(tmp_path) == []


@posix
def test_a_run_is_private(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "runs" / "me", {})
    append_jsonl(run / "pairs.jsonl", [{"a": 1}])
    with atomic_directory(run / "adapter") as partial:
        (partial / "weights").write_text("x")
    with run.locked():
        pass
    assert stat.S_IMODE(run.path.stat().st_mode) == 0o700
    for file in run.path.rglob("*"):
        assert stat.S_IMODE(file.stat().st_mode) == (0o700 if file.is_dir() else 0o600), file


def test_jsonl_is_recovered_to_its_last_whole_line(tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    append_jsonl(file, [{"id": 0, "text": "a\nb ü"}, {"id": 1}])
    with file.open("ab") as stream:
        stream.write(b'{"id": 2, "te')
    assert [row["id"] for row in read_jsonl(file)] == [0, 1]
    append_jsonl(file, [{"id": 2}])
    assert [row["id"] for row in read_jsonl(file)] == [0, 1, 2]
    truncate_jsonl(file, 1)
    assert [row["id"] for row in read_jsonl(file)] == [0]
    with file.open("ab") as stream:
        stream.write(b"x" * 200_000)
    append_jsonl(file, [{"id": 1}])
    assert [row["id"] for row in read_jsonl(file)] == [0, 1]
    file.write_bytes(b'{"id": 0, "te')
    append_jsonl(file, [{"id": 3}])
    assert [row["id"] for row in read_jsonl(file)] == [3]


def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text('{"id": 0}\nsecret words\n{"id": 2}\n')
    with pytest.raises(UserError) as error:
        read_jsonl(file)
    assert error.value.what == f"{file} is damaged at line 2."
    assert "secret" not in str(error.value)


def test_a_stage_is_done_only_for_its_own_inputs(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "r", {})
    with run.stage("pairs", "one") as entry:
        entry["pairs"] = 3
    reopened = Run(tmp_path / "r")
    assert reopened.is_done("pairs", "one")
    assert not reopened.is_done("pairs", "two")
    assert reopened.meta["stages"]["pairs"]["pairs"] == 3


def test_an_interrupted_stage_is_not_done_and_its_time_adds_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, 5.0, 100.0, 107.0])
    monkeypatch.setattr(run_module.time, "monotonic", lambda: next(clock))
    run = Run.create(tmp_path / "r", {})
    with pytest.raises(KeyboardInterrupt), run.stage("train", "x"):
        raise KeyboardInterrupt
    assert not Run(tmp_path / "r").is_done("train", "x")
    with run.stage("train", "x"):
        pass
    assert run.meta["stages"]["train"]["seconds"] == 12.0


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can begin a peak anew")
def test_the_peak_of_a_stage_is_its_own(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", {})
    for stage, size in (("large", 256), ("small", 1)):
        with run.stage(stage, stage):
            bytearray(size << 20)
    large, small = (run.meta["stages"][stage]["peak_memory"] for stage in ("large", "small"))
    assert 200 << 20 < large - small < 300 << 20
    with run.stage("large", "large"):  # again, from where it was interrupted
        pass
    assert run.meta["stages"]["large"]["peak_memory"] == large


def test_a_full_disk_leaves_the_last_good_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run.create(tmp_path / "r", {"seed": 1})

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(run_module.os, "fsync", full)
    run.meta["seed"] = 2
    with pytest.raises(OSError, match="No space"):
        run.save()
    monkeypatch.undo()
    assert Run(tmp_path / "r").meta["seed"] == 1
    assert leftovers(tmp_path) == []


def _hold(path: Path, ready: multiprocessing.Event, release: multiprocessing.Event) -> None:
    with Run(path).locked():
        ready.set()
        release.wait(30)


def test_a_second_process_is_refused(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "r", {})
    context = multiprocessing.get_context("spawn")
    ready, release = context.Event(), context.Event()
    holder = context.Process(target=_hold, args=(run.path, ready, release))
    holder.start()
    try:
        assert ready.wait(30)
        with pytest.raises(UserError, match="Another process is working on"), run.locked():
            pass
    finally:
        release.set()
        holder.join()
    with run.locked():
        pass


def test_opening_removes_what_a_killed_process_left(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "r", {})
    (run / ".metrics.json.partial").write_text("half")
    (run / ".adapter.partial").mkdir()
    (run / ".adapter.partial" / "x").write_text("half")
    with run.locked():
        assert leftovers(run.path) == []


@pytest.mark.parametrize(
    ("prepare", "what"),
    [
        (lambda path: path.write_text("x"), "{} is a file, not a run directory."),
        (
            lambda path: (path.mkdir(), (path / "thesis.doc").write_text("x")),
            "{} is not empty and not a run directory.",
        ),
    ],
)
def test_create_refuses_what_is_not_its_own(tmp_path: Path, prepare, what: str) -> None:
    path = tmp_path / "r"
    prepare(path)
    with pytest.raises(UserError) as error:
        Run.create(path, {})
    assert error.value.what == what.format(path)


def test_open_refuses_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is not a run directory: it has no run\.json"):
        Run(tmp_path)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        Run(tmp_path)
    (tmp_path / "run.json").write_text('{"format": 99}')
    with pytest.raises(UserError, match="another version"):
        Run(tmp_path)


def test_fingerprint_depends_on_values_not_on_order() -> None:
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})
