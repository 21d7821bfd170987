from __future__ import annotations

import json

import pytest

from mipo_lite import bench, bench_training
from mipo_lite.bench_training import Settings, make_batches

TINY = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 256,
}


def test_pairs_share_their_context_and_nothing_else():
    settings = Settings(context_tokens=50, batch=3, response_tokens=7)
    first, second = make_batches(settings, 1000, 2)
    assert len(first) == len(second) == 3
    prompts = [pair["prompt_ids"] for pair in first + second]
    assert len({tuple(prompt[:50]) for prompt in prompts}) == 1
    assert len({prompt[50] for prompt in prompts}) > 1
    assert all(len(prompt) + 7 == settings.row_tokens for prompt in prompts)


def test_the_whole_bench_on_a_tiny_shape(tmp_path, monkeypatch):
    monkeypatch.setitem(bench_training.SHAPES, "tiny", TINY)
    in_fresh_process = bench.memory_in_fresh_process
    measured = []

    def one_real_process(settings, way, directory):
        if way == "ours":
            measured.append(in_fresh_process(settings, way, directory))
        return measured[0] if measured else 1  # the other two would take as long

    monkeypatch.setattr(bench, "memory_in_fresh_process", one_real_process)
    path = tmp_path / "bench.json"
    result = bench.run_bench(
        context_tokens=60, batch=2, response_tokens=4, shape="tiny", repeats=2, json_path=path
    )
    assert json.loads(path.read_text()) == result
    assert measured[0] > 0
    for key in ("speedup_vs_trl", "memory_vs_trl", "sampling_speedup"):
        assert result[key] > 0
    trl, precomputed, ours = (result["training"][way] for way in bench_training.WAYS)
    assert trl["tokens_computed_per_step"] == 4 * (60 + 24 + 4)
    assert ours["tokens_computed_per_step"] == 60 + 2 * 24 + 4 * 4
    assert trl["reference_seconds_per_batch"] == 0
    assert precomputed["reference_seconds_per_batch"] > 0
    assert ours["pairs_per_second"] == pytest.approx(
        2 / (ours["seconds_per_step"] + ours["reference_seconds_per_batch"])
    )
    assert len(ours["steps"]) == 2
