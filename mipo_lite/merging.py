"""Merge a LoRA adapter into full-precision weights, one tensor in memory at a time.

Two honest targets. `full` adds the delta to the original 16-bit weights: the better model as a
rule. `dequantized` adds it to the weights after NF4 quantization and back: exactly what the
adapter was trained on. Merging into the 4-bit weights themselves would quantize the sum again and
lose part of the delta, so it is not offered.

Assumes a safetensors checkpoint and a plain LoRA adapter; anything else is refused with a way out.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Literal, TypeAlias

import torch
from torch import nn

from .adapters import Adapter, load_adapter
from .checkpoint import DTYPES, Checkpoint, copy_bytes, header_size, small_files
from .disk import require_disk
from .errors import UserError
from .run import atomic_directory

Onto: TypeAlias = Literal["full", "dequantized"]
Progress: TypeAlias = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]


def merge(
    base_dir: Path | str,
    adapter_dir: Path | str,
    out_dir: Path | str,
    *,
    onto: Onto = "full",
    progress: Progress | None = None,
) -> Path:
    """Write base + adapter as a Hugging Face directory with the base's shards and dtypes.

    The delta is computed and added in float32 and cast once, to the stored dtype. The tokenizer,
    chat template, generation config and licence files of the base are copied as they are.

    Args:
        onto: what the delta is added to, see the head of this module.
        progress: e.g. `console.progress`; counts tensors.

    Returns:
        `out_dir`, which appears under its name only when it is complete.

    Raises:
        UserError: base or adapter can not be merged or do not fit each other; too little disk;
            `out_dir` holds files that are not ours to remove.
    """
    base_dir, out_dir = Path(base_dir), Path(out_dir)
    base, adapter = Checkpoint(base_dir), load_adapter(adapter_dir)
    check_fit(base, adapter)
    _check_target(base, adapter, out_dir)
    require_disk(out_dir, base.nbytes, "the merged model")
    quantized = quantized_weights(base_dir) if onto == "dequantized" else set()
    bar = progress("merging", len(base.entries)) if progress else nullcontext(lambda n: None)
    with atomic_directory(out_dir) as partial, bar as advance:
        for file in small_files(base_dir):
            shutil.copyfile(file, partial / file.name)
        index = base_dir / "model.safetensors.index.json"
        if index.is_file():
            shutil.copyfile(index, partial / index.name)
        _copy_missing_template(adapter.path, partial)
        for file in base.files:
            _merge_shard(base, file, adapter, quantized, partial / file.name, advance)
    return out_dir


def merged_tensor(
    weight: torch.Tensor, adapter: Adapter, name: str, *, quantized: bool = False
) -> torch.Tensor:
    """`weight` with the adapter's update, in the dtype of `weight`.

    Args:
        weight: the stored tensor called `name`.
        quantized: take it through NF4 and back first.
    """
    merged = adapter.replaced.get(name, weight).float()
    if quantized:
        merged = nf4_round_trip(merged)
    if name in adapter.pairs:
        merged = merged + adapter.pairs[name].delta()
    return merged.to(weight.dtype)


def nf4_round_trip(weight: torch.Tensor) -> torch.Tensor:
    """A float32 weight through NF4 with double quantization (blocks of 64) and back."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    packed, state = quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    restored: torch.Tensor = dequantize_4bit(packed, state)
    return restored


def quantized_weights(model_dir: Path) -> set[str]:
    """Names of the weights that transformers puts into 4 bits: all linear ones but the head."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.quantizers.base import get_keys_to_not_convert
    from transformers.quantizers.quantizers_utils import should_convert_module

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model_dir))
    kept = get_keys_to_not_convert(model)
    return {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and should_convert_module(name, kept)
    }


def check_fit(base: Checkpoint, adapter: Adapter) -> None:
    """Raise UserError unless every tensor of the adapter meets one of the base, in its shape."""
    fix = "Name the base that the adapter was trained on."
    config = json.loads((base.directory / "config.json").read_text("utf-8"))
    if "quantization_config" in config:
        raise UserError(
            f"{base.directory} holds quantized weights: nothing can be added to them exactly.",
            "Name the 16-bit model that they were made from.",
        )
    shapes = {name: pair.delta_shape for name, pair in adapter.pairs.items()}
    shapes |= {name: tuple(tensor.shape) for name, tensor in adapter.replaced.items()}
    for name, shape in shapes.items():
        if name not in base.entries:
            tied = name == "lm_head.weight" and "model.embed_tokens.weight" in base.entries
            raise UserError(
                f"{adapter.path} changes {name}, which {base.directory} does not have"
                + (" (it is tied to the embeddings)." if tied else "."),
                "Untie the embeddings of the base first, or train without it." if tied else fix,
            )
        if base.entries[name].shape != shape:
            raise UserError(
                f"{adapter.path} has {name} as {list(shape)}, {base.directory} as "
                f"{list(base.entries[name].shape)}.",
                fix,
            )
        if name.endswith("embed_tokens.weight") and "lm_head.weight" not in base.entries:
            raise UserError(
                f"{adapter.path} changes the embeddings, and the head of {base.directory} is "
                "tied to them: merging would change the head too.",
                "Untie the embeddings of the base first, or train without them.",
            )


def _merge_shard(
    base: Checkpoint,
    file: Path,
    adapter: Adapter,
    quantized: set[str],
    target: Path,
    advance: Callable[[int], None],
) -> None:
    # Shapes and dtypes stay, so the shard's header stays; the safetensors package can only write
    # a shard that is in memory as a whole.
    with file.open("rb") as source, target.open("wb") as out:
        copy_bytes(source, out, header_size(file))
        for name, entry in base.in_file_order(file):
            if entry.start != out.tell():
                raise UserError(f"{file} has gaps between its tensors.", "Save it again.")
            if name in adapter.pairs or name in adapter.replaced or name in quantized:
                tensor = merged_tensor(base.read(name), adapter, name, quantized=name in quantized)
                assert tensor.dtype == DTYPES[entry.dtype]
                out.write(tensor.contiguous().view(torch.uint8).numpy().data)
            else:
                source.seek(entry.start)
                copy_bytes(source, out, entry.nbytes)
            advance(1)


def _copy_missing_template(adapter_dir: Path, target: Path) -> None:
    # A base without a template, trained with one: then the adapter's directory has it.
    for name in ("chat_template.jinja", "chat_template.json"):
        config = target / "tokenizer_config.json"
        has_one = any((target / n).exists() for n in ("chat_template.jinja", "chat_template.json"))
        has_one = has_one or (config.is_file() and '"chat_template"' in config.read_text("utf-8"))
        if (adapter_dir / name).is_file() and not has_one:
            shutil.copyfile(adapter_dir / name, target / name)


def _check_target(base: Checkpoint, adapter: Adapter, out_dir: Path) -> None:
    if out_dir.resolve() in (base.directory.resolve(), adapter.path.resolve()):
        raise UserError(f"{out_dir} is what is being merged.", "Choose another --out.")
    if not out_dir.exists():
        return
    ours = {file.name for file in (*small_files(base.directory), *base.files)}
    ours |= {"model.safetensors.index.json", "chat_template.jinja", "chat_template.json"}
    if not out_dir.is_dir() or any(file.name not in ours for file in out_dir.iterdir()):
        raise UserError(f"{out_dir} exists and is not a merged model.", "Choose another --out.")
