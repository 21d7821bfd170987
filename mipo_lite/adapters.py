"""Read a PEFT LoRA adapter from its directory: per module A, B and the scale; nothing is applied.

What a weight delta can not say (DoRA, bias training, adapters that change the base when they are
set up) is refused here by name, so that neither the merged model nor a LoRA GGUF is ever silently
something else than the trained policy.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from .errors import UserError

_PREFIX = "base_model.model."

# Settings of peft.LoraConfig whose effect is not B @ A on one weight, with the value at which they
# are off (empty and absent count as off too).
_UNSUPPORTED = {
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "kasa_config": "KaSA",
    "arrow_config": "Arrow",
    "monteclora_config": "MonteCLoRA",
    "velora_config": "VeLoRA",
    "alora_invocation_tokens": "activated LoRA",
    "layer_replication": "layer replication",
    "target_parameters": "LoRA on bare parameters",
    "trainable_token_indices": "trainable tokens",
    "lora_bias": "a bias in LoRA B",
    "fan_in_fan_out": "transposed (Conv1D) layers",
}
# These subtract the initial B @ A from the base, so the stored A and B do not fit the plain base.
_CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class LoraPair:
    """The low-rank update of one weight W [out, in]: W + scale * B @ A.

    Attributes:
        a: [rank, in], float32.
        b: [out, rank], float32.
        scale: alpha / rank, or alpha / sqrt(rank) for rsLoRA (Kalajdzievski, arXiv 2312.03732).
        embedding: the module is an embedding; its weight is stored [in, out] of this pair.
    """

    a: torch.Tensor
    b: torch.Tensor
    scale: float
    embedding: bool = False

    @property
    def delta_shape(self) -> tuple[int, ...]:
        shape = (self.b.shape[0], self.a.shape[1])
        return shape[::-1] if self.embedding else shape

    def delta(self) -> torch.Tensor:
        """The update in the shape of the stored weight, float32."""
        delta = (self.b @ self.a) * self.scale
        return delta.T if self.embedding else delta


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter.

    Attributes:
        pairs: name of the base weight ("model.layers.0.self_attn.q_proj.weight") -> its update.
        replaced: name of a base tensor -> the tensor saved to stand in its stead (modules_to_save).
    """

    path: Path
    pairs: dict[str, LoraPair]
    replaced: dict[str, torch.Tensor]


def load_adapter(directory: Path | str) -> Adapter:
    """Read `adapter_config.json` and `adapter_model.safetensors`.

    Raises:
        UserError: there is no adapter, or it is of a kind that can not be merged.
    """
    directory = Path(directory)
    check_adapter(directory)
    config = _config(directory)
    weights = directory / "adapter_model.safetensors"
    halves: dict[str, dict[str, torch.Tensor]] = {}
    replaced = {}
    for key, tensor in load_file(weights).items():
        name = key.removeprefix(_PREFIX)
        for mark in (".lora_A.weight", ".lora_B.weight", ".lora_embedding_A", ".lora_embedding_B"):
            if name.endswith(mark):
                halves.setdefault(name.removesuffix(mark), {})[mark] = tensor.float()
                break
        else:
            if "lora_" in name:
                raise UserError(
                    f"{weights} holds a tensor that is not plain LoRA: {name}.",
                    "Merge this adapter with PEFT, then export the merged directory.",
                )
            # base_layer: PEFT saves embeddings beside their LoRA, in case they were resized.
            name = name.replace(".modules_to_save.", ".").replace(".base_layer.", ".")
            replaced[name] = tensor
    pairs = {f"{name}.weight": _pair(name, half, config) for name, half in halves.items()}
    if not pairs and not replaced:
        raise UserError(f"{weights} is empty.", "Train the adapter again.")
    return Adapter(directory, pairs, replaced)


def check_adapter(directory: Path) -> None:
    """Raises UserError when a file of the adapter is missing or damaged."""
    if not (directory / "adapter_config.json").is_file():
        raise UserError(
            f"{directory} is not an adapter: it has no adapter_config.json.",
            "Name a directory that PEFT's save_pretrained wrote.",
        )
    if not (directory / "adapter_model.safetensors").is_file():
        raise UserError(
            f"{directory} has no adapter_model.safetensors.",
            "Save the adapter with save_pretrained, which writes safetensors.",
        )
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        file = directory / name
        try:
            if file.suffix == ".json":
                json.loads(file.read_text("utf-8"))
            else:
                with safe_open(file, framework="pt") as weights:
                    weights.keys()
        except (ValueError, SafetensorError) as error:
            raise UserError(
                f"{file} is damaged.",
                f"Remove {directory} and run again: a run then trains it anew.",
            ) from error


def _config(directory: Path) -> dict[str, Any]:
    file = directory / "adapter_config.json"
    config: dict[str, Any] = json.loads(file.read_text("utf-8"))
    fix = "Merge this adapter with PEFT, then export the merged directory."
    if config.get("peft_type") != "LORA":
        raise UserError(f"{directory} is a {config.get('peft_type')} adapter, not LoRA.", fix)
    for key, label in _UNSUPPORTED.items():
        if config.get(key):
            raise UserError(f"{directory} uses {label} ({key}): B @ A does not say it all.", fix)
    if config.get("bias", "none") != "none":
        raise UserError(f"{directory} trained biases too (bias={config['bias']}).", fix)
    init = str(config.get("init_lora_weights", True)).lower()
    if init.startswith(_CHANGED_BASE):
        raise UserError(f"{directory} was set up with {init}, which changes the base.", fix)
    return config


def _pair(name: str, half: dict[str, torch.Tensor], config: dict[str, Any]) -> LoraPair:
    embedding = ".lora_embedding_A" in half
    kind = "embedding_" if embedding else ""
    end = "" if embedding else ".weight"
    try:
        a, b = half[f".lora_{kind}A{end}"], half[f".lora_{kind}B{end}"]
    except KeyError as error:
        raise UserError(
            f"The adapter has only one half of the LoRA pair of {name}.", "Save it again."
        ) from error
    if a.ndim != 2:
        raise UserError(f"The adapter's {name} is a convolution.", "Merge it with PEFT.")
    rank = a.shape[0]
    patterns: dict[str, float] = config.get("alpha_pattern") or {}
    alpha = float(patterns.get(get_pattern_key(list(patterns), name), config["lora_alpha"]))
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return LoraPair(a, b, scale, embedding)
