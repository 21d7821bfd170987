"""Faults in the middle of a run: one clear message each, nothing lost, and a rerun goes on."""

from __future__ import annotations

import errno
import os
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch
from forked import needs_fork, personalize, start, wait_until
from safetensors import SafetensorError

from mipo_lite import cli, sampling
from mipo_lite import run as run_module
from mipo_lite.disk import is_disk_full
from mipo_lite.run import Run, read_json, read_jsonl

FULL = (
    "Error: The disk is full.\n"
    "Free some space and run the same command again: it goes on where it stopped.\n"
)
TINY = ("pairs=8", "max_new_tokens=6", "epochs=1", "evaluations=2", "eval_prompts=2")


@pytest.fixture(autouse=True)
def one_base(builtin_base, monkeypatch: pytest.MonkeyPatch) -> None:
    """Load the base once for all of these."""
    monkeypatch.setattr("mipo_lite.flow.load_base", lambda *args, **options: builtin_base)


def main(arguments: list[str], capsys) -> tuple[int, str]:
    """Exit code and errors of `mipo-lite ARGUMENTS` in this process."""
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["mipo-lite", *arguments])
        code = 0
        try:
            cli.main()
        except SystemExit as error:
            code = int(error.code or 0)
    return code, capsys.readouterr().err


@pytest.fixture(scope="module")
def whole(builtin_base, tmp_path_factory) -> Path:
    """A finished run that nothing happened to."""
    run = tmp_path_factory.mktemp("whole") / "me"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mipo_lite.flow.load_base", lambda *args, **options: builtin_base)
        patch.setattr(sys, "argv", ["mipo-lite", *personalize(run, *TINY)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
    assert ended.value.code == 0
    return run


def copy(whole: Path, tmp_path: Path, *redo: str) -> Path:
    """A copy of the finished run in which the stages `redo` have not been done."""
    run = tmp_path / "me"
    shutil.copytree(whole, run)
    opened = Run(run)
    for name in redo:
        opened.meta["stages"][name]["state"] = "running"
    opened.save()
    return run


def test_the_disk_is_full_at_every_write_once(whole: Path, tmp_path, monkeypatch, capsys) -> None:
    """Every file fails when it is first written; in the end the run is the same."""
    run = tmp_path / "me"
    failed: set[str] = set()
    real = os.fsync

    def full(descriptor: int) -> None:
        name = Path(f"/proc/self/fd/{descriptor}").readlink().name
        if name not in failed:
            failed.add(name)
            raise OSError(errno.ENOSPC, "No space left on device", name)
        real(descriptor)

    monkeypatch.setattr(run_module.os, "fsync", full)
    for _ in range(60):
        code, errors = main(personalize(run, *TINY), capsys)
        if code == 0:
            break
        assert errors == FULL
        assert list(run.rglob("*.partial")) == []
    assert code == 0
    wanted = {"pairs.jsonl", "scores.jsonl", ".run.json.partial", "adapter_model.safetensors"}
    assert wanted | {"evaluation.jsonl", ".metrics.json.partial", ".me-lora.gguf.partial"} <= failed
    for name in ("pairs.jsonl", "scores.jsonl", "evaluation.jsonl"):
        assert (run / name).read_bytes() == (whole / name).read_bytes(), name


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (SafetensorError("I/O error: No space left on device (os error 28)"), True),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 5"), True),
        (OSError("2000000 requested and 262112 written"), True),
        (OSError(errno.EACCES, "Permission denied"), False),
        (RuntimeError("a bug"), False),
    ],
)
def test_how_a_full_disk_is_said(error: Exception, expected: bool) -> None:
    """The messages are those of a real full disk."""
    assert is_disk_full(error) == expected


CUT = [
    ("run.json", "{f} is damaged: it is not valid JSON."),
    ("context.json", "{f} is damaged: it is not valid JSON."),
    ("prompts.jsonl", "{f} is damaged at line 1."),
    ("pairs.jsonl", "{f} is damaged at line 1."),
    ("scores.jsonl", "{f} is damaged at line 1."),
    ("evaluation.jsonl", "{f} is damaged at line 1."),
    ("metrics.json", "{f} is damaged: it is not valid JSON."),
    ("adapter/adapter_model.safetensors", "{f} is damaged"),
    ("adapter/adapter_config.json", "{f} is damaged"),
]


