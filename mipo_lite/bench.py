"""Training and sampling speed on this machine, against TRL's own DPOTrainer.

Three ways to train the same pairs on the same 4-bit base, side by side in one process:

  trl              DPOTrainer as it is, the reference computed in each step with the adapter off
  trl_precomputed  the same with reference log-probs computed beforehand (and counted)
  ours             the same trainer with shared prefixes, its reference pass counted too

Steps are timed one by one in alternating order, on batches that no one has seen before; figures
are medians. Memory is the peak of a fresh process for each way (on CUDA: of the allocator), above
what the process held once its libraries were loaded. Token ids are random: speed does not depend
on what they say.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from .console import console, quiet_libraries

WAYS = ("trl", "trl_precomputed", "ours")
PROMPT_TOKENS = 24  # the request after the context; each pair has its own

# Random weights of these shapes. "small" is a Qwen2 of 8 layers and 512 hidden, whose LM head
# takes as large a share of a token's work (a quarter) as that of Qwen2.5-0.5B.
SHAPES: dict[str, dict[str, Any]] = {
    "small": {
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_hidden_layers": 8,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 16_384,
    },
    "qwen2.5-0.5b": {
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151_936,
    },
    "qwen2.5-1.5b": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151_936,
    },
    "qwen2.5-7b": {
        "hidden_size": 3584,
        "intermediate_size": 18_944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152_064,
    },
}


@dataclass(frozen=True)
class Settings:
    """What is measured. Lengths in tokens; `batch` in pairs; `base` or `shape` names the model."""

    context_tokens: int = 1200
    batch: int = 4
    response_tokens: int = 96
    base: str | None = None
    shape: str | None = None
    repeats: int = 5
    gradient_checkpointing: bool = False
    sampling_rows: int = 16
    sampling_tokens: int = 64


def run_bench(
    *,
    context_tokens: int,
    batch: int,
    response_tokens: int,
    base: str | None = None,
    shape: str | None = None,
    repeats: int = 5,
    gradient_checkpointing: bool = False,
    json_path: str | Path | None = None,
) -> dict[str, Any]:
    """Measure, print a table, and return (and write to `json_path`) everything.

    `speedup_vs_trl` and `memory_vs_trl` at the top level are ours against `trl`: pairs per
    second, and peak memory above the idle process.
    """
    settings = Settings(
        context_tokens=context_tokens,
        batch=batch,
        response_tokens=response_tokens,
        base=base,
        shape=shape,
        repeats=repeats,
        gradient_checkpointing=gradient_checkpointing,
    )
    with _model_directory(settings) as directory:
        training = measure_training(settings, directory)
        for way in WAYS:
            training[way]["memory_bytes"] = _memory_in_fresh_process(settings, way, directory)
        sampling = measure_sampling(settings, directory)
    result = {
        "speedup_vs_trl": training["ours"]["pairs_per_second"]
        / training["trl"]["pairs_per_second"],
        "memory_vs_trl": training["ours"]["memory_bytes"] / training["trl"]["memory_bytes"],
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


# ---------------------------------------------------------------- what is trained on


def make_pairs(settings: Settings, vocab_size: int, batches: int, seed: int = 0) -> list[dict]:
    """Pairs of random token ids that all begin with the same context, `batches * batch` of them."""
    rng = random.Random(seed)

    def tokens(n: int) -> list[int]:
        return [rng.randrange(16, vocab_size) for _ in range(n)]

    context = tokens(settings.context_tokens)
    return [
        {
            "prompt_ids": context + tokens(PROMPT_TOKENS),
            "chosen_ids": tokens(settings.response_tokens),
            "rejected_ids": tokens(settings.response_tokens),
        }
        for _ in range(batches * settings.batch)
    ]


@contextmanager
def _model_directory(settings: Settings) -> Iterator[Path]:
    """The directory of the base, or of random weights of the shape, deleted afterwards."""
    if settings.base is not None:
        from .base import find_base

        yield find_base(settings.base).path
        return
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen2Config

    shape = SHAPES[settings.shape or "small"]
    config = Qwen2Config(
        **shape,
        tie_word_embeddings=True,
        max_position_embeddings=32_768,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=1,
    )
    with tempfile.TemporaryDirectory() as directory:
        torch.manual_seed(0)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(directory)
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(WordLevel({"<end>": 0, "<pad>": 1}, unk_token="<pad>")),
            eos_token="<end>",
            pad_token="<pad>",
            chat_template="{% for m in messages %}{{ m.content }}{% endfor %}",
        )
        tokenizer.save_pretrained(directory)
        del model
        yield Path(directory)


def _load(directory: Path) -> Any:
    from .base import BaseSource, load_base

    return load_base(BaseSource("bench", directory))


# ---------------------------------------------------------------- training


class Way:
    """One way to train, ready to do single steps."""

    def __init__(self, name: str, settings: Settings, directory: Path, output: Path) -> None:
        from .label_head import label_positions_only
        from .prefix_sharing import install

        self.name = name
        base = _load(directory)
        self.vocab_size = base.model.config.vocab_size
        self.trainer = _trainer(base, settings, precomputed=name != "trl", output=output)
        self.sharing = None
        if name == "ours":
            model = self.trainer.model
            for parameter in model.parameters():
                if parameter.requires_grad:  # as in training: TRL leaves LoRA in bfloat16
                    parameter.data = parameter.data.float()
            self.sharing = install(model)
            label_positions_only(model)

    def step(self, pairs: list[dict]) -> dict[str, float]:
        """Seconds of the reference pass, if it is a separate one, and of the training step."""
        reference = 0.0
        if self.name != "trl":
            begin = _now()
            pairs = self._with_reference(pairs)
            reference = _now() - begin
        return {"reference": reference, "step": _train_step(self.trainer, pairs)}

    def _with_reference(self, pairs: list[dict]) -> list[dict]:
        model = self.trainer.model
        if self.name == "ours":
            from .scoring import response_logprobs

            rows = [
                (p["prompt_ids"], p[key]) for p in pairs for key in ("chosen_ids", "rejected_ids")
            ]
            with model.disable_adapter():
                sums = [lp.double().sum().item() for lp in response_logprobs(model, rows)]
            chosen, rejected = sums[0::2], sums[1::2]
        else:
            batch = self.trainer._prepare_inputs(self.trainer.data_collator(pairs))
            both = self.trainer.compute_ref_log_probs(model, batch)
            chosen, rejected = (x.tolist() for x in both)
        return [
            {**pair, "ref_chosen_logps": c, "ref_rejected_logps": r}
            for pair, c, r in zip(pairs, chosen, rejected, strict=True)
        ]


def _trainer(base: Any, settings: Settings, *, precomputed: bool, output: Path) -> Any:
    """TRL's DPOTrainer with LoRA r=8 on all linear layers; only its tokenization is left out."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl import DPOConfig, DPOTrainer

    class OnTokenIds(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

    import torch

    on_gpu = torch.cuda.is_available()
    trainer = OnTokenIds(
        base.model,
        args=DPOConfig(
            output_dir=str(output),
            per_device_train_batch_size=settings.batch,
            max_steps=1,
            learning_rate=1e-4,
            max_length=None,
            bf16=on_gpu,
            use_cpu=not on_gpu,
            gradient_checkpointing=settings.gradient_checkpointing,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=False,
            seed=0,
        ),
        train_dataset=Dataset.from_list(
            [{"prompt_ids": [2], "chosen_ids": [2], "rejected_ids": [2]}]
        ),
        processing_class=base.tokenizer,
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"),
    )
    # Not through the config: that would look for its disk cache, keyed on a hash of the model.
    trainer.precompute_ref_logps = precomputed
    return trainer


def _train_step(trainer: Any, pairs: list[dict]) -> float:
    """Seconds of one optimizer step, from the forward pass to the update."""
    from datasets import Dataset
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        seconds = 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.begin = _now()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.seconds = _now() - self.begin

    clock = Clock()
    trainer.train_dataset = Dataset.from_list(pairs)
    trainer.add_callback(clock)
    trainer.train()
    trainer.remove_callback(clock)
    return clock.seconds


def measure_training(settings: Settings, directory: Path) -> dict[str, dict[str, Any]]:
    """Medians over `repeats` batches, each trained once in every way, in alternating order."""
    with tempfile.TemporaryDirectory() as output:
        ways = [Way(name, settings, directory, Path(output)) for name in WAYS]
        pairs = make_pairs(settings, ways[0].vocab_size, settings.repeats + 1)
        times: dict[str, list[dict[str, float]]] = {name: [] for name in WAYS}
        for repeat in range(settings.repeats + 1):
            batch = pairs[repeat * settings.batch :][: settings.batch]
            for way in ways if repeat % 2 else ways[::-1]:
                seconds = way.step(batch)
                if repeat:  # the first batch warms up
                    times[way.name].append(seconds)
        sharing = ways[-1].sharing
        assert sharing is not None
        in_batch, computed = sharing.stats.tokens_in, sharing.stats.tokens_computed
    padded = (
        (settings.context_tokens + PROMPT_TOKENS + settings.response_tokens) * 2 * settings.batch
    )
    results = {}
    for name, measured in times.items():
        step = median(t["step"] for t in measured)
        whole = median(t["step"] + t["reference"] for t in measured)
        results[name] = {
            "tokens_computed_per_batch": padded
            if name != "ours"
            else padded * computed // in_batch,
            "seconds_per_step": step,
            "reference_seconds_per_batch": median(t["reference"] for t in measured),
            "pairs_per_second": settings.batch / whole,
            "all_seconds": measured,
        }
    return results


def _now() -> float:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


# ---------------------------------------------------------------- memory


def _memory_in_fresh_process(settings: Settings, way: str, directory: Path) -> int:
    """Peak bytes above the idle process while `way` trains two batches."""
    request = json.dumps({"settings": asdict(settings), "way": way, "directory": str(directory)})
    command = [sys.executable, "-m", "mipo_lite.bench", "--memory-of", request]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(done.stdout.split()[-1])


def _memory_child(request: dict[str, Any]) -> int:
    import torch
    import trl  # noqa: F401  its import is part of the idle process

    settings = Settings(**request["settings"])
    idle = _peak_memory()
    with tempfile.TemporaryDirectory() as output:
        way = Way(request["way"], settings, Path(request["directory"]), Path(output))
        pairs = make_pairs(settings, way.vocab_size, 2)
        for at in (0, settings.batch):
            way.step(pairs[at : at + settings.batch])
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return _peak_memory() - idle


def _peak_memory() -> int:
    """Peak resident set of this process in bytes. Linux counts it per program image: a child
    does not inherit its parent's peak, as it does in getrusage."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import psutil

    info = psutil.Process().memory_info()
    return int(getattr(info, "peak_wset", info.rss))


# ---------------------------------------------------------------- sampling


def measure_sampling(settings: Settings, directory: Path) -> dict[str, dict[str, float]]:
    """Tokens per second of `sample` and of plain `generate`, no row ending early."""
    import torch

    from .sampling import SampleRequest, sample

    base = _load(directory)
    rows, new = settings.sampling_rows, settings.sampling_tokens
    small = Settings(context_tokens=settings.context_tokens, batch=rows)
    prompts = [p["prompt_ids"] for p in make_pairs(small, base.model.config.vocab_size, 1)]
    device = base.model.get_input_embeddings().weight.device

    def ours() -> None:
        requests = [SampleRequest(prompt, seed) for seed, prompt in enumerate(prompts)]
        list(
            sample(
                base.model,
                requests,
                max_new_tokens=new,
                eos_ids=[-1],
                pad_id=base.pad_id,
                batch_size=rows,
            )
        )

    def generate() -> None:
        ids = torch.tensor(prompts, device=device)
        base.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            do_sample=True,
            eos_token_id=-1,
            pad_token_id=base.pad_id,
        )

    seconds = _alternate({"generate": generate, "ours": ours}, settings.repeats)
    return {
        name: {"seconds": s, "tokens_per_second": rows * new / s} for name, s in seconds.items()
    }


def _alternate(ways: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """Median seconds of each, run in alternating order after one warm-up."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats + 1):
        for name in list(ways) if repeat % 2 else list(ways)[::-1]:
            begin = _now()
            ways[name]()
            if repeat:
                times[name].append(_now() - begin)
    return {name: median(t) for name, t in times.items()}


# ---------------------------------------------------------------- report


def _machine() -> dict[str, Any]:
    import os
    import platform

    import torch
    import transformers
    import trl

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "gpu": gpu,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "trl": trl.__version__,
    }


