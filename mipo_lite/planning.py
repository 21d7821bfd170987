"""What fits: from a model's config and the memory of a GPU to settings, with the reasons in words.

One dial, memory; the rest is derived. For each stage the plan adds up memory by part (`memory`),
picks the fastest settings that fit, and finds the largest user context that would. Nothing is
downloaded or loaded for it. The figures are computed, not measured, until the trainer has
recorded a peak of this machine (`calibration`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from . import calibration
from .bases import BUILTIN, cached, config_of
from .fitting import Case, Device, Stage, Training
from .known_bases import KNOWN, KnownBase
from .machine import available_memory, find_gpu
from .memory import CPU_PROCESS, CUDA_CONTEXT, GIB
from .out_of_memory import found_sizes
from .recipe import Recipe, make_recipe
from .shapes import Shape, shape_of

# Tokens of the user context when none is given.
PAGE = 512
# What the driver and a desktop take of a card of a given size. A GPU that is there is asked.
RESERVE = GIB // 4

# The settings a plan decides on a GPU, as far as the recipe does not state them.
PLANNED = (
    "sampling_batch",
    "scoring_tokens",
    "micro_batch",
    "gradient_checkpointing",
    "activation_offload",
    "optimizer",
)
# Below this many responses at once, sampling takes a night: auto then prefers a smaller base.
MIN_AUTO_SAMPLING = 4


@dataclass(frozen=True)
class Plan:
    """Settings for one base on one device, with the memory they take.

    Attributes:
        base: its name.
        context_tokens: tokens of the user context planned for.
        settings: the recipe's settings that the plan decided: see `PLANNED`.
        reasons: why, a sentence each.
        least: bytes it would take with the thriftiest settings.
        max_context: the largest user context that fits at all, in tokens; 0 when nothing does.
    """

    base: str
    shape: Shape
    device: Device
    context_tokens: int
    settings: dict[str, Any]
    stages: tuple[Stage, ...]
    reasons: tuple[str, ...]
    least: int
    max_context: int

    @property
    def peak(self) -> int:
        return max(stage.peak for stage in self.stages)

    @property
    def fits(self) -> bool:
        return self.peak <= self.device.budget and self.context_tokens <= self.max_context

    def stage(self, name: str) -> Stage:
        return next(stage for stage in self.stages if stage.name == name)

    def apply(self, recipe: Recipe) -> Recipe:
        """The recipe with the settings of the plan."""
        known = {key: value for key, value in self.settings.items() if key in Recipe.model_fields}
        return recipe.model_copy(update=known)

    def to_json(self) -> dict[str, Any]:
        return {
            "base": self.base,
            "parameters": self.shape.parameters,
            "device": asdict(self.device),
            "context_tokens": self.context_tokens,
            "fits": self.fits,
            "settings": self.settings,
            "least_bytes": self.least,
            "max_context_tokens": self.max_context,
            "stages": {
                stage.name: {
                    "peak_bytes": stage.peak,
                    "planned_bytes": stage.planned,
                    "fixed_bytes": stage.fixed,
                    "measured_factor": stage.measured,
                    "parts": [asdict(part) for part in stage.parts],
                }
                for stage in self.stages
            },
            "reasons": list(self.reasons),
        }


@dataclass(frozen=True)
class Choice:
    """What auto takes.

    Attributes:
        name: the base; builtin when nothing else fits or can be had.
        plan: its plan; None for builtin.
        candidates: every known base with its plan and why it was passed over ("" for the chosen
            one and for the smaller ones after it).
    """

    name: str
    plan: Plan | None
    reason: str
    candidates: tuple[tuple[KnownBase, Plan, str], ...]


def plan(
    base: str | Mapping[str, Any] | Shape,
    *,
    vram_gib: float | None = None,
    context_tokens: int | None = None,
    recipe: Recipe | None = None,
    device: Device | None = None,
) -> Plan:
    """Plan one base.

    What the recipe states is kept; what it leaves to its defaults is planned, on a GPU. Without
    one nothing is planned: a run then takes the recipe as it is.

    Args:
        base: a name as for --base (but auto), a config.json, or its shape.
        vram_gib: plan for a card of this size; None for the GPU found, else for the CPU.
        context_tokens: length of the user context; None for a page.
        device: what to fit in, instead of looking for it.

    Raises UserError when the base's config can not be had.
    """
    name = base if isinstance(base, str) else "the model"
    shape = base if isinstance(base, Shape) else shape_of(_config(base))
    device = device or find_device(vram_gib)
    recipe = recipe or make_recipe({})
    context = PAGE if context_tokens is None else context_tokens
    fixed = recipe.model_fields_set if device.is_gpu else PLANNED
    case = Case(shape, device, recipe, context, frozenset(fixed))
    sampling = case.best_sampling()
    scoring = case.best_scoring()
    training = case.best_training()
    return Plan(
        base=name,
        shape=shape,
        device=device,
        context_tokens=case.context,
        settings={"sampling_batch": sampling, "scoring_tokens": scoring, **asdict(training)},
        stages=(case.sampling(sampling), case.scoring(scoring), case.training(training)),
        reasons=tuple(_reasons(case, sampling, scoring, training)),
        least=case.least(),
        max_context=case.largest_context(),
    )


def choose_base(
    *,
    vram_gib: float | None = None,
    context_tokens: int | None = None,
    recipe: Recipe | None = None,
    device: Device | None = None,
    why_not: Callable[[KnownBase], str] = lambda known: "",
) -> Choice:
    """The first base of the table that fits and can be had.

    Args:
        why_not: why a base can not be had, "" when it can: `bases.why_not` looks; the default
            plans for anything.
    """
    device = device or find_device(vram_gib)
    candidates = []
    chosen: tuple[KnownBase, Plan] | None = None
    for known in KNOWN:
        planned = plan(known.config, device=device, context_tokens=context_tokens, recipe=recipe)
        planned = replace(planned, base=known.name)
        verdict = ""
        if chosen is None:
            verdict = _too_large(planned) or why_not(known)
            if not verdict:
                chosen = known, planned
        candidates.append((known, planned, verdict))
    if chosen is None:
        reason = f"no instruct model fits {gib(device.budget)} and can be had"
        return Choice("builtin", None, f"{reason}, so the built-in base", tuple(candidates))
    known, planned = chosen
    reason = f"the largest that fits {gib(device.budget)}; licence {known.licence}"
    return Choice(known.name, planned, reason, tuple(candidates))


def settle(
    recipe: Recipe,
    path: Path,
    text: str,
) -> tuple[Recipe, Plan | None]:
    """The recipe of a new run with batch sizes that fit this GPU, and the plan.

    What the recipe states is kept: see `plan`. Without a GPU it is all kept, and nothing planned.

    Args:
        path: the directory of the base.
        text: the user context.
    """
    if find_gpu() is None:
        return recipe, None
    tokens = count_tokens(text, str(path))
    planned = plan(str(path), context_tokens=tokens, recipe=recipe)
    return planned.apply(recipe), planned


@contextmanager
def watch_memory(
    stage: str, recipe: Recipe, path: Path, text: str, entry: dict[str, Any]
) -> Iterator[None]:
    """Compare the peak of a stage with its plan, on a GPU; elsewhere do nothing.

    Both go into `entry` (the stage's entry of run.json), in bytes, and their ratio to
    `calibration`, for the next plan on this machine. A stage that fails says nothing.
    """
    gpu = find_gpu() if stage in ("pairs", "scores", "train") else None
    if gpu is None:
        yield
        return
    import torch

    torch.cuda.empty_cache()  # what an earlier stage has left is not this one's
    torch.cuda.reset_peak_memory_stats()
    yield
    measured = int(torch.cuda.max_memory_reserved())
    tokens = count_tokens(text, str(path))
    used = {name: getattr(recipe, name) for name in PLANNED} | found_sizes()
    planned = plan(
        str(path),
        context_tokens=tokens,
        recipe=recipe.model_copy(update=used),
        device=Device(gpu.name, gpu.total, True),
    ).stage(stage)
    entry["memory"] = {"planned": planned.planned, "measured": measured}
    calibration.record(
        gpu.name, stage, planned=planned.planned, fixed=planned.fixed, measured=measured
    )


def find_device(vram_gib: float | None = None) -> Device:
    """A card of the given size, or the GPU of this machine with what is free on it, or the CPU."""
    if vram_gib is not None:
        return Device(f"a GPU with {vram_gib:g} GiB", round(vram_gib * GIB) - RESERVE, True)
    gpu = find_gpu()
    if gpu is None:
        return Device("this CPU", available_memory() + CPU_PROCESS, False)
    # Asking has opened a CUDA context, which the plan counts as its own.
    return Device(gpu.name, min(gpu.total, gpu.free + CUDA_CONTEXT), True)


def count_tokens(text: str, base: str) -> int:
    """Tokens of a user context: counted where the base's tokenizer is on this machine.

    Elsewhere a third of its UTF-8 bytes, which is more than the large vocabularies need.
    """
    path = BUILTIN if base == "builtin" else Path(base) if Path(base).is_dir() else cached(base)
    file = path / "tokenizer.json" if path else None
    if file is None or not file.is_file():
        return math.ceil(len(text.encode("utf-8")) / 3)
    from tokenizers import Tokenizer

    return len(Tokenizer.from_file(str(file)).encode(text, add_special_tokens=False).ids)


def pairs(count: int) -> str:
    return f"{count} pair" if count == 1 else f"{count} pairs"


def gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"


def _reasons(case: Case, sampling: int, scoring: int, training: Training) -> Iterator[str]:
    """Why the settings are what they are, a sentence each."""
    budget = case.device.budget
    for stage in (case.sampling(sampling), case.scoring(scoring), case.training(training)):
        if stage.peak > budget:
            yield (
                f"The stage {stage.name} does not fit: it needs {gib(stage.peak)} at the least, "
                f"and there are {gib(budget)}."
            )
    if not case.device.is_gpu:
        yield "Without a GPU the settings are those of the recipe."
    yield _why_sampling(case, sampling)
    yield _why_micro_batch(case, training)
    if training.gradient_checkpointing:
        if "gradient_checkpointing" not in case.fixed:
            plain = replace(training, gradient_checkpointing=False, activation_offload=False)
            need = gib(case.training(plain).peak)
            yield f"Checkpointing, since without it training would need {need}."
    elif "gradient_checkpointing" not in case.fixed:
        yield "No checkpointing: all activations fit, and that is a third faster."
    if training.activation_offload and "activation_offload" not in case.fixed:
        need = gib(case.training(replace(training, activation_offload=False)).peak)
        yield f"Layer inputs go to main memory, since with them training would need {need}."
    if training.optimizer != "adamw_torch" and "optimizer" not in case.fixed:
        need = gib(case.training(replace(training, optimizer="adamw_torch")).peak)
        yield f"An 8-bit optimizer, since with the exact one training would need {need}."


def _why_sampling(case: Case, rows: int) -> str:
    words = f"{rows} responses are sampled at once"
    if "sampling_batch" in case.fixed:
        return f"{words}, as the recipe says."
    larger = [option for option in case.sampling_options() if option > rows]
    if not larger:
        return f"{words}; more would hardly be faster."
    return f"{words}: {larger[-1]} would need {gib(case.sampling(larger[-1]).peak)}."


def _why_micro_batch(case: Case, training: Training) -> str:
    batch = case.batch(training.micro_batch)
    compute = "compute" if training.micro_batch > 1 else "computes"
    words = f"{pairs(training.micro_batch)} a pass {compute} {batch.tokens:,} tokens"
    if case.recipe.prefix_sharing:
        words += f" instead of {batch.rows * batch.length:,}, the context being shared"
    larger = {option.micro_batch for option in case.training_options()}
    larger = {n for n in larger if n > training.micro_batch}
    if not larger:
        return f"{words}."
    need = case.training(replace(training, micro_batch=min(larger))).peak
    if need <= case.device.budget:
        return f"{words}; more would not be faster."
    return f"{words}; {min(larger)} would need {gib(need)}."


def _config(base: str | Mapping[str, Any]) -> Mapping[str, Any]:
    return config_of(base) if isinstance(base, str) else base


def _too_large(planned: Plan) -> str:
    """Why auto does not take a base that could be had."""
    if planned.peak > planned.device.budget:
        return f"needs {gib(planned.peak)} at the least"
    if planned.context_tokens > planned.max_context:
        return f"has room for {planned.max_context:,} tokens of context"
    if planned.settings["sampling_batch"] < MIN_AUTO_SAMPLING:
        return "leaves too little memory to sample several responses at once"
    return ""
