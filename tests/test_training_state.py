"""Which checkpoint is gone on from: the newest that is whole, whatever a crash left behind."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mipo_lite.run import partial_path
from mipo_lite.training_state import newest_checkpoint, remove_checkpoints

FILES = (
    "trainer_state.json",
    "adapter_model.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
)


def checkpoint(directory: Path, step: int) -> Path:
    """What transformers writes, in small."""
    path = directory / f"checkpoint-{step}"
    path.mkdir(parents=True)
    save_file({"lora_A": torch.ones(4, 8)}, path / "adapter_model.safetensors")
    torch.save({"state": {0: {"exp_avg": torch.ones(4, 8)}}}, path / "optimizer.pt")
    torch.save({"last_epoch": 3}, path / "scheduler.pt")
    states = {"python": random.getstate(), "numpy": np.random.get_state()}
    torch.save(states | {"cpu": torch.random.get_rng_state()}, path / "rng_state.pth")
    (path / "trainer_state.json").write_text(f'{{"global_step": {step}}}')
    return path


def test_the_newest_by_number_not_by_name(tmp_path: Path) -> None:
    checkpoint(tmp_path, 8)
    newest = checkpoint(tmp_path, 10)
    assert newest_checkpoint(tmp_path) == newest
    assert newest_checkpoint(tmp_path / "nothing") is None


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "overwritten"])
def test_one_that_is_not_whole_is_removed(tmp_path: Path, name: str, damage: str) -> None:
    whole = checkpoint(tmp_path, 2)
    broken = checkpoint(tmp_path, 4)
    file = broken / name
    data = file.read_bytes()
    if damage == "missing":
        file.unlink()
    else:
        half = len(data) // 2
        file.write_bytes({"empty": b"", "cut": data[:half]}.get(damage, b"\0" * half))
    assert newest_checkpoint(tmp_path) == whole
    assert [path.name for path in tmp_path.iterdir()] == [whole.name]


def test_a_checkpoint_never_runs_code(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self):
            return Path.touch, (tmp_path / "was here",)

    path = checkpoint(tmp_path / "checkpoints", 2)
    torch.save(Payload(), path / "optimizer.pt")
    assert newest_checkpoint(tmp_path / "checkpoints") is None
    assert not (tmp_path / "was here").exists()


def test_all_are_removed_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint(tmp_path / "checkpoints", 2)

    def killed(path: Path, **options: bool) -> None:
        if path.exists():
            raise KeyboardInterrupt

    monkeypatch.setattr("mipo_lite.training_state.shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        remove_checkpoints(tmp_path / "checkpoints")
    assert newest_checkpoint(tmp_path / "checkpoints") is None
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == [".checkpoints.partial"]
    assert partial_path(tmp_path / "checkpoints").is_dir()
    remove_checkpoints(tmp_path / "checkpoints")
