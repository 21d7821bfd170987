"""What `bench` trains: random pairs, a 4-bit base, and three ways to train them.

  trl              DPOTrainer as it is, the reference computed in each step with the adapter off
  trl_precomputed  the same with reference log-probs computed beforehand
  ours             MIPOTrainer with shared prefixes, its reference pass on shared prefixes too

Token ids are random: speed does not depend on what they say.
"""

from __future__ import annotations

import json
import random
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .disk import require_disk
from .errors import UsageError
from .known_bases import KNOWN
from .label_head import label_positions_only
from .prefix_sharing import install
from .scoring import score_matrix

WAYS = ("trl", "trl_precomputed", "ours")
PROMPT_TOKENS = 24  # the request after the context; each pair has its own


def _config_of(name: str) -> dict[str, Any]:
    """The sizes of a known base, all of which are a Qwen2 here."""
    [config] = [known.config for known in KNOWN if known.name == name]
    return {key: value for key, value in config.items() if key != "model_type"}


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
        "tie_word_embeddings": True,
    },
    "qwen2.5-1.5b": _config_of("Qwen/Qwen2.5-1.5B-Instruct"),
    "qwen2.5-7b": _config_of("Qwen/Qwen2.5-7B-Instruct"),
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

    @property
    def row_tokens(self) -> int:
        return self.context_tokens + PROMPT_TOKENS + self.response_tokens


@dataclass(frozen=True)
class Seconds:
    """Time by the clock, and processor time of all threads (which waiting for others spares)."""

    clock: float = 0.0
    processor: float = 0.0

    @classmethod
    def now(cls) -> Seconds:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return cls(time.perf_counter(), time.process_time())

    def __sub__(self, other: Seconds) -> Seconds:
        return Seconds(self.clock - other.clock, self.processor - other.processor)


def make_batches(
    settings: Settings, vocab_size: int, count: int, seed: int = 0
) -> list[list[dict]]:
    """`count` batches of pairs of random token ids that all begin with the same context."""
    rng = random.Random(seed)

    def tokens(n: int) -> list[int]:
        return [rng.randrange(16, vocab_size) for _ in range(n)]

    context = tokens(settings.context_tokens)

    def pair() -> dict:
        return {
            "prompt_ids": context + tokens(PROMPT_TOKENS),
            "chosen_ids": tokens(settings.response_tokens),
            "rejected_ids": tokens(settings.response_tokens),
        }

    return [[pair() for _ in range(settings.batch)] for _ in range(count)]


@contextmanager
def model_directory(settings: Settings) -> Iterator[Path]:
    """The directory of the base, or one of random weights of the shape, deleted afterwards.

    Touches no GPU, and holds one layer at a time.

    Raises UsageError for an unknown shape, UserError for a base that can not be had or too little
    disk.
    """
    if settings.base is not None:
        from .base import find_base

        yield find_base(settings.base).path
        return
    shape = settings.shape or "small"
    if shape not in SHAPES:
        raise UsageError(f"There is no shape {shape!r}.", f"Known: {', '.join(SHAPES)}.")
    with tempfile.TemporaryDirectory() as directory:
        _write_model(Path(directory), SHAPES[shape], shape)
        _write_tokenizer(Path(directory))
        yield Path(directory)


