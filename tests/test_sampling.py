from __future__ import annotations

import pytest
import torch
from tiny_models import CONFIGS, VOCAB, tiny_model, with_lora

from mipo_lite.sampling import SampleRequest, inverse_cdf, sample, seeded_uniform

CONTEXT = [3 + i % 60 for i in range(50)]
PROMPTS = [
    [*CONTEXT, 7, 8, 9],
    [*CONTEXT, 7],
    [5, 6],  # shares nothing
    [*CONTEXT, 7, 8, 9],
    [4],
    CONTEXT,
]
REQUESTS = [SampleRequest(prompt, seed=i) for i, prompt in enumerate(PROMPTS)]
OPTIONS = {"max_new_tokens": 40, "eos_ids": [2, 17], "pad_id": 0}


def draw(model, requests=REQUESTS, **options):
    return list(sample(model, requests, **{**OPTIONS, **options}))


def reference(model, request, temperature):
    """One row, no cache, token by token."""
    ids = list(request.prompt_ids)
    uniform = seeded_uniform(request.seed, OPTIONS["max_new_tokens"])
    for u in uniform:
        with torch.no_grad():
            logits = model(torch.tensor([ids]), use_cache=False).logits[0, -1].float()
        if temperature == 0:
            token = int(logits.argmax())
        else:
            probs = (logits / temperature).softmax(-1)
            token = int((probs.cumsum(0) <= u).sum())
        ids.append(token)
        if token in OPTIONS["eos_ids"]:
            break
    return ids[len(request.prompt_ids) :]


@pytest.mark.parametrize("family", sorted(CONFIGS))
@pytest.mark.parametrize("temperature", [0, 1.0, 0.7])
def test_equals_one_row_without_a_cache(family, temperature):
    model = tiny_model(family)
    samples = draw(model, temperature=temperature, batch_size=4)
    assert len(samples) == len(REQUESTS)
    for request, got in zip(REQUESTS, samples, strict=True):
        assert got.token_ids == reference(model, request, temperature)
        assert got.ended == (got.token_ids[-1] in OPTIONS["eos_ids"])


def test_rows_end_at_different_times_and_the_limit():
    samples = draw(tiny_model("qwen2"), [SampleRequest(CONTEXT, seed) for seed in range(24)])
    lengths = {len(s.token_ids) for s in samples}
    assert len(lengths) > 3
    assert max(lengths) == 40
    assert all(s.ended or len(s.token_ids) == 40 for s in samples)
    for s in samples:
        assert not set(s.token_ids[:-1]) & {2, 17}


def test_a_resumed_run_is_bit_identical():
    model = tiny_model("llama")
    whole = draw(model, batch_size=2)
    assert whole == draw(model, batch_size=2)
    assert whole[2:] == draw(model, REQUESTS[2:], batch_size=2)


def test_the_seed_makes_the_sample():
    model = tiny_model("llama")
    requests = [SampleRequest(CONTEXT, seed) for seed in (1, 2, 1)]
    first, second, again = draw(model, requests)
    assert first == again
    assert first != second


def test_the_global_generator_is_left_alone():
    model = tiny_model("llama")
    state = torch.random.get_rng_state()
    draw(model)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_adapter_enabled_and_disabled():
    base = draw(tiny_model("qwen3"))
    model = with_lora(tiny_model("qwen3")).train()
    assert draw(model) != base
    assert model.training
    with model.disable_adapter():
        assert draw(model) == base


def test_top_p_near_zero_is_greedy():
    model = tiny_model("qwen2")
    assert draw(model, top_p=1e-6) == draw(model, temperature=0)


def test_samples_follow_the_distribution():
    model = tiny_model("qwen2")
    n = 4000
    requests = [SampleRequest([3, 4, 5], seed) for seed in range(n)]
    samples = draw(model, requests, max_new_tokens=1, batch_size=n)
    counts = torch.bincount(torch.tensor([s.token_ids[0] for s in samples]), minlength=VOCAB)
    with torch.no_grad():
        probs = model(torch.tensor([[3, 4, 5]])).logits[0, -1].softmax(-1)
    sigma = (n * probs * (1 - probs)).sqrt()
    assert ((counts - n * probs).abs() <= 5 * sigma + 1).all()


def test_inverse_cdf_never_draws_the_impossible():
    probs = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]]).expand(4, -1)
    uniform = torch.tensor([0.0, 0.4999, 0.5, 1.0])  # 1.0: as rounding may make it
    assert inverse_cdf(probs, uniform).tolist() == [1, 1, 3, 3]


def test_no_requests_and_empty_prompts():
    model = tiny_model("llama")
    assert draw(model, []) == []
    with pytest.raises(ValueError, match="at least one token"):
        draw(model, [SampleRequest([], 0)])


@pytest.mark.parametrize("adapted", [False, True])
def test_what_the_model_brings_for_generate_does_not_count(adapted):
    model = tiny_model("qwen2")
    model = with_lora(model) if adapted else model
    plain = draw(model)
    theirs = model.generation_config
    theirs.update(
        repetition_penalty=5.0, no_repeat_ngram_size=2, min_new_tokens=30, suppress_tokens=[7, 8]
    )
    assert draw(model) == plain
    assert model.generation_config is theirs
