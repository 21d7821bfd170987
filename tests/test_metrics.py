"""Measures against values computed by hand, and the theorem that MIPO rests on."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mipo_lite.metrics import (
    SharedRun,
    bootstrap_mean,
    compare,
    compare_distinct_n,
    distinct_n,
    information,
    own_words,
    repetition,
    wilson_interval,
    words,
)
from mipo_lite.scoring import response_logprobs

# Two contexts, three responses: p(y | c), rows c. Without a context the base mixes both evenly.
TOY = np.array([[0.5, 0.25, 0.25], [0.25, 0.25, 0.5]])


def toy_scores(own: int) -> np.ndarray:
    """[3, 1 + 2]: every response given nothing, its own context, and the other one."""
    return np.log(np.stack([TOY.mean(axis=0), TOY[own], TOY[1 - own]], axis=1))


def test_information_of_a_toy_distribution_is_what_one_computes_by_hand() -> None:
    found = information(toy_scores(own=0))
    # p(y) = 3/8, 1/4, 3/8.
    assert found["pmi"] == pytest.approx([math.log(4 / 3), 0.0, math.log(2 / 3)])
    # With a uniform prior over both contexts, p(y) is the mean: bits are PMI in base 2.
    assert found["bits"] == pytest.approx([math.log2(4 / 3), 0.0, math.log2(2 / 3)])
    # The middle response fits both equally well: half a guess.
    assert found["which_context"] == pytest.approx([1.0, 0.5, 0.0])


def test_infonce_over_all_contexts_is_the_mutual_information() -> None:
    """With the true densities and every context among the K, the bound is tight."""
    bits = sum(0.5 * (TOY[c] * information(toy_scores(c))["bits"]).sum() for c in (0, 1))
    joint = 0.5 * TOY
    exact = (joint * np.log2(joint / (joint.sum(0) * joint.sum(1, keepdims=True)))).sum()
    assert bits == pytest.approx(exact)


def test_infonce_never_exceeds_log_k() -> None:
    scores = np.random.default_rng(0).normal(scale=300, size=(50, 9))
    found = information(scores)
    assert np.isfinite(found["bits"]).all()
    assert found["bits"].max() <= 3.0
    sure = np.full((1, 9), -900.0)
    sure[0, 1] = -10.0
    assert information(sure)["bits"] == pytest.approx([3.0])


def dpo_loss(log_ratio_chosen, log_ratio_rejected, beta):
    """Rafailov et al. 2023, arXiv 2305.18290, eq. 7."""
    return -torch.nn.functional.logsigmoid(beta * (log_ratio_chosen - log_ratio_rejected))


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_dpo_on_missing_context_pairs_learns_pmi_over_beta(beta: float) -> None:
    """The theorem of arXiv 2603.19294 on a policy that is a table.

    Five contexts, twenty responses; pairs y+ ~ p(. | c), y- ~ p(.), as MIPO makes them.
    """
    rng = torch.Generator().manual_seed(0)
    base = torch.randn(5, 20, generator=rng, dtype=torch.float64).mul(1.2).log_softmax(dim=1)
    without = base.exp().mean(dim=0).log()
    pmi = base - without
    chosen = torch.multinomial(base.exp(), 40_000, replacement=True, generator=rng)
    rejected = torch.multinomial(without.exp(), 5 * 40_000, replacement=True, generator=rng)
    # How often each pair was drawn, [5, 20, 20]: faster than going through them one by one.
    pairs = torch.arange(5)[:, None] * 400 + chosen * 20 + rejected.view(5, -1)
    share = torch.bincount(pairs.flatten(), minlength=2000).view(5, 20, 20) / pairs.numel()
    logits = base.clone().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.1 / beta / 10)
    for _ in range(600):
        log_ratio = logits.log_softmax(dim=1) - base
        loss = (share * dpo_loss(log_ratio[:, :, None], log_ratio[:, None, :], beta)).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    learned = (logits.log_softmax(dim=1) - base).detach()
    for c in range(5):
        # Up to a constant of each context, beta log(policy / base) is the PMI.
        r = np.corrcoef(learned[c], pmi[c] / beta)[0, 1]
        slope = np.polyfit(pmi[c].numpy(), learned[c].numpy() * beta, 1)[0]
        assert r > 0.99
        assert slope == pytest.approx(1.0, abs=0.1)


def test_dpo_of_a_transformer_learns_pmi_over_beta() -> None:
    """The same theorem on a model, at the recipe's beta.

    A vocabulary of six tokens, of which one ends; a response is the end at once or two tokens, so
    all 31 can be enumerated. All weights are trained: LoRA beside a frozen head of this size can
    not reach log-ratios of PMI / beta.
    """
    beta, end, vocabulary, request = 0.1, 1, 6, 0
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=8,
        initializer_range=0.12,  # contexts matter, and no response is out of reach
        bos_token_id=None,
        eos_token_id=end,
    )
    model = LlamaForCausalLM(config).eval()
    starts = [token for token in range(vocabulary) if token != end]
    responses = [[end], *([first, second] for first in starts for second in range(vocabulary))]
    prompts = [[request, context] for context in range(2, vocabulary)]
    contexts, n = len(prompts), len(responses)

    rows = [(prompt, response) for prompt in [*prompts, [request]] for response in responses]
    sums = [tokens.double().sum() for tokens in response_logprobs(model, rows)]
    *given, without = torch.stack(sums).view(-1, n)
    base = torch.stack(given)
    totals = [float(scores.exp().sum()) for scores in (*given, without)]
    assert totals == pytest.approx([1.0] * 5), "these are all responses there are"
    pmi = base - without

    rng = torch.Generator().manual_seed(0)
    chosen = torch.multinomial(base.exp(), 20_000, replacement=True, generator=rng)
    rejected = torch.multinomial(
        without.exp().expand(contexts, n), 20_000, replacement=True, generator=rng
    )
    pairs = torch.arange(contexts)[:, None] * n * n + chosen * n + rejected
    share = torch.bincount(pairs.flatten(), minlength=contexts * n * n).view(contexts, n, n)
    share = share / pairs.numel()

    input_ids = torch.tensor([[*prompt, *response, end][:4] for prompt, response in rows[:-n]])
    counts = torch.tensor([[1.0, len(response) - 1.0] for _, response in rows[:-n]])

    def policy() -> torch.Tensor:
        """[contexts, responses] log-probs, with gradients."""
        logprobs = model(input_ids).logits[:, 1:-1].log_softmax(dim=-1)
        tokens = logprobs.gather(-1, input_ids[:, 2:, None])[..., 0]
        return (tokens * counts).sum(dim=1).view(contexts, n)

    assert policy().detach().numpy() == pytest.approx(base.numpy(), abs=1e-5)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, total_iters=300)
    for _ in range(300):
        log_ratio = policy() - base
        loss = (share * dpo_loss(log_ratio[:, :, None], log_ratio[:, None, :], beta)).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    learned = (policy() - base).detach()
    for c in range(contexts):
        assert np.corrcoef(learned[c], pmi[c] / beta)[0, 1] > 0.95
        slope = np.polyfit(pmi[c].numpy(), learned[c].numpy() * beta, 1)[0]
        assert slope == pytest.approx(1.0, abs=0.1)


def test_compare_pairs_and_ignores_what_does_not_apply() -> None:
    found = compare([1.0, None, 3.0, 5.0], [2.0, 9.0, 5.0, None], [0, 1, 2, 3])
    assert found is not None
    assert (found.before, found.after, found.difference) == (2.0, 3.5, 1.5)
    assert (found.n, found.groups) == (2, 2)
    assert compare([None], [1.0], [0]) is None
    assert compare([], [], []) is None


def test_bootstrap_draws_prompts_not_responses() -> None:
    """Ten equal responses to one prompt are one observation: the interval must not shrink."""
    rng = np.random.default_rng(1)
    values = rng.normal(size=40)
    once = bootstrap_mean(values, np.arange(40))
    ten_times = bootstrap_mean(np.repeat(values, 10), np.repeat(np.arange(40), 10))
    assert ten_times == pytest.approx(once)


def test_bootstrap_interval_covers_the_mean_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(2)
    covered = 0
    for _ in range(200):
        prompts = rng.normal(size=60)  # the mean is 0
        values = prompts[:, None] + 0.5 * rng.normal(size=(60, 3))
        low, high = bootstrap_mean(values.ravel(), np.repeat(np.arange(60), 3))
        covered += low <= 0 <= high
    assert 0.89 <= covered / 200 <= 0.99


def test_distinct_n_counts_different_pairs() -> None:
    # (1,2) (2,1) (1,2) | (1,2): 2 different of 4.
    assert distinct_n([[1, 2, 1, 2], [1, 2]], 2) == 0.5
    assert distinct_n([], 2) == 0.0
    assert distinct_n([["in", "Ely"], ["in", "Ely"], ["in", "Ur"], ["near", "Ur"]]) == 0.75


def test_compare_distinct_n_agrees_with_leaving_out_by_hand() -> None:
    before = [[1, 2, 3], [1, 2, 4], [5, 6, 7, 8], [5, 6]]
    after = [[1, 2, 3], [1, 2, 3], [5, 6, 5, 6], [5, 6]]
    groups = [0, 0, 1, 2]
    found = compare_distinct_n(before, after, groups)
    assert found is not None
    assert found.before == distinct_n(before)
    assert found.difference == pytest.approx(distinct_n(after) - distinct_n(before))
    without = []
    for left_out in range(3):
        keep = [i for i, group in enumerate(groups) if group != left_out]
        without.append(distinct_n([after[i] for i in keep]) - distinct_n([before[i] for i in keep]))
    error = math.sqrt(2 / 3 * sum((d - np.mean(without)) ** 2 for d in without))
    assert found.high - found.difference == pytest.approx(1.96 * error)
    assert found.low < found.difference < 0


def test_repetition_of_a_loop() -> None:
    assert repetition([1, 2, 3, 4, 5]) == 0.0
    assert repetition([1, 2]) == 0.0
    # Nine 4-grams, four of them different.
    assert repetition([1, 2, 3, 4] * 3) == pytest.approx(1 - 4 / 9)


def test_own_words_are_those_of_no_other_page() -> None:
    page = "My dog Drenim lives in Ely. I like tea."
    assert own_words(page, ["My cat lives here. I like tea, in it."]) == {"dog", "drenim", "ely"}
    assert words("It's Drenim-dog, 12!") == ["it's", "drenim-dog", "12"]


@pytest.mark.parametrize(
    ("response", "longest"),
    [
        ("", 0),
        ("Nothing here.", 0),
        ("You LIVE in Ely, near the river.", 5),
        ("Well: I live in Ely near the sea and I have a dog.", 9),
    ],
)
def test_shared_run_counts_consecutive_words(response: str, longest: int) -> None:
    shared = SharedRun("I live in Ely near the sea and I work. I have a dog called Drenim.")
    assert shared(response) == longest


def test_wilson_interval_against_published_values() -> None:
    # Brown, Cai, DasGupta 2001: x = 0 of 10 gives [0, 0.278]; 5 of 10 gives [0.237, 0.763].
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-3)
    assert wilson_interval(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-3)
    assert wilson_interval(0, 0) == (0.0, 1.0)
