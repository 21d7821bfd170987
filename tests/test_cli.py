"""The command line as a stranger meets it: what it prints, and how it says no."""

from __future__ import annotations

import errno
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mipo_lite import cli
from mipo_lite.base import BUILTIN

SAMPLE = Path(__file__).parent.parent / "examples" / "me.txt"
WRITE_ONE = "Write a text file about yourself (examples/me.txt shows one) and name it."
NAME_ONE = "Give builtin, a Hugging Face id such as Qwen/Qwen2.5-1.5B-Instruct, or a directory."


def run(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[int, str, str]:
    """Exit code, output and errors of `mipo-lite ARGUMENTS`."""
    monkeypatch.setattr(sys, "argv", ["mipo-lite", *arguments])
    try:
        cli.main()
        code = 0
    except SystemExit as error:
        code = int(error.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def base_without(path: Path, *patterns: str) -> Path:
    """A copy of the built-in base that lacks some files."""
    shutil.copytree(BUILTIN, path, ignore=shutil.ignore_patterns(*patterns))
    return path


@pytest.mark.parametrize(
    ("make", "what", "fix"),
    [
        (lambda d: d / "no.txt", "There is no file {}.", WRITE_ONE),
        (lambda d: write(d / "me.txt", b""), "{} is empty.", WRITE_ONE),
        (lambda d: write(d / "me.txt", b" \n\t\n"), "{} is empty.", WRITE_ONE),
        (lambda d: d, "{} is a directory.", WRITE_ONE),
        (
            lambda d: write(d / "me.txt", b"\x89PNG\r\n\x1a\n\x00\xff"),
            "{} is not text in UTF-8.",
            "Save it as plain UTF-8 text.",
        ),
        (
            lambda d: write(d / "me.txt", b"a\x00b"),
            "{} is not text in UTF-8.",
            "Save it as plain UTF-8 text.",
        ),
    ],
)
def test_bad_user_contexts(make, what, fix, tmp_path, monkeypatch, capsys) -> None:
    path = make(tmp_path)
    arguments = ["personalize", "--user-context", str(path), "--base", "builtin"]
    arguments += ["--run", str(tmp_path / "run")]
    code, _, errors = run(arguments, monkeypatch, capsys)
    assert errors == f"Error: {what.format(path)}\n{fix}\n"
    assert code == 1
    assert not (tmp_path / "run").exists()


def test_a_context_larger_than_the_window(tmp_path, monkeypatch, capsys) -> None:
    path = write(tmp_path / "me.txt", b"I live in a very small house. " * 2000)
    arguments = ["personalize", "--user-context", str(path), "--base", "builtin"]
    arguments += ["--run", str(tmp_path / "run")]
    code, _, errors = run(arguments, monkeypatch, capsys)
    first, second = errors.splitlines()
    assert first.startswith("Error: The user context takes ")
    assert " tokens; builtin has room for " in first
    assert second == "Shorten the file, or choose a base with a larger window."
    assert "small house" not in errors
    assert code == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("make", "what", "fix"),
    [
        (lambda d: "no such base!", "There is no base 'no such base!'.", NAME_ONE),
        (
            lambda d: "nobody/nothing",
            "{} is not in the local cache, and HF_HUB_OFFLINE forbids a download.",
            "Unset HF_HUB_OFFLINE to download it, or use --base builtin.",
        ),
        (
            lambda d: base_without(d / "b", "config.json"),
            "{} is not a model directory: it has no config.json.",
            "Name a directory with config.json, *.safetensors and a tokenizer.",
        ),
        (
            lambda d: base_without(d / "b", "*.safetensors"),
            "{} holds no weights: there is no *.safetensors file.",
            "Download the model completely; pickled weights (*.bin) are not loaded.",
        ),
        (
            lambda d: base_without(d / "b", "chat_template.jinja"),
            "{} has no chat template: it is not an instruct model.",
            "Choose its instruct version, or put a chat_template.jinja into its directory.",
        ),
    ],
)
def test_bad_bases(make, what, fix, tmp_path, monkeypatch, capsys) -> None:
    base = make(tmp_path)
    arguments = ["personalize", "--user-context", str(SAMPLE), "--base", str(base)]
    arguments += ["--run", str(tmp_path / "run")]
    code, _, errors = run(arguments, monkeypatch, capsys)
    assert errors == f"Error: {what.format(base)}\n{fix}\n"
    assert code == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "what", "code"),
    [
        (["--set", "pear=3"], "There is no setting 'pear'. Did you mean 'pairs'?", 2),
        (["--set", "pairs=0"], "pairs can not be 0: input should be greater than", 2),
        (["--recipe", "bultin"], "There is no recipe 'bultin'. Did you mean 'builtin'?", 2),
        (["--recipe", "no.yaml"], "The recipe no.yaml can not be read.", 2),
    ],
)
def test_bad_settings(arguments, what, code, tmp_path, monkeypatch, capsys) -> None:
    command = ["personalize", "--user-context", str(SAMPLE), "--base", "builtin"]
    command += ["--run", str(tmp_path / "run"), *arguments]
    found, _, errors = run(command, monkeypatch, capsys)
    assert errors.startswith(f"Error: {what}")
    assert len(errors.splitlines()) == 2
    assert found == code
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "code"),
    [(["personalise"], 2), (["personalize"], 2), (["personalize", "--user-contxt", "x"], 2)],
)
def test_wrong_usage_exits_2_and_says_how(arguments, code, monkeypatch, capsys) -> None:
    found, _, errors = run(arguments, monkeypatch, capsys)
    assert found == code
    assert errors.startswith("Usage: ")
    assert "Traceback" not in errors


