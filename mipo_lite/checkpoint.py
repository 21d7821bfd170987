"""Read a Hugging Face checkpoint tensor by tensor, never the whole model at once.

Knows the safetensors layout (8 bytes with the length of a JSON header, the header, the data) and
reads with plain file reads instead of a memory map: what is resident is the tensor at hand, not
the file. It knows nothing about what the tensors mean. Weights in other formats are refused.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from .errors import UserError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "I8": torch.int8,
}
_CHUNK = 1 << 24  # bytes


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies: `start` counts bytes from the beginning of `file`."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


class Checkpoint:
    """The tensors of a model directory, found by name.

    Attributes:
        files: the safetensors shards, sorted.
        entries: tensor name -> where it lies.
    """

    def __init__(self, directory: Path | str) -> None:
        """Raises UserError: no safetensors, a shard that is missing, cut off or not readable."""
        self.directory = Path(directory)
        self.files = _shards(self.directory)
        self.entries: dict[str, Entry] = {}
        for file in self.files:
            self.entries |= _entries(file)

    @property
    def nbytes(self) -> int:
        """Bytes of all shards."""
        return sum(file.stat().st_size for file in self.files)

    def read(self, name: str) -> torch.Tensor:
        """The tensor, in the dtype it is stored in."""
        entry = self.entries[name]
        data = np.fromfile(entry.file, dtype=np.uint8, count=entry.nbytes, offset=entry.start)
        return torch.from_numpy(data).view(DTYPES[entry.dtype]).reshape(entry.shape)

    def in_file_order(self, file: Path) -> list[tuple[str, Entry]]:
        mine = ((name, entry) for name, entry in self.entries.items() if entry.file == file)
        return sorted(mine, key=lambda item: item[1].start)


def copy_bytes(source: BinaryIO, target: BinaryIO, count: int) -> None:
    """Copy `count` bytes without holding more than a chunk of them."""
    for _ in range(math.ceil(count / _CHUNK)):
        target.write(source.read(min(_CHUNK, count)))
        count -= _CHUNK


def small_files(directory: Path) -> Iterator[Path]:
    """Everything of a model directory that is not weights: config, tokenizer, template, licence."""
    weights = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx"}
    for file in sorted(directory.iterdir()):
        skipped = file.name.endswith((".safetensors.index.json", ".bin.index.json"))
        skipped |= file.suffix in weights or file.name.startswith((".", "README"))
        if file.is_file() and not skipped:
            yield file


def _shards(directory: Path) -> list[Path]:
    if not (directory / "config.json").is_file():
        raise UserError(
            f"{directory} is not a model directory: it has no config.json.",
            "Name a directory in the Hugging Face format.",
        )
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
        files = [directory / name for name in names]
    else:
        files = [directory / "model.safetensors"]
    for file in files:
        if not file.is_file():
            raise UserError(
                f"{directory} has no weights: {file.name} is missing.",
                "Download the model again, or save it with save_pretrained, which writes "
                "safetensors.",
            )
    return files


def header_size(file: Path) -> int:
    """Bytes before the first tensor's data."""
    with file.open("rb") as stream:
        return 8 + struct.unpack("<Q", stream.read(8))[0]


def _entries(file: Path) -> dict[str, Entry]:
    fix = "Download or save the file again."
    try:
        data = header_size(file)
        with file.open("rb") as stream:
            stream.seek(8)
            header = json.loads(stream.read(data - 8))
    except (struct.error, ValueError, MemoryError, OverflowError) as error:
        raise UserError(f"{file} is not a safetensors file.", fix) from error
    header.pop("__metadata__", None)
    entries = {}
    for name, info in header.items():
        begin, end = info["data_offsets"]
        entries[name] = Entry(file, info["dtype"], tuple(info["shape"]), data + begin, end - begin)
    if entries and max(e.start + e.nbytes for e in entries.values()) > file.stat().st_size:
        raise UserError(f"{file} is cut off: it ends before its last tensor.", fix)
    return entries
