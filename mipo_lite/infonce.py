"""InfoNCE as a training loss: the baseline that maximizes the bound directly, on the same pairs.

For the chosen responses y_i of a batch and its prompts x_k, minimize

    - 1/B sum_i log [ p(y_i | x_i) / sum_k p(y_i | x_k) ]

with p the policy itself as the critic (van den Oord et al. 2018, arXiv 1807.03748, eq. 4). There
is no reference in it, and rejected responses are not used. A plain loop, since no trainer of TRL's
has a loss over prompts.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from transformers import get_linear_schedule_with_warmup

from .base import Base
from .prefix_sharing import backbone_of, run_trie
from .recipe import Recipe
from .run import atomic_directory
from .scoring import token_logprobs
from .training import lora_config
from .trie import build_trie
from .trie_attention import switched_on

# Prompts that each response is contrasted with at once, its own among them.
WAYS = 8


def infonce_loss(logprobs: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of telling which prompt a response belongs to, in nats.

    Args:
        logprobs: [B, B] log p(y_i | x_k); the diagonal is each response's own prompt.
    """
    return torch.nn.functional.cross_entropy(logprobs, torch.arange(len(logprobs)))


def train_infonce(
    base: Base,
    pairs: Sequence[dict[str, Any]],
    recipe: Recipe,
    adapter: Path,
    watch: Callable[[int, int], None] = lambda step, steps: None,
) -> None:
    """Train an adapter with `infonce_loss` on the chosen responses, as many steps as DPO takes.

    A step accumulates `recipe.batch_size` responses in groups of `WAYS`.
    """
    torch.manual_seed(recipe.seed)
    rng = random.Random(f"infonce {recipe.seed}")
    model: Any = get_peft_model(base.model, lora_config(recipe))
    parameters = [p for p in model.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.data = parameter.data.float()
    groups = max(1, recipe.batch_size // WAYS)
    steps = max(1, round(recipe.epochs * len(pairs) / (groups * WAYS)))
    optimizer = torch.optim.AdamW(parameters, lr=recipe.learning_rate, weight_decay=0.0)
    schedule = get_linear_schedule_with_warmup(optimizer, round(recipe.warmup * steps), steps)
    try:
        model.train()
        order: list[dict[str, Any]] = []
        for step in range(steps):
            for _ in range(groups):
                if len(order) < WAYS:
                    order = rng.sample(pairs, len(pairs))
                batch, order = order[:WAYS], order[WAYS:]
                # Under gradient checkpointing, which a DPO before may have left switched on, the
                # backward pass runs forwards again: they need the same attention.
                with switched_on(base.model.config.get_text_config()):
                    loss = infonce_loss(_logprobs(model, batch))
                    (loss / groups).backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            watch(step + 1, steps)
        with atomic_directory(adapter) as partial:
            model.save_pretrained(str(partial))
    finally:
        model.unload()
        base.model.eval()


def _logprobs(model: Any, batch: Sequence[dict[str, Any]]) -> torch.Tensor:
    """[B, B] log p(chosen response i | prompt k), with gradients; prompts are computed once."""
    responses = [pair["chosen_ids"] for pair in batch]
    rows = [[*pair["prompt_ids"], *response] for response in responses for pair in batch]
    lengths = [len(response) for response in responses for _ in batch]
    trie = build_trie(rows)
    backbone = backbone_of(model)
    hidden = run_trie(backbone, backbone, trie, use_cache=False).last_hidden_state[0]
    slots = [path[len(path) - n - 1 : -1] for path, n in zip(trie.paths, lengths, strict=True)]
    tokens = token_logprobs(
        model,
        hidden,
        torch.cat([torch.from_numpy(slot) for slot in slots]),
        torch.tensor([token for r in responses for _ in batch for token in r]),
    )
    sums = torch.stack([part.sum() for part in tokens.split(lengths)])
    return sums.view(len(batch), len(batch))
