from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import CONFIGS, VOCAB, right_padded, tiny_model, with_lora
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention

from mipo_lite import trie_attention
from mipo_lite.prefix_sharing import (
    UnsupportedModel,
    backbone_of,
    install,
    self_check,
    share_prefixes,
)
from mipo_lite.trie import build_trie

FAMILIES = sorted(CONFIGS)
TOKEN = st.integers(1, VOCAB - 1)


@st.composite
def batches(draw):
    """Prompts and responses that share as much or as little as hypothesis likes."""
    context = draw(st.lists(TOKEN, max_size=16))
    rows = []
    for _ in range(draw(st.integers(1, 4))):
        prompt = context[: draw(st.integers(0, len(context)))] + draw(
            st.lists(st.integers(1, 2), min_size=1, max_size=6)
        )
        for _ in range(draw(st.integers(1, 3))):
            rows.append((prompt, draw(st.lists(st.integers(1, 2), max_size=6))))
    return rows


EDGES = {
    "no shared prefix": [([1, 2], [3]), ([4, 5], [6, 7])],
    "all the same": [([1, 2, 3, 4, 5, 6, 7], [8])] * 3,
    "one a prefix of another": [([1, 2, 3], [4]), ([1, 2, 3], [4, 5, 6]), ([1, 2], [3])],
    "single row": [([1, 2, 3], [4, 5])],
    "empty response": [([1, 2, 3], []), ([1, 2, 3], [4])],
    "much padding": [([1], [2]), ([1] * 20, [3, 4])],
}


def response_logprobs(model, rows):
    """Log-probs of all response tokens from the model's full logits, the slow obvious way."""
    logits = model(**right_padded([p + r for p, r in rows]), use_cache=False).logits
    logprobs = logits.log_softmax(-1)
    return torch.stack(
        [
            logprobs[i, len(prompt) + t - 1, token]
            for i, (prompt, response) in enumerate(rows)
            for t, token in enumerate(response)
        ]
        or [logits.sum() * 0]
    )


def gradients(model, rows):
    model.zero_grad()
    logprobs = response_logprobs(model, rows)
    # Weights of both signs, as DPO gives chosen and rejected.
    weights = torch.linspace(-1, 1.5, len(logprobs))
    (logprobs * weights).sum().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return logprobs.detach(), grads


def assert_same_both_ways(model, rows):
    plain_logprobs, plain_grads = gradients(model, rows)
    with share_prefixes(model, min_ratio=0.0):
        shared_logprobs, shared_grads = gradients(model, rows)
    torch.testing.assert_close(shared_logprobs, plain_logprobs, atol=1e-5, rtol=0)
    assert shared_grads.keys() == plain_grads.keys()
    assert any("lora_A" in name for name in plain_grads)
    # A query that sees one key has no gradient at all: there rounding is measured by what flows
    # through the model, not by that zero.
    floor = 1e-2 * max(plain.norm() for plain in plain_grads.values())
    for name, plain in plain_grads.items():
        scale = torch.maximum(plain.norm(), floor).clamp(min=1e-3)
        assert (shared_grads[name] - plain).norm() / scale < 1e-4, name


@pytest.fixture(scope="module", autouse=True)
def small_blocks():
    """Query blocks shorter than the rows, so that they are cut as long rows are."""
    with pytest.MonkeyPatch.context() as patch:
        small = partial(trie_attention.plan_blocks, size=5)
        patch.setattr(trie_attention, "plan_blocks", small)
        yield


@pytest.fixture(scope="module", params=FAMILIES)
def lora_model(request):
    return with_lora(tiny_model(request.param))


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(rows=batches())
def test_logprobs_and_gradients_are_those_of_the_plain_path(lora_model, rows):
    assert_same_both_ways(lora_model, rows)


@pytest.mark.parametrize("rows", EDGES.values(), ids=EDGES)
def test_edges(lora_model, rows):
    assert_same_both_ways(lora_model, rows)


@pytest.fixture
def model():
    return with_lora(tiny_model("qwen2"))


SHARED = [([1, 2, 3, 4, 5, 6, 7, 8], [9, 10]), ([1, 2, 3, 4, 5, 6, 7, 8], [9, 11, 12])]


