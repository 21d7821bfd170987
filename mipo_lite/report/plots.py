"""The plots of the page: matplotlib figures as inline SVG that follow the page's colours.

Colours are drawn as place-holders and replaced by the page's CSS variables, so that one SVG
serves light and dark. Text stays text, in the page's font.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK, FAINT, BEFORE, AFTER = "#010203", "#040506", "#070809", "#0a0b0c"
_VARIABLES = {INK: "var(--ink)", FAINT: "var(--faint)", BEFORE: "var(--before)"}
_VARIABLES[AFTER] = "var(--after)"
_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}


def training_plot(history: Sequence[dict[str, float]]) -> str:
    """Loss and reward margin over the steps, of the batches and of the held-out pairs."""

    def draw(figure: Figure) -> None:
        for axes, name, title in zip(
            figure.subplots(1, 2), ("loss", "margin"), ("loss", "reward margin"), strict=True
        ):
            for key, colour, marker, label in (
                (name, BEFORE, "", "training pairs"),
                (f"held_out_{name}", AFTER, "o", "held-out pairs"),
            ):
                rows = [row for row in history if key in row]
                axes.plot(
                    [row["step"] for row in rows],
                    [row[key] for row in rows],
                    color=colour,
                    marker=marker,
                    markersize=4,
                    linewidth=1.6,
                    label=label,
                )
            if name == "loss":
                axes.axhline(math.log(2), color=FAINT, linewidth=1, linestyle="--")
            axes.set_title(title, fontsize=10)
            axes.set_xlabel("step")
            axes.locator_params(nbins=4)
            axes.xaxis.get_major_locator().set_params(integer=True)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)

    return _svg(draw, "training")


def pair_plot(chosen: Sequence[float], rejected: Sequence[float]) -> str:
    """PMI of chosen and rejected responses."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        _histograms(axes, (rejected, "rejected"), (chosen, "chosen"))
        axes.axvline(0, color=FAINT, linewidth=1)
        axes.set_xlabel("PMI, nats")
        axes.set_ylabel("pairs")

    return _svg(draw, "pairs")


def bits_plot(before: Sequence[float], after: Sequence[float], contexts: int) -> str:
    """Bits about the context in each answer; no answer can hold more than log2 K of them."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        _histograms(axes, (before, "before"), (after, "after"), low=-2.0)
        axes.axvline(0, color=FAINT, linewidth=1)
        axes.axvline(math.log2(contexts), color=FAINT, linewidth=1, linestyle="--")
        axes.set_xlabel(f"bits, of {math.log2(contexts):g} at most")
        axes.set_ylabel("answers")

    return _svg(draw, "bits")


def length_plot(before: Sequence[float], after: Sequence[float]) -> str:
    """Length of the answers."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        _histograms(axes, (before, "before"), (after, "after"), low=0)
        axes.set_xlabel("length, tokens")
        axes.set_ylabel("answers")

    return _svg(draw, "length")


def _histograms(
    axes: Axes,
    first: tuple[Sequence[float], str],
    second: tuple[Sequence[float], str],
    low: float | None = None,
) -> None:
    """Two step histograms over the same bins, the second filled; values below `low` go in the
    first bin."""
    values = np.concatenate([first[0], second[0]])
    start = float(values.min()) if low is None else low
    bins = np.linspace(start, max(float(values.max()), start + 1), 25).tolist()
    axes.hist(
        np.clip(second[0], start, None),
        bins=bins,
        histtype="stepfilled",
        color=AFTER,
        alpha=0.35,
        label=second[1],
    )
    axes.hist(
        np.clip(first[0], start, None),
        bins=bins,
        histtype="step",
        edgecolor=BEFORE,
        linewidth=1.8,
        label=first[1],
    )
    axes.legend(fontsize=8)


def _svg(draw: Callable[[Figure], Any], name: str) -> str:
    """Draw, and return an <svg> element that scales with the page."""
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": name}):  # type: ignore[arg-type]
        # Small, so that its text is still read when a phone shows it small.
        figure = Figure(figsize=(4.8, 2.5), layout="constrained")
        draw(figure)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None}, transparent=True)
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    # A style inside an SVG applies to the whole page.
    svg = re.sub(r"<style\b.*?</style>", "", svg, flags=re.S)
    # Ids are the page's too: two figures may both have an "axes_1".
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", svg)
    svg = re.sub(r'xlink:href="#([^"]+)"', rf'href="#{name}-\1"', svg)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r'\1 role="img"', svg, count=1)
    svg = re.sub(r"font-family: [^;\"]+;? ?", "", svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, variable)
    return svg
