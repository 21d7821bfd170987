"""Trains the built-in base from nothing: a tiny Qwen2 on chats from `corpus.py`.

Muon for the matrices, AdamW for the rest, bfloat16 products where the processor has them, a
constant learning rate that falls to zero over the last part. The corpus changes on the way: short
profiles and copied values first, then longer ones, and at the end the natural mix. Everything
follows from the settings and the seed; the state is saved every few minutes and picked up again.

Assumes a CPU; the shapes of the batches are few, so that torch.compile pays.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import Qwen2Config, Qwen2ForCausalLM

from mipo_lite.builtin.corpus import Document, Mix, document
from mipo_lite.builtin.tokenizer import VOCABULARY, as_chat_tokenizer

LENGTHS = (128, 192, 256, 320, 1024)
CHUNK_TOKENS = 400_000

COPYING = Mix(
    topics=(1, 4),
    fillers=(0, 1),
    turns=(1, 3),
    repeats=0.25,
    no_profile=0.06,
    sums=0.02,
    neutral=0.05,
    direct=0.55,
    direct_fact=0.95,
    indirect_fact=0.85,
    wrong=0.02,
    fact_weight=4.0,
)
READING = replace(
    COPYING,
    topics=(2, 9),
    fillers=(0, 5),
    turns=(1, 4),
    repeats=0.20,
    sums=0.12,
    direct=0.35,
    direct_fact=0.90,
    indirect_fact=0.65,
    wrong=0.05,
)
NATURAL = Mix(
    topics=(2, 10),
    fillers=(0, 6),
    repeats=0.04,
    sums=0.12,
    direct_fact=0.80,
    indirect_fact=0.50,
    fact_weight=2.0,
)
LONG = replace(NATURAL, repeats=0.0, no_profile=0.0, topics=(10, 14), fillers=(20, 65))


@dataclass(frozen=True)
class Round:
    """A rise of the learning rate, a plateau and a linear fall to zero; counts are tokens."""

    tokens: int
    natural: int  # of the natural mix, at its end
    rate: float = 1.0  # of the plateau, as a factor of the learning rates
    fall: int = 9_000_000


@dataclass(frozen=True)
class Settings:
    """Of the training; tokens are those of the text, without padding."""

    seed: int = 0
    rounds: tuple[Round, ...] = (
        Round(26_500_000, natural=8_000_000),
        Round(9_500_000, natural=3_500_000, rate=0.5),
        Round(9_000_000, natural=4_500_000, rate=0.5),
        Round(11_000_000, natural=5_500_000, rate=0.5),
    )
    copying_tokens: int = 4_000_000  # of COPYING at the start
    freer_from: int = 12_152_256  # from here on profiles use freer phrasings too
    batch_tokens: int = 8192
    muon_lr: float = 0.02
    adam_lr: float = 3e-3
    weight_decay: float = 0.02
    long_share: float = 0.015
    # So small a model is unsure of the letters of a value and misspells it when sampled at
    # temperature 1; sampling from sharper logits leaves the choice of the answer, and spells it.
    logit_scale: float = 1.25
    intermediate: int = 512

    @property
    def tokens(self) -> int:
        return sum(part.tokens for part in self.rounds)


def new_model(settings: Settings) -> Qwen2ForCausalLM:
    torch.manual_seed(settings.seed)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=settings.intermediate,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=2,
    )
    config._attn_implementation = "eager"
    return Qwen2ForCausalLM(config)


def fast_bfloat16() -> bool:
    """Whether the processor's bfloat16 products are faster than float32's.

    Without AVX-512 they are emulated.
    """
    return "AVX512" in torch.backends.cpu.get_cpu_capability()


class Muon(torch.optim.Muon):
    """`torch.optim.Muon` that multiplies in the parameters' own precision instead of bfloat16."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for matrix in group["params"]:
                gradient = matrix.grad
                momentum = self.state[matrix].setdefault(
                    "momentum_buffer", torch.zeros_like(gradient)
                )
                momentum.lerp_(gradient, 1 - group["momentum"])
                update = gradient.lerp(momentum, group["momentum"])  # Nesterov's
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                rate = group["lr"] * max(1, matrix.shape[0] / matrix.shape[1]) ** 0.5
                matrix.sub_(rate * _orthogonal(update, group))


