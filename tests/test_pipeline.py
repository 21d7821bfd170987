"""The whole flow on the built-in base, as the command line runs it; killed, and gone on with."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from peft import PeftModel

from mipo_lite import pipeline
from mipo_lite.base import BUILTIN
from mipo_lite.compare import choice_pairs, judged_prompts, load_comparisons
from mipo_lite.errors import UserError
from mipo_lite.flow import execute, fingerprints
from mipo_lite.gguf.verify import (
    agreement,
    gguf_distributions,
    load_model,
    torch_distributions,
)
from mipo_lite.prompts import may_matter
from mipo_lite.report.page import write_page
from mipo_lite.report.summary import print_summary
from mipo_lite.run import Run, append_jsonl, read_json, read_jsonl

ROOT = Path(__file__).parent.parent
ME = ROOT / "examples" / "me.txt"
# Small enough for seconds, large enough for a checkpoint and for several chunks of pairs.
SMALL = (
    "pairs=24",
    "sampling_batch=8",
    "max_new_tokens=24",
    "epochs=2",
    "batch_size=4",
    "micro_batch=4",
    "eval_prompts=18",
    "eval_samples=2",
    "quants=[q4_k_m, f16]",
)


def command(run: Path, *settings: str) -> list[str]:
    arguments = ["personalize", "--user-context", str(ME), "--base", "builtin", "--run", str(run)]
    for setting in (*SMALL, *settings):
        arguments += ["--set", setting]
    return [sys.executable, "-m", "mipo_lite", *arguments]


def finish(arguments: list[str]) -> str:
    done = subprocess.run(arguments, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def heed_signals() -> None:
    """In the child: a job in the background of a script is started with Ctrl-C ignored."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


def kill_when(arguments: list[str], ready: Callable[[], bool], sent: int) -> int:
    """Start the command, send it the signal as soon as `ready`; its exit code."""
    process = subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    deadline = time.monotonic() + 120
    while not ready():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "the moment to kill never came"
        time.sleep(0.01)
    process.send_signal(sent)
    process.communicate(timeout=60)
    return process.returncode


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """An uninterrupted run, and what it printed."""
    run = tmp_path_factory.mktemp("runs") / "whole"
    return run, finish(command(run))


def test_a_run_leaves_everything_it_promises(finished) -> None:
    run, output = finished
    for name in (
        "run.json",
        "pairs.jsonl",
        "scores.jsonl",
        "adapter/adapter_model.safetensors",
        "metrics.json",
        "report.html",
        "merged/model.safetensors",
        "gguf/whole-Q4_K_M.gguf",
        "gguf/Modelfile",
    ):
        assert (run / name).is_file(), name
    assert not (run / "checkpoints").exists()
    assert f"mipo-lite chat {run}" in output.replace("\n", "")
    stages = read_json(run / "run.json")["stages"]
    assert {entry["state"] for entry in stages.values()} == {"done"}


@pytest.mark.skipif(os.name == "nt", reason="modes are POSIX")
def test_everything_in_a_run_is_private(finished) -> None:
    run, _ = finished
    assert run.stat().st_mode & 0o777 == 0o700
    for path in run.rglob("*"):
        assert path.stat().st_mode & 0o077 == 0, path


def test_pairs_hold_what_training_needs(finished) -> None:
    run, _ = finished
    pairs = read_jsonl(run / "pairs.jsonl")
    scores = read_jsonl(run / "scores.jsonl")
    assert [pair["id"] for pair in pairs] == [score["id"] for score in scores] == list(range(24))
    page = ME.read_text("utf-8").strip()
    for pair, score in zip(pairs, scores, strict=True):
        if pair["persona"] == "user":
            assert pair["prompt"][0] == {"role": "system", "content": page}
        assert score["why"] == "identical" or pair["chosen_ids"] != pair["rejected_ids"]


def test_no_page_text_in_run_json_or_in_the_output(finished) -> None:
    run, output = finished
    for text in ("Trondheim", "Knubbel", "lino cutting"):
        assert text not in (run / "run.json").read_text("utf-8")
        assert text not in output


def test_a_finished_run_does_nothing_again(finished) -> None:
    run, _ = finished
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.suffix != ".json"}
    finish(command(run))
    after = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.suffix != ".json"}
    before.pop(run / ".lock", None)
    after.pop(run / ".lock", None)
    assert before == after


