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
    merged = MergedCheckpoint(base_dir, adapter_dir, onto)
    _check_target(merged, out_dir)
    require_disk(out_dir, merged.nbytes, "the merged model")
    bar = progress("merging", len(merged.entries)) if progress else nullcontext(lambda n: None)
    with atomic_directory(out_dir) as partial, bar as advance:
        for file in small_files(base_dir):
            shutil.copyfile(file, partial / file.name)
        index = base_dir / "model.safetensors.index.json"
        if index.is_file():
            shutil.copyfile(index, partial / index.name)
        _copy_missing_template(merged.adapter.path, partial)
        for file in merged.files:
            _merge_shard(merged, file, partial / file.name, advance)
    return out_dir


class MergedCheckpoint(Checkpoint):
    """The tensors of base + adapter, each merged when it is read; names, shapes, dtypes stay."""

    def __init__(self, base_dir: Path | str, adapter_dir: Path | str, onto: Onto = "full") -> None:
        """Raises UserError as `merge`."""
        super().__init__(base_dir)
        self.adapter = load_adapter(adapter_dir)
        check_fit(self, self.adapter)
        self._quantized = quantized_weights(self.directory) if onto == "dequantized" else set()

    def changes(self, name: str) -> bool:
        """Whether the tensor differs from the base's."""
        changed = name in self.adapter.pairs or name in self.adapter.replaced
        return changed or name in self._quantized

    def read(self, name: str) -> torch.Tensor:
        weight = super().read(name)
        if not self.changes(name):
            return weight
        merged = self.adapter.replaced.get(name, weight).float()
        if name in self._quantized:
            merged = nf4_round_trip(merged)
        if name in self.adapter.pairs:
            merged += self.adapter.pairs[name].delta()
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
    merged: MergedCheckpoint, file: Path, target: Path, advance: Callable[[int], None]
) -> None:
    # Shapes and dtypes stay, so the shard's header stays; the safetensors package can only write
    # a shard that is in memory as a whole.
    with file.open("rb") as source, target.open("wb") as out:
        copy_bytes(source, out, header_size(file))
        for name, entry in merged.in_file_order(file):
            if entry.start != out.tell():
                raise UserError(f"{file} has gaps between its tensors.", "Save it again.")
            if merged.changes(name):
                tensor = merged.read(name)
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


def _check_target(merged: MergedCheckpoint, out_dir: Path) -> None:
    base, adapter = merged.directory, merged.adapter.path
    if out_dir.resolve() in (base.resolve(), adapter.resolve()):
        raise UserError(f"{out_dir} is what is being merged.", "Choose another --out.")
    if not out_dir.exists():
        return
    ours = {file.name for file in (*small_files(base), *merged.files)}
    ours |= {"model.safetensors.index.json", "chat_template.jinja", "chat_template.json"}
    if not out_dir.is_dir() or any(file.name not in ours for file in out_dir.iterdir()):
        raise UserError(f"{out_dir} exists and is not a merged model.", "Choose another --out.")
