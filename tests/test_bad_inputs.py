"""Bad input to every command: an exit code, a line on what is wrong, a line on what to do.

Readers of the user's files also get noise: they refuse it in words, or read it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from finished_run import make_run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mipo_lite import cli
from mipo_lite.contexts import load_facts, load_user_context
from mipo_lite.errors import UserError
from mipo_lite.problems import load_problems
from mipo_lite.prompts import load_prompts
from mipo_lite.recipe import load_recipe
from mipo_lite.run import read_json, read_jsonl

ME = str(Path(__file__).parent.parent / "examples" / "me.txt")
PERSONALIZE = ["personalize", "--user-context", ME, "--base", "builtin", "--run", "{d}/run"]
IMPROVE = ["improve", "--base", "builtin", "--run", "{d}/run", "--prompts"]


def nine(row: str) -> str:
    """Nine rows that differ by the number in them."""
    return "".join(row.replace("%d", str(n)) + "\n" for n in range(9))


FILES: dict[str, bytes | str] = {
    "empty": b"",
    "binary": b"\x89PNG\r\n\x1a\n\x00\xff",
    "few.txt": "one\ntwo\n",
    "no_text.jsonl": '{"txt": "a"}\n' * 9,
    "broken.jsonl": '{"text": "a"}\n{"text": \n',
    "number.jsonl": '{"text": 3}\n',
    "topics.jsonl": nine('{"text": "a%d", "topics": 7}'),
    "train.jsonl": nine('{"text": "a%d", "split": "train"}'),
    "split.jsonl": nine('{"text": "a%d", "split": "test"}'),
    "list.yaml": "- pairs\n- 3\n",
    "broken.yaml": "pairs: [1,\n",
    "unknown.yaml": "pear: 3\n",
    "range.yaml": "pairs: -1\n",
    "type.yaml": "pairs: many\n",
    "numbers.yaml": "1: 2\n",
    "code.yaml": "pairs: !!python/object/apply:os.getcwd []\n",
    "no_question.csv": "a,b\n1,2\n1,3\n",
    "few.jsonl": '{"question": "1 + 1?"}\n' * 9,
    "q.jsonl": nine('{"question": "What is %d + 1?"}'),
    "p.parquet": b"PAR1",
    "other.gguf": b"GGUF but not really",
}
PERSONALIZE_BAD: list[tuple[list[str], int, str]] = [
    (["--set", "pairs=0"], 2, "pairs can not be 0"),
    (["--set", "pairs=many"], 2, "pairs can not be 'many'"),
    (["--set", "pairs"], 2, "--set pairs is not key=value."),
    (["--set", "=3"], 2, "There is no setting ''"),
    (["--set", "learning_rate=-1"], 2, "learning_rate can not be -1"),
    (["--set", "learning_rate=nan"], 2, "learning_rate can not be nan"),
    (["--set", "learning_rate=inf"], 2, "learning_rate can not be inf"),
    (["--set", "quants=[q9]"], 2, "quants can not be ['q9']"),
    (["--set", "quants=q4_k_m"], 2, "quants can not be 'q4_k_m'"),
    (["--set", "loss=best"], 2, "loss can not be 'best'"),
    (["--set", "top_p=1.5"], 2, "top_p can not be 1.5"),
    (["--set", "optimizer=sgd"], 2, "optimizer can not be 'sgd'"),
    (["--set", "negatives=near"], 2, "negatives can not be 'near' for personalize."),
    (["--set", "pairs=[1"], 2, "pairs can not be '[1'"),
    (["--set", "eval_contexts=21"], 2, "eval_contexts can not be 21 for personalize."),
    (["--seed", "-1"], 2, "seed can not be -1"),
    (["--set", "seed=3000000000"], 2, "seed can not be 3000000000"),
    (["--recipe", "fast"], 2, "There is no recipe 'fast'."),
    (["--recipe", "{d}"], 2, "There is no recipe '{d}'."),
    (["--recipe", "{d}/list.yaml"], 2, "{d}/list.yaml is not a list of settings."),
    (["--recipe", "{d}/broken.yaml"], 2, "{d}/broken.yaml is not valid YAML (line 2)."),
    (["--recipe", "{d}/unknown.yaml"], 2, "There is no setting 'pear'. Did you mean 'pairs'?"),
    (["--recipe", "{d}/range.yaml"], 2, "pairs can not be -1"),
    (["--recipe", "{d}/type.yaml"], 2, "pairs can not be 'many'"),
    (["--recipe", "{d}/numbers.yaml"], 2, "There is no setting '1'."),
    (["--recipe", "{d}/code.yaml"], 2, "{d}/code.yaml is not valid YAML"),
    (["--recipe", "{d}/binary"], 2, "The recipe {d}/binary can not be read."),
    (["--prompts", "{d}/none"], 1, "The prompts {d}/none can not be read as text."),
    (["--prompts", "{d}"], 1, "The prompts {d} can not be read as text."),
    (["--prompts", "{d}/binary"], 1, "The prompts {d}/binary can not be read as text."),
    (["--prompts", "{d}/empty"], 1, "{d}/empty holds 0 different prompts"),
    (["--prompts", "{d}/few.txt"], 1, "{d}/few.txt holds 2 different prompts"),
    (["--prompts", "{d}/no_text.jsonl"], 1, '{d}/no_text.jsonl, line 1, has no "text".'),
    (["--prompts", "{d}/broken.jsonl"], 1, '{d}/broken.jsonl, line 2, has no "text".'),
    (["--prompts", "{d}/number.jsonl"], 1, '{d}/number.jsonl, line 1, has no "text".'),
    (["--prompts", "{d}/topics.jsonl"], 1, "{d}/topics.jsonl, line 1, "),
    (["--prompts", "{d}/split.jsonl"], 1, "{d}/split.jsonl, line 1, "),
    (["--prompts", "{d}/train.jsonl"], 1, "{d}/train.jsonl has no prompt whose split is held_out"),
    (["--run", "{d}/few.txt"], 1, "{d}/few.txt is a file, not a run directory."),
    (["--run", "{d}"], 1, "{d} is not empty and not a run directory."),
    (["--run", "{d}/few.txt/below"], 1, "{d}/few.txt/below can not be written."),
    (["--base", "{d}/../other"], 1, "There is no base '{d}/../other'."),
    (["--base", "x; rm -rf /"], 1, "There is no base 'x; rm -rf /'."),
    (["--base", ""], 1, ". is not a model directory"),
    (["--base", "{d}/few.txt"], 1, ""),
]
OTHER_BAD: list[tuple[list[str], int, str]] = [
    ([*IMPROVE, "{d}/none"], 1, "There is no file {d}/none."),
    ([*IMPROVE, "{d}"], 1, "{d} is a directory."),
    ([*IMPROVE, "{d}/empty"], 1, "{d}/empty holds 0 usable questions"),
    ([*IMPROVE, "{d}/few.jsonl"], 1, "{d}/few.jsonl holds 1 usable question"),
    ([*IMPROVE, "{d}/p.parquet"], 1, "{d}/p.parquet is of a kind that is not read."),
    ([*IMPROVE, "{d}/no_question.csv"], 2, "{d}/no_question.csv has no question column."),
    ([*IMPROVE, "{d}/q.jsonl", "--question-column", "x"], 2, "{d}/q.jsonl has no column 'x'."),
    ([*IMPROVE, "{d}/q.jsonl", "--answer-column", "x"], 2, "{d}/q.jsonl has no column 'x'."),
    ([*IMPROVE, "{d}/q.jsonl", "--negatives", "missing"], 2, "negatives=missing is for"),
    ([*IMPROVE, "{d}/q.jsonl", "--negatives", "bad"], 2, "negatives can not be 'bad'"),
    ([*IMPROVE, "{d}/q.jsonl", "--rounds", "0"], 2, "rounds can not be 0"),
    ([*IMPROVE, "{d}/q.jsonl", "--eval-prompts", "{d}/none"], 1, "There is no file {d}/none."),
    ([*IMPROVE, "{d}/q.jsonl", "--eval-prompts", "{d}/q.jsonl"], 1, "{d}/q.jsonl holds fewer"),
    (["train", "{d}/none"], 1, "{d}/none is not a run directory"),
    (["train", "{d}/run", "--set", "pear=1"], 2, "There is no setting 'pear'."),
    (["pairs", "{d}/run", "--set", "pairs=0"], 2, "pairs can not be 0"),
    (["evaluate", "{d}/run", "--set", "eval_prompts=x"], 2, "eval_prompts can not be 'x'"),
    (["export", "{d}/none"], 1, "{d}/none"),
    (["export", "{d}"], 1, "{d} is not a model directory"),
    (["export", "{d}/run", "--onto", "half"], 2, "--onto can not be 'half'."),
    (["export", "{d}", "--lora"], 1, "{d} is not a model directory"),
    (["export", "{d}", "--imatrix"], 2, "--imatrix needs a run"),
    (["merge", "{d}", "--out", "{d}/m"], 2, "There is no adapter to merge."),
    (["merge", "{d}", "--adapter", "{d}", "--out", "{d}/m"], 1, "{d} is not a model directory"),
    (["merge", "{d}/run", "--adapter", "{d}", "--out", "{d}/m"], 2, "{d}/run is a run and has"),
    (["export", "{d}/run", "--adapter", "{d}"], 2, "{d}/run is a run and has its own adapter"),
    (["merge", "{d}", "--onto", "x", "--out", "{d}/m"], 2, "--onto can not be 'x'."),
    (["chat", "{d}/none.gguf"], 1, "There is no file {d}/none.gguf."),
    (["chat", "{d}/other.gguf", "-m", "Hi"], 1, "llama.cpp can not load {d}/other.gguf"),
    (["chat", "{d}/few.txt", "-m", "Hi"], 1, "llama.cpp can not load {d}/few.txt"),
    (["compare", "{d}/none"], 1, "{d}/none is not a run directory"),
    (["compare", "{d}/run", "--judge", "nowhere"], 2, "nowhere is not an address."),
    (["compare", "{d}/run", "--prompts", "{d}/none"], 1, ""),
    (["plan", "--base", "no such!"], 1, "There is no base 'no such!'."),
    (["plan", "--set", "pairs=0"], 2, "pairs can not be 0"),
    (["plan", "--base", "builtin", "--user-context", "{d}/none"], 1, "There is no file {d}/none."),
    (["bench", "--shape", "none"], 2, "There is no shape 'none'."),
    (["bench", "--base", "no such!"], 1, "There is no base 'no such!'."),
    (["bench", "--base", "{d}/none"], 1, ""),
    (["recipes", "none"], 2, "There is no recipe 'none'."),
    (["recipes", "../pyproject"], 2, "There is no recipe '../pyproject'."),
]
CASES = [([*PERSONALIZE, *more], code, what) for more, code, what in PERSONALIZE_BAD] + OTHER_BAD


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bad")
    for name, content in FILES.items():
        (path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def run(arguments: list[str], capsys) -> tuple[int, str]:
    """Exit code and errors."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["mipo-lite", *arguments])
        try:
            cli.main()
            code = 0
        except SystemExit as error:
            code = int(error.code or 0)
    return code, capsys.readouterr().err


