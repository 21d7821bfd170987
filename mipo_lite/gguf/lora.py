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


def export_lora(
    base_dir: Path | str, adapter_dir: Path | str, out_path: Path | str, *, name: str | None = None
) -> Path:
    """Write `adapter_dir` as a LoRA GGUF, in float32.

    Use: `llama-cli -m BASE.gguf --lora FILE`, or `Llama(base, lora_path=FILE)`.

    Args:
        base_dir: the model the adapter was trained on; names, shapes and head counts are its.

    Raises:
        UserError: the adapter does not fit the base, or the format can not say it.
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
    return out_path