def test_another_recipe_for_the_same_run_is_refused(finished) -> None:
    run, _ = finished
    with pytest.raises(UserError) as error:
        pipeline.personalize(ME, base="builtin", run=run, settings=[*SMALL, "beta=0.2"])
    assert error.value.what == f"{run} belongs to another recipe: beta was 0.1, now 0.2."
    assert (
        error.value.fix == "Give the same inputs to go on, or choose another --run to start anew."
    )


def test_a_dry_run_on_a_run_shows_its_own_settings(finished) -> None:
    given = {"base": None, "prompts": None, "recipe": None, "seed": None, "run": finished[0]}
    foreseen = pipeline.preview(ME, settings=["epochs=5"], **given)
    assert (foreseen.recipe.pairs, foreseen.recipe.epochs) == (24, 5)
    assert foreseen.base.name == "builtin"


def test_another_page_for_the_same_run_is_refused(finished, tmp_path: Path) -> None:
    run, _ = finished
    other = tmp_path / "other.txt"
    other.write_text("I am somebody else.")
    with pytest.raises(UserError) as error:
        pipeline.personalize(other, base="builtin", run=run, settings=SMALL)
    assert error.value.what == f"{run} was made with another user context file."


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL")
def test_killed_in_pairs_and_in_training_it_ends_the_same(finished, tmp_path: Path) -> None:
    whole, _ = finished
    run = tmp_path / "killed"

    def some_pairs() -> bool:
        return len(read_jsonl(run / "pairs.jsonl")) >= 8

    def a_checkpoint() -> bool:
        return any((run / "checkpoints").glob("checkpoint-*/trainer_state.json"))

    assert kill_when(command(run), some_pairs, signal.SIGKILL) == -signal.SIGKILL
    assert len(read_jsonl(run / "pairs.jsonl")) < 24
    assert kill_when(command(run), a_checkpoint, signal.SIGKILL) == -signal.SIGKILL
    finish(command(run))
    assert (run / "pairs.jsonl").read_bytes() == (whole / "pairs.jsonl").read_bytes()
    assert list(run.rglob("*.partial")) == []
    margins = [
        read_json(path / "run.json")["stages"]["train"]["history"][-1] for path in (whole, run)
    ]
    assert margins[1] == pytest.approx(margins[0], abs=1e-4)


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_a_polite_kill_say_how_to_go_on(tmp_path: Path, sent: int) -> None:
    run = tmp_path / "stopped"
    process = subprocess.Popen(
        command(run),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        preexec_fn=heed_signals,
    )
    deadline = time.monotonic() + 120
    while not (run / "pairs.jsonl").exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(sent)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.splitlines()[-2:] == [
        "Error: Stopped.",
        "What was finished is kept: run the same command again to go on.",
    ]
    assert Run(run).meta["stages"]["pairs"]["state"] == "running"


def test_a_changed_setting_redoes_what_depends_on_it(finished, tmp_path: Path) -> None:
    """Fingerprints only: nothing is run."""
    whole, _ = finished
    flow = pipeline.open_flow(whole, ["learning_rate=0.5"])
    assert flow.recipe.learning_rate == 0.5
    assert stale_stages(flow) == ["train", "baseline", "evaluate", "export", "report"]


def stale_stages(flow) -> list[str]:
    return [
        stage.name
        for stage, inputs in fingerprints(flow)
        if not flow.run.is_done(stage.name, inputs)
    ]


def choose(run: Path, prompts: list[str], choice: str) -> None:
    """Choices as the blind test writes them, of answers that nobody gave."""
    rows = [
        {
            "id": f"{choice}-{number}",
            "prompt": prompt,
            "choice": choice,
            "shown_first": "after",
            "before": "No.",
            "after": "Yes.",
            "before_ids": [40, 41],
            "after_ids": [42, 41],
        }
        for number, prompt in enumerate(prompts)
    ]
    append_jsonl(run / "choices.jsonl", rows)


@pytest.fixture
def copied(finished, tmp_path: Path) -> Path:
    whole, _ = finished
    return Path(shutil.copytree(whole, tmp_path / "copied"))


def asked_in(run: Path) -> list[str]:
    """The held-out prompts of an evaluation, those of the blind test."""
    rows = read_jsonl(run / "evaluation.jsonl")
    return list(dict.fromkeys(r["prompt"] for r in rows if r["condition"] == "with_context"))


