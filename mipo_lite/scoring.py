"""Log-probabilities of responses under a model, with every shared prefix computed once.

Rows are put into batches by the tokens their trie computes (`mipo_lite.trie.pack`), the backbone
runs once on each trie, and the LM head only on the positions that predict a response token: no
[batch, length, vocab] ever stands in memory.

Knows about token ids, not about pairs or contexts. `score_matrix` gives what PMI and the ranking
of contexts are differences of.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from .out_of_memory import fitting, halving
from .prefix_sharing import UnsupportedModel, backbone_of, check_supported, run_trie
from .trie import build_trie, pack

# Logits of this many float32 elements at a time: 64 MiB.
TILE = 16 * 2**20

Row = tuple[Sequence[int], Sequence[int]]


def response_logprobs(
    model: Any,
    rows: Sequence[Row],
    *,
    max_tokens: int = 8192,
    progress: Callable[[int], None] | None = None,
) -> list[torch.Tensor]:
    """Token log-probs log p(response | prompt), in nats, of each of `rows` (prompt, response).

    Returns, in the order of `rows`, float32 CPU tensors of shape [len(response)]. `max_tokens`
    bounds the tokens computed at once; a longer row is computed alone. `progress(n)` is called
    after each batch with its number of rows. `model` is a causal LM or a PeftModel, and its
    adapter counts if it is enabled.

    Raises ValueError for a response without a prompt, `UnsupportedModel` for a model that cannot
    run on a trie or that does more to its logits than soft-capping, UserError when memory does not
    suffice for one row.
    """
    check_scorable(model)
    if any(response and not prompt for prompt, response in rows):
        raise ValueError("the first token of a response needs a prompt to be predicted from")
    results = [torch.empty(0)] * len(rows)
    was_training = model.training
    model.eval()
    try:
        whole = [[*prompt, *response] for prompt, response in rows]
        limit = fitting("scoring_tokens", max_tokens)
        for batch in pack([[row] for row in whole], max_tokens=limit):
            scored = _score_within(
                [whole[i] for i in batch], [len(rows[i][1]) for i in batch], model, limit
            )
            for i, logprobs in zip(batch, scored, strict=True):
                results[i] = logprobs
            if progress is not None:
                progress(len(batch))
    finally:
        model.train(was_training)
    return results


def _score_within(
    rows: list[list[int]], lengths: list[int], model: Any, limit: int
) -> list[torch.Tensor]:
    """`_score` of a batch, in parts where it takes more memory than there is."""
    longest = max(map(len, rows))

    def score(tokens: int) -> list[torch.Tensor]:
        if tokens == limit:
            return _score(rows, lengths, model)
        scored = [torch.empty(0)] * len(rows)
        for part in pack([[row] for row in rows], max_tokens=tokens):
            found = _score([rows[i] for i in part], [lengths[i] for i in part], model)
            for i, logprobs in zip(part, found, strict=True):
                scored[i] = logprobs
        return scored

    def smaller(tokens: int) -> int:
        # With room for its longest row alone a batch can not be cut any further.
        size = build_trie(rows).size if tokens == limit else tokens
        return max(size // 2, longest) if len(rows) > 1 and size > longest else 0

    return halving("scoring_tokens", limit, score, smaller)


@torch.inference_mode()
def _score(rows: list[list[int]], lengths: list[int], model: Any) -> list[torch.Tensor]:
    """Log-probs of the last `lengths[i]` tokens of each row."""
    trie = build_trie(rows)
    hidden = run_trie(backbone_of(model), backbone_of(model), trie, use_cache=False)
    slots = [path[len(path) - n - 1 : -1] for path, n in zip(trie.paths, lengths, strict=True)]
    targets = [row[len(row) - n :] for row, n in zip(rows, lengths, strict=True)]
    logprobs = token_logprobs(
        model,
        hidden.last_hidden_state[0],
        torch.from_numpy(np.concatenate(slots)),
        torch.tensor([token for target in targets for token in target], dtype=torch.long),
    )
    return list(logprobs.split(lengths))


def check_scorable(model: Any) -> None:
    """Raise `UnsupportedModel` unless `model` runs on a trie and its head is a plain one."""
    check_supported(backbone_of(model))
    causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    _softcap(causal_lm.config.get_text_config())


def score_matrix(
    model: Any,
    prompts: Sequence[Sequence[Sequence[int]]],
    responses: Sequence[Sequence[int]],
    **options: Any,
) -> torch.Tensor:
    """Summed log p(response i | prompts[i][k]), float64 [responses, K], in shared passes.

    With prompts [(with context), (without)] the PMI of each response is column 0 minus column 1;
    with the prompts of K contexts, `argmax(dim=1)` is the context a response fits best.
    `options` go to `response_logprobs`.
    """
    rows = [
        (prompt, response)
        for variants, response in zip(prompts, responses, strict=True)
        for prompt in variants
    ]
    sums = [logprobs.double().sum() for logprobs in response_logprobs(model, rows, **options)]
    return torch.stack(sums).view(len(responses), -1) if sums else torch.empty(0, 0)


def token_logprobs(
    model: Any, hidden: torch.Tensor, slots: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """Log-probs of `targets` [n] predicted from `hidden[slots]`, float32 CPU [n].

    hidden: [size, hidden] of the backbone; slots: [n] indices into it. The softmax is taken in
    float32 over tiles of positions.
    """
    causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    head = causal_lm.get_output_embeddings()
    softcap = _softcap(causal_lm.config.get_text_config())
    slots = slots.to(hidden.device)
    targets = targets.to(head.weight.device)
    tile = max(1, TILE // head.weight.shape[0])
    parts = [torch.empty(0)]
    for at in range(0, len(slots), tile):
        logits = head(hidden[slots[at : at + tile]].to(head.weight.device)).float()
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        chosen = logits.gather(1, targets[at : at + tile, None])[:, 0]
        parts.append((chosen - logits.logsumexp(dim=1)).cpu())
    return torch.cat(parts)


def _softcap(config: Any) -> float | None:
    """Gemma 2's cap on logits; families that scale their logits otherwise are refused."""
    for name in ("logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier"):
        if getattr(config, name, None) not in (None, 1, 1.0):
            raise UnsupportedModel(f"{config.model_type} scales its logits by {name}")
    return getattr(config, "final_logit_softcapping", None)