def _write_model(directory: Path, sizes: dict[str, Any], name: str) -> None:
    """A Qwen2 of random weights in bfloat16, a shard for each layer."""
    from safetensors.torch import save_file

    model = empty_model(sizes)
    model.config.save_pretrained(directory)
    require_disk(directory, sum(p.nbytes for p in model.parameters()), name)
    generator = torch.Generator().manual_seed(0)
    weight_map: dict[str, str] = {}
    for number, parameters in enumerate(_by_layer(model)):
        file = f"model-{number:05d}.safetensors"
        tensors = {key: _random(key, p, generator) for key, p in parameters.items()}
        save_file(tensors, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")


def empty_model(sizes: dict[str, Any]) -> Any:
    """A Qwen2 in bfloat16 on the meta device: shapes without memory."""
    from transformers import AutoModelForCausalLM, Qwen2Config

    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
    config = Qwen2Config(**{"max_position_embeddings": 32_768, **sizes, **ids})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.config.architectures = [type(model).__name__]
    return model


def _by_layer(model: Any) -> list[dict[str, torch.Tensor]]:
    """Parameters by name, those of a layer together; tied ones once."""
    layers: dict[str, dict[str, torch.Tensor]] = {}
    for name, parameter in model.named_parameters():
        in_layer = name.startswith("model.layers.")
        prefix = ".".join(name.split(".")[:3]) if in_layer else name
        layers.setdefault(prefix, {})[name] = parameter
    return list(layers.values())


def _random(name: str, like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Weights as transformers initializes them: norms 1, biases 0, matrices normal."""
    if name.endswith("norm.weight"):
        return torch.ones(like.shape, dtype=like.dtype)
    if name.endswith("bias"):
        return torch.zeros(like.shape, dtype=like.dtype)
    return torch.empty(like.shape, dtype=like.dtype).normal_(0, 0.02, generator=generator)


def _write_tokenizer(directory: Path) -> None:
    """Token ids are random, so that it only has to be there."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"<end>": 0, "<pad>": 1}, unk_token="<pad>")),
        eos_token="<end>",
        pad_token="<pad>",
        chat_template="{% for m in messages %}{{ m.content }}{% endfor %}",
    )
    tokenizer.save_pretrained(directory)


def load(directory: Path) -> Any:
    """The base in NF4, as every command loads it."""
    from .base import BaseSource, load_base

    return load_base(BaseSource("bench", directory))


class Way:
    """One way to train, ready to do single steps on its own copy of the base."""

    def __init__(self, name: str, settings: Settings, directory: Path, output: Path) -> None:
        self.name = name
        base = load(directory)
        self.vocab_size = base.model.config.vocab_size
        self.trainer = _trainer(name, base, settings, output)
        self.sharing = None
        if name == "ours":
            self.sharing = install(self.trainer.model)
            label_positions_only(self.trainer.model)

    def with_reference(self, batches: list[list[dict]]) -> list[list[dict]]:
        """The batches with the reference log-probs of their pairs, as this way computes them.

        `trl` leaves it to each step. `trl_precomputed` goes batch by batch, as TRL does. Ours
        scores all pairs in shared passes, as a run does before it trains.
        """
        model = self.trainer.model
        if self.name == "trl":
            return batches
        if self.name == "trl_precomputed":
            columns = []
            for batch in batches:
                inputs = self.trainer._prepare_inputs(self.trainer.data_collator(batch))
                columns.append(self.trainer.compute_ref_log_probs(model, inputs))
            chosen, rejected = (torch.cat(column) for column in zip(*columns, strict=True))
        else:
            pairs = [pair for batch in batches for pair in batch]
            prompts = [[pair["prompt_ids"]] for pair in pairs]
            responses = [pair[key] for key in ("chosen_ids", "rejected_ids") for pair in pairs]
            with model.disable_adapter():
                chosen, rejected = score_matrix(model, prompts * 2, responses)[:, 0].chunk(2)
        reference = iter(zip(chosen.tolist(), rejected.tolist(), strict=True))
        columns_of = ("ref_chosen_logps", "ref_rejected_logps")
        return [
            [pair | dict(zip(columns_of, next(reference), strict=True)) for pair in batch]
            for batch in batches
        ]

    def step(self, batch: list[dict]) -> Seconds:
        """Time of one optimizer step, from its forward pass to the update."""
        from datasets import Dataset
        from transformers import TrainerCallback

        class Clock(TrainerCallback):
            taken = Seconds()

            def on_step_begin(self, *_: Any, **__: Any) -> None:
                self.begin = Seconds.now()

            def on_step_end(self, *_: Any, **__: Any) -> None:
                self.taken = Seconds.now() - self.begin

        clock = Clock()
        self.trainer.train_dataset = Dataset.from_list(batch)
        self.trainer.add_callback(clock)
        self.trainer.train()
        self.trainer.remove_callback(clock)
        return clock.taken


def _trainer(name: str, base: Any, settings: Settings, output: Path) -> Any:
    """LoRA r=8 on all linear layers; the same arguments in every way."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import PrinterCallback
    from trl import DPOConfig, DPOTrainer

    from .training import MIPOTrainer

    class TRL(DPOTrainer):
        """TRL's trainer; only its tokenization is left out."""

        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

    on_gpu = torch.cuda.is_available()
    empty = {"prompt_ids": [2], "chosen_ids": [2], "rejected_ids": [2]}
    trainer = (MIPOTrainer if name == "ours" else TRL)(
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
        train_dataset=Dataset.from_list([empty]),
        processing_class=base.tokenizer,
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"),
    )
    trainer.remove_callback(PrinterCallback)
    # Not through the arguments: that would look for a disk cache, keyed on a hash of the model.
    trainer.precompute_ref_logps = name != "trl"
    return trainer
