"""The bench for a CUDA GPU: real shapes in NF4, long contexts, and what fits into how much memory.

Every figure comes from a fresh process, so that running out of memory is a row of the table and
not the end of it. Written to be run by `make bench-gpu`; it has not been run on a GPU yet.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

from .console import console, quiet_libraries
from .errors import UserError
from .machine import find_gpu
from .out_of_memory import is_out_of_memory

SHAPES = ("qwen2.5-1.5b", "qwen2.5-7b")
CONTEXTS = (1_000, 4_000, 12_000)
CARDS_GB = (6, 8, 12, 24)
LONGEST = 30_000  # tokens; the shapes' positions end at 32,768
WAYS = ("trl", "ours")
OOM = "OOM"
SPEED_HEAD = """\
| shape | context | TRL s/batch | ours s/batch | speed | TRL GB | ours GB |
|---|---|---|---|---|---|---|"""
CONTEXT_HEAD = """\
| shape | memory, GB | TRL | ours |
|---|---|---|---|"""


def run_gpu_bench(json_path: str | Path | None = None) -> dict[str, Any]:
    """Measure everything and print two markdown tables, row by row as it is measured.

    After each row all figures so far are written to `json_path`. Cards larger than the GPU are
    left out.

    Raises UserError without a CUDA GPU.
    """
    from .bench_training import Settings, model_directory

    # This process opens no CUDA context and holds no memory that a measurement would miss.
    gpu = ask_fresh_process({"find": "gpu"})
    if gpu is None:
        raise UserError(
            "There is no CUDA GPU here to measure.", "Run `mipo-lite bench` for this machine."
        )
    result: dict[str, Any] = {"gpu": gpu["name"], "speed": [], "largest_context": []}

    def measured(table: str, row: dict[str, Any], line: str) -> None:
        result[table].append(row)
        console.print(line, markup=False, soft_wrap=True)
        if json_path is not None:
            Path(json_path).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")

    with ExitStack() as stack:

        @cache
        def directory(shape: str) -> Path:
            return stack.enter_context(model_directory(Settings(shape=shape)))

        console.print(SPEED_HEAD, markup=False, soft_wrap=True)
        for shape, context in itertools.product(SHAPES, CONTEXTS):
            row = measure_speed(shape, context, directory(shape))
            measured("speed", row, speed_row(row))
        console.print(f"\n{CONTEXT_HEAD}", markup=False, soft_wrap=True)
        for shape, card in itertools.product(SHAPES, cards_within(gpu["total"])):
            row = measure_context(shape, card, directory(shape), gpu["total"])
            measured("largest_context", row, context_row(row))
    return result


def cards_within(total: int) -> list[int]:
    """Those of `CARDS_GB` that a GPU of `total` bytes is no smaller than.

    A card shows up to a twentieth less than its name says: a part is the driver's.
    """
    return [card for card in CARDS_GB if card * 2**30 * 0.95 <= total]


def measure_speed(shape: str, context: int, directory: Path) -> dict[str, Any]:
    """A row of the first table: each way's seconds and bytes, None where memory ran out."""
    from .bench_training import Settings

    settings = Settings(shape=shape, context_tokens=context)
    row: dict[str, Any] = {"shape": shape, "context": context}
    for way in WAYS:
        row[way] = in_fresh_process(settings, way, directory, steps=settings.repeats)
    return row


def measure_context(shape: str, card_gb: int, directory: Path, total: int) -> dict[str, Any]:
    """A row of the second table: the largest context of each way in tokens, 0 for none.

    Args:
        total: bytes of the GPU, of which a process gets those of the card.
    """
    from .bench_training import Settings

    share = min(1.0, card_gb * 2**30 / total)
    row: dict[str, Any] = {"shape": shape, "card_gb": card_gb}
    for way in WAYS:

        def fits(context: int, way: str = way) -> bool:
            settings = Settings(shape=shape, context_tokens=context)
            return in_fresh_process(settings, way, directory, share=share) is not None

        row[way] = largest_that_fits(fits, LONGEST)
    return row


def in_fresh_process(
    settings: Any, way: str, directory: Path, *, steps: int = 1, share: float | None = None
) -> dict[str, Any] | None:
    """Train `steps` batches in one way: {"seconds" a batch, "memory_bytes"}; None out of memory.

    Args:
        share: of the GPU's memory that the process may use; None for all of it.

    Raises RuntimeError when it fails for another reason.
    """
    request = {
        "settings": asdict(settings),
        "way": way,
        "directory": str(directory),
        "steps": steps,
        "share": share,
    }
    return ask_fresh_process(request)


def ask_fresh_process(request: dict[str, Any]) -> dict[str, Any] | None:
    """What a new process of this module answers. Raises RuntimeError when it fails."""
    command = [sys.executable, "-m", "mipo_lite.bench_gpu", "--answer", json.dumps(request)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"measuring {request} failed:\n{done.stderr[-2000:]}")
    answer: dict[str, Any] | None = json.loads(done.stdout.splitlines()[-1])
    return answer


def _answer(request: dict[str, Any]) -> dict[str, Any] | None:
    """In the fresh process."""
    if request.get("find") == "gpu":
        gpu = find_gpu()
        return asdict(gpu) if gpu else None
    try:
        return _one_way(request)
    except (MemoryError, RuntimeError, UserError) as error:
        if is_out_of_memory(error) or is_out_of_memory(error.__cause__ or error):
            return None
        raise


def _one_way(request: dict[str, Any]) -> dict[str, Any]:
    import torch

    from .bench_training import Seconds, Settings, Way, make_batches

    settings = Settings(**request["settings"])
    if request["share"] is not None:
        torch.cuda.set_per_process_memory_fraction(request["share"])
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


def speed_row(row: dict[str, Any]) -> str:
    """Markdown: seconds per batch and peak GB of each way; OOM where memory ran out."""
    trl, ours = row["trl"], row["ours"]
    both = trl is not None and ours is not None
    cells = [row["shape"], f"{row['context']:,}"]
    cells += [OOM if way is None else f"{way['seconds']:.2f}" for way in (trl, ours)]
    cells += [f"{trl['seconds'] / ours['seconds']:.1f}x" if both else ""]
    cells += [OOM if way is None else f"{way['memory_bytes'] / 1e9:.1f}" for way in (trl, ours)]
    return f"| {' | '.join(cells)} |"


def context_row(row: dict[str, Any]) -> str:
    """Markdown: the largest context in tokens that trains within so much memory."""
    cells = [f"{row[way]:,}" if row[way] else OOM for way in WAYS]
    return f"| {row['shape']} | {row['card_gb']} | {cells[0]} | {cells[1]} |"


def main(arguments: list[str] | None = None) -> None:
    """`python -m mipo_lite.bench_gpu`."""
    parser = argparse.ArgumentParser(prog="mipo_lite.bench_gpu")
    parser.add_argument("--json", type=Path, dest="json_path", help="write everything here")
    parser.add_argument("--answer", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    quiet_libraries()
    if options.answer is not None:
        print(json.dumps(_answer(options.answer)))
        return
    try:
        run_gpu_bench(options.json_path)
    except UserError as error:
        print(f"Error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None


if __name__ == "__main__":
    main()
