"""The bench for a CUDA GPU: real shapes in NF4, long contexts, and what fits into how much memory.

Every figure comes from a fresh process, so that running out of memory is a row of the table and
not the end of it. Written to be run by `make bench-gpu`; it has not been run on a GPU yet.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

from .console import console, quiet_libraries
from .errors import UserError

SHAPES = ("qwen2.5-1.5b", "qwen2.5-7b")
CONTEXTS = (1_000, 4_000, 12_000)
CARDS_GB = (6, 8, 12, 24)
LONGEST = 30_000  # tokens; the shapes' positions end at 32,768
WAYS = ("trl", "ours")
OOM = "OOM"


def run_gpu_bench(json_path: str | Path | None = None) -> dict[str, Any]:
    """Measure everything, print two markdown tables, and write all figures to `json_path`.

    Raises UserError without a CUDA GPU.
    """
    import torch

    from .bench_training import Settings, model_directory

    if not torch.cuda.is_available():
        raise UserError(
            "There is no CUDA GPU here to measure.", "Run `mipo-lite bench` for this machine."
        )
    speed: list[dict[str, Any]] = []
    fits: list[dict[str, Any]] = []
    for shape in SHAPES:
        with model_directory(Settings(shape=shape)) as directory:
            for context in CONTEXTS:
                settings = Settings(shape=shape, context_tokens=context)
                row: dict[str, Any] = {"shape": shape, "context": context}
                for way in WAYS:
                    row[way] = in_fresh_process(settings, way, directory, steps=settings.repeats)
                speed.append(row)
            for card in CARDS_GB:
                row = {"shape": shape, "card_gb": card}
                for way in WAYS:
                    row[way] = _largest_context(shape, way, card, directory)
                fits.append(row)
    result = {"gpu": torch.cuda.get_device_name(), "speed": speed, "largest_context": fits}
    console.print(speed_table(speed), markup=False)
    console.print(context_table(fits), markup=False)
    if json_path is not None:
        Path(json_path).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


def _largest_context(shape: str, way: str, card_gb: int, directory: Path) -> int:
    from .bench_training import Settings

    def fits(context: int) -> bool:
        settings = Settings(shape=shape, context_tokens=context)
        return in_fresh_process(settings, way, directory, limit_gb=card_gb) is not None

    return largest_that_fits(fits, LONGEST)


def in_fresh_process(
    settings: Any, way: str, directory: Path, *, steps: int = 1, limit_gb: float | None = None
) -> dict[str, Any] | None:
    """Train `steps` batches in one way: {"seconds" a batch, "memory_bytes"}; None out of memory.

    Raises RuntimeError when it fails for another reason.
    """
    request = {
        "settings": asdict(settings),
        "way": way,
        "directory": str(directory),
        "steps": steps,
        "limit_gb": limit_gb,
    }
    command = [sys.executable, "-m", "mipo_lite.bench_gpu", "--one-way", json.dumps(request)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode == 0:
        return dict(json.loads(done.stdout.splitlines()[-1]))
    if "OutOfMemoryError" in done.stderr:
        return None
    raise RuntimeError(f"measuring {way} failed:\n{done.stderr[-2000:]}")


def _one_way(request: dict[str, Any]) -> dict[str, Any]:
    """In the fresh process."""
    import torch

    from .bench_training import Seconds, Settings, Way, make_batches

    settings = Settings(**request["settings"])
    if request["limit_gb"] is not None:
        whole = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(request["limit_gb"] * 2**30 / whole)
    with tempfile.TemporaryDirectory() as output:
        way = Way(request["way"], settings, Path(request["directory"]), Path(output))
        batches = make_batches(settings, way.vocab_size, request["steps"] + 1)
        begin = Seconds.now()
        batches = way.with_reference(batches)
        reference = (Seconds.now() - begin).clock / len(batches)
        steps = [way.step(batch).clock for batch in batches]
    memory = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    # The first step warms up; the reference pass of all batches is shared out among them.
    return {"seconds": median(steps[1:] or steps) + reference, "memory_bytes": memory}


def largest_that_fits(fits: Callable[[int], bool], limit: int, step: int = 250) -> int:
    """The largest multiple of `step` up to `limit` for which `fits` holds, 0 if none does.

    Assumes that what fits keeps fitting when made smaller; asks about log2(limit / step) times.
    """
    low, high = 0, limit // step + 1  # low fits (0 stands for nothing), high does not
    while high - low > 1:
        middle = (low + high) // 2
        if fits(middle * step):
            low = middle
        else:
            high = middle
    return low * step


def speed_table(rows: list[dict[str, Any]]) -> str:
    """Markdown: seconds per batch and peak GB of each way; rows that ran out of memory say OOM."""
    lines = [
        "| shape | context | TRL s/batch | ours s/batch | speed | TRL GB | ours GB |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        trl, ours = row["trl"], row["ours"]
        both = trl is not None and ours is not None
        speed = f"{trl['seconds'] / ours['seconds']:.1f}x" if both else ""
        cells = [row["shape"], f"{row['context']:,}"]
        cells += [OOM if way is None else f"{way['seconds']:.2f}" for way in (trl, ours)]
        cells += [speed]
        cells += [OOM if way is None else f"{way['memory_bytes'] / 1e9:.1f}" for way in (trl, ours)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def context_table(rows: list[dict[str, Any]]) -> str:
    """Markdown: the largest context in tokens that trains within so much memory."""
    lines = ["| shape | memory, GB | TRL | ours |", "|---|---|---|---|"]
    for row in rows:
        cells = [f"{row[way]:,}" if row[way] else OOM for way in WAYS]
        lines.append(f"| {row['shape']} | {row['card_gb']} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


def main() -> None:
    """`python -m mipo_lite.bench_gpu`."""
    parser = argparse.ArgumentParser(prog="mipo_lite.bench_gpu")
    parser.add_argument("--json", type=Path, dest="json_path", help="write everything here")
    parser.add_argument("--one-way", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    quiet_libraries()
    if options.one_way is not None:
        print(json.dumps(_one_way(options.one_way)))
    else:
        run_gpu_bench(options.json_path)


if __name__ == "__main__":
    main()
