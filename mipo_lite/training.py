"""DPO on scored pairs: TRL's DPOTrainer, a LoRA adapter, the adapter-disabled base as reference.

The trainer is TRL's own. What is added here: it trains on the token ids as they were sampled,
reads reference log-probs that were computed once, keeps trainable parameters in float32, shares
prompt prefixes within batches put together for it, stops when the margin of held-out pairs no
longer rises, and discards an adapter that does no better on them than chance would.
"""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import trl.trainer.utils
from datasets import Dataset
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model_state_dict,
    load_peft_weights,
    set_peft_model_state_dict,
)
from transformers import EarlyStoppingCallback, PrinterCallback, TrainerCallback, set_seed
from transformers.trainer import TRAINING_ARGS_NAME
from trl import DPOConfig, DPOTrainer

from .base import Base
from .batching import SharedContextSampler
from .carry_over import MIN_WATCHED, CarryOver, carry_over_of, margins
from .errors import NothingToLearn
from .interrupts import finish_step
from .label_head import label_positions_only
from .out_of_memory import halving
from .prefix_sharing import self_check, share_prefixes
from .recipe import Recipe
from .run import atomic_directory
from .training_state import newest_checkpoint, remove_checkpoints

# TRL 1.14, the last for Python 3.10, has no fused LM head yet.
FUSED_HEAD = hasattr(trl.trainer.utils, "add_fused_lm_head")

# What a held-out evaluation must gain over the best one so far to count as better.
MIN_GAIN = 1e-3


@dataclass(frozen=True)
class TrainingResult:
    """What training did.

    Attributes:
        history: one entry per logged step: loss, margin, held-out loss and margin; with
            `sft_weight`, loss is the other loss alone, and sft_loss stands beside it.
        prefix_sharing: why prefixes were shared, or why not, in a sentence.
        best_step: the step whose adapter was best.
        carry_over: what it gained on held-out pairs; None where that was not asked.
        kept: False when the adapter is the one that training began with.
    """

    steps: int
    best_step: int
    history: list[dict[str, float]]
    prefix_sharing: str
    carry_over: CarryOver | None = None
    kept: bool = True


class MIPOTrainer(DPOTrainer):
    """DPOTrainer for data that carry token ids and reference log-probs."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # The data carry ref_chosen_logps and ref_rejected_logps: read them, run no reference
        # pass. (TRL's own way there hashes the whole model and caches outside the run.)
        self.precompute_ref_logps = True
        # TRL casts LoRA to bfloat16 for a quantized base; at small learning rates most updates
        # of an 8-bit mantissa round away.
        for parameter in self.policy.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        if FUSED_HEAD:
            label_positions_only(self.policy)
        # Pairs in a batch that is put together: a smaller micro-batch takes it in parts, so that
        # the order, and what a checkpoint has seen of it, stay the same.
        self.ordered_by = self.args.per_device_train_batch_size
        self._evaluated: list[int] = []

    @property
    def policy(self) -> PeftModel:
        return cast(PeftModel, self.model)

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        """TRL would tokenize the text again, which need not give the ids that were sampled."""
        return dataset

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> SharedContextSampler:
        """Pairs of one context in the same micro-batch, in an order of the seed and the epoch."""
        rows = cast(Dataset, self.train_dataset if train_dataset is None else train_dataset)
        return SharedContextSampler(list(rows), self.ordered_by, self.args.seed)

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self._evaluated.append(len(inputs["input_ids"]) // 2)
        return super().prediction_step(model, inputs, *args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL takes the mean over batches; the last one may be smaller: here, over the pairs."""
        if not self.policy.training:
            pairs, self._evaluated = self._evaluated, []
            for values in self._metrics["eval"].values():
                if len(values) == len(pairs):
                    weighted = sum(map(operator.mul, values, pairs)) / sum(pairs)
                    values[:] = [weighted]
        super().log(logs, start_time)

    def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool) -> Any:
        """TRL logs the sum of two losses; that of `sft`, a mean over tokens, is logged here too."""
        result = super()._compute_loss(model, inputs, return_outputs)
        if len(self.loss_types) > 1:
            logged = self._metrics["train" if self.policy.training else "eval"]
            chosen, _ = inputs["completion_mask"].chunk(2)
            tokens = int(chosen[:, 1:].sum())  # of the batch; logps/chosen is the mean of its sums
            logged["sft_loss"].append(-logged["logps/chosen"][-1] * len(chosen) / tokens)
        return result

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        # A pickle, which nothing here reads.
        Path(str(output_dir or self.args.output_dir), TRAINING_ARGS_NAME).unlink(missing_ok=True)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """A run directory is private; it needs no page for a hub."""


