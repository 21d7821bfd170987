"""Score only label positions in TRL's fused LM head.

TRL's head projects every position through the LM head where Triton is missing (on a CPU), prompts
included, though only the responses have labels. This hook hands it the labelled positions alone.
"""

from __future__ import annotations

from typing import Any

from .prefix_sharing import backbone_of

PER_TOKEN = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


def label_positions_only(model: Any) -> None:
    """Patch `model` (after `DPOTrainer` was made, which adds its fused head) for good.

    `model(..., labels=, fused_lm_head=True)` returns what it did before: per-token fields of shape
    [batch, length - 1], zero where there is no label. Other calls are left alone.
    """
    causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    backbone = backbone_of(model)
    original = causal_lm.forward

    def forward(*args: Any, fused_lm_head: bool = False, labels: Any = None, **kwargs: Any) -> Any:
        if not fused_lm_head or labels is None or kwargs.get("shift_labels") is not None:
            extra = {} if labels is None else {"labels": labels}
            return original(*args, fused_lm_head=fused_lm_head, **extra, **kwargs)
        next_tokens = labels[:, 1:]
        labelled = next_tokens != -100

        def keep_labelled(module: Any, inputs: Any, outputs: Any) -> Any:
            outputs.last_hidden_state = outputs.last_hidden_state[:, :-1][labelled][None]
            return outputs

        hook = backbone.register_forward_hook(keep_labelled)
        try:
            # The head takes labels that are shifted already as they are, position by position.
            outputs = original(
                *args, fused_lm_head=True, shift_labels=next_tokens[labelled][None], **kwargs
            )
        finally:
            hook.remove()
        for name in PER_TOKEN:
            values = outputs.get(name)
            if values is not None:
                outputs[name] = values.new_zeros(labelled.shape).masked_scatter(labelled, values)
        outputs.label_mask = labelled
        return outputs

    causal_lm.forward = forward
