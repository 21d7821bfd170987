"""Sample many responses at once, computing shared prompt text once.

A chunk of requests is prefilled as a trie (see `mipo_lite.trie`): a user context that stands
before every prompt is read once, and its keys and values are then copied into each row's cache.
From there transformers' own `generate` decodes in stretches of a few tokens; between stretches
the rows that have ended leave the batch, so that one long answer does not hold the others.

Each request draws from its own seed. Chunks are fixed, consecutive runs of `batch_size` requests,
so a run that goes on at a chunk boundary gives bit for bit what an uninterrupted one gives. (In
another chunk the same request sees other rounding, and may in rare cases take another token.)

Knows about token ids only: no text, no chat template.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from .out_of_memory import halving
from .prefix_sharing import backbone_of, check_supported, run_trie
from .trie import build_trie

# Tokens decoded between two looks at which rows have ended. Starting `generate` costs about one
# decoding step, and an ended row waits half a stretch on average.
STRETCH = 16


@dataclass(frozen=True)
class SampleRequest:
    """A prompt (token ids, with the generation prompt at its end) and the seed of its answer."""

    prompt_ids: list[int]
    seed: int


@dataclass(frozen=True)
class Sample:
    """A response. `token_ids` ends with an end token exactly if it `ended` by itself."""

    token_ids: list[int]
    ended: bool


def sample(
    model: Any,
    requests: Sequence[SampleRequest],
    *,
    max_new_tokens: int,
    eos_ids: Sequence[int],
    pad_id: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    batch_size: int = 32,
) -> Iterator[Sample]:
    """Yield one `Sample` for each of `requests`, in their order.

    `model` is a causal LM or a PeftModel; the adapter counts if it is enabled when the chunk is
    decoded. `temperature=0` is greedy. The cache of a chunk takes
    `batch_size * (longest prompt + max_new_tokens)` tokens of keys and values.

    A chunk that takes more memory than there is is decoded in parts.

    Raises ValueError for an empty prompt, `UnsupportedModel` for a model that cannot run on a trie,
    UserError when memory does not suffice for one response.
    """
    check_supported(backbone_of(model))
    if any(not request.prompt_ids for request in requests):
        raise ValueError("a prompt needs at least one token")
    config = GenerationConfig(
        do_sample=False,  # the draw is in SeededDraw, where it has its own seed for each row
        eos_token_id=list(eos_ids),
        pad_token_id=pad_id,
        use_cache=True,
        return_dict_in_generate=True,
        output_scores=False,
    )
    for start in range(0, len(requests), batch_size):
        chunk = requests[start : start + batch_size]
        was_training = model.training
        model.eval()
        try:
            with _no_generation_config(model):
                samples = _decode_within(model, chunk, config, max_new_tokens, temperature, top_p)
        finally:
            model.train(was_training)
        yield from samples


@contextmanager
def _no_generation_config(model: Any) -> Iterator[None]:
    """While the block runs, the model has no settings of its own for `generate`.

    `generate` takes from there what a call leaves open. Many instruct models bring a
    repetition_penalty, which counts the prompt too: a sample with it is not the model's own, and it
    punishes words of the user's page.
    """
    causal_lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    theirs = causal_lm.generation_config
    causal_lm.generation_config = GenerationConfig()
    try:
        yield
    finally:
        causal_lm.generation_config = theirs


def _decode_within(
    model: Any, chunk: Sequence[SampleRequest], config: GenerationConfig, *how: Any
) -> list[Sample]:
    """`_decode` of a chunk, in parts where it takes more memory than there is."""
    samples: list[Sample] = []

    def decode(rows: int) -> list[Sample]:
        return _decode(model, chunk[len(samples) : len(samples) + rows], config, *how)

    while len(samples) < len(chunk):
        samples += halving("sampling_batch", len(chunk) - len(samples), decode)
    return samples


@torch.inference_mode()
def _decode(
    model: Any,
    chunk: Sequence[SampleRequest],
    config: GenerationConfig,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
) -> list[Sample]:
    """Decode one chunk to its end."""
    state = _prefill(model, chunk, config.pad_token_id, max_new_tokens)
    responses: list[list[int]] = [[] for _ in chunk]
    eos = set(config.eos_token_id)
    while len(state.rows):
        done = len(responses[state.rows[0]])
        config.max_new_tokens = min(STRETCH, max_new_tokens - done)
        output = model.generate(
            input_ids=state.input_ids,
            attention_mask=state.attention_mask,
            past_key_values=state.cache,
            generation_config=config,
            logits_processor=_processors(state.uniform[:, done:], temperature, top_p),
        )
        new = output.sequences[:, state.input_ids.shape[1] :]
        going = []
        for i, (row, tokens) in enumerate(zip(state.rows, new.tolist(), strict=True)):
            ended = _until_end(tokens, eos)
            responses[row] += ended
            if ended[-1] not in eos and len(responses[row]) < max_new_tokens:
                going.append(i)
        state = state.advance(new, output.past_key_values, going)
    return [Sample(ids, bool(ids) and ids[-1] in eos) for ids in responses]


@dataclass
class _Decoding:
    """The rows still being decoded.

    rows: their indices in the chunk; input_ids and attention_mask: [rows, length], left-padded;
    cache: keys and values of all but the last token; uniform: [rows, max_new_tokens] draws.
    """

    rows: list[int]
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    cache: DynamicCache
    uniform: torch.Tensor

    def advance(self, new: torch.Tensor, cache: DynamicCache, going: list[int]) -> _Decoding:
        """Append `new` tokens [rows, n] and keep the rows `going` (indices into rows)."""
        ids = torch.cat([self.input_ids, new], dim=1)
        mask = torch.cat([self.attention_mask, torch.ones_like(new)], dim=1)
        if len(going) == len(self.rows):
            return _Decoding(self.rows, ids, mask, cache, self.uniform)
        keep = torch.tensor(going, dtype=torch.long, device=ids.device)
        if going:
            cache.batch_select_indices(keep)
        return _Decoding(
            [self.rows[i] for i in going], ids[keep], mask[keep], cache, self.uniform[keep]
        )


def _prefill(
    model: Any, chunk: Sequence[SampleRequest], pad_id: int, max_new_tokens: int
) -> _Decoding:
    """Read the prompts as a trie, all but their last token, which `generate` starts with."""
    backbone = backbone_of(model)
    device = backbone.get_input_embeddings().weight.device
    prompts = [request.prompt_ids for request in chunk]
    longest = max(map(len, prompts))
    input_ids = torch.full((len(prompts), longest), pad_id, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        input_ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        attention_mask[row, longest - len(prompt) :] = 1

    cache = DynamicCache(config=backbone.config)
    if longest > 1:
        trie = build_trie([prompt[:-1] for prompt in prompts])
        read = DynamicCache()  # without a config: keeps every slot, also in sliding-window layers
        run_trie(backbone, backbone, trie, past_key_values=read, use_cache=True)
        slots = torch.zeros((len(prompts), longest - 1), dtype=torch.long)
        for row, path in enumerate(trie.paths):
            slots[row, longest - 1 - len(path) :] = torch.from_numpy(path)
        for layer, (keys, values, *_) in enumerate(read):
            index = slots.to(keys.device)
            keys, values = (kv[0][:, index].transpose(0, 1).contiguous() for kv in (keys, values))
            cache.update(keys, values, layer)

    uniform = torch.stack([seeded_uniform(request.seed, max_new_tokens) for request in chunk])
    return _Decoding(
        list(range(len(prompts))),
        input_ids.to(device),
        attention_mask.to(device),
        cache,
        uniform.to(device),
    )


def seeded_uniform(seed: int, n: int) -> torch.Tensor:
    """[n] float32 draws from [0, 1), the same on every device."""
    return torch.rand(n, generator=torch.Generator().manual_seed(seed))


def _processors(uniform: torch.Tensor, temperature: float, top_p: float) -> LogitsProcessorList:
    processors = LogitsProcessorList()
    if temperature == 0:
        return processors
    if temperature != 1:
        processors.append(TemperatureLogitsWarper(temperature))
    if top_p < 1:
        processors.append(TopPLogitsWarper(top_p))
    processors.append(SeededDraw(uniform))
    return processors


@dataclass
class SeededDraw(LogitsProcessor):
    """Sampling by inverting the distribution function, written as scores that argmax reads.

    uniform: [rows, steps], one draw for each row and step to come.
    """

    uniform: torch.Tensor
    step: int = field(default=0, init=False)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        token = inverse_cdf(scores.softmax(dim=-1), self.uniform[:, self.step])
        self.step += 1
        drawn = torch.full_like(scores, -torch.inf)
        return drawn.scatter_(1, token[:, None], 0.0)


def inverse_cdf(probs: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """The token at which the running sum of `probs` [rows, vocab] first exceeds `uniform` [rows].

    A token of probability 0 is never drawn, whatever the rounding of the sum.
    """
    cdf = probs.cumsum(dim=-1)
    # Scaled by the sum as it came out, so that rounding cannot leave the draw beyond the end.
    target = (uniform * cdf[:, -1])[:, None]
    token = torch.searchsorted(cdf, target, right=True)[:, 0]
    last = probs.shape[1] - 1 - (probs > 0).flip(1).int().argmax(dim=1)
    return torch.minimum(token, last)


def _until_end(tokens: list[int], eos: set[int]) -> list[int]:
    """`tokens` up to and with the first end token."""
    for i, token in enumerate(tokens):
        if token in eos:
            return tokens[: i + 1]
    return tokens
