from __future__ import annotations

import pytest
import torch
from tiny_models import CONFIGS, tiny_model, with_lora

from mipo_lite.prefix_sharing import UnsupportedModel
from mipo_lite.scoring import response_logprobs, score_matrix

CONTEXT = list(range(3, 40))
ROWS = [
    ([*CONTEXT, 7, 8], [9, 10, 2]),
    ([7, 8], [9, 10, 2]),  # the same response without its context
    ([*CONTEXT, 7, 8], [9, 11]),
    ([*CONTEXT, 7, 8], []),
    ([*CONTEXT, 5], [2]),
    ([*CONTEXT, 7, 8], [9, 10, 2]),  # again
]


def plain(model, prompt, response):
    """One row, full logits."""
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *response]])).logits[0].float()
    logprobs = logits.log_softmax(-1)
    return torch.stack(
        [logprobs[len(prompt) + t - 1, token] for t, token in enumerate(response)]
        or [torch.zeros(())]
    )[: len(response)]


@pytest.mark.parametrize("family", sorted(CONFIGS))
@pytest.mark.parametrize("max_tokens", [8192, 45, 1])
def test_equals_one_row_at_a_time(family, max_tokens):
    model = tiny_model(family)
    scored = response_logprobs(model, ROWS, max_tokens=max_tokens)
    for (prompt, response), logprobs in zip(ROWS, scored, strict=True):
        assert logprobs.shape == (len(response),)
        assert logprobs.dtype == torch.float32
        torch.testing.assert_close(logprobs, plain(model, prompt, response), atol=1e-5, rtol=0)


def test_small_tiles_change_nothing(monkeypatch):
    model = tiny_model("gemma2")
    whole = response_logprobs(model, ROWS)
    monkeypatch.setattr("mipo_lite.scoring.TILE", 1)
    for a, b in zip(whole, response_logprobs(model, ROWS), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


def test_the_adapter_counts_only_while_enabled():
    base = [lp.sum() for lp in response_logprobs(tiny_model("qwen2"), ROWS)]
    model = with_lora(tiny_model("qwen2"))
    tuned = [lp.sum() for lp in response_logprobs(model, ROWS)]
    with model.disable_adapter():
        disabled = [lp.sum() for lp in response_logprobs(model, ROWS)]
    assert disabled == base
    assert tuned != base


def test_progress_counts_rows_and_the_mode_is_restored():
    model = tiny_model("llama").train()
    done = []
    response_logprobs(model, ROWS, max_tokens=45, progress=done.append)
    assert sum(done) == len(ROWS)
    assert model.training


def test_score_matrix_sums_every_context():
    model = tiny_model("llama")
    prompts = [[[*CONTEXT, 7], [7]], [[*CONTEXT, 8], [8]]]
    responses = [[9, 10], [11]]
    matrix = score_matrix(model, prompts, responses)
    assert matrix.shape == (2, 2)
    for i, response in enumerate(responses):
        for k in range(2):
            expected = plain(model, prompts[i][k], response).sum()
            assert matrix[i, k].item() == pytest.approx(expected.item(), abs=1e-5)


def test_no_rows():
    assert response_logprobs(tiny_model("llama"), []) == []


def test_a_response_needs_a_prompt():
    with pytest.raises(ValueError, match="prompt"):
        response_logprobs(tiny_model("llama"), [([], [1])])


def test_scaled_logits_are_refused():
    model = tiny_model("llama")
    model.config.logit_scale = 0.5
    with pytest.raises(UnsupportedModel, match="logit_scale"):
        response_logprobs(model, ROWS)
