"""`mipo-lite improve` as the command line runs it; killed, and gone on with; and how it says no."""

from __future__ import annotations

import html
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mipo_lite import cli
from mipo_lite.base import Base
from mipo_lite.errors import UserError
from mipo_lite.flow import Flow, execute, fingerprints
from mipo_lite.improve_flow import improve, prepare, read_problems
from mipo_lite.pipeline import open_flow
from mipo_lite.recipe import recipe_names
from mipo_lite.rounds import set_aside
from mipo_lite.run import read_json, read_jsonl

ROOT = Path(__file__).parent.parent
CHOICES = ROOT / "examples" / "choices.csv"
# Small enough for seconds; two rounds; several chunks of pairs; checkpoints.
SMALL = (
    "pairs=16",
    "negatives=random",
    "answers_per_question=4",
    "rounds=2",
    "sampling_batch=8",
    "max_new_tokens=24",
    "epochs=1",
    "batch_size=4",
    "micro_batch=4",
    "eval_prompts=6",
    "eval_samples=1",
    "eval_contexts=4",
)
RECIPES = [name for name in recipe_names() if name.startswith(("math", "multiple"))]


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sums with their answers, 36 of them."""
    path = tmp_path_factory.mktemp("questions") / "sums.jsonl"
    lines = (ROOT / "examples" / "sums.jsonl").read_text("utf-8").splitlines()[:36]
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


def arguments(questions: Path, run: Path, *more: str) -> list[str]:
    found = ["improve", "--prompts", str(questions), "--base", "builtin", "--run", str(run)]
    return [*found, *(part for setting in SMALL for part in ("--set", setting)), *more]


def say_no(
    given: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[int, str, str]:
    """Exit code, output and errors of a command that is refused."""
    monkeypatch.setattr(sys, "argv", ["mipo-lite", *given])
    with pytest.raises(SystemExit) as raised:
        cli.main()
    captured = capsys.readouterr()
    return int(raised.value.code or 0), captured.out, captured.err


def flow_of(questions: Path, run: Path, recipe: str | None = None) -> Flow:
    return prepare(
        questions,
        eval_prompts=None,
        columns=(None, None),
        base="builtin",
        recipe=recipe,
        settings=SMALL,
        flags={},
        run=run,
        trust_remote_code=False,
    )


@pytest.fixture(scope="module")
def finished(questions: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """An uninterrupted run, and what it printed."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    output = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(output):
        patch.setattr(sys, "argv", ["mipo-lite", *arguments(questions, run)])
        try:
            cli.main()
        except SystemExit as ended:
            assert not ended.code
    return run, output.getvalue()


def test_a_run_leaves_everything_it_promises(finished) -> None:
    run, output = finished
    for name in (
        "pairs.jsonl",
        "scores.jsonl",
        "adapter/adapter_model.safetensors",
        "rounds/2/adapter/adapter_model.safetensors",
        "metrics.json",
        "merged/model.safetensors",
        "gguf/whole-Q4_K_M.gguf",
        "report.html",
    ):
        assert (run / name).is_file(), name
    stages = read_json(run / "run.json")["stages"]
    assert list(stages) == [
        "pairs", "scores", "train", "rounds", "baseline", "evaluate", "export", "report",
    ]  # fmt: skip
    assert {entry["state"] for entry in stages.values()} == {"done"}
    for said in ("are right", "I(y; x), bound", "round 2:", "same next token as in torch"):
        assert said in output, said
    assert read_json(run / "metrics.json")["verdict"]["sentence"] in " ".join(output.split())


def test_the_report_is_one_of_improve(finished) -> None:
    run, _ = finished
    page = (run / "report.html").read_text("utf-8")
    assert read_json(run / "metrics.json")["verdict"]["sentence"] in html.unescape(page)
    assert "log p(answer | question)" in page


@pytest.mark.skipif(os.name == "nt", reason="modes are POSIX")
def test_everything_in_a_run_is_private(finished) -> None:
    run, _ = finished
    for path in (run, *run.rglob("*")):
        assert path.stat().st_mode & 0o077 == 0, path


