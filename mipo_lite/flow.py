"""The machinery of a run: stages that are repeated exactly when something they depend on changed.

A stage reads files of the run directory and writes files of the run directory. Its fingerprint
covers the settings it reads, what else it says it reads, and the fingerprint of the stage before
it. This module knows how stages are run, recorded and gone on with, and nothing about what they do.
"""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .base import Base, load_base
from .bases import BaseOffer, BaseSource, find_base, look_up, recorded_offer, recorded_source
from .console import console
from .contexts import Persona
from .errors import UserError
from .out_of_memory import remembering
from .planning import count_tokens, settle, watch_memory
from .prompts import Prompt, from_row
from .recipe import Recipe, load_recipe, load_recipe_for
from .run import Run, fingerprint, read_json, read_jsonl

VERSIONS = ("mipo-lite", "torch", "transformers", "trl", "peft", "bitsandbytes", "llama-cpp-python")

# What later stages read: when it is gone, its stage is run again. Exports may be removed for room.
_NEEDED = ("pairs.jsonl", "scores.jsonl", "adapter", "sft", "evaluation.jsonl", "metrics.json")


@dataclass
class Flow:
    """A run together with what its stages share; the base is loaded when first needed."""

    run: Run
    recipe: Recipe
    source: BaseSource
    stages: tuple[Stage, ...]
    trust_remote_code: bool = False

    @cached_property
    def base(self) -> Base:
        with console.status(f"Loading {self.source.name} in 4 bits"):
            return load_base(self.source, trust_remote_code=self.trust_remote_code)

    @cached_property
    def user(self) -> Persona:
        row = read_json(self.run / "context.json")
        return Persona("user", row["text"], row["facts"])

    @cached_property
    def prompts(self) -> tuple[Prompt, ...]:
        return tuple(map(from_row, read_jsonl(self.run / "prompts.jsonl")))


@dataclass(frozen=True)
class Stage:
    """A step of the flow.

    Attributes:
        settings: the settings it reads; a change of one makes the stage, and all after it, stale.
        files: what it writes, removed before a stale stage is run again.
        reads: what else its result depends on, as JSON; None when there is nothing.
    """

    name: str
    action: Callable[[Flow, dict[str, Any]], None]
    settings: tuple[str, ...]
    files: tuple[str, ...]
    reads: Callable[[Flow], Any] = lambda flow: None


@dataclass(frozen=True)
class Preview:
    """What a command would do.

    Attributes:
        path: the run directory.
        prompts: how many to train on, and how many are held out.
        words: length of the user context; None without one.
    """

    path: Path
    base: BaseOffer
    recipe: Recipe
    prompts: tuple[int, int]
    stages: tuple[Stage, ...]
    words: int | None = None

    @property
    def done(self) -> set[str]:
        """Names of the stages that an earlier run in the same directory has finished."""
        if not (self.path / "run.json").is_file():
            return set()
        stages = Run(self.path).meta["stages"]
        return {name for name, entry in stages.items() if entry["state"] == "done"}


def open_or_create(
    path: Path,
    inputs: dict[str, Any],
    chosen: Recipe,
    source: BaseSource,
    write: Callable[[Run], None],
    stages: tuple[Stage, ...],
    *,
    text: str = "",
    trust_remote_code: bool = False,
) -> Flow:
    """The run at `path`, checked to be of the same inputs, or a new one that `write` fills.

    Args:
        inputs: "command" and fingerprints of what the run is made from.
        text: the user context, whose length the plan depends on.
    """
    if (path / "run.json").is_file():
        opened = Run(path)
        _check_same(opened, {**inputs, "recipe": chosen.model_dump()})
        if not opened.meta["stages"]:  # perhaps killed before the inputs were copied
            write(opened)
        return Flow(opened, chosen, source, stages, trust_remote_code)
    chosen, planned = settle(chosen, source.path, text)
    meta = {
        **inputs,
        "recipe": chosen.model_dump(),
        "plan": planned.to_json() if planned else None,
        "base": {
            "name": source.name,
            "path": str(source.path),
            "revision": source.revision,
        },
        "seed": chosen.seed,
        "versions": {"python": platform.python_version(), **_versions()},
        "device": _device(),
    }
    created = Run.create(path, meta)
    write(created)
    return Flow(created, chosen, source, stages, trust_remote_code)


def resolve(
    path: Path,
    recipe: str | None,
    settings: Iterable[str],
    flags: dict[str, Any],
    defaults: tuple[str, str] = ("builtin", "default"),
    text: str = "",
) -> tuple[Recipe, BaseSource]:
    """The recipe and the base, downloaded.

    Of the run at `path`, if there is one: what is not stated anew is as it was there. Otherwise,
    without a recipe, the base decides: see `recipe.load_recipe_for`.
    """
    settings = list(settings)
    wanted = load_recipe(recipe, settings, flags)
    if (path / "run.json").is_file():
        run = Run(path)
        return recorded_recipe(run, wanted), recorded_source(run.meta["base"])
    source = find_base(wanted.base, recipe=wanted, context_tokens=_tokens(wanted, text))
    return load_recipe_for(source.name, recipe, settings, flags, defaults), source