def test_there_are_enough() -> None:
    assert len(CASES) >= 60
    commands = {
        command.name or command.callback.__name__ for command in cli.app.registered_commands
    }
    assert commands - {"doctor"} == {arguments[0] for arguments, _, _ in CASES}


@pytest.mark.parametrize(("arguments", "code", "what"), CASES)
def test_bad_input(
    directory: Path, tmp_path: Path, capsys, arguments, code: int, what: str
) -> None:
    if arguments[0] in ("personalize", "improve"):
        arguments = [argument.replace("{d}/run", str(tmp_path / "new")) for argument in arguments]
    elif not (directory / "run").exists():
        make_run(directory / "run")
    arguments = [argument.replace("{d}", str(directory)) for argument in arguments]
    found, errors = run(arguments, capsys)
    lines = errors.splitlines()
    assert lines[-2:-1], errors
    assert lines[-2].startswith(f"Error: {what.replace('{d}', str(directory))}"), errors
    assert len(lines[-1]) > 10
    assert found == code
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["doctor", "--no-such"], "No such option: --no-such"),
        (["doctor", "extra"], "Got unexpected extra argument(s) (extra)"),
        (["personalise"], "No such command 'personalise'. Did you mean 'personalize'?"),
    ],
)
def test_a_command_line_that_typer_refuses(capsys, arguments: list[str], what: str) -> None:
    """`doctor` takes no input but its flag: what is wrong with it, and where help is."""
    code, errors = run(arguments, capsys)
    assert code == 2
    assert what in " ".join(errors.split())
    assert "-h' for help" in errors