def test_what_is_measured_was_never_trained_on(finished) -> None:
    run, _ = finished
    problems = read_problems(run)
    training = [problem for problem in problems if problem.split == "train"]
    train_on, watched = set_aside(training)
    measured = {row["prompt_id"] for row in read_jsonl(run / "evaluation.jsonl")}
    assert measured <= {problem.id for problem in problems if problem.split == "held_out"}
    for pairs in ("pairs.jsonl", "rounds/2/pairs.jsonl"):
        used = {row["prompt_id"] for row in read_jsonl(run / pairs)}
        assert used and used <= {problem.id for problem in train_on}
    for number in (1, 2):
        rows = read_jsonl(run / "rounds" / str(number) / "watched.jsonl")
        assert {row["prompt_id"] for row in rows} <= {problem.id for problem in watched}


def test_answers_lie_in_a_file_that_only_the_evaluation_reads(finished) -> None:
    run, _ = finished
    assert all("answer" not in row for row in read_jsonl(run / "problems.jsonl"))
    assert {problem.answer for problem in read_problems(run)} == {None}
    with_answers = read_problems(run, with_answers=True)
    assert all(problem.answer is not None for problem in with_answers)


def test_a_finished_run_does_nothing_again(finished, questions: Path) -> None:
    run, _ = finished
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*.jsonl")}
    improve(questions, base="builtin", run=run, settings=SMALL)
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*.jsonl")}


def test_what_another_setting_redoes(finished) -> None:
    """Fingerprints only: nothing is run. More rounds set other questions aside."""
    run, _ = finished
    for setting, first in (
        ("negatives=near", "pairs"),
        ("rounds=3", "pairs"),
        ("learning_rate=0.5", "train"),
        ("eval_samples=9", "evaluate"),
    ):
        flow = open_flow(run, [setting])
        stale = [
            stage.name for stage, now in fingerprints(flow) if not run_is_done(flow, stage, now)
        ]
        names = [stage.name for stage in flow.stages]
        assert stale == names[names.index(first) :], setting


def run_is_done(flow: Flow, stage, inputs: str) -> bool:
    return flow.run.is_done(stage.name, inputs)


def test_other_answers_are_other_inputs(finished, questions: Path, tmp_path: Path) -> None:
    run, _ = finished
    other = tmp_path / "sums.jsonl"
    rows = [json.loads(line) for line in questions.read_text("utf-8").splitlines()]
    other.write_text("".join(json.dumps(row | {"answer": "7"}) + "\n" for row in rows), "utf-8")
    with pytest.raises(UserError, match="their answers differ"):
        improve(other, base="builtin", run=run, settings=SMALL)


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL")
def test_killed_in_the_second_round_it_ends_the_same(
    finished, questions: Path, tmp_path: Path, builtin_base: Base
) -> None:
    whole, _ = finished
    run = tmp_path / "killed"

    def a_checkpoint() -> bool:
        return any((run / "rounds/2/checkpoints").glob("checkpoint-*/trainer_state.json"))

    kill_when(arguments(questions, run), a_checkpoint)
    assert read_json(run / "run.json")["stages"]["rounds"]["state"] == "running"
    flow = flow_of(questions, run)
    flow.base = builtin_base
    with flow.run.locked():
        execute(flow, only="rounds")
    for name in ("pairs.jsonl", "scores.jsonl", "rounds/2/pairs.jsonl"):
        assert (run / name).read_bytes() == (whole / name).read_bytes(), name
    file = "rounds/2/adapter/adapter_model.safetensors"
    once, again = load_file(whole / file), load_file(run / file)
    for name, tensor in once.items():
        torch.testing.assert_close(again[name], tensor, rtol=1e-3, atol=1e-5)


