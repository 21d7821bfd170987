"""An importance matrix from the user's own prompts.

The quantizer weighs the error of each column of a weight by how strongly that column is driven:
the mean square of the activation that enters it (the E[x^2] of the diagonal Hessian in LeCun et
al., Optimal Brain Damage, 1989). It is measured on the model that will be quantized, on text it
will be used for.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ..merging import Progress
from .architectures import architecture, gguf_name


def importance_matrix(
    model: Any, rows: Sequence[Sequence[int]], *, progress: Progress | None = None
) -> dict[str, NDArray[np.float32]]:
    """Mean squared input of every linear layer in the decoder.

    Args:
        model: the merged transformers model.
        rows: token ids, prompt and response together; a few thousand tokens are enough.

    Returns:
        Name of the weight in the GGUF file -> [columns], float32, as `quantize` takes it.
    """
    family = architecture(model.config)
    sums: dict[str, torch.Tensor] = {}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            squares = inputs[0].detach().flatten(0, -2).float().square().sum(0).double().cpu()
            sums[name] = sums[name] + squares if name in sums else squares

        return hook

    handles = [
        module.register_forward_pre_hook(watch(gguf_name(family, f"{name}.weight")))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".layers." in name
    ]
    bar = progress("importance matrix", len(rows)) if progress else nullcontext(lambda n: None)
    try:
        with bar as advance, torch.no_grad():
            for row in rows:
                model(torch.tensor([list(row)], device=model.device), logits_to_keep=1)
                advance(1)
    finally:
        for handle in handles:
            handle.remove()
    tokens = sum(map(len, rows))
    # A column that was never driven still has to be rounded somewhere.
    return {name: (s / tokens).clamp(min=1e-12).float().numpy() for name, s in sums.items()}
