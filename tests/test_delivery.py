"""The export of a run: what is compared, what memory leaves out, and what stays behind."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from finished_run import make_run
from gguf_tiny import adapter, qwen2

from mipo_lite.delivery import export_files, export_run
from mipo_lite.errors import UserError
from mipo_lite.gguf import deliver, room, verify
from mipo_lite.report.page import write_page
from mipo_lite.run import Run, read_json


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has been evaluated, with an adapter of a tiny base in `base`."""
    path = tmp_path_factory.mktemp("trained")
    run = make_run(path / "run")
    base = qwen2(path / "base")
    adapter(base, run / "adapter")
    run.meta["base"] = {"name": "tiny", "path": str(base), "revision": None}
    run.save()
    return run.path


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Run:
    return Run(shutil.copytree(trained, tmp_path / "run"))


def export(run: Run, *quants: str, **options: Any) -> list[Path]:
    return export_run(run, Path(run.meta["base"]["path"]), run / "gguf", quants, **options)


def test_kinds_named_twice(run: Run, capsys: Any) -> None:
    files = export(run, "q8_0", "Q8_0")
    assert [file.name for file in files] == ["run-Q8_0.gguf"]
    metrics = read_json(run / "metrics.json")
    assert metrics["export_skipped"] == []
    (check,) = metrics["export"]
    assert check["greedy_agreement"] > 0.9
    assert "same next token as in torch" in capsys.readouterr().out
    assert (run / "gguf" / "run-lora.gguf").is_file()


def test_export_goes_on_where_memory_is_small(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(room, "available_memory", lambda: 10**6)
    monkeypatch.setattr(verify, "load_model", None)  # an error if it is used
    assert export(run, "q8_0")[0].is_file()
    said = " ".join(capsys.readouterr().out.split())
    assert "Comparing it with the model in torch needs 1.0 GiB of memory" in said
    metrics = read_json(run / "metrics.json")
    assert metrics["export"] == []
    (check,) = metrics["export_skipped"]
    assert check["template_equal"]
    assert check["skipped"] in said
    write_page(run)
    with pytest.raises(UserError, match="The importance matrix needs"):
        export(run, "q8_0", imatrix=True)


def test_a_template_that_differs_is_a_warning(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(verify, "encode", lambda llama, text: [])
    export(run, "q8_0")
    assert verify.OTHER_TEMPLATE in " ".join(capsys.readouterr().out.split())
    (check,) = read_json(run / "metrics.json")["export"]
    assert check["warnings"] == [verify.OTHER_TEMPLATE]


def test_merged_weights_stay_in_the_directory_of_the_export(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def watched(path: Path, *args: Any, **options: Any) -> Any:
        seen.append(Path(path))
        return distributions(path, *args, **options)

    distributions = deliver.gguf_distributions
    monkeypatch.setattr(deliver, "gguf_distributions", watched)
    monkeypatch.setattr(tempfile, "tempdir", str(run / "none"))
    export(run, "q8_0", imatrix=True)
    assert {path.parent for path in seen} == {run / "gguf" / ".imatrix.partial"}
    assert not (run / "gguf" / ".imatrix.partial").exists()
    effect = read_json(run / "metrics.json")["export"][0]["imatrix"]
    assert effect["without"] > 0 and effect["with"] > 0


def test_a_coarse_kind_is_refused_first(run: Run) -> None:
    with pytest.raises(UserError, match="IQ2_M is too coarse") as error:
        export(run, "iq2_m")
    assert "--imatrix" in error.value.fix
    assert not (run / "gguf").exists()


def test_the_adapter_alone_is_loaded_onto_a_file_of_the_run(run: Run) -> None:
    options: dict[str, Any] = {
        "adapter": None, "quants": None, "lora": True, "onto": "full", "imatrix": False,
        "out": run / "out",
    }  # fmt: skip
    export_files(run.path, **options)
    assert (run / "out" / "run-lora.gguf").is_file()
    (run / "gguf").mkdir()
    (run / "gguf" / "run-Q8_0.gguf").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"can not load run-Q8_0\.gguf"):
        export_files(run.path, **options)