@pytest.mark.parametrize(("name", "what"), CUT)
def test_a_damaged_file_is_named(whole: Path, tmp_path, capsys, name: str, what: str) -> None:
    stages = ("scores", "train", "baseline", "evaluate", "export", "report")
    since = {"metrics.json": 5, "evaluation.jsonl": 3}.get(name, 3 if "/" in name else 0)
    run = copy(whole, tmp_path, *stages[since:])
    (run / name).write_bytes(b"\x00garbage\n" * 3)
    code, errors = main(personalize(run, *TINY), capsys)
    assert code == 1
    assert errors.startswith(f"Error: {what.replace('{f}', str(run / name))}"), errors
    assert len(errors.splitlines()) == 2


@pytest.mark.parametrize("name", ["pairs.jsonl", "adapter"])
def test_what_was_removed_is_made_anew(whole: Path, tmp_path, capsys, name: str) -> None:
    run = copy(whole, tmp_path)
    path = run / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert main(personalize(run, *TINY), capsys)[0] == 0
    if name == "adapter":
        assert (path / "adapter_model.safetensors").is_file()
    else:
        assert path.read_bytes() == (whole / name).read_bytes()


def test_a_damaged_gguf_is_named(whole: Path, tmp_path, capsys) -> None:
    run = copy(whole, tmp_path)
    file = run / "gguf" / "me-Q4_K_M.gguf"
    file.write_bytes(file.read_bytes()[:5000])
    code, errors = main(["chat", str(run), "-m", "Hi"], capsys)
    assert code == 1
    assert errors.splitlines()[-2].startswith(f"Error: llama.cpp can not load {file}")


def test_a_size_that_was_halved_is_begun_with(whole: Path, tmp_path, monkeypatch, capsys) -> None:
    tried: list[int] = []
    real = sampling._prefill

    def prefill(model, chunk, *rest):
        tried.append(len(chunk))
        if len(chunk) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        if len(tried) == 4:
            raise KeyboardInterrupt
        return real(model, chunk, *rest)

    monkeypatch.setattr(sampling, "_prefill", prefill)
    run = tmp_path / "me"
    assert main(personalize(run, *TINY), capsys)[0] == 130
    assert tried == [4, 2, 2, 2]
    assert read_json(run / "run.json")["fits"] == {"sampling_batch": 2}
    assert main(personalize(run, *TINY), capsys)[0] == 0
    assert max(tried[4:]) == 2
    assert (run / "pairs.jsonl").read_bytes() == (whole / "pairs.jsonl").read_bytes()


@needs_fork
def test_two_processes_on_one_run(tmp_path: Path, capsys) -> None:
    run = tmp_path / "me"
    first = start(personalize(run), tmp_path / "output")
    wait_until(lambda: len(read_jsonl(run / "pairs.jsonl")) >= 4, first)
    try:
        code, errors = main(personalize(run), capsys)
    finally:
        first.kill()
        first.join()
    assert code == 1
    assert errors == (
        f"Error: Another process is working on {run}.\n"
        "Wait until it has finished, or choose another --run.\n"
    )


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write all")
def test_a_directory_that_can_not_be_written(whole: Path, tmp_path, capsys) -> None:
    run = copy(whole, tmp_path, "report")
    run.chmod(0o500)
    try:
        code, errors = main(personalize(run, *TINY), capsys)
    finally:
        run.chmod(0o700)
    assert code == 1
    assert errors.startswith("Error: There is no permission for ")


def test_a_file_system_that_is_read_only(whole: Path, tmp_path, monkeypatch, capsys) -> None:
    run = copy(whole, tmp_path, "report")

    def refuse(self: Path, *args: object, **options: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(self))

    monkeypatch.setattr(Path, "write_text", refuse)
    code, errors = main(personalize(run, *TINY), capsys)
    assert code == 1
    assert errors.startswith(f"Error: There is no permission for {run}")


def test_a_clock_that_jumps_back(whole: Path, tmp_path, monkeypatch, capsys) -> None:
    run = copy(whole, tmp_path, "evaluate", "export", "report")
    monkeypatch.setattr(time, "time", lambda: 0.0)
    monkeypatch.setattr(time, "strftime", lambda form, *t: "1970-01-01T00:00:00+0000")
    assert main(personalize(run, *TINY), capsys)[0] == 0
    stages = read_json(run / "run.json")["stages"]
    assert all(stage["state"] == "done" and stage["seconds"] >= 0 for stage in stages.values())