def train(
    base: Base,
    pairs: Sequence[dict[str, Any]],
    scores: Sequence[dict[str, Any]],
    recipe: Recipe,
    adapter: Path,
    checkpoints: Path,
    watch: Callable[[int, int], None] = lambda step, steps: None,
    start: Path | None = None,
    keep_any: bool = False,
) -> TrainingResult:
    """Train an adapter on the kept pairs and write it to `adapter`.

    If the margin of held-out pairs did not rise beyond chance, what is written is the adapter that
    training began with: pairs with nothing to learn in them still move the weights, and a step
    that is far too large does so too. Kept as trained with `keep_any`, when fewer than
    `MIN_WATCHED` pairs are held out, and by SFT, which has no margin.

    Goes on from the newest complete checkpoint in `checkpoints`, which is removed at the end. Where
    memory does not suffice, forward passes are of fewer pairs, optimizer steps of as many as before
    (where those hold unlike numbers of pairs, or with `sft_weight` of tokens, these are weighed a
    little differently: TRL takes the mean over forward passes).

    Args:
        pairs, scores: lines of pairs.jsonl and scores.jsonl, in the same order.
        watch: called as watch(step, steps) after every optimizer step.
        start: an adapter of the same rank to go on from; None starts a new one.

    Raises:
        NothingToLearn: too few pairs were kept to train on and to watch.
        UserError: memory does not suffice for one pair.
    """
    train_rows, held_out_rows = split_pairs(pairs, scores, recipe)
    micro_batch, accumulation = micro_batches(recipe)

    def attempt(size: int) -> TrainingResult:
        # Out of memory, it is called again, and goes on from the newest checkpoint.
        arguments = _arguments(recipe, checkpoints, len(train_rows), base, size)
        with _trainer(base, recipe, arguments, train_rows, held_out_rows, watch) as trainer:
            judged = not keep_any and recipe.loss != "sft" and len(held_out_rows) >= MIN_WATCHED
            watched = held_out_rows if judged else []
            return _finish(trainer, base, recipe, adapter, checkpoints, start, watched)

    return halving(
        "micro_batch", micro_batch, attempt, lambda size: _smaller(micro_batch * accumulation, size)
    )