@pytest.mark.parametrize("command", ["pairs", "train", "evaluate", "chat"])
def test_commands_on_what_is_no_run(command, tmp_path, monkeypatch, capsys) -> None:
    code, _, errors = run([command, str(tmp_path)], monkeypatch, capsys)
    assert errors == (
        f"Error: {tmp_path} is not a run directory: it has no run.json.\n"
        "Name a directory that `mipo-lite personalize` made; they lie in runs/.\n"
    )
    assert code == 1


def test_choices_are_a_flag_of_train(tmp_path, monkeypatch, capsys) -> None:
    found = []
    monkeypatch.setattr(cli, "_stage", lambda *arguments: found.append(arguments))
    run(["train", str(tmp_path), "--set", "beta=0.2", "--use-choices"], monkeypatch, capsys)
    run(["train", str(tmp_path)], monkeypatch, capsys)
    expected = ["beta=0.2", "use_choices=true"]
    assert found == [(tmp_path, expected, "train"), (tmp_path, [], "train")]


def test_dry_run_says_what_would_be_done_and_does_nothing(tmp_path, monkeypatch, capsys) -> None:
    command = ["personalize", "--user-context", str(SAMPLE), "--base", "builtin", "--dry-run"]
    code, output, _ = run([*command, "--run", str(tmp_path / "run")], monkeypatch, capsys)
    assert code == 0
    assert "Base:     builtin" in output
    assert "Nothing was started." in output
    assert not (tmp_path / "run").exists()


def test_recipes_are_listed_and_printed(monkeypatch, capsys) -> None:
    _, listed, _ = run(["recipes"], monkeypatch, capsys)
    assert "builtin" in listed
    assert "default" in listed
    _, printed, _ = run(["recipes", "builtin"], monkeypatch, capsys)
    assert "learning_rate:" in printed


def test_debug_shows_the_traceback(tmp_path, monkeypatch, capsys) -> None:
    _, _, errors = run(["--debug", "train", str(tmp_path)], monkeypatch, capsys)
    assert "Traceback (most recent call last)" in errors
    assert "is not a run directory" in errors


def test_help_needs_no_heavy_library() -> None:
    code = (
        "import sys; sys.argv = ['mipo-lite', '--help']\n"
        "from mipo_lite.cli import main\n"
        "try:\n    main()\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'datasets', 'matplotlib', 'llama_cpp'}\n"
        "heavy &= set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "personalize" in done.stdout


def test_ctrl_c_ends_with_130_and_says_how_to_go_on(monkeypatch, capsys) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "app", interrupted)
    code, _, errors = run([], monkeypatch, capsys)
    assert code == 130
    assert errors.splitlines()[1].startswith("What was finished is kept")


def test_a_full_disk_is_said_in_two_lines(monkeypatch, capsys) -> None:

    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "secret.txt")

    monkeypatch.setattr(cli, "app", full)
    code, _, errors = run([], monkeypatch, capsys)
    assert code == 1
    assert errors == (
        "Error: The disk is full.\n"
        "Free some space and run the same command again: it goes on where it stopped.\n"
    )
