"""What the code may never do, looked for in the code itself; and what others may read of a run."""

from __future__ import annotations

import ast
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from handmade_pairs import RECIPE, make_pairs, train_on

from mipo_lite.base import Base
from mipo_lite.run import Run

PACKAGE = Path(__file__).parent.parent / "mipo_lite"
FILES = sorted(PACKAGE.rglob("*.py"))


def calls() -> Iterator[tuple[str, ast.Call, str]]:
    """(place, call, dotted name of what is called) in the whole package."""
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.Call):
                yield f"{file.relative_to(PACKAGE)}:{node.lineno}", node, ast.unparse(node.func)


def keyword(call: ast.Call, name: str) -> str | None:
    return next((ast.unparse(k.value) for k in call.keywords if k.arg == name), None)


def test_there_is_something_to_look_at() -> None:
    assert len(FILES) > 50
    assert sum(1 for _ in calls()) > 1000


def test_nothing_is_unpickled() -> None:
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            bad = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
            assert not bad & {name.partition(".")[0] for name in names}, file
    for place, call, name in calls():
        if name == "torch.load":
            assert keyword(call, "weights_only") == "True", place
        if name in ("np.load", "numpy.load"):
            assert keyword(call, "allow_pickle") in (None, "False"), place
        if name.endswith("from_pretrained"):
            assert keyword(call, "use_safetensors") in (None, "True"), place


def test_no_shell_no_eval_no_archives() -> None:
    for place, call, name in calls():
        assert keyword(call, "shell") in (None, "False"), place
        assert name not in ("os.system", "os.popen", "eval", "exec", "compile"), place
        assert not name.startswith(("tarfile.", "zipfile.")), place
        assert not name.endswith("unpack_archive"), place


def test_yaml_is_data() -> None:
    for place, _, name in calls():
        if name.startswith("yaml."):
            assert name in ("yaml.safe_load", "yaml.safe_dump"), place


def test_code_of_a_model_runs_only_when_asked_for() -> None:
    for file in FILES:
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef):
                given = node.args.kwonlyargs + node.args.args
                positional = node.args.args[len(node.args.args) - len(node.args.defaults) :]
                defaults = dict(zip(positional, node.args.defaults, strict=True))
                defaults |= dict(zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True))
                for argument in given:
                    if argument.arg == "trust_remote_code" and defaults.get(argument):
                        assert ast.unparse(defaults[argument]) == "False", (file, node.name)
    for place, call, _ in calls():
        assert keyword(call, "trust_remote_code") != "True", place


def test_nothing_is_sent_anywhere() -> None:
    # The judge of the blind test opens the address that it is given; bases asks whether the hub
    # answers, with a HEAD request.
    for place, call, name in calls():
        if name.endswith("urlopen") or (".open" in name and "opener" in name):
            assert place.startswith(("judge.py", "bases.py")), place
        assert not name.endswith(("push_to_hub", "upload_file", "upload_folder")), place
        assert not name.startswith(("requests.", "httpx.", "wandb.", "mlflow.")), place
        assert keyword(call, "push_to_hub") in (None, "False"), place
        if keyword(call, "report_to") is not None:
            assert keyword(call, "report_to") in ("'none'", "[]"), place


@pytest.mark.skipif(os.name == "nt", reason="modes are POSIX")
def test_a_run_is_private_whatever_writes_into_it(builtin_base: Base, tmp_path: Path) -> None:
    """Checkpoints are written by transformers, which knows no modes."""
    run = Run.create(tmp_path / "run", {})

    def stop(step: int, steps: int) -> None:
        if step == 2:
            raise KeyboardInterrupt

    before = os.umask(0o022)
    try:
        with pytest.raises(KeyboardInterrupt), run.locked():
            train_on(builtin_base, make_pairs(builtin_base), run.path, recipe=RECIPE, watch=stop)
        assert os.umask(0o022) == 0o022
    finally:
        os.umask(before)
    files = [path for path in run.path.rglob("*") if path.is_file()]
    assert "optimizer.pt" in {path.name for path in files}
    assert "training_args.bin" not in {path.name for path in files}, "a pickle that nothing needs"
    for path in (run.path, *run.path.rglob("*")):
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == (0o700 if path.is_dir() else 0o600), path