def test_choices_are_noticed_where_they_are_used(copied: Path) -> None:
    choose(copied, asked_in(copied)[:2], "after")
    assert stale_stages(pipeline.open_flow(copied)) == []
    use = ["use_choices=true"]
    later = ["scores", "train", "baseline", "evaluate", "export", "report"]
    assert stale_stages(pipeline.open_flow(copied, use)) == later, "nothing is sampled again"
    seen = {s.name: i for s, i in fingerprints(pipeline.open_flow(copied, use))}
    choose(copied, asked_in(copied)[2:3], "tie")
    again = {s.name: i for s, i in fingerprints(pipeline.open_flow(copied, use))}
    assert again == seen, "a tie teaches nothing"
    choose(copied, asked_in(copied)[3:4], "before")
    more = {s.name: i for s, i in fingerprints(pipeline.open_flow(copied, use))}
    assert more["scores"] != seen["scores"] and more["pairs"] == seen["pairs"]


def test_choices_are_trained_on_and_not_measured(copied: Path, builtin_base) -> None:
    sampled = (copied / "pairs.jsonl").read_bytes()
    asked = asked_in(copied)
    choose(copied, asked[:2], "after")
    choose(copied, asked[2:3], "before")
    choose(copied, asked[3:4], "tie")
    flow = pipeline.open_flow(copied, ["use_choices=true", "epochs=0.5"])
    flow.base = builtin_base
    execute(flow, only="evaluate")

    pairs = read_jsonl(copied / "pairs.jsonl")
    assert (copied / "pairs.jsonl").read_bytes().startswith(sampled)
    assert [p["chosen"] for p in pairs[24:]] == ["Yes.", "Yes.", "No."]
    assert pairs[24:] == choice_pairs(flow.run, builtin_base, first_id=24)
    scores = read_jsonl(copied / "scores.jsonl")
    assert [score["id"] for score in scores] == list(range(27))
    assert all(score["kept"] for score in scores[24:]), "whatever PMI says"
    assert flow.run.meta["stages"]["scores"]["choices"] == 3

    judged = judged_prompts(flow.run)
    assert judged == set(asked[:3])
    measured = {row["prompt"] for row in read_jsonl(copied / "evaluation.jsonl")}
    assert measured and not judged & measured
    assert len(read_jsonl(copied / "choices.jsonl")) == 4, "choices stay"

    flow = pipeline.open_flow(copied, ["use_choices=false"])
    flow.base = builtin_base
    execute(flow, only="scores")
    assert (copied / "pairs.jsonl").read_bytes() == sampled
    assert len(read_jsonl(copied / "scores.jsonl")) == 24


def test_what_a_new_training_outdates_is_not_shown_as_its_result(
    copied: Path, builtin_base, capsys
) -> None:
    append_jsonl(copied / "compare.jsonl", [{"prompt": "Mine?"}])
    flow = pipeline.open_flow(copied, ["epochs=0.5"])
    flow.base = builtin_base
    execute(flow, only="train")
    states = {name: entry["state"] for name, entry in Run(copied).meta["stages"].items()}
    assert states["train"] == "done"
    assert {states[name] for name in ("evaluate", "export", "report")} == {"stale"}
    with pytest.raises(UserError, match="trained anew since"):
        load_comparisons(flow.run)
    assert not (copied / "compare.jsonl").exists(), "answers of the adapter before"
    capsys.readouterr()
    print_summary(flow.run)
    output = capsys.readouterr().out
    assert "Not made anew yet: evaluate, export." in output
    assert "before" not in output and "GGUF:" not in output
    html = write_page(flow.run).read_text("utf-8")
    assert "evaluate, export still to do" in html and "Before and after" not in html
    assert (copied / "gguf" / "whole-Q4_K_M.gguf").is_file(), "it stays until it is made anew"

    # Back to the first settings: what was recorded for them is no longer there to rely on.
    assert "evaluate" in stale_stages(pipeline.open_flow(copied, ["epochs=2"]))


