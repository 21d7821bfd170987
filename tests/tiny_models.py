"""Tiny random causal LMs in float32, one of each attention family, for the engine's tests."""

from __future__ import annotations

from copy import deepcopy

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

VOCAB = 64
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,  # far from the flat distribution of the usual 0.02
}
WINDOW = 5  # shorter than the rows, so that it cuts
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SHAPE),
    "qwen2": Qwen2Config(**SHAPE),
    "qwen3": Qwen3Config(**SHAPE),
    "gemma": GemmaConfig(**SHAPE),
    "gemma2": Gemma2Config(  # soft-capped logits, sliding and full layers in turn
        **SHAPE, sliding_window=WINDOW, query_pre_attn_scalar=8, attn_implementation="eager"
    ),
    "gemma3": Gemma3TextConfig(
        **SHAPE,
        sliding_window=WINDOW,
        query_pre_attn_scalar=8,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "mistral": MistralConfig(**SHAPE, sliding_window=WINDOW),
}


def tiny_model(family: str, seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(deepcopy(CONFIGS[family]), dtype=torch.float32).eval()


def with_lora(model: torch.nn.Module, seed: int = 1) -> torch.nn.Module:
    """LoRA on every linear layer, with a B that is not zero: gradients reach A too."""
    torch.manual_seed(seed)
    peft = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", lora_alpha=8))
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return peft


def right_padded(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    length = max(map(len, rows))
    return {
        "input_ids": torch.tensor([row + [0] * (length - len(row)) for row in rows]),
        "attention_mask": torch.tensor(
            [[1] * len(row) + [0] * (length - len(row)) for row in rows]
        ),
    }