def _orthogonal(matrix: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
    """Newton and Schulz's iteration: [n, m] with its singular values near 1."""
    a, b, c = group["ns_coefficients"]
    tall = matrix.shape[0] > matrix.shape[1]
    wide = matrix.T if tall else matrix
    wide = wide / wide.norm().clamp(min=group["eps"])
    for _ in range(group["ns_steps"]):
        gram = wide @ wide.T
        wide = a * wide + (b * gram + c * gram @ gram) @ wide
    return wide.T if tall else wide


def make_optimizers(model: torch.nn.Module, settings: Settings) -> list[torch.optim.Optimizer]:
    matrices: list[torch.nn.Parameter] = []
    rest: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (matrices if parameter.ndim == 2 and "embed" not in name else rest).append(parameter)
    return [
        (torch.optim.Muon if fast_bfloat16() else Muon)(
            matrices, lr=settings.muon_lr, weight_decay=settings.weight_decay
        ),
        torch.optim.AdamW(
            rest, lr=settings.adam_lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True
        ),
    ]


def round_at(settings: Settings, done: int) -> tuple[Round, int]:
    """The round under way after `done` tokens, and how many of its tokens are left."""
    end = 0
    for part in settings.rounds:
        end += part.tokens
        if done < end:
            return part, end - done
    return settings.rounds[-1], 0


def learning_rate(settings: Settings, done: int) -> float:
    """Factor of the learning rates after `done` tokens."""
    part, left = round_at(settings, done)
    rise = 0.02 + (part.tokens - left) / 500_000
    return part.rate * min(1.0, rise, left / part.fall)


def mix_at(settings: Settings, rng: random.Random, done: int) -> Mix:
    if done < settings.copying_tokens:
        return COPYING
    part, left = round_at(settings, done)
    mix = NATURAL if left <= part.natural else READING
    if rng.random() < settings.long_share:
        mix = LONG
    return replace(mix, freer=done >= settings.freer_from)


def token_weights(doc: Document, offsets: list[tuple[int, int]]) -> np.ndarray:
    """Loss weight of each token: that of its last character."""
    characters = np.zeros(len(doc.text) + 1, dtype=np.float32)
    for start, end, weight in doc.weights:
        characters[start:end] = weight
    ends = np.fromiter((end for _, end in offsets), dtype=np.int64, count=len(offsets))
    return characters[np.maximum(ends - 1, 0)]


def chunk(
    settings: Settings, tokenizer: Tokenizer, number: int, done: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Batches (ids, weights), each [rows, length + 1], of about CHUNK_TOKENS fresh tokens."""
    rng = random.Random(settings.seed * 1_000_003 + number)
    rows: dict[int, list[tuple[list[int], np.ndarray]]] = {length: [] for length in LENGTHS}
    count = 0
    while count < CHUNK_TOKENS:
        docs = [document(rng, mix_at(settings, rng, done + count)) for _ in range(256)]
        for doc, encoded in zip(docs, tokenizer.encode_batch([d.text for d in docs]), strict=True):
            tokens = encoded.ids[: LENGTHS[-1] + 1]
            length = next(n for n in LENGTHS if len(tokens) <= n + 1)
            rows[length].append((tokens, token_weights(doc, encoded.offsets)[: len(tokens)]))
            count += len(tokens)
    batches = []
    for length, members in rows.items():
        size = max(1, settings.batch_tokens // length)
        for start in range(0, len(members), size):
            ids = np.zeros((size, length + 1), dtype=np.int64)
            weights = np.zeros((size, length + 1), dtype=np.float32)
            for row, (row_ids, row_weights) in enumerate(members[start : start + size]):
                ids[row, : len(row_ids)] = row_ids
                weights[row, : len(row_ids)] = row_weights
            batches.append((ids, weights))
    rng.shuffle(batches)
    yield from batches


def save_model(
    model: Qwen2ForCausalLM, tokenizer: Tokenizer, out: Path, logit_scale: float
) -> None:
    """A loadable bfloat16 model directory; every logit is `logit_scale` times the trained one."""
    fresh = Qwen2ForCausalLM(model.config)
    fresh.load_state_dict(model.state_dict())
    fresh.tie_weights()
    fresh.model.norm.weight.data *= logit_scale
    fresh.bfloat16()
    fresh.generation_config.eos_token_id = 2
    fresh.generation_config.pad_token_id = 0
    fresh.save_pretrained(out)
    as_chat_tokenizer(tokenizer).save_pretrained(out)


def train(settings: Settings, tokenizer: Tokenizer, work: Path, compiled: bool = True) -> None:
    """Trains to the end, going on from `work/state.pt` if there is one.

    Leaves `work/model` (loadable, renewed every few minutes) and `work/loss.jsonl`.
    """
    model = new_model(settings)
    optimizers = make_optimizers(model, settings)
    done = number = step = 0
    state_file = work / "state.pt"
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        done, number, step = state["done"], state["number"], state["step"]
    base_rates = [settings.muon_lr, settings.adam_lr]

    def loss_of(ids: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.autocast("cpu", torch.bfloat16, enabled=fast_bfloat16()):
            hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
            logits = model.lm_head(hidden)
        nats = torch.nn.functional.cross_entropy(
            logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
        )
        scale = weights[:, 1:].flatten()
        answers = (scale >= 1.0).float()
        return (nats * scale).sum() / scale.sum(), (nats * answers).sum() / answers.sum()

    run_step = torch.compile(loss_of, dynamic=False) if compiled else loss_of
    log = (work / "loss.jsonl").open("a", encoding="utf-8")
    began = time.monotonic()
    saved_at = began
    while done < settings.tokens:
        for ids, weights in chunk(settings, tokenizer, number, done):
            rate = learning_rate(settings, done)
            for optimizer, base_rate in zip(optimizers, base_rates, strict=True):
                optimizer.param_groups[0]["lr"] = base_rate * rate
            loss, answer = run_step(torch.from_numpy(ids), torch.from_numpy(weights))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            done += int((ids > 0).sum())
            step += 1
            if step % 20 == 0:
                row = {
                    "step": step,
                    "tokens": done,
                    "loss": round(loss.item(), 4),
                    "answer_loss": round(answer.item(), 4),
                    "rate": round(rate, 4),
                    "seconds": round(time.monotonic() - began, 1),
                }
                log.write(json.dumps(row) + "\n")
                log.flush()
        number += 1
        if time.monotonic() - saved_at > 150 or done >= settings.tokens:
            saved_at = time.monotonic()
            state = {
                "model": model.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "done": done,
                "number": number,
                "step": step,
            }
            torch.save(state, work / "state.part")
            (work / "state.part").replace(state_file)
            save_model(model, tokenizer, work / "model", settings.logit_scale)
    log.close()
