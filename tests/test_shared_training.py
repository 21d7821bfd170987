"""A whole DPO run with shared prefixes against the same run without."""

from __future__ import annotations

import math
import random
from contextlib import nullcontext

import pytest
from datasets import Dataset
from peft import LoraConfig
from tiny_models import VOCAB, tiny_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer

from mipo_lite.label_head import label_positions_only
from mipo_lite.prefix_sharing import share_prefixes


class OnTokenIds(DPOTrainer):
    def _prepare_dataset(self, dataset, *_):
        return dataset


def pairs(n=24, seed=0):
    rng = random.Random(seed)
    contexts = [[rng.randrange(3, VOCAB) for _ in range(30)] for _ in range(2)]

    def tokens(low, high):
        return [rng.randrange(3, VOCAB) for _ in range(rng.randint(low, high))]

    return [
        {
            "prompt_ids": contexts[i % 2] + tokens(1, 6),
            "chosen_ids": tokens(1, 8),
            "rejected_ids": tokens(1, 8),
        }
        for i in range(n)
    ]


def run(path, *, shared, family, checkpointing):
    words = {"<pad>": 0, "<end>": 2}
    trainer = OnTokenIds(
        tiny_model(family),
        args=DPOConfig(
            output_dir=str(path),
            per_device_train_batch_size=4,
            num_train_epochs=4,
            learning_rate=3e-3,
            max_length=None,
            bf16=False,
            gradient_checkpointing=checkpointing,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
            seed=3,
        ),
        train_dataset=Dataset.from_list(pairs()),
        processing_class=PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(WordLevel(words, unk_token="<pad>")),
            pad_token="<pad>",
            eos_token="<end>",
        ),
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
    )
    if shared:
        label_positions_only(trainer.model)
    with share_prefixes(trainer.model) if shared else nullcontext() as stats:
        trainer.train()
    if shared:
        assert stats.ratio > 1.5
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize(
    ("family", "checkpointing"), [("qwen2", False), ("llama", True), ("gemma3", False)]
)
def test_loss_curves_agree(tmp_path, family, checkpointing):
    curves = [
        [float(x) for x in run(tmp_path, shared=s, family=family, checkpointing=checkpointing)]
        for s in (False, True)
    ]
    assert len(curves[0]) == 24
    assert curves[0][0] == pytest.approx(math.log(2), abs=1e-6)
    assert min(curves[0]) < 0.6  # it learns, so the curves have something to agree on
    assert curves[1] == pytest.approx(curves[0], abs=1e-4)
