"""What the stages of a run took, in words, for the terminal and for the page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..planning import gib

Entry = Mapping[str, Any]


def current(stages: Mapping[str, Entry]) -> dict[str, Entry]:
    """The entries of run.json without those of stages whose result an earlier stage outdated."""
    return {name: entry for name, entry in stages.items() if entry["state"] != "stale"}


def stages_run(stages: Mapping[str, Entry]) -> dict[str, Entry]:
    """The entries of the stages that did anything."""
    return {name: entry for name, entry in stages.items() if entry.get("seconds")}


def took(entry: Entry) -> str:
    """Seconds and peak memory of a stage; what was not measured is not mentioned."""
    parts = [f"{entry['seconds']:.0f} s"]
    if (peak := entry.get("peak_memory")) is not None:
        parts.append(f"{gib(peak)} of main memory")
    if (gpu := entry.get("memory")) is not None:
        parts.append(f"{gib(gpu['measured'])} on the GPU ({gib(gpu['planned'])} planned)")
    if entry["state"] == "running":
        parts.append("so far")
    return ", ".join(parts)


def took_in_all(stages: Mapping[str, Entry]) -> str:
    """Seconds of all stages and the largest peaks."""
    entries = list(stages_run(stages).values())
    parts = [f"{sum(entry['seconds'] for entry in entries):.0f} s in all"]
    peaks = [entry["peak_memory"] for entry in entries if entry.get("peak_memory") is not None]
    if peaks:
        parts.append(f"{gib(max(peaks))} of main memory at most")
    on_gpu = [entry["memory"]["measured"] for entry in entries if entry.get("memory") is not None]
    if on_gpu:
        parts.append(f"{gib(max(on_gpu))} on the GPU")
    return ", ".join(parts)
