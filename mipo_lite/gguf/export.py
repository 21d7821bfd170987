"""Write one GGUF file from a Hugging Face model directory, tensor by tensor.

The file appears under its name only after llama.cpp has found every tensor of the architecture in
it, read its vocabulary back and encoded a corpus of hard strings as the model's own tokenizer does.
K-quants are made from such a file, in `quantize`; which files a user gets is decided in `deliver`.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import gguf
import torch

from ..checkpoint import Checkpoint
from ..disk import require_disk
from ..errors import UsageError, UserError
from ..merging import MergedCheckpoint, Onto, Progress
from ..run import atomic_write
from .architectures import (
    Architecture,
    architecture,
    convert,
    extra_tensors,
    gguf_name,
    write_metadata,
)
from .proof import prove_loads, prove_tokenizer
from .vocabulary import Vocabulary, load_tokenizer, read_vocabulary

OUTTYPES = {
    "f32": (torch.float32, gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "f16": (torch.float16, gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bf16": (torch.bfloat16, gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
}


def export(
    model_dir: Path | str,
    out_path: Path | str,
    *,
    outtype: str = "f16",
    adapter_dir: Path | str | None = None,
    onto: Onto = "full",
    name: str | None = None,
    progress: Progress | None = None,
) -> Vocabulary:
    """Write `model_dir` as GGUF.

    Matrices are stored as `outtype`, vectors (norms, biases) as float32. One tensor at a time is in
    memory.

    Args:
        outtype: f32, f16 or bf16.
        adapter_dir: a LoRA adapter to merge on the way, without a merged directory on disk.
        onto: as in `merging.merge`.
        name: general.name of the file; the directory's name by default.
        progress: e.g. `console.progress`; counts tensors.

    Returns:
        The vocabulary that was written.

    Raises:
        UserError: unknown architecture or tokenizer, weights that do not fit float16, too little
            disk, or llama.cpp encodes text differently or misses a tensor.
    """
    model_dir, out_path = Path(model_dir), Path(out_path)
    if outtype not in OUTTYPES:
        raise UsageError(f"There is no output type {outtype}.", f"Known are {', '.join(OUTTYPES)}.")
    checkpoint = open_checkpoint(model_dir, adapter_dir, onto)
    config = load_config(model_dir)
    family, tokenizer = architecture(config), load_tokenizer(model_dir)
    vocabulary = read_vocabulary(tokenizer, config.vocab_size)
    names = _names(checkpoint, family, config)
    require_disk(out_path, _bytes(checkpoint, names, outtype), out_path.name)
    bar = progress(f"writing {outtype}", len(names)) if progress else nullcontext(lambda n: None)
    out_path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(out_path) as partial, bar as advance:
        writer = gguf.GGUFWriter(partial, family.name)
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_name(name or model_dir.resolve().name)
        writer.add_file_type(OUTTYPES[outtype][2])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        write_metadata(writer, family, config)
        vocabulary.write(writer)
        extra = extra_tensors(config)
        for source, target in names.items():
            entry = checkpoint.entries[source]
            _declare(writer, target, entry.shape, outtype)
        for target, tensor in extra.items():
            _declare(writer, target, tuple(tensor.shape), outtype)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for source in names:
            tensor = convert(family, config, source, checkpoint.read(source))
            _write(writer, source, tensor, outtype)
            advance(1)
        for target, tensor in extra.items():
            _write(writer, target, tensor, outtype)
        writer.close()
        shapes = [checkpoint.entries[source].shape for source in names]
        numbers = sum(map(math.prod, [*shapes, *(tensor.shape for tensor in extra.values())]))
        prove_loads(partial, (family.name, numbers))
        prove_tokenizer(partial, tokenizer, vocabulary)
    return vocabulary


def require_exportable(model_dir: Path | str) -> None:
    """Raise the UserError that `export` would, before a model is trained for nothing.

    Reads the config, the tokenizer and the headers of the weights; takes about a second.
    """
    model_dir = Path(model_dir)
    config = load_config(model_dir)
    family = architecture(config)
    read_vocabulary(load_tokenizer(model_dir), config.vocab_size)
    _names(Checkpoint(model_dir), family, config)


def open_checkpoint(
    model_dir: Path, adapter_dir: Path | str | None, onto: Onto = "full"
) -> Checkpoint:
    """The tensors to export, merged with the adapter if there is one."""
    if adapter_dir is None:
        return Checkpoint(model_dir)
    return MergedCheckpoint(model_dir, adapter_dir, onto)


def load_config(model_dir: Path) -> Any:
    """The transformers config, with every default filled in; UserError for an unknown type."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(model_dir)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{model_dir} has no config.json that transformers knows.",
            "Name a directory in the Hugging Face format.",
        ) from error


def _names(checkpoint: Checkpoint, family: Architecture, config: Any) -> dict[str, str]:
    """Checkpoint name -> name in the file. A head that is tied to the embeddings is left out."""
    names = {}
    for name in sorted(checkpoint.entries, key=_natural):
        tied = config.tie_word_embeddings and name == "lm_head.weight"
        if not tied and not name.endswith("rotary_emb.inv_freq"):  # old checkpoints store these
            names[name] = gguf_name(family, name)
    if "model.embed_tokens.weight" not in names:
        raise UserError(f"{checkpoint.directory} has no embedding table.", "Save the model again.")
    rows = checkpoint.entries["model.embed_tokens.weight"].shape[0]
    if rows != config.vocab_size:
        raise UserError(
            f"config.json says {config.vocab_size} tokens, the embedding table has {rows} rows.",
            "Save the model again with save_pretrained.",
        )
    return names


def _natural(name: str) -> tuple[Any, ...]:
    return tuple((0, int(p), "") if p.isdigit() else (1, 0, p) for p in name.split("."))


def _is_matrix(shape: tuple[int, ...]) -> bool:
    return len(shape) > 1


def _bytes(checkpoint: Checkpoint, names: dict[str, str], outtype: str) -> int:
    width = OUTTYPES[outtype][0].itemsize
    sizes = (checkpoint.entries[name].shape for name in names)
    matrices = sum(math.prod(shape) * (width if _is_matrix(shape) else 4) for shape in sizes)
    return matrices + (16 << 20)  # vocabulary and metadata


def _declare(writer: gguf.GGUFWriter, name: str, shape: tuple[int, ...], outtype: str) -> None:
    dtype, kind, _ = OUTTYPES[outtype if _is_matrix(shape) else "f32"]
    nbytes = math.prod(shape) * dtype.itemsize
    # The numpy dtype is only looked at when no type is given.
    writer.add_tensor_info(name, shape, torch.zeros(0).numpy().dtype, nbytes, raw_dtype=kind)


def _write(writer: gguf.GGUFWriter, name: str, tensor: torch.Tensor, outtype: str) -> None:
    dtype = OUTTYPES[outtype if _is_matrix(tuple(tensor.shape)) else "f32"][0]
    tensor = tensor.to(dtype).contiguous()
    if not bool(tensor.isfinite().all()):
        raise UserError(
            f"{name} has values that {outtype} can not hold.",
            "Export as bf16." if outtype == "f16" else "The model is broken: train it again.",
        )
    writer.write_tensor_data(tensor.view(torch.uint8).numpy())
