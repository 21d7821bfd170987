"""The search behind a plan: the fastest settings of each stage that fit a device.

Pure arithmetic on a shape, a recipe and a number of bytes. Speed is compared, not predicted: by
tokens computed for a pair, weighted as `Case.cost` says.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from . import calibration
from .memory import (
    CPU_PROCESS,
    CUDA_CONTEXT,
    FRAGMENTATION,
    OPTIMIZER_BYTES,
    Attention,
    Batch,
    Part,
    sampling_parts,
    scoring_parts,
    total,
    training_parts,
    trie_attention,
)
from .recipe import Recipe
from .shapes import Shape

# Assumed lengths, in tokens: a request with its chat template, and the page of a persona of the
# pool.
PROMPT, PERSONA = 64, 128
SAMPLING_BATCHES = (64, 48, 32, 24, 16, 12, 8, 6, 4, 3, 2, 1)
SCORING_TOKENS = (8192, 6144, 4096, 3072, 2048, 1024)


@dataclass(frozen=True)
class Device:
    """What a plan has to fit in: `budget` bytes, on a GPU or in main memory."""

    name: str
    budget: int
    is_gpu: bool

    @property
    def compute_bytes(self) -> int:
        """Bytes of a number: 16 bits on a GPU, float32 on a CPU (see `base.load_base`)."""
        return 2 if self.is_gpu else 4

    @property
    def overhead(self) -> int:
        return CUDA_CONTEXT if self.is_gpu else CPU_PROCESS


@dataclass(frozen=True)
class Stage:
    """Memory of one stage.

    Attributes:
        name: pairs, scores or train, as in run.json.
        measured: the factor this machine's earlier runs showed; None before the first.
        overhead: CUDA context, or the Python process on a CPU.
    """

    name: str
    parts: tuple[Part, ...]
    measured: float | None
    overhead: int

    @property
    def fixed(self) -> int:
        """Bytes that do not vary with batch and length."""
        return sum(part.bytes for part in self.parts if not part.varies)

    @property
    def planned(self) -> int:
        """Bytes of the tensors at the peak: what `calibration.record` is told."""
        return total(list(self.parts))

    @property
    def allowance(self) -> int:
        """For fragmentation; or, once measured, by how much the varying parts were off."""
        factor = 1 + FRAGMENTATION if self.measured is None else self.measured
        return round((factor - 1) * (self.planned - self.fixed))

    @property
    def peak(self) -> int:
        return self.planned + self.allowance + self.overhead


@dataclass(frozen=True)
class Training:
    """The training settings of a plan, under the recipe's names."""

    micro_batch: int
    gradient_checkpointing: bool
    activation_offload: bool
    optimizer: str


