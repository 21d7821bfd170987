"""Tiny random models with a real tokenizer, for the tests of merging and export.

Hidden and intermediate sizes are multiples of 256, because K-quants need it. Weights are drawn
wide, so that the next-token distribution is peaked and a greedy token means something.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

SHARED = Path(__file__).parents[2] / "shared" / "data"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
VOCAB = 320
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": True,
}


def shared(part: str) -> Path:
    """A folder of real material beside the checkout; the test is skipped where it is absent."""
    path = SHARED / part
    if not path.exists():
        pytest.skip(f"{path} is absent: real tokenizers and prompts are not in the repository")
    return path


def byte_level_tokenizer(split: str = QWEN2_SPLIT, size: int = VOCAB) -> PreTrainedTokenizerFast:
    """A byte-level BPE with ChatML, trained on this file."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([Path(__file__).read_text()], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHATML,
    )


def random_model(config: PreTrainedConfig, seed: int = 0, std: float = 0.08) -> Any:
    """A float32 model whose weights, biases and norms are all random.

    Embeddings and head are drawn so that logits have a standard deviation of about 4; Gemma scales
    its embeddings by sqrt(hidden), so its next token would only ever be the last one again.
    """
    wide = 0.1 if "gemma" in config.model_type else 0.25
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            torch.nn.init.normal_(parameter, mean=parameter.mean().item(), std=0.2)
        elif "embed_tokens" in name or "lm_head" in name:
            torch.nn.init.normal_(parameter, std=wide)
        else:
            torch.nn.init.normal_(parameter, std=std)
    return model


def save(
    path: Path, config: PreTrainedConfig, dtype: torch.dtype = torch.float32, **kw: Any
) -> Path:
    """A model directory with weights and tokenizer."""
    random_model(config).to(dtype).save_pretrained(path, **kw)
    byte_level_tokenizer(size=config.vocab_size).save_pretrained(path)
    return path


def qwen2(path: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    return save(path, Qwen2Config(**(SHAPE | changes)), dtype)


def adapter(model_dir: Path, out: Path, seed: int = 3, **settings: Any) -> Path:
    """A LoRA adapter for `model_dir` with a B that is not zero."""
    torch.manual_seed(seed)
    settings = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"} | settings
    base = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    peft = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **settings))
    for name, parameter in peft.named_parameters():
        if "lora_B" in name or "lora_embedding_A" in name:
            torch.nn.init.normal_(parameter, std=0.02)
        elif "modules_to_save" in name:
            parameter.data += 0.01 * torch.randn_like(parameter)
    peft.save_pretrained(out)
    return out
