"""Training and sampling speed on this machine, against TRL's own DPOTrainer and plain generate.

Everything is measured side by side in one process on the same 4-bit base and the same pairs: step
by step in alternating order, each batch once in every way (see `mipo_lite.bench_training`).
Figures are medians. Memory is the peak of a fresh process for each way, above what it held once
its libraries were loaded; on CUDA, of the allocator.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
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
from .machine import resident_peak


def run_bench(
    *,
    context_tokens: int = 1200,
    batch: int = 4,
    response_tokens: int = 96,
    base: str | None = None,
    shape: str | None = None,
    repeats: int = 5,
    gradient_checkpointing: bool = False,
    json_path: str | Path | None = None,
) -> dict[str, Any]:
    """Measure, print a table, and return (and write to `json_path`) everything.

    `batch` counts pairs. `base` is anything `--base` takes; `shape`, one of `SHAPES`, is random
    weights instead. At the top level of the result `speedup_vs_trl` (pairs per second, our
    reference pass counted) and `memory_vs_trl` (peak above the idle process) are ours against
    the unmodified trainer.
    """
    from .bench_training import WAYS, Settings, model_directory

    settings = Settings(
        context_tokens=context_tokens,
        batch=batch,
        response_tokens=response_tokens,
        base=base,
        shape=shape,
        repeats=repeats,
        gradient_checkpointing=gradient_checkpointing,
    )
    with model_directory(settings) as directory:
        training = measure_training(settings, directory)
        for way in WAYS:
            training[way]["memory_bytes"] = memory_in_fresh_process(settings, way, directory)
        sampling = measure_sampling(settings, directory)
    trl, ours = training["trl"], training["ours"]
    result = {
        "speedup_vs_trl": ours["pairs_per_second"] / trl["pairs_per_second"],
        "speedup_vs_trl_processor": trl["processor_seconds"] / ours["processor_seconds"],
        "memory_vs_trl": ours["memory_bytes"] / trl["memory_bytes"],
        "sampling_speedup": sampling["ours"]["tokens_per_second"]
        / sampling["generate"]["tokens_per_second"],
        "settings": asdict(settings),
        "machine": _machine(),
        "training": training,
        "sampling": sampling,
    }
    _print(result)
    if json_path is not None:
        Path(json_path).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


def measure_training(settings: Any, directory: Path) -> dict[str, dict[str, Any]]:
    """Medians over `repeats` batches, each trained once in every way, in alternating order.

    The reference pass of all batches comes first and is shared out evenly among them.
    """
    from .bench_training import WAYS, Seconds, Way, make_batches

    steps: dict[str, list[Seconds]] = {name: [] for name in WAYS}
    reference: dict[str, Seconds] = {}
    with tempfile.TemporaryDirectory() as output:
        ways = [Way(name, settings, directory, Path(output)) for name in WAYS]
        warm_up, *batches = make_batches(settings, ways[0].vocab_size, settings.repeats + 1)
        batches_of = {}
        for way in ways:
            way.step(way.with_reference([warm_up])[0])
            begin = Seconds.now()
            batches_of[way.name] = way.with_reference(batches)
            reference[way.name] = Seconds.now() - begin
        for repeat in range(settings.repeats):
            for way in ways if repeat % 2 else ways[::-1]:
                steps[way.name].append(way.step(batches_of[way.name][repeat]))
        stats = ways[-1].sharing.stats  # type: ignore[union-attr]
    tokens = settings.row_tokens * 2 * settings.batch
    results = {}
    for name in WAYS:
        step = median(taken.clock for taken in steps[name])
        per_batch = reference[name].clock / settings.repeats if name != "trl" else 0.0
        processor = median(taken.processor for taken in steps[name])
        results[name] = {
            "tokens_computed_per_step": round(tokens / stats.ratio) if name == "ours" else tokens,
            "seconds_per_step": step,
            "reference_seconds_per_batch": per_batch,
            "pairs_per_second": settings.batch / (step + per_batch),
            "processor_seconds": processor + reference[name].processor / settings.repeats,
            "steps": [asdict(taken) for taken in steps[name]],
        }
    return results


def measure_sampling(settings: Any, directory: Path) -> dict[str, dict[str, float]]:
    """Tokens per second of `sample` and of plain `generate`, when no row ends early."""
    import torch

    from .bench_training import Settings, load, make_batches
    from .sampling import SampleRequest, sample

    base = load(directory)
    rows, new = settings.sampling_rows, settings.sampling_tokens
    one_batch = Settings(context_tokens=settings.context_tokens, batch=rows)
    [pairs] = make_batches(one_batch, base.model.config.vocab_size, 1)
    requests = [SampleRequest(pair["prompt_ids"], seed) for seed, pair in enumerate(pairs)]
    ids = torch.tensor([r.prompt_ids for r in requests], device=base.model.device)
    never = -1

    def ours() -> None:
        options = {"eos_ids": [never], "pad_id": base.pad_id, "batch_size": rows}
        list(sample(base.model, requests, max_new_tokens=new, **options))

    def generate() -> None:
        options = {"do_sample": True, "eos_token_id": never, "pad_token_id": base.pad_id}
        mask = torch.ones_like(ids)
        base.model.generate(ids, attention_mask=mask, max_new_tokens=new, **options)

    seconds = _alternate({"generate": generate, "ours": ours}, settings.repeats)
    return {
        name: {"seconds": s, "tokens_per_second": rows * new / s} for name, s in seconds.items()
    }


def _alternate(ways: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """Median seconds of each, run in alternating order after one warm-up."""
    from .bench_training import Seconds

    times: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats + 1):
        for name in list(ways) if repeat % 2 else list(ways)[::-1]:
            begin = Seconds.now()
            ways[name]()
            if repeat:
                times[name].append((Seconds.now() - begin).clock)
    return {name: median(taken) for name, taken in times.items()}


def memory_in_fresh_process(settings: Any, way: str, directory: Path) -> int:
    """Peak bytes above the idle process while `way` trains one batch.

    Raises subprocess.CalledProcessError when it runs out of memory.
    """
    request = json.dumps({"settings": asdict(settings), "way": way, "directory": str(directory)})
    command = [sys.executable, "-m", "mipo_lite.bench", "--memory-of", request]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(done.stdout.split()[-1])


def _memory_of(request: dict[str, Any]) -> int:
    """In the fresh process: train, and say what it took."""
    import torch
    import trl  # noqa: F401  its import is part of the idle process

    from .bench_training import Settings, Way, make_batches

    settings = Settings(**request["settings"])
    idle = resident_peak()
    with tempfile.TemporaryDirectory() as output:
        way = Way(request["way"], settings, Path(request["directory"]), Path(output))
        [batch] = way.with_reference(make_batches(settings, way.vocab_size, 1))
        way.step(batch)
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return resident_peak() - idle


def _machine() -> dict[str, Any]:
    import torch
    import transformers
    import trl

    return {
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "trl": trl.__version__,
    }


def _print(result: dict[str, Any]) -> None:
    from rich.table import Table

    s = result["settings"]
    table = Table(
        title=f"{s['base'] or s['shape'] or 'small'}: context {s['context_tokens']} tokens, "
        f"{s['batch']} pairs a batch, responses of {s['response_tokens']}"
    )
    for column in ("", "tokens", "s / step", "s / reference", "pairs / s", "cpu s", "GB"):
        table.add_column(column, justify="right" if column else "left")
    for name, row in result["training"].items():
        table.add_row(
            name,
            f"{row['tokens_computed_per_step']:,}",
            f"{row['seconds_per_step']:.2f}",
            f"{row['reference_seconds_per_batch']:.2f}",
            f"{row['pairs_per_second']:.3f}",
            f"{row['processor_seconds']:.1f}",
            f"{row['memory_bytes'] / 1e9:.2f}",
        )
    console.print(table)
    sampling = result["sampling"]
    console.print(
        f"sampling {s['sampling_rows']} rows of {s['sampling_tokens']} tokens: "
        f"{sampling['ours']['tokens_per_second']:.0f} tokens/s, "
        f"plain generate {sampling['generate']['tokens_per_second']:.0f}"
    )
    console.print(
        f"ours against TRL: {result['speedup_vs_trl']:.2f}x pairs per second, "
        f"{result['memory_vs_trl']:.2f}x memory, {result['sampling_speedup']:.2f}x sampling"
    )


def main(arguments: list[str] | None = None) -> None:
    """`python -m mipo_lite.bench`."""
    parser = argparse.ArgumentParser(prog="mipo_lite.bench")
    parser.add_argument("--context-tokens", type=int, default=1200)
    parser.add_argument("--batch", type=int, default=4, help="pairs")
    parser.add_argument("--response-tokens", type=int, default=96)
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--base")
    model.add_argument("--shape", help="random weights of this shape, such as qwen2.5-1.5b")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--json", type=Path, dest="json_path", help="write everything here")
    parser.add_argument("--memory-of", type=json.loads, help=argparse.SUPPRESS)
    options = vars(parser.parse_args(arguments))
    memory_of = options.pop("memory_of")
    quiet_libraries()
    if memory_of is not None:
        print(_memory_of(memory_of))
        return
    try:
        run_bench(**options)
    except UserError as error:
        print(f"Error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None


if __name__ == "__main__":
    main()