def recorded_recipe(run: Run, stated: Recipe) -> Recipe:
    """The recipe of an existing run, with what `stated` states."""
    known = {key: value for key, value in run.meta["recipe"].items() if key in Recipe.model_fields}
    return Recipe(**{**known, **stated.model_dump(exclude_unset=True)})


def foresee(
    path: Path,
    recipe: str | None,
    settings: Iterable[str],
    flags: dict[str, Any],
    defaults: tuple[str, str] = ("builtin", "default"),
    text: str = "",
) -> tuple[Recipe, BaseOffer]:
    """What `resolve` would give, before anything is downloaded."""
    settings = list(settings)
    wanted = load_recipe(recipe, settings, flags)
    if (path / "run.json").is_file():
        run = Run(path)
        return recorded_recipe(run, wanted), recorded_offer(run.meta["base"])
    offer = look_up(wanted.base, recipe=wanted, context_tokens=_tokens(wanted, text))
    return load_recipe_for(offer.name, recipe, settings, flags, defaults), offer


def _tokens(wanted: Recipe, text: str) -> int | None:
    """Tokens of the user context, as far as the choice of the base depends on them."""
    return count_tokens(text, "auto") if wanted.base == "auto" else None


def execute(flow: Flow, only: str | None = None) -> None:
    """Run the stages that are not done; with `only`, up to that one and not beyond."""
    meta, recipe = flow.run.meta, flow.recipe.model_dump()
    page = flow.run.page or ""
    # What had to be halved for lack of memory is begun with, unless it was set anew since.
    sizes = {
        key: n for key, n in meta.get("fits", {}).items() if meta["recipe"][key] == recipe[key]
    }
    meta |= {"recipe": recipe, "fits": sizes}
    for stage, inputs in fingerprints(flow):
        if not flow.run.is_done(stage.name, inputs) or _was_removed(flow, stage):
            _start_over_if_stale(flow.run, stage, inputs)
            _outdate_later(flow, stage)
            with (
                flow.run.stage(stage.name, inputs) as entry,
                remembering(sizes, flow.run.save, {"scoring_tokens": flow.recipe.scoring_tokens}),
                watch_memory(stage.name, flow.recipe, flow.source.path, page, entry),
            ):
                stage.action(flow, entry)
        if stage.name == only:
            return


def fingerprints(flow: Flow) -> Iterator[tuple[Stage, str]]:
    """The stages in order, each with the fingerprint of all that its result depends on."""
    meta = flow.run.meta
    recipe = flow.recipe.model_dump()
    before = fingerprint([meta.get("context"), meta["prompts"], flow.source.revision])
    for stage in flow.stages:
        parts = [before, stage.name, {key: recipe[key] for key in stage.settings}]
        more = stage.reads(flow)
        before = fingerprint(parts if more is None else [*parts, more])
        yield stage, before


def _was_removed(flow: Flow, stage: Stage) -> bool:
    """Whether the user has removed what the stage had written, as damaged files ask for."""
    if stage.name == "baseline" and not flow.recipe.sft_baseline:
        return False
    return any(name in stage.files and not (flow.run / name).exists() for name in _NEEDED)


def _start_over_if_stale(run: Run, stage: Stage, inputs: str) -> None:
    """Remove what the stage wrote for other inputs; what it wrote for these is gone on with."""
    recorded = run.meta["stages"].get(stage.name)
    if recorded and recorded["inputs"] == inputs and recorded["state"] != "done":
        return
    for name in stage.files:
        path = run / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _outdate_later(flow: Flow, stage: Stage) -> None:
    """Mark what later stages made of an earlier result: it stays, and nobody takes it for new."""
    for later in flow.stages[flow.stages.index(stage) + 1 :]:
        if (entry := flow.run.meta["stages"].get(later.name)) is not None:
            entry |= {"state": "stale", "inputs": None}


def _check_same(run: Run, inputs: dict[str, Any]) -> None:
    """Raises UserError when the run was made from other inputs, naming the first that differ."""
    recorded = run.meta
    fix = "Give the same inputs to go on, or choose another --run to start anew."
    if recorded.get("command") != inputs["command"]:
        raise UserError(f"{run.path} was made by `mipo-lite {recorded.get('command')}`.", fix)
    old, new = recorded["recipe"], inputs["recipe"]
    changed = [
        f"{key} was {old.get(key)}, now {new[key]}" for key in new if old.get(key) != new[key]
    ]
    if changed:
        raise UserError(f"{run.path} belongs to another recipe: {'; '.join(changed[:3])}.", fix)
    for key, name in (
        ("context", "user context"),
        ("prompts", "prompts"),
        ("answers", "prompts (their answers differ)"),
    ):
        if recorded.get(key) != inputs.get(key):
            raise UserError(f"{run.path} was made with another {name} file.", fix)


def _versions() -> dict[str, str]:
    found = {}
    for package in VERSIONS:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _device() -> str:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU, {os.cpu_count()} cores"