def test_a_run_is_gone_on_with_as_it_was_changed(copied: Path, builtin_base) -> None:
    flow = pipeline.open_flow(copied, ["epochs=0.5"])
    flow.base = builtin_base
    execute(flow, only="train")
    # Nothing stated: the run's own base and settings, the changed one among them.
    arguments = {"prompts": None, "recipe": None, "seed": None}
    flow = pipeline.prepare(ME, base=None, settings=[], run=copied, **arguments)
    assert flow.source.name == "builtin"
    assert flow.recipe.epochs == 0.5
    assert flow.recipe.pairs == 24
    assert stale_stages(flow) == ["baseline", "evaluate", "export", "report"]
    with pytest.raises(UserError, match=r"epochs was 0\.5, now 2"):
        pipeline.prepare(ME, base=None, settings=["epochs=2"], run=copied, **arguments)


def test_choices_that_are_not_there_are_asked_for(copied: Path) -> None:
    with pytest.raises(UserError, match="holds no choices to train on") as error:
        pipeline.open_flow(copied, ["use_choices=true"])
    assert f"mipo-lite compare {copied}" in error.value.fix


def test_what_is_judged_completely_can_not_be_measured(copied: Path, builtin_base) -> None:
    flow = pipeline.open_flow(copied)
    held_out = [p.text for p in may_matter(flow.prompts) if p.split == "held_out"]
    choose(copied, held_out, "after")
    flow = pipeline.open_flow(copied, ["use_choices=true"])
    flow.base = builtin_base
    with pytest.raises(UserError, match="none is left to measure on"):
        execute(flow, only="train")
    assert len(read_jsonl(copied / "pairs.jsonl")) == 24


def test_metrics_have_before_after_and_intervals(finished) -> None:
    run, _ = finished
    metrics = json.loads((run / "metrics.json").read_text("utf-8"))
    pmi = metrics["with_context"]["sampled"]["pmi"]
    assert pmi["low"] <= pmi["difference"] <= pmi["high"]
    assert pmi["difference"] == pytest.approx(pmi["after"] - pmi["before"], abs=1e-3)


@pytest.fixture(scope="module")
def held_out(finished, builtin_base) -> list[tuple[list[int], list[int]]]:
    """50 held-out (prompt ids, response ids) of the trained model, with the user's page."""
    run, _ = finished
    page = read_json(run / "context.json")["text"]
    rows = [
        (builtin_base.encode(row["prompt"], page), row["token_ids"])
        for row in read_jsonl(run / "evaluation.jsonl")
        if (row["model"], row["condition"]) == ("after", "with_context")
    ]
    assert len(rows) >= 50
    return rows[:50]


def test_the_merged_model_is_the_base_with_the_adapter(finished, held_out) -> None:
    run, _ = finished
    applied = PeftModel.from_pretrained(load_model(BUILTIN), str(run / "adapter"))
    found = agreement(
        torch_distributions(applied, held_out),
        iter(torch_distributions(load_model(run / "merged"), held_out)),
    )
    assert found["mean_kl"] < 1e-3
    assert found["greedy_agreement"] >= 0.99


def test_f16_in_llama_cpp_is_the_merged_model_in_torch(finished, held_out) -> None:
    run, _ = finished
    found = agreement(
        torch_distributions(load_model(run / "merged"), held_out),
        gguf_distributions(run / "gguf" / "whole-F16.gguf", held_out),
    )
    assert found["greedy_agreement"] >= 0.99


def test_the_export_was_checked_and_the_result_kept(finished) -> None:
    run, output = finished
    checks = read_json(run / "metrics.json")["export"]
    assert [check["file"] for check in checks] == ["whole-Q4_K_M.gguf", "whole-F16.gguf"]
    assert all(check["template_equal"] for check in checks)
    assert all(check["ended"] == check["answers"] for check in checks)
    assert "whole-Q4_K_M.gguf: same next token as in torch" in output


def test_chat_answers_through_llama_cpp(finished) -> None:
    run, _ = finished
    said = ["chat", str(run), "--message", "What is my name?", "--temperature", "0"]
    answer = finish([sys.executable, "-m", "mipo_lite", *said])
    assert 0 < len(answer.split()) < 40


def test_a_base_that_can_not_be_exported_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(BUILTIN, base)
    config = json.loads((base / "config.json").read_text("utf-8"))
    config |= {"model_type": "phi3", "architectures": ["Phi3ForCausalLM"]}
    (base / "config.json").write_text(json.dumps(config), "utf-8")
    with pytest.raises(UserError, match="phi3"):
        pipeline.personalize(ME, base=str(base), run=tmp_path / "run")
    assert not (tmp_path / "run").exists()