# Noise for the readers

FEW = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)
KEYS = st.sampled_from(["text", "question", "choices", "answer", "id", "topics", "split", "label"])
ROWS = st.lists(st.dictionaries(KEYS, VALUES, max_size=5) | VALUES, max_size=10)
JSONL = ROWS.map(lambda rows: "\n".join(map(json.dumps, rows)).encode())
NOISE = st.binary(max_size=200) | st.text(max_size=200).map(lambda text: text.encode("utf-8"))


def only_words(read: Callable[[Path], object], path: Path, content: bytes) -> None:
    """`read` takes the content, or refuses it in two lines."""
    path.write_bytes(content)
    try:
        read(path)
    except UserError as error:
        assert error.what and error.fix
        assert "\n" not in error.what


@FEW
@given(NOISE)
def test_noise_as_a_page(tmp_path: Path, content: bytes) -> None:
    only_words(load_user_context, tmp_path / "me.txt", content)


@FEW
@given(NOISE | VALUES.map(lambda value: json.dumps(value).encode()))
def test_noise_as_facts(tmp_path: Path, content: bytes) -> None:
    only_words(lambda path: load_facts(tmp_path / "me.txt"), tmp_path / "me.facts.yaml", content)


@FEW
@given(NOISE | JSONL)
def test_noise_as_prompts(tmp_path: Path, content: bytes) -> None:
    only_words(load_prompts, tmp_path / "prompts.jsonl", content)
    only_words(load_prompts, tmp_path / "prompts.txt", content)