def _print(result: dict[str, Any]) -> None:
    from rich.table import Table

    s = result["settings"]
    table = Table(
        title=f"{s['base'] or s['shape'] or 'small'}, context {s['context_tokens']} tokens, "
        f"{s['batch']} pairs a batch, responses of {s['response_tokens']}"
    )
    for column in ("", "tokens computed", "s / step", "s / reference", "pairs / s", "memory, GB"):
        table.add_column(column, justify="right" if column else "left")
    for name, row in result["training"].items():
        table.add_row(
            name,
            f"{row['tokens_computed_per_batch']:,}",
            f"{row['seconds_per_step']:.2f}",
            f"{row['reference_seconds_per_batch']:.2f}",
            f"{row['pairs_per_second']:.3f}",
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
    parser = argparse.ArgumentParser(prog="mipo_lite.bench", description=__doc__.split("\n")[0])
    parser.add_argument("--context-tokens", type=int, default=1200)
    parser.add_argument("--batch", type=int, default=4, help="pairs")
    parser.add_argument("--response-tokens", type=int, default=96)
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--base")
    model.add_argument("--shape", choices=SHAPES, help="random weights of this shape")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--json", type=Path, help="write everything here")
    parser.add_argument("--memory-of", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    quiet_libraries()
    if options.memory_of is not None:
        print(_memory_child(options.memory_of))
        return
    run_bench(
        context_tokens=options.context_tokens,
        batch=options.batch,
        response_tokens=options.response_tokens,
        base=options.base,
        shape=options.shape,
        repeats=options.repeats,
        gradient_checkpointing=options.gradient_checkpointing,
        json_path=options.json,
    )


if __name__ == "__main__":
    main()