def test_stats_count_tokens(model):
    with share_prefixes(model) as stats:
        response_logprobs(model, SHARED)
    assert (stats.tokens_in, stats.tokens_computed) == (21, 12)


def test_below_the_ratio_the_plain_path_runs(model):
    rows = [([1, 2, 3], [4]), ([1, 5, 6], [7])]
    with share_prefixes(model) as stats:
        shared = response_logprobs(model, rows)
    assert stats.tokens_computed == stats.tokens_in == 8
    assert torch.equal(shared, response_logprobs(model, rows))


def test_gradient_checkpointing(model):
    model.train()
    model.get_base_model().gradient_checkpointing_enable()
    model.enable_input_require_grads()
    assert_same_both_ways(model, SHARED)


def test_adapter_disabled(model):
    with model.disable_adapter():
        plain = response_logprobs(model, SHARED)
        with share_prefixes(model) as stats:
            shared = response_logprobs(model, SHARED)
    assert stats.ratio > 1.3
    torch.testing.assert_close(shared, plain, atol=1e-5, rtol=0)


def test_bfloat16_is_within_its_rounding(model):
    model.to(torch.bfloat16)
    context = [1 + i % 60 for i in range(100)]
    check = self_check(model, right_padded([[*context, i, i + 1] for i in range(1, 9)]))
    assert check.ok, check.message


def test_generate_with_a_cache_is_left_alone(model):
    inputs = right_padded([[1, 2, 3, 4, 5], [1, 2, 3, 4, 6]])
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    plain = model.generate(**inputs, **options)
    with share_prefixes(model) as stats:
        assert torch.equal(model.generate(**inputs, **options), plain)
    assert stats.tokens_in == 0


def test_left_padding_takes_the_plain_path(model):
    inputs = {
        "input_ids": torch.tensor([[0, 1, 2, 3], [1, 2, 3, 4]]),
        "attention_mask": torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]]),
    }
    plain = model(**inputs).logits
    with share_prefixes(model, min_ratio=0.0):
        assert torch.equal(model(**inputs, use_cache=False).logits, plain)


def test_install_and_remove(model):
    backbone = backbone_of(model)
    sharing = install(model)
    response_logprobs(model, SHARED)
    assert sharing.stats.ratio > 1.3
    sharing.remove()
    response_logprobs(model, SHARED)
    assert sharing.stats.tokens_in == 21
    assert backbone.forward.__func__ is type(backbone).forward


@pytest.mark.parametrize("family", FAMILIES)
def test_self_check_passes_in_float32(family):
    rows = [p + r for p, r in SHARED]
    check = self_check(tiny_model(family), right_padded(rows))
    assert check.ok
    assert check.difference < 1e-5


@pytest.mark.parametrize("family", ["qwen2", "gemma2"])  # blocks under SDPA, a mask under eager
def test_self_check_sees_a_wrong_layout(family, monkeypatch):
    def siblings_see_each_other(rows):
        trie = build_trie(rows)
        return replace(trie, end=np.full(trie.size, trie.size))

    monkeypatch.setattr("mipo_lite.prefix_sharing.build_trie", siblings_see_each_other)
    check = self_check(tiny_model(family), right_padded([p + r for p, r in SHARED]))
    assert not check.ok
    assert "differs" in check.message


def test_an_attention_that_never_sees_the_layout_fails(model, monkeypatch):
    def forgetful(self, *args, layout=None, **kwargs):
        return original(self, *args, **kwargs)

    original = Qwen2Attention.forward
    monkeypatch.setattr(Qwen2Attention, "forward", forgetful)
    check = self_check(model, right_padded([p + r for p, r in SHARED]))
    assert not check.ok
    assert "keyword arguments" in check.message


def test_unsupported_models_are_refused_aloud():
    from transformers import AutoModelForCausalLM, BloomConfig

    bloom = AutoModelForCausalLM.from_config(
        BloomConfig(vocab_size=VOCAB, hidden_size=16, n_layer=1, n_head=2)
    )
    with pytest.raises(UnsupportedModel, match="position_ids"), share_prefixes(bloom):
        pass
    assert not self_check(bloom, right_padded([[1, 2], [1, 3]])).ok

    chunked = tiny_model("llama")
    chunked.config.layer_types = ["chunked_attention", "full_attention"]
    with pytest.raises(UnsupportedModel, match="chunked_attention"):
        install(chunked)