def kill_when(given: list[str], ready: Callable[[], bool]) -> None:
    """Start the command and kill it as soon as `ready`."""
    process = subprocess.Popen(
        [sys.executable, "-m", "mipo_lite", *given],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    deadline = time.monotonic() + 120
    while not ready():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "the moment to kill never came"
        time.sleep(0.01)
    process.kill()
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_runs(name: str, questions: Path, tmp_path: Path, builtin_base: Base) -> None:
    """Pairs, scores and training, with the recipe's own settings but for sizes."""
    prompts = CHOICES if name == "multiple-choice" else questions
    own = [setting for setting in SMALL if not setting.startswith("negatives")]
    settings = [*own, "rounds=1", "min_contrast=0", "pairs=8", "evaluations=1"]
    flow = prepare(
        prompts,
        eval_prompts=None,
        columns=(None, None),
        base="builtin",
        recipe=name,
        settings=settings,
        flags={},
        run=tmp_path / "run",
        trust_remote_code=False,
    )
    flow.base = builtin_base
    execute(flow, only="train")
    assert (flow.run / "adapter" / "adapter_model.safetensors").is_file()
    asked = read_problems(flow.run)[0].text
    assert asked.endswith(flow.recipe.instruction)


# --- bad input ---------------------------------------------------------------------------------


def test_bad_rows_are_told_before_the_good_ones_are_used(
    questions: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    """Refused further on, so that nothing is run; the name would be read as markup by rich."""
    lines = questions.read_text("utf-8").splitlines()[:8]
    lines[1] = '{"id": "a", "answer": "3"}'
    lines[2] = '{"id": "b", "question": "Wh'
    lines[3] = json.dumps({"id": "c", "question": "x" * 10 * 2**20})
    lines[4] = json.dumps({"id": "sum-001", "question": "What is 1 plus 0?"})
    path = tmp_path / "q[bold].jsonl"
    path.write_text("\n".join(lines) + "\n", "utf-8")
    run = tmp_path / "run"
    given = arguments(path, run, "--negatives", "missing")
    code, output, errors = say_no(given, monkeypatch, capsys)
    assert output.splitlines() == [
        f"{path}: 4 of 8 rows can not be used.",
        "  line 2: no question",
        "  line 3: broken JSON at column 28",
        "  line 4: the line is 10.0 MiB long",
        "  line 5: the same id as line 1",
    ]
    assert errors.splitlines() == [
        "Error: negatives=missing is for personalize: a question has no context.",
        "Use one of: random, near, far, answers.",
    ]
    assert code == 2
    assert not run.exists()


@pytest.mark.parametrize(
    ("content", "more", "what", "code"),
    [
        (
            '{"question": "What is 1 plus 1?"}\n',
            (),
            "{} holds 1 usable question; 4 is the least. Line 1 has no other to be contrasted "
            "with.",
            1,
        ),
        ('{"frage": "Was ist 1 plus 1?"}\n', (), "{} has no question column.", 2),
        (
            "question\na?\nb?\nc?\nd?\n",
            ("--question-column", "asked"),
            "{} has no column 'asked'.",
            2,
        ),
        ("", (), "{} holds 0 usable questions; 4 is the least.", 1),
    ],
)  # fmt: skip
def test_files_that_are_refused(
    content: str, more: tuple[str, ...], what: str, code: int, tmp_path: Path, monkeypatch, capsys
) -> None:
    path = tmp_path / ("q.csv" if content.startswith("question\n") else "q.jsonl")
    path.write_text(content, "utf-8")
    run = tmp_path / "run"
    found, _, errors = say_no(arguments(path, run, *more), monkeypatch, capsys)
    first, second = errors.splitlines()
    assert first == f"Error: {what.format(path)}"
    assert second.strip()
    assert found == code
    assert not run.exists()


def test_only_held_out_questions_are_left(questions: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="fewer than two questions that are not held out as well"):
        improve(
            questions, eval_prompts=questions, base="builtin", run=tmp_path / "run", settings=SMALL
        )


def test_questions_without_room_are_left_out_and_counted(tmp_path: Path, capsys) -> None:
    path = tmp_path / "q.txt"
    long = " ".join(["What is a very long question about the sea?"] * 600)
    path.write_text("".join(f"What is {n} plus 1?\n" for n in range(12)) + long + "\n", "utf-8")
    flow = flow_of(path, tmp_path / "run")
    assert len(read_problems(flow.run)) == 12
    assert "1 of 13 questions are left out: builtin has room for" in capsys.readouterr().out
