from __future__ import annotations

import pytest
import torch
import trl.trainer.utils
from tiny_models import right_padded, tiny_model, with_lora

from mipo_lite.label_head import PER_TOKEN, label_positions_only
from mipo_lite.prefix_sharing import share_prefixes
from mipo_lite.training import FUSED_HEAD

if not FUSED_HEAD:
    pytest.skip("TRL 1.14, the last for Python 3.10, has no fused head", allow_module_level=True)

ROWS = [([1, 2, 3, 4, 5, 6], [7, 8]), ([1, 2, 3, 4, 5, 6], [9, 10, 11]), ([1, 2], [])]


def fused(model, rows=ROWS):
    batch = right_padded([prompt + response for prompt, response in rows])
    labels = torch.full_like(batch["input_ids"], -100)
    for i, (prompt, response) in enumerate(rows):
        labels[i, len(prompt) : len(prompt) + len(response)] = torch.tensor(response).long()
    outputs = model(**batch, labels=labels, fused_lm_head=True, use_cache=False)
    model.zero_grad()
    if outputs.log_probs.requires_grad:
        (outputs.log_probs * torch.arange(outputs.log_probs.shape[1])).sum().backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    return outputs, gradients


@pytest.fixture
def model():
    model = tiny_model("qwen2")
    trl.trainer.utils.add_fused_lm_head(model, outputs=PER_TOKEN)
    return with_lora(model)


@pytest.mark.parametrize("shared", [False, True])
def test_outputs_and_gradients_are_those_of_all_positions(model, shared):
    before, gradients_before = fused(model)
    label_positions_only(model)
    if shared:
        with share_prefixes(model):
            after, gradients_after = fused(model)
    else:
        after, gradients_after = fused(model)
    for name in (*PER_TOKEN, "label_mask", "loss"):
        torch.testing.assert_close(after[name], before[name], atol=1e-5, rtol=1e-4)
    for got, want in zip(gradients_after, gradients_before, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-3)


def test_only_labelled_positions_reach_the_head(model, monkeypatch):
    seen = []

    class Spy:
        @staticmethod
        def apply(hidden, *args):
            seen.append(len(hidden))
            return original.apply(hidden, *args)

    from trl.trainer import utils

    original = utils._ChunkedLogProbFunction
    monkeypatch.setattr(utils, "_ChunkedLogProbFunction", Spy)
    fused(model)
    label_positions_only(model)
    fused(model)
    assert seen == [3 * 8, 5]


def test_a_batch_without_labels_has_a_gradient_of_zero(model):
    label_positions_only(model)
    outputs, gradients = fused(model, [([1, 2, 3], []), ([1, 2], [])])
    assert outputs.log_probs.tolist() == [[0, 0], [0, 0]]
    assert all((gradient == 0).all() for gradient in gradients)


def test_other_calls_are_left_alone(model):
    batch = right_padded([[1, 2, 3], [4, 5, 6]])
    logits = model(**batch).logits
    loss = model(**batch, labels=batch["input_ids"]).loss
    label_positions_only(model)
    assert torch.equal(model(**batch).logits, logits)
    assert torch.equal(model(**batch, labels=batch["input_ids"]).loss, loss)
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    assert model.generate(**batch, **options).shape == (2, 6)
