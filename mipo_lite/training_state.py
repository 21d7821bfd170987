"""Checkpoints of an interrupted training: which one can be gone on from, and which can not.

transformers writes them, file by file and under their final names, so a killed process leaves half
of one behind. Its own files but the adapter are torch.save files: read here, as transformers does,
with weights_only, which runs no code of theirs.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from transformers.trainer_pt_utils import safe_globals

from .run import partial_path

_TENSORS = ("optimizer.pt", "scheduler.pt", "rng_state.pth")


def newest_checkpoint(directory: Path) -> Path | None:
    """The newest checkpoint that was written completely; broken ones are removed."""

    def step(path: Path) -> int:
        return int(path.name.rpartition("-")[2])

    for path in sorted(directory.glob("checkpoint-*"), key=step, reverse=True):
        if _is_whole(path):
            return path
        shutil.rmtree(path)
    return None


def remove_checkpoints(directory: Path) -> None:
    """Remove them all, in one step: half a checkpoint must not look like a whole one."""
    if directory.exists():
        doomed = partial_path(directory)
        shutil.rmtree(doomed, ignore_errors=True)
        directory.replace(doomed)
        shutil.rmtree(doomed)


def _is_whole(checkpoint: Path) -> bool:
    """Whether every file is there and can be read to its end."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text("utf-8"))
        with safe_open(checkpoint / "adapter_model.safetensors", framework="pt") as weights:
            weights.keys()
        with safe_globals():  # numpy's arrays, for its random state
            for name in _TENSORS:
                torch.load(checkpoint / name, map_location="cpu", weights_only=True)
    except Exception:  # a cut or overwritten archive fails in as many ways as there are bytes
        return False
    return True
