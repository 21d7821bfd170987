"""`mipo-lite plan`: what the planner found, for people or as JSON; what `--dry-run` says; and the
tables of the recipes.

`python -m mipo_lite.plan_report` prints the tables of recipes/README.md.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from .bases import NO_GPU, hub_reachable, why_not
from .console import console
from .contexts import load_user_context
from .fitting import Device, Stage
from .memory import GIB, MIB
from .planning import Choice, Plan, choose_base, count_tokens, find_device, gib, pairs, plan
from .recipe import Recipe, load_recipe, load_recipe_for

if TYPE_CHECKING:
    from .flow import Preview

# The card each recipe for a GPU is made for, GiB.
RECIPE_CARDS = {"6gb": 6, "8gb": 8, "12gb": 12, "24gb": 24, "careful": 12}
# The bases of the second table of recipes/README.md.
SHAPES = (
    "Qwen/Qwen2.5-0.5B-Instruct",
    "Qwen/Qwen2.5-1.5B-Instruct",
    "meta-llama/Llama-3.2-3B-Instruct",
    "meta-llama/Llama-3.1-8B-Instruct",
)
_STAGES = {"pairs": "sampling", "scores": "scoring", "train": "training"}


def report(
    base: str | None,
    *,
    vram_gib: float | None,
    user_context: Path | None,
    recipe: str | None = None,
    settings: Sequence[str] = (),
    as_json: bool = False,
) -> None:
    """Print what `personalize` would take, and what fits. Starts nothing, downloads at most a
    config.json.

    Args:
        base, recipe, settings: as for `personalize`; auto shows the table of known bases as well.

    Raises UserError for a base, a recipe or a context that can not be had.
    """
    text = load_user_context(user_context) if user_context else None
    device = find_device(vram_gib)
    flags = {"base": base}
    wanted = load_recipe(recipe, settings, flags)
    choice, name, reason = None, wanted.base, ""
    if name == "auto" and device.is_gpu:
        choice = _choose(wanted, device, text)
        name, reason = choice.name, choice.reason
    elif name == "auto":
        name, reason = "builtin", NO_GPU
    planned = plan(
        name,
        context_tokens=count_tokens(text, name) if text else None,
        recipe=load_recipe_for(name, recipe, settings, flags),
        device=device,
    )
    if as_json:
        print(json.dumps(planned.to_json() | {"reason": reason}, indent=2))
        return
    if choice:
        console.print(_candidates(choice, device))
    if reason:
        console.print(f"auto would take {name}: {reason}.\n")
    print_plan(planned)


def _choose(recipe: Recipe, device: Device, text: str | None) -> Choice:
    """What auto takes on this device, as `bases.find_base` chooses, but for failed downloads."""
    online = hub_reachable()
    return choose_base(
        recipe=recipe,
        context_tokens=count_tokens(text, "auto") if text else None,
        device=device,
        why_not=lambda known: why_not(known, online),
    )


def print_plan(planned: Plan) -> None:
    """One plan: memory by part for each stage, the settings, why, and the limits."""
    device, shape = planned.device, planned.shape
    console.print(
        f"[bold]{planned.base}[/]: {shape.parameters / 1e6:,.0f} million parameters, on "
        f"{device.name} with {gib(device.budget)} to use, "
        f"context of {planned.context_tokens:,} tokens"
    )
    for stage in planned.stages:
        console.print(_parts(stage, device))
    settings = ", ".join(f"{key} {value}" for key, value in planned.settings.items())
    console.print(f"Settings: {settings}", soft_wrap=True)
    for reason in planned.reasons:
        console.print(f"  {reason}", soft_wrap=True)
    verdict = "It fits" if planned.fits else "[bold]It does not fit[/]"
    console.print(
        f"{verdict}. The largest user context that would: {planned.max_context:,} tokens."
    )
    if not planned.fits:
        console.print(
            "Choose a smaller base, shorten the context, or lower max_new_tokens or lora_rank."
        )
    measured = [stage.measured for stage in planned.stages if stage.measured is not None]
    console.print(
        "Computed from the model's config"
        + (
            ", corrected by what earlier runs measured on this GPU."
            if measured
            else ", not measured: the first run on a GPU measures and corrects it."
        )
    )


def print_preview(preview: Preview) -> None:
    """What a command with --dry-run would do."""
    recipe = preview.recipe
    train, held_out = preview.prompts
    lines = {"Run": str(preview.path), "Base": str(preview.base)}
    about_others = ""
    if preview.words is not None:
        lines["Context"] = f"{preview.words} words"
        about_others = f", {recipe.pool_positives:.0%} about other personas"
    lines["Prompts"] = f"{train} to train on, {held_out} held out"
    lines["Pairs"] = f"{recipe.pairs}, negatives {recipe.negatives}{about_others}"
    lines["Training"] = (
        f"LoRA r {recipe.lora_rank}, {recipe.epochs:g} epochs at {recipe.learning_rate:g}, "
        f"{recipe.batch_size} pairs a step"
    )
    for name, words in lines.items():
        console.print(f"{name + ':':<9} {words}", markup=False, soft_wrap=True)
    for stage in preview.stages:
        state = "done already" if stage.name in preview.done else "to do"
        console.print(f"  {stage.name}: {state}")
    console.print("Nothing was started.")


def _parts(stage: Stage, device: Device) -> Table:
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(min_width=34)
    table.add_column(justify="right")
    table.add_column()
    table.add_row(f"[bold]{_STAGES[stage.name]}[/]", f"[bold]{gib(stage.peak)}[/]")
    largest = max((part.bytes for part in stage.parts if part.in_turn), default=0)
    for part in stage.parts:
        spared = part.in_turn and part.bytes < largest
        note = "at another moment, not added" if spared else ""
        table.add_row(f"  {part.name}", size(part.bytes), note)
    if stage.measured is None:
        table.add_row("  fragmentation, an allowance", size(stage.allowance))
    else:
        table.add_row("  as measured here before", size(stage.allowance))
    name = "CUDA context" if device.is_gpu else "Python and its libraries"
    table.add_row(f"  {name}", size(stage.overhead))
    return table


def size(count: int) -> str:
    """Bytes in GiB, or in MiB where GiB would show nothing."""
    return gib(count) if abs(count) >= GIB else f"{count / MIB:,.0f} MiB"


def _candidates(choice: Choice, device: Device) -> Table:
    table = Table(title=f"Bases on {gib(device.budget)}", title_justify="left")
    for column in ("base", "needs", "largest context", "licence", ""):
        table.add_column(
            column,
            justify="right" if column in ("needs", "largest context") else "left",
            no_wrap=column == "base",
            overflow="fold",
        )
    for known, planned, verdict in choice.candidates:
        chosen = known.name == choice.name
        table.add_row(
            f"[bold]{known.name}[/]" if chosen else known.name,
            gib(planned.least),
            f"{planned.max_context:,}",
            known.licence + (", gated" if known.gated else ""),
            "taken" if chosen else verdict,
        )
    return table


def recipe_table() -> str:
    """The memory plan of every recipe on the card it is made for, in Markdown.

    The base is the one auto would take if everything that needs no agreement could be had.
    """
    lines = [
        "| recipe | on | base | at once | a pass | sampling | scoring | training "
        "| largest context | measured |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, card in RECIPE_CARDS.items():
        recipe = load_recipe(name)
        choice = choose_base(
            vram_gib=card,
            recipe=recipe,
            why_not=lambda known: "licence" if known.gated or known.restricted else "",
        )
        if choice.plan is None:
            raise ValueError(f"nothing fits {card} GiB with the recipe {name}")
        lines.append(_row(name, f"{card} GiB", choice.plan))
    for name in ("cpu", "quick", "builtin"):
        recipe = load_recipe(name)
        device = Device("CPU", 4 * GIB, False)
        planned = plan("builtin", recipe=recipe, device=device)
        lines.append(_row(name, "CPU", planned))
    return "\n".join(lines)


def _row(name: str, card: str, planned: Plan) -> str:
    settings = planned.settings
    cells = [
        f"`{name}`",
        card,
        planned.base.rpartition("/")[2],
        f"{settings['sampling_batch']} responses",
        pairs(settings["micro_batch"]),
        *(gib(stage.peak) for stage in planned.stages),
        f"{planned.max_context:,} tokens",
        "not measured",
    ]
    return f"| {' | '.join(cells)} |"


def shape_table() -> str:
    """Twelve plans, four bases with three contexts each, in Markdown: the least they take, and
    how fast a card of 8 GiB is for them. Default recipe."""
    lines = [
        "| base | context | weights | at least | with 8 GiB |",
        "|---|---|---|---|---|",
    ]
    recipe = load_recipe("default")
    for name in SHAPES:
        for context in (200, 1200, 3000):
            planned = plan(name, vram_gib=8, context_tokens=context, recipe=recipe)
            settings = planned.settings
            words = f"{settings['sampling_batch']} at once, {pairs(settings['micro_batch'])} a pass"
            if settings["gradient_checkpointing"]:
                words += ", checkpointing"
            lines.append(
                f"| {name.rpartition('/')[2]} | {context:,} tokens "
                f"| {gib(planned.stages[0].parts[0].bytes)} | {gib(planned.least)} "
                f"| {words if planned.fits else 'does not fit'} |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    print(recipe_table(), shape_table(), sep="\n\n")
