"""SIGKILL at random moments of the whole flow: started again until it is done, nothing differs.

A few kills always; thirty with MIPO_LITE_SLOW=1, over a flow with every optional stage.
"""

from __future__ import annotations

import os
import random
import time
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path

import psutil
import pytest
from forked import finish, needs_fork, personalize, start
from gguf import GGUFReader
from safetensors.torch import load_file

from mipo_lite.run import read_json, read_jsonl

pytestmark = [needs_fork, pytest.mark.timeout(1200)]

SLOW = bool(os.environ.get("MIPO_LITE_SLOW"))
RUNS, KILLS = (10, 3) if SLOW else (1, 3)
SETTINGS = ("sft_baseline=true", "compare_merges=true") if SLOW else ()
STARTING = 0.3  # processor seconds until a run that is gone on with is where it was
ADAPTERS = ("adapter", "sft") if SLOW else ("adapter",)


@pytest.fixture(scope="module", autouse=True)
def temporary(tmp_path_factory):
    """An empty folder for what the killed processes put into the system's temporary one."""
    folder = tmp_path_factory.mktemp("tmp")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(folder))
        yield folder


def work(process: BaseProcess, most: float = 600) -> float:
    """Wait until the process has used so much processor time, or has ended; seconds used.

    Processor time is the same on a busy machine: a moment of it is a place in the flow.
    """
    used = 0.0
    while process.is_alive() and used < most:
        with suppress(psutil.Error):
            times = psutil.Process(process.pid).cpu_times()
            used = times.user + times.system
        time.sleep(0.002)
    return used


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, float]:
    """An uninterrupted run, and how many processor seconds it took."""
    run = tmp_path_factory.mktemp("whole") / "me"
    process = start(personalize(run, *SETTINGS), run.parent / "output")
    seconds = work(process)
    process.join()
    assert process.exitcode == 0, (run.parent / "output").read_text()
    return run, seconds


@pytest.mark.parametrize("number", range(RUNS))
def test_killed_at_random_it_ends_the_same(number: int, whole, temporary, tmp_path: Path) -> None:
    expected, seconds = whole
    run, output = tmp_path / "me", tmp_path / "output"
    rng = random.Random(number)
    moments = [(part + rng.random()) / KILLS * seconds for part in range(KILLS)]
    reached = []
    for before, moment in zip([0.0, *moments], moments, strict=False):
        process = start(personalize(run, *SETTINGS), output)
        work(process, moment - before + STARTING)
        process.kill()
        process.join()
        reached.append(stage_of(run))
    finish(personalize(run, *SETTINGS), output)
    print(f"killed in {', '.join(reached)}")
    for name in ("pairs.jsonl", "scores.jsonl"):
        assert (run / name).read_bytes() == (expected / name).read_bytes(), reached
    assert [pair["id"] for pair in read_jsonl(run / "pairs.jsonl")] == list(range(16))
    stages, theirs = (read_json(path / "run.json")["stages"] for path in (run, expected))
    assert {stage["state"] for stage in stages.values()} == {"done"}
    for row, other in zip(stages["train"]["history"], theirs["train"]["history"], strict=True):
        names = [name for name in other if "accuracy" not in name]
        assert [row[key] for key in names] == pytest.approx([other[k] for k in names], abs=1e-5)
    for name in ADAPTERS:
        tensors, others = (
            load_file(path / name / "adapter_model.safetensors") for path in (run, expected)
        )
        for key, tensor in tensors.items():
            assert (tensor - others[key]).norm() <= 1e-3 * others[key].norm(), (reached, key)
    texts, others = (
        [(row["model"], row["prompt_id"], row["text"]) for row in read_jsonl(path)]
        for path in (run / "evaluation.jsonl", expected / "evaluation.jsonl")
    )
    assert texts == others, reached
    files = [sorted(file.name for file in (path / "gguf").iterdir()) for path in (run, expected)]
    assert files[0] == files[1]
    for file in (run / "gguf").glob("*.gguf"):
        assert GGUFReader(file).tensors
    assert [path.name for path in run.rglob(".*")] == [".lock"]
    assert sorted(path.name for path in run.iterdir()) == sorted(
        path.name for path in expected.iterdir()
    )
    # torch makes a folder for compiled kernels as soon as it is imported.
    assert {path.name.partition("_")[0] for path in temporary.iterdir()} <= {"torchinductor"}


def stage_of(run: Path) -> str:
    """The stage that was running when the process was killed."""
    if not (run / "run.json").is_file():
        return "no run yet"
    stages = read_json(run / "run.json")["stages"]
    return next((name for name, s in stages.items() if s["state"] == "running"), "between")
