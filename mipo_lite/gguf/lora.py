"""Write a LoRA adapter alone as GGUF, to be put on any GGUF of the same base at run time.

The format knows one alpha for the whole file and scales each pair by alpha / rank; other scales
(rsLoRA, alpha patterns) are folded into B. It can not say DoRA, trained heads or embeddings: those
are refused, export the merged model instead.
"""

from __future__ import annotations

from pathlib import Path

import gguf
import torch

from ..adapters import load_adapter
from ..checkpoint import Checkpoint
from ..errors import UserError
from ..merging import check_fit
from ..run import atomic_write
from .architectures import architecture, convert, gguf_name
from .export import load_config
from .llama import read_back


def export_lora(
    base_dir: Path | str,
    adapter_dir: Path | str,
    out_path: Path | str,
    *,
    name: str | None = None,
    over: Path | None = None,
) -> Path:
    """Write `adapter_dir` as a LoRA GGUF, in float32, and read it back before it gets its name.

    Use: `llama-cli -m BASE.gguf --lora FILE`, or `Llama(base, lora_path=FILE)`.

    Args:
        base_dir: the model the adapter was trained on; names, shapes and head counts are its.
        over: a GGUF file of the base, merged or not, on which llama.cpp then has to load it.

    Raises:
        UserError: the adapter does not fit the base, the format can not say it, or what was written
            can not be read back.
    """
    base_dir, out_path = Path(base_dir), Path(out_path)
    base, config, adapter = Checkpoint(base_dir), load_config(base_dir), load_adapter(adapter_dir)
    family = architecture(config)
    check_fit(base, adapter)
    beyond = [*adapter.replaced, *(n for n in adapter.pairs if ".layers." not in n)]
    if beyond:
        raise UserError(
            f"A LoRA GGUF can not say what {adapter.path} does to {beyond[0]}.",
            "Export the merged model: leave out --lora.",
        )
    first = next(iter(adapter.pairs.values()))
    alpha = first.scale * first.a.shape[0]
    out_path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(out_path) as partial:
        writer = gguf.GGUFWriter(partial, family.name)
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_name(name or out_path.stem)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        for weight, pair in adapter.pairs.items():
            target = gguf_name(family, weight)
            scaled: torch.Tensor = pair.b * (pair.scale * pair.a.shape[0] / alpha)
            b = convert(family, config, weight, scaled)
            writer.add_tensor(f"{target}.lora_a", pair.a.contiguous().numpy())
            writer.add_tensor(f"{target}.lora_b", b.contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        targets = [gguf_name(family, weight) for weight in adapter.pairs]
        _prove(partial, family.name, {f"{t}.lora_{half}" for t in targets for half in "ab"})
        if over is not None:
            read_back(over, lora=partial)
    return out_path


def _prove(path: Path, family: str, names: set[str]) -> None:
    """Raise UserError unless the file is an adapter for `family` with these tensors."""
    reader = gguf.GGUFReader(path)
    field = reader.get_field(gguf.Keys.General.ARCHITECTURE)
    found = {tensor.name for tensor in reader.tensors}
    if field is None or field.contents() != family or found != names:
        raise UserError(
            f"{path.name} does not hold the adapter that was written to it.",
            "Export it again; should it happen again, please report the model's name.",
        )
