"""The bench for a GPU, as far as it can run without one."""

from __future__ import annotations

import json
from contextlib import contextmanager

import pytest
import torch
from test_bench import TINY

from mipo_lite import bench_gpu, bench_training
from mipo_lite.bench_gpu import (
    CONTEXT_HEAD,
    SPEED_HEAD,
    cards_within,
    context_row,
    in_fresh_process,
    largest_that_fits,
    main,
    run_gpu_bench,
    speed_row,
)
from mipo_lite.bench_training import SHAPES, Settings, empty_model, model_directory
from mipo_lite.errors import UserError
from mipo_lite.known_bases import KNOWN
from mipo_lite.shapes import shape_of

GIB = 2**30
TRL = {"seconds": 9.0, "memory_bytes": 2e10}
OURS = {"seconds": 2.0, "memory_bytes": 5e9}


@pytest.mark.parametrize("limit", [0, 250, 251, 4_000, 29_999, 30_000, 99_999])
def test_largest_that_fits(limit):
    assert largest_that_fits(lambda n: n <= limit, 30_000) == min(limit // 250 * 250, 30_000)


def test_rows_out_of_memory_stay_in_the_tables():
    row = {"shape": "a", "context": 1000, "trl": TRL, "ours": OURS}
    assert speed_row(row) == "| a | 1,000 | 9.00 | 2.00 | 4.5x | 20.0 | 5.0 |"
    row = {"shape": "a", "context": 12_000, "trl": None, "ours": OURS}
    assert speed_row(row) == "| a | 12,000 | OOM | 2.00 |  | OOM | 5.0 |"
    row = {"shape": "a", "card_gb": 6, "trl": 0, "ours": 3000}
    assert context_row(row) == "| a | 6 | OOM | 3,000 |"


@pytest.mark.parametrize(
    ("gib", "cards"), [(4, []), (7.8, [6, 8]), (8, [6, 8]), (23.6, [6, 8, 12, 24]), (80, None)]
)
def test_cards_larger_than_the_gpu_are_left_out(gib, cards):
    assert cards_within(round(gib * GIB)) == (list(bench_gpu.CARDS_GB) if cards is None else cards)


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of 7.8 GiB that measures what `answers` says, and the requests that came to it."""
    requests = []

    @contextmanager
    def directory(settings):
        yield f"/{settings.shape}"

    def ask(request):
        if request == {"find": "gpu"}:
            return {"name": "A card", "total": round(7.8 * GIB), "free": 0}
        requests.append(request)
        context = request["settings"]["context_tokens"]
        if request["way"] == "trl":
            return TRL if context <= 1000 else None
        return OURS

    monkeypatch.setattr(bench_training, "model_directory", directory)
    monkeypatch.setattr(bench_gpu, "ask_fresh_process", ask)
    return requests


def test_the_whole_bench(gpu, tmp_path, capsys):
    path = tmp_path / "all.json"
    result = run_gpu_bench(path)
    assert json.loads(path.read_text("utf-8")) == result
    speed, fits = capsys.readouterr().out.strip().split("\n\n")
    assert speed.startswith(SPEED_HEAD) and fits.startswith(CONTEXT_HEAD)
    assert speed.splitlines()[2] == "| qwen2.5-1.5b | 1,000 | 9.00 | 2.00 | 4.5x | 20.0 | 5.0 |"
    assert [line.split(" | ")[1] for line in fits.splitlines()[2:]] == ["6", "8", "6", "8"]
    assert fits.splitlines()[2] == "| qwen2.5-1.5b | 6 | 1,000 | 30,000 |"
    shares = {request["share"] for request in gpu}
    assert max(share for share in shares if share is not None) == 1  # torch refuses more
    assert min(share for share in shares if share is not None) == pytest.approx(6 / 7.8)
    assert all(request["directory"] == f"/{request['settings']['shape']}" for request in gpu)


def test_what_was_measured_before_an_error_is_kept(gpu, monkeypatch, tmp_path, capsys):
    def broken(*_):
        raise RuntimeError("measuring failed")

    monkeypatch.setattr(bench_gpu, "measure_context", broken)
    path = tmp_path / "all.json"
    with pytest.raises(RuntimeError, match="measuring failed"):
        run_gpu_bench(path)
    rows = len(bench_gpu.SHAPES) * len(bench_gpu.CONTEXTS)
    assert capsys.readouterr().out.count("| qwen2.5-") == rows
    assert len(json.loads(path.read_text("utf-8"))["speed"]) == rows


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    with pytest.raises(SystemExit) as ended:
        main([])
    assert ended.value.code == 1
    assert capsys.readouterr().err == (
        "Error: There is no CUDA GPU here to measure.\nRun `mipo-lite bench` for this machine.\n"
    )


def as_a_run_says_it() -> None:
    try:
        raise torch.OutOfMemoryError("CUDA out of memory")
    except RuntimeError as error:
        raise UserError("Scoring a single response needs more memory.", "Close others.") from error


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), None])
def test_no_memory_is_an_answer(monkeypatch, error):
    def one_way(request):
        if error:
            raise error
        as_a_run_says_it()

    monkeypatch.setattr(bench_gpu, "_one_way", one_way)
    assert bench_gpu._answer({}) is None


def test_another_error_is_none(monkeypatch):
    def one_way(request):
        raise RuntimeError("CUDA error: an illegal access")

    monkeypatch.setattr(bench_gpu, "_one_way", one_way)
    with pytest.raises(RuntimeError, match="illegal"):
        bench_gpu._answer({})


def test_a_model_is_made_without_the_gpu_and_measured_in_a_fresh_process(monkeypatch):
    monkeypatch.setitem(SHAPES, "tiny", TINY)
    settings = Settings(shape="tiny", context_tokens=30, batch=1, response_tokens=4)
    with monkeypatch.context() as patched:
        patched.setattr(torch.cuda, "is_available", lambda: True)
        made = model_directory(settings)
        directory = made.__enter__()
    try:
        found = in_fresh_process(settings, "ours", directory)
    finally:
        made.__exit__(None, None, None)
    assert found is not None and found["seconds"] > 0
    assert not directory.exists()


@pytest.mark.parametrize(
    ("shape", "name"),
    [
        ("qwen2.5-1.5b", "Qwen/Qwen2.5-1.5B-Instruct"),
        ("qwen2.5-7b", "Qwen/Qwen2.5-7B-Instruct"),
    ],
)
def test_shapes_are_those_of_the_bases_they_are_named_after(shape, name):
    """The head of the 7B is a matrix of its own."""
    [known] = [known for known in KNOWN if known.name == name]
    parameters = empty_model(SHAPES[shape]).parameters()
    assert sum(p.numel() for p in parameters) == shape_of(known.config).parameters