@dataclass(frozen=True)
class Case:
    """One question: this base, on this device, with this recipe and context."""

    shape: Shape
    device: Device
    recipe: Recipe
    context: int
    fixed: frozenset[str]

    @property
    def c(self) -> int:
        return self.device.compute_bytes

    @property
    def length(self) -> int:
        """The longest row: context, request and response."""
        return self.context + PROMPT + self.recipe.max_new_tokens

    @cached_property
    def factors(self) -> dict[str, float | None]:
        names = ("pairs", "scores", "train")
        return {name: calibration.factor(self.device.name, name) for name in names}

    def stage(self, name: str, parts: list[Part]) -> Stage:
        return Stage(name, tuple(parts), self.factors[name], self.device.overhead)

    # Sampling

    def sampling_options(self) -> tuple[int, ...]:
        if "sampling_batch" in self.fixed:
            return (self.recipe.sampling_batch,)
        return SAMPLING_BATCHES

    def sampling(self, rows: int) -> Stage:
        # In the worst chunk every row has another persona's page for its negative.
        prefill = self.context + rows * (PERSONA + PROMPT)
        gpu = self.device.is_gpu
        attention = trie_attention(self.context, rows, PERSONA + PROMPT, 0, 0, gpu=gpu)
        parts = sampling_parts(
            self.shape,
            rows=rows,
            length=self.length,
            prefill=prefill,
            attention=attention,
            rank=self.recipe.lora_rank,
            c=self.c,
        )
        return self.stage("pairs", parts)

    def best_sampling(self) -> int:
        return self.first_that_fits(self.sampling_options(), self.sampling)

    # Scoring

    def scoring_options(self) -> tuple[int, ...]:
        if "scoring_tokens" in self.fixed:
            return (self.recipe.scoring_tokens,)
        return SCORING_TOKENS

    def scoring(self, tokens: int) -> Stage:
        # A row that is longer than a batch is scored alone.
        tokens = max(tokens, self.length)
        row = PROMPT + self.recipe.max_new_tokens
        rows = max(1, (tokens - self.context) // row)
        attention = trie_attention(self.context, rows, row, 0, 0, gpu=self.device.is_gpu)
        parts = scoring_parts(
            self.shape, tokens=tokens, attention=attention, rank=self.recipe.lora_rank, c=self.c
        )
        return self.stage("scores", parts)

    def best_scoring(self) -> int:
        return self.first_that_fits(self.scoring_options(), self.scoring)

    def first_that_fits(self, options: tuple[int, ...], stage: Callable[[int], Stage]) -> int:
        """The first, or the last (smallest) one where none fits."""
        fitting = (option for option in options if stage(option).peak <= self.device.budget)
        return next(fitting, options[-1])

    # Training

    def training_options(self) -> Iterator[Training]:
        recipe, gpu = self.recipe, self.device.is_gpu
        batches = [n for n in range(1, recipe.batch_size + 1) if recipe.batch_size % n == 0]
        options: dict[str, list[Any]] = {
            "micro_batch": batches,
            "gradient_checkpointing": [False, True],
            "activation_offload": [False, True] if gpu else [False],
            "optimizer": list(OPTIMIZER_BYTES) if gpu else ["adamw_torch"],
        }
        for name in options:
            if name in self.fixed:
                options[name] = [getattr(recipe, name)]
        both_fixed = {"gradient_checkpointing", "activation_offload"} <= self.fixed
        for values in itertools.product(*options.values()):
            option = Training(*values)
            # Offloading whole activations would move all of them over the bus: only inputs.
            if option.gradient_checkpointing or not option.activation_offload or both_fixed:
                yield option

    def batch(self, micro_batch: int) -> Batch:
        """A micro batch: pairs that share the context, and each its prompt."""
        recipe, pairs = self.recipe, micro_batch
        response = recipe.max_new_tokens
        rows = 2 * pairs
        if not recipe.prefix_sharing:
            plain = Attention(rows * self.length**2)
            return Batch(rows * self.length, rows, self.length, rows * response, plain, False)
        personas = 0
        if recipe.pool_positives:
            personas = min(pairs - 1, math.ceil(recipe.pool_positives * pairs))
        context = self.context + personas * PERSONA
        attention = trie_attention(context, pairs, PROMPT, 2, response, gpu=self.device.is_gpu)
        tokens = context + pairs * PROMPT + rows * response
        return Batch(tokens, rows, self.length, rows * response, attention, True)

    def training(self, option: Training) -> Stage:
        parts = training_parts(
            self.shape,
            self.batch(option.micro_batch),
            rank=self.recipe.lora_rank,
            checkpointing=option.gradient_checkpointing,
            offload=option.activation_offload,
            optimizer=option.optimizer,
            c=self.c,
        )
        return self.stage("train", parts)

    def best_training(self) -> Training:
        """The cheapest that fits; where none does, the one that needs least."""
        options = list(self.training_options())
        peaks = {option: self.training(option).peak for option in options}
        fitting = [option for option in options if peaks[option] <= self.device.budget]
        if not fitting:
            return min(options, key=lambda option: peaks[option])
        return min(fitting, key=lambda option: (self.cost(option), peaks[option]))

    def cost(self, option: Training) -> float:
        """Relative time for a pair, in tokens through the linear layers.

        Attention of a token to m others costs as much as 2 L q m / linear weights more tokens.
        Unpacking the weights costs a pass some 200 tokens (memory traffic against arithmetic of
        current cards). Checkpointing computes the forward again, a third of a step; offloading
        copies; an 8-bit or paged optimizer is hardly slower but less exact, so it comes last.
        """
        batch = self.batch(option.micro_batch)
        seen = batch.tokens * self.length  # about: a token of an answer sees its whole row
        attention = 2 * self.shape.layers * self.shape.query * seen
        tokens = batch.tokens + 200 + attention / self.shape.linear_parameters
        tokens *= 4 / 3 if option.gradient_checkpointing else 1
        tokens *= 1.15 if option.activation_offload else 1
        tokens *= 1 + 0.01 * list(OPTIMIZER_BYTES).index(option.optimizer)
        return tokens / option.micro_batch

    # Limits

    def least(self) -> int:
        """Bytes of the largest stage with the thriftiest settings."""
        options = list(self.training_options())
        smallest = min(option.micro_batch for option in options)
        options = [option for option in options if option.micro_batch == smallest]
        return max(
            self.sampling(self.sampling_options()[-1]).peak,
            self.scoring(self.scoring_options()[-1]).peak,
            min(self.training(option).peak for option in options),
        )

    def largest_context(self) -> int:
        """Tokens of the longest user context with which every stage fits somehow; 0 for none."""

        def fits(context: int) -> bool:
            return replace(self, context=context).least() <= self.device.budget

        low, high = 0, max(0, self.shape.window - PROMPT - self.recipe.max_new_tokens)
        if not fits(0):
            return 0
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if fits(middle) else (low, middle - 1)
        return low