@FEW
@given(NOISE | JSONL | ROWS.map(lambda rows: json.dumps(rows).encode()))
def test_noise_as_problems(tmp_path: Path, content: bytes) -> None:
    for name in ("q.jsonl", "q.csv", "q.tsv", "q.txt"):
        only_words(lambda path: load_problems(path, lambda line: None), tmp_path / name, content)


SETTINGS = st.dictionaries(
    st.sampled_from(["pairs", "loss", "quants", "beta"]) | st.text(max_size=5), VALUES
)


@FEW
@given(NOISE | SETTINGS.map(lambda values: json.dumps(values).encode()))
def test_noise_as_a_recipe(tmp_path: Path, content: bytes) -> None:
    only_words(lambda path: load_recipe(str(path)), tmp_path / "recipe.yaml", content)


@FEW
@given(st.text(max_size=12), st.text(max_size=20))
def test_noise_as_a_setting(key: str, value: str) -> None:
    try:
        load_recipe(None, [f"{key}={value}", f"beta={value}"])
    except UserError as error:
        assert error.what and error.fix


@FEW
@given(NOISE | JSONL)
def test_noise_in_a_run(tmp_path: Path, content: bytes) -> None:
    only_words(read_jsonl, tmp_path / "pairs.jsonl", content)
    only_words(read_json, tmp_path / "run.json", content)
