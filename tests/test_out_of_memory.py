"""Out of memory in sampling, scoring and training: smaller batches, the same results."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from handmade_pairs import ASKED, PAGE, assert_same, make_pairs, train_on

from mipo_lite import out_of_memory, sampling, scoring
from mipo_lite.base import Base
from mipo_lite.errors import UserError
from mipo_lite.out_of_memory import fitting, found_sizes, halving, is_out_of_memory, remembering
from mipo_lite.sampling import SampleRequest, sample
from mipo_lite.scoring import response_logprobs
from mipo_lite.training import MIPOTrainer

CPU = "[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: not enough memory: you tried"


@pytest.fixture(autouse=True)
def nothing_remembered():
    with remembering({}, lambda: None):
        yield


def gpu_error() -> Exception:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (gpu_error(), True),
        (RuntimeError(CPU), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), True),
        (MemoryError(), True),
        (RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"), False),
        (ValueError("out of memory"), False),
        (KeyboardInterrupt(), False),
    ],
)
def test_what_running_out_of_memory_looks_like(error: BaseException, expected: bool) -> None:
    assert is_out_of_memory(error) == expected


def test_numpy_and_torch_on_this_machine_are_recognized() -> None:
    with pytest.raises(MemoryError) as array:
        np.ones(2**60, dtype=np.uint8)
    with pytest.raises(RuntimeError) as tensor:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(array.value)
    assert is_out_of_memory(tensor.value)


def test_a_size_is_halved_said_remembered_and_begun_with(capsys) -> None:
    tried: list[int] = []
    saved: list[dict[str, int]] = []
    sizes: dict[str, int] = {}

    def work(size: int) -> str:
        tried.append(size)
        if size > 3:
            raise gpu_error()
        return "done"

    with remembering(sizes, lambda: saved.append(dict(sizes))):
        assert halving("sampling_batch", 16, work) == "done"
        assert halving("sampling_batch", 16, work) == "done"
        assert halving("sampling_batch", 1, work) == "done"
        assert halving("micro_batch", 2, work) == "done"
    assert tried == [16, 8, 4, 2, 2, 1, 2]
    assert sizes == {"sampling_batch": 2}
    assert saved == [{"sampling_batch": n} for n in (8, 4, 2)]
    assert found_sizes() == {}
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 3
    assert said[0] == (
        "Out of memory with sampling_batch 16: going on with 8, which changes the speed and not "
        "the result."
    )


def test_what_the_failed_attempt_held_is_freed_before_the_next() -> None:
    class Tensor:
        alive = 0

        def __init__(self) -> None:
            Tensor.alive += 1

        def __del__(self) -> None:
            Tensor.alive -= 1

    def work(size: int) -> int:
        assert Tensor.alive == 0
        held = [Tensor()]
        held.append(held)  # type: ignore[arg-type]  # a cycle: only the collector frees it
        if size > 1:
            raise gpu_error()
        return size

    assert halving("micro_batch", 8, work) == 1


def test_another_error_passes_through() -> None:
    def work(size: int) -> None:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        halving("micro_batch", 8, work)


# Each stage, at every batch size


def limited(monkeypatch, target, name: str, size: Callable[..., int], most: int) -> list[int]:
    """Let `target.name` fail when `size` of its arguments is over `most`; the sizes that passed."""
    passed: list[int] = []
    real = getattr(target, name)

    def wrapped(*args, **kwargs):
        if size(*args, **kwargs) > most:
            raise gpu_error()
        passed.append(size(*args, **kwargs))
        return real(*args, **kwargs)

    monkeypatch.setattr(target, name, wrapped)
    return passed


def sampled(base: Base) -> list[sampling.Sample]:
    requests = [SampleRequest(base.encode(text, PAGE), n) for n, text in enumerate(ASKED * 4)]
    return list(
        sample(
            base.model,
            requests[:13],
            max_new_tokens=6,
            eos_ids=base.eos_ids,
            pad_id=base.pad_id,
            batch_size=8,
        )
    )


def chunk_size(model, chunk, *rest) -> int:
    return len(chunk)


@pytest.mark.parametrize("most", [7, 2, 1])
def test_sampling_in_smaller_parts(builtin_base: Base, monkeypatch, capsys, most: int) -> None:
    whole = sampled(builtin_base)
    passed = limited(monkeypatch, sampling, "_prefill", chunk_size, most)
    assert sampled(builtin_base) == whole
    assert sum(passed) == 13
    assert max(passed) <= most
    assert capsys.readouterr().out.count("Out of memory") == {7: 1, 2: 2, 1: 3}[most]


def scored(base: Base) -> list[torch.Tensor]:
    rows = [
        (base.encode(text, PAGE if n % 2 else None), [5, 6, 7, 8 + n])
        for n in range(3)
        for text in ASKED
    ]
    return response_logprobs(base.model, rows)


def trie_size(model, backbone, trie, **rest) -> int:
    return trie.size


def test_scoring_in_smaller_parts(builtin_base: Base, monkeypatch, capsys) -> None:
    whole = scored(builtin_base)
    with monkeypatch.context() as patch:
        sizes = limited(patch, scoring, "run_trie", trie_size, 9999)
        scored(builtin_base)
    (size,) = sizes
    longest = max(len(builtin_base.encode(text, PAGE)) + 4 for text in ASKED)
    for most in (size - 1, size // 2, longest):
        with monkeypatch.context() as patch, remembering({}, lambda: None):
            passed = limited(patch, scoring, "run_trie", trie_size, most)
            for found, expected in zip(scored(builtin_base), whole, strict=True):
                torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
            assert len(passed) > 1
            assert "Out of memory with scoring_tokens" in capsys.readouterr().out
            scored(builtin_base)
            assert "Out of memory" not in capsys.readouterr().out


@pytest.fixture(scope="module")
def pairs_and_scores(builtin_base: Base):
    return make_pairs(builtin_base)


@pytest.fixture(scope="module")
def whole(builtin_base: Base, pairs_and_scores, tmp_path_factory):
    return train_on(builtin_base, pairs_and_scores, tmp_path_factory.mktemp("whole"))


def batch_pairs(trainer, model, inputs, *rest, **options) -> int:
    return len(inputs["input_ids"]) // 2


@pytest.mark.parametrize("most", [2, 1])  # fails at 8 and 4; and at 2
def test_training_in_smaller_parts(
    builtin_base: Base, pairs_and_scores, whole, tmp_path: Path, monkeypatch, capsys, most: int
) -> None:
    passed = limited(monkeypatch, MIPOTrainer, "training_step", batch_pairs, most)
    assert_same(train_on(builtin_base, pairs_and_scores, tmp_path), whole)
    assert set(passed) == {most}
    assert found_sizes() == {"micro_batch": most}
    assert "with micro_batch 8: going on with 4" in capsys.readouterr().out


def test_training_goes_on_from_its_checkpoint_when_memory_runs_out_later(
    builtin_base: Base, pairs_and_scores, whole, tmp_path: Path, monkeypatch
) -> None:
    steps: list[int] = []
    real = MIPOTrainer.training_step

    def step(trainer, *args, **kwargs):
        if len(steps) == 3:
            steps.append(-1)
            raise RuntimeError(CPU)
        steps.append(trainer.state.global_step)
        return real(trainer, *args, **kwargs)

    monkeypatch.setattr(MIPOTrainer, "training_step", step)
    assert_same(train_on(builtin_base, pairs_and_scores, tmp_path), whole)
    assert steps == [0, 1, 2, -1, 3, 3]


SHORTER = (
    "Close what else uses it; or start a new run with a shorter user context, a lower "
    "max_new_tokens, or a smaller --base."
)


def test_when_a_single_one_does_not_fit_it_says_what_to_change(
    builtin_base: Base, pairs_and_scores, tmp_path: Path, monkeypatch
) -> None:
    def failing(*args, **kwargs):
        raise gpu_error()

    monkeypatch.setattr(sampling, "_prefill", failing)
    monkeypatch.setattr(scoring, "run_trie", failing)
    monkeypatch.setattr(MIPOTrainer, "training_step", failing)
    for act, what in (
        (lambda: sampled(builtin_base), "Sampling a single response"),
        (lambda: scored(builtin_base), "Scoring a single response"),
        (
            lambda: train_on(builtin_base, pairs_and_scores, tmp_path),
            "Training on a single pair",
        ),
    ):
        with pytest.raises(UserError) as error:
            act()
        assert error.value.what == f"{what} needs more memory than there is."
        assert error.value.fix == SHORTER
        assert error.value.__cause__ is not None
    assert not hasattr(builtin_base.model, "peft_config")
    assert out_of_memory.found_sizes()["micro_batch"] == 1


def test_limits_bound_a_size_and_are_not_remembered() -> None:
    sizes: dict[str, int] = {}
    with remembering(sizes, lambda: None, {"scoring_tokens": 512}):
        assert fitting("scoring_tokens", 8192) == 512
        assert fitting("scoring_tokens", 256) == 256
    assert fitting("scoring_tokens", 8192) == 8192
    assert sizes == {}