@contextmanager
def _trainer(
    base: Base,
    recipe: Recipe,
    arguments: DPOConfig,
    train_rows: list[dict[str, Any]],
    held_out_rows: list[dict[str, Any]],
    watch: Callable[[int, int], None],
) -> Iterator[MIPOTrainer]:
    """A trainer with a new adapter; afterwards the base is as it was, come what may."""
    forward = vars(base.model).get("forward")
    set_seed(recipe.seed)  # TRL 1.14 makes the adapter before it seeds
    trainer = MIPOTrainer(
        model=base.model,
        args=arguments,
        train_dataset=Dataset.from_list(train_rows),
        eval_dataset=Dataset.from_list(held_out_rows),
        processing_class=base.tokenizer,
        peft_config=lora_config(recipe),
        callbacks=[EarlyStoppingCallback(recipe.patience, MIN_GAIN), _Watch(watch)],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.ordered_by = micro_batches(recipe)[0]
    try:
        yield trainer
    finally:
        # Without LoRA layers, and without TRL's forward.
        trainer.policy.unload()
        vars(base.model).pop("forward", None)
        if forward is not None:
            base.model.forward = forward
        base.model.eval()


def _finish(
    trainer: MIPOTrainer,
    base: Base,
    recipe: Recipe,
    adapter: Path,
    checkpoints: Path,
    start: Path | None,
    watched: list[dict[str, Any]],
) -> TrainingResult:
    """Train from the newest checkpoint to the end and write the adapter, if `watched` bear it."""
    model = trainer.policy
    if start is not None:
        set_peft_model_state_dict(model, load_peft_weights(str(start), device="cpu"))
    beginning = {name: w.cpu().clone() for name, w in get_peft_model_state_dict(model).items()}
    before = margins(model, watched, recipe.beta) if watched else np.zeros(0)
    checkpoint = newest_checkpoint(checkpoints)
    with finish_step() as asked, _shared_prefixes(trainer, recipe) as sharing:
        trainer.add_callback(_Stop(asked))
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if asked():
            raise KeyboardInterrupt
    after = margins(model, watched, recipe.beta) if watched else before
    carry_over = carry_over_of(after - before) if watched else None
    kept = carry_over is None or carry_over.beyond_chance
    if not kept:
        set_peft_model_state_dict(model, beginning)
    with atomic_directory(adapter) as partial:
        model.save_pretrained(str(partial))
        _name_base(partial, base)
    state = trainer.state
    best = state.best_global_step or state.global_step
    remove_checkpoints(checkpoints)
    history = _history(state.log_history, recipe.sft_weight)
    return TrainingResult(state.global_step, best, history, sharing, carry_over, kept)


def split_pairs(
    pairs: Sequence[dict[str, Any]], scores: Sequence[dict[str, Any]], recipe: Recipe
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows for the trainer: (to train on, held out), of the kept pairs.

    The held-out ones are spread evenly over the file, so that pool positives are among them.
    """
    kept = [
        {
            "prompt_ids": pair["prompt_ids"],
            "chosen_ids": pair["chosen_ids"],
            "rejected_ids": pair["rejected_ids"],
            "ref_chosen_logps": score["ref_chosen"],
            "ref_rejected_logps": score["ref_rejected"],
        }
        for pair, score in zip(pairs, scores, strict=True)
        if score["kept"]
    ]
    held_out = max(1, round(len(kept) * recipe.held_out))
    if len(kept) - held_out < 2:
        raise NothingToLearn(
            f"Only {len(kept)} of {len(pairs)} pairs show any contrast: too few to learn from.",
            "Set more pairs, or lower min_contrast; a longer page or other prompts help as well.",
        )
    every = len(kept) / held_out
    held = {int((i + 0.5) * every) for i in range(held_out)}
    return (
        [row for i, row in enumerate(kept) if i not in held],
        [row for i, row in enumerate(kept) if i in held],
    )


def lora_config(recipe: Recipe) -> LoraConfig:
    return LoraConfig(
        r=recipe.lora_rank,
        lora_alpha=recipe.lora_alpha,
        lora_dropout=0.0,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )


def micro_batches(recipe: Recipe) -> tuple[int, int]:
    """Pairs per forward pass, and forward passes per optimizer step."""
    micro_batch = min(recipe.micro_batch, recipe.batch_size)
    return micro_batch, max(1, recipe.batch_size // micro_batch)


def _smaller(effective: int, micro_batch: int) -> int:
    """The largest micro-batch of at most half the size that divides the effective batch; 0: none.

    >>> [_smaller(12, 6), _smaller(15, 5), _smaller(16, 1)]
    [3, 1, 0]
    """
    sizes = (n for n in range(micro_batch // 2, 0, -1) if effective % n == 0)
    return next(sizes, 0)


def _arguments(
    recipe: Recipe, checkpoints: Path, rows: int, base: Base, micro_batch: int
) -> DPOConfig:
    """For `rows` pairs, with `micro_batch` per forward pass: the recipe's number, or fewer."""
    planned, accumulation = micro_batches(recipe)
    steps = max(1, math.ceil(math.ceil(rows / planned) / accumulation * recipe.epochs))
    every = max(1, steps // recipe.evaluations)
    bf16 = base.model.dtype == torch.bfloat16
    sft = recipe.loss == "sft"
    arguments = DPOConfig(
        output_dir=str(checkpoints),
        seed=recipe.seed,
        loss_type=list(recipe.losses),
        loss_weights=list(recipe.losses.values()),
        beta=recipe.beta,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=round(recipe.warmup * steps),
        num_train_epochs=recipe.epochs,
        per_device_train_batch_size=micro_batch,
        per_device_eval_batch_size=micro_batch,
        gradient_accumulation_steps=planned * accumulation // micro_batch,
        optim=recipe.optimizer,
        activation_offloading=recipe.activation_offload,
        gradient_checkpointing=recipe.gradient_checkpointing,
        max_length=None,
        bf16=bf16,
        fp16=base.model.dtype == torch.float16,
        logging_steps=1,
        logging_first_step=True,
        eval_strategy="steps",
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=2,
        load_best_model_at_end=True,
        # SFT has no margin to speak of; its own held-out loss says when it is best.
        metric_for_best_model="eval_loss" if sft else "eval_rewards/margins",
        greater_is_better=not sft,
        use_cpu=base.model.device.type == "cpu",
        dataloader_pin_memory=False,
        report_to="none",
        disable_tqdm=True,
        push_to_hub=False,
    )
    # The base lies on one GPU; for every one in sight the Trainer would wrap it in DataParallel.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


@contextmanager
def _shared_prefixes(trainer: MIPOTrainer, recipe: Recipe) -> Iterator[str]:
    """Share prefixes while the block runs, if that proves right on a real batch; yields why."""
    if not recipe.prefix_sharing:
        yield "off: the recipe says so"
        return
    # A few rows show a difference as well as many, and the plain path is the one that costs.
    batch = next(iter(trainer.get_train_dataloader()))
    batch = {key: batch[key][:4] for key in ("input_ids", "attention_mask")}
    check = self_check(trainer.policy, batch)
    with share_prefixes(trainer.policy) if check.ok else nullcontext():
        yield check.message


class _Watch(TrainerCallback):
    """Reports every optimizer step."""

    def __init__(self, watch: Callable[[int, int], None]) -> None:
        self._watch = watch

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._watch(state.global_step, state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._watch(state.global_step, state.max_steps)


class _Stop(TrainerCallback):
    """Ends training after a step, with a checkpoint, when that was asked for."""

    def __init__(self, asked: Callable[[], bool]) -> None:
        self._asked = asked

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._asked():
            control.should_save = control.should_training_stop = True


def _history(log: list[dict[str, Any]], sft_weight: float) -> list[dict[str, float]]:
    """The figures worth keeping of the trainer's log, under our names; `loss` without `sft_loss`.

    So it is comparable between recipes, and DPO's begins at ln 2.
    """
    names = {
        "loss": "loss",
        "sft_loss": "sft_loss",
        "rewards/margins": "margin",
        "rewards/accuracies": "accuracy",
        "eval_loss": "held_out_loss",
        "eval_sft_loss": "held_out_sft_loss",
        "eval_rewards/margins": "held_out_margin",
        "eval_rewards/accuracies": "held_out_accuracy",
    }
    rows: dict[int, dict[str, float]] = {}
    for entry in log:
        row = rows.setdefault(entry["step"], {"step": entry["step"]})
        row |= {ours: float(entry[theirs]) for theirs, ours in names.items() if theirs in entry}
    for row in rows.values():
        for part in ("", "held_out_"):
            if f"{part}sft_loss" in row:
                row[f"{part}loss"] -= sft_weight * row[f"{part}sft_loss"]
    return [row for row in rows.values() if len(row) > 1]


def _name_base(adapter: Path, base: Base) -> None:
    """Let the adapter name its base as others would find it, not as a path of this machine."""
    (adapter / "README.md").unlink(missing_ok=True)
    file = adapter / "adapter_config.json"
    config = json.loads(file.read_text("utf-8"))
    config["base_model_name_or_path"] = base.source.name
    config["revision"] = base.source.revision
    file.write_text(json.dumps(config, indent=2) + "\n", "utf-8")
