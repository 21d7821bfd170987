"""DPO on real sampled pairs: the reference, the precision, the gradients, and going on."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from trl import DPOConfig

from mipo_lite.base import Base, find_base, load_base
from mipo_lite.batching import SharedContextSampler
from mipo_lite.carry_over import margins
from mipo_lite.contexts import Persona
from mipo_lite.errors import UserError
from mipo_lite.filtering import score_pairs
from mipo_lite.pairs import plan_personalize, sample_pairs
from mipo_lite.prompts import shipped_prompts
from mipo_lite.recipe import Recipe
from mipo_lite.run import read_jsonl
from mipo_lite.scoring import response_logprobs
from mipo_lite.training import _arguments, lora_config, split_pairs, train
from mipo_lite.training_state import newest_checkpoint

USER = Persona("user", "My name is Anouk. I live in Gent. I have a dog called Biscuit.")
POOL = [
    Persona("a", "My name is Teo. I live in Lima. I have a cat called Momo."),
    Persona("b", "I am Ines from Porto. I work as a baker and like chess."),
]
RECIPE = Recipe(
    pairs=24,
    max_new_tokens=24,
    sampling_batch=24,
    min_contrast=0.0,
    learning_rate=1e-3,
    batch_size=4,
    micro_batch=4,
    epochs=2.0,
    evaluations=3,
    patience=3,
    gradient_checkpointing=False,
)


@pytest.fixture(scope="module")
def pairs_and_scores(builtin_base: Base, tmp_path_factory: pytest.TempPathFactory):
    directory = tmp_path_factory.mktemp("pairs")
    prompts = [prompt for prompt in shipped_prompts() if prompt.split == "train"]
    plans = plan_personalize(RECIPE, prompts, USER, POOL)
    sample_pairs(builtin_base, plans, RECIPE, directory / "pairs.jsonl")
    pairs = read_jsonl(directory / "pairs.jsonl")
    score_pairs(builtin_base, pairs, RECIPE, directory / "scores.jsonl")
    return pairs, read_jsonl(directory / "scores.jsonl")


@pytest.fixture(scope="module")
def trained(builtin_base: Base, pairs_and_scores, tmp_path_factory: pytest.TempPathFactory):
    """An uninterrupted training: its result and its adapter directory."""
    directory = tmp_path_factory.mktemp("trained")
    adapter = directory / "adapter"
    result = train(builtin_base, *pairs_and_scores, RECIPE, adapter, directory / "checkpoints")
    assert not (directory / "checkpoints").exists()
    return result, adapter


def test_the_first_loss_is_ln_2(trained) -> None:
    result, _ = trained
    assert result.history[0]["loss"] == pytest.approx(math.log(2), abs=1e-3)


def test_the_sft_loss_is_added_and_logged_by_itself(
    builtin_base: Base, pairs_and_scores, tmp_path: Path
) -> None:
    pairs, scores = pairs_and_scores
    rows, held_out = split_pairs(pairs, scores, RECIPE)
    settings = {"batch_size": len(rows), "micro_batch": len(rows), "epochs": 1.0}
    weighted = RECIPE.model_copy(update={**settings, "sft_weight": 0.5, "evaluations": 1})
    result = train(
        builtin_base, pairs, scores, weighted, tmp_path / "adapter", tmp_path / "checkpoints"
    )
    first = result.history[0]
    nats = -sum(row["ref_chosen_logps"] for row in rows)
    assert first["sft_loss"] == pytest.approx(
        nats / sum(len(row["chosen_ids"]) for row in rows), rel=1e-2
    )
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-3)
    model = PeftModel.from_pretrained(builtin_base.model, tmp_path / "adapter")
    logistic = [math.log1p(math.exp(-m)) for m in margins(model, held_out, weighted.beta)]
    model.unload()
    assert result.history[-1]["held_out_loss"] == pytest.approx(
        sum(logistic) / len(logistic), abs=1e-3
    )


def test_the_sft_loss_pulls_chosen_responses_up(
    builtin_base: Base, pairs_and_scores, trained, tmp_path: Path
) -> None:
    pairs, scores = pairs_and_scores
    weighted = RECIPE.model_copy(update={"sft_weight": 3.0})
    adapter = tmp_path / "adapter"
    train(builtin_base, pairs, scores, weighted, adapter, tmp_path / "checkpoints", keep_any=True)
    rows, _ = split_pairs(pairs, scores, RECIPE)
    chosen = [(row["prompt_ids"], row["chosen_ids"]) for row in rows]
    sums = []
    for directory in (trained[1], adapter):
        model = PeftModel.from_pretrained(builtin_base.model, directory)
        sums.append(sum(float(t.double().sum()) for t in response_logprobs(model, chosen)))
        model.unload()
    assert sums[1] > sums[0] + 1


def test_trained_in_float32_and_every_b_moved(trained) -> None:
    _, adapter = trained
    weights = load_file(adapter / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    moved = {name: bool(tensor.any()) for name, tensor in weights.items() if "lora_B" in name}
    assert moved
    assert all(moved.values()), [name for name, was in moved.items() if not was]


def test_the_margin_of_training_pairs_rises(trained) -> None:
    result, _ = trained
    margins = [row["margin"] for row in result.history if "margin" in row]
    assert margins[-1] > margins[0] + 0.05


def test_prefixes_are_shared_and_that_was_checked(trained) -> None:
    result, _ = trained
    assert "agrees with the plain path" in result.prefix_sharing


def test_batches_hold_one_context_in_another_order_each_epoch(
    builtin_base: Base, pairs_and_scores, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    orders: list[list[int]] = []

    class Recording(SharedContextSampler):
        def __iter__(self):
            orders.append(list(super().__iter__()))
            return iter(orders[-1])

    monkeypatch.setattr("mipo_lite.training.SharedContextSampler", Recording)
    pairs, scores = pairs_and_scores
    train(builtin_base, pairs, scores, RECIPE, tmp_path / "adapter", tmp_path / "checkpoints")
    rows, _ = split_pairs(pairs, scores, RECIPE)
    *_, first, second = orders  # the self-check before them takes a batch too
    assert first != second
    assert sorted(first) == sorted(second) == list(range(len(rows)))
    contexts = [tuple(row["prompt_ids"][:20]) for row in rows]
    batches = [second[at : at + 4] for at in range(0, len(second), 4)]
    mixed = [batch for batch in batches if len({contexts[i] for i in batch}) > 1]
    assert len(mixed) < len(set(contexts))  # only where one context ends within a batch


def test_the_adapter_loads_on_the_plain_base_and_disabled_is_the_base(
    builtin_base: Base, trained
) -> None:
    _, adapter = trained
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "builtin"
    rows = [(builtin_base.encode("What is my dog called?", USER.text), [5, 6, 7, 8])]
    before = response_logprobs(builtin_base.model, rows)[0]
    model = PeftModel.from_pretrained(builtin_base.model, adapter)
    try:
        with model.disable_adapter():
            disabled = response_logprobs(model, rows)[0]
        enabled = response_logprobs(model, rows)[0]
    finally:
        model.unload()
    after = response_logprobs(builtin_base.model, rows)[0]
    assert torch.equal(before, disabled)
    assert torch.equal(before, after)
    assert not torch.equal(before, enabled)


def test_an_interrupted_training_goes_on_to_the_same_adapter(
    builtin_base: Base, pairs_and_scores, trained, tmp_path: Path
) -> None:
    result, whole = trained

    def interrupt(step: int, steps: int) -> None:
        if step == 5:
            raise KeyboardInterrupt

    arguments = (*pairs_and_scores, RECIPE, tmp_path / "adapter", tmp_path / "checkpoints")
    with pytest.raises(KeyboardInterrupt):
        train(builtin_base, *arguments, interrupt)
    assert newest_checkpoint(tmp_path / "checkpoints") is not None
    resumed = train(builtin_base, *arguments)
    assert resumed.steps == result.steps
    losses = {row["step"]: row["loss"] for row in result.history if "loss" in row}
    for row in resumed.history:
        if "loss" in row:
            assert row["loss"] == pytest.approx(losses[row["step"]], abs=1e-5)
    expected = load_file(whole / "adapter_model.safetensors")
    for name, tensor in load_file(tmp_path / "adapter" / "adapter_model.safetensors").items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-5, rtol=0)


def test_both_responses_are_trained_on_the_same_correct_prompt(
    builtin_base: Base, pairs_and_scores
) -> None:
    pairs, scores = pairs_and_scores
    texts = {"user": USER.text, **{persona.id: persona.text for persona in POOL}}
    rows, held_out = split_pairs(pairs, scores, RECIPE)
    expected = [
        builtin_base.encode(pair["prompt"][-1]["content"], texts[pair["persona"]])
        for pair, score in zip(pairs, scores, strict=True)
        if score["kept"]
    ]
    assert sorted(row["prompt_ids"] for row in rows + held_out) == sorted(expected)


def test_held_out_pairs_are_spread_and_never_trained_on() -> None:
    pairs = [{"prompt_ids": [i], "chosen_ids": [i], "rejected_ids": [0]} for i in range(100)]
    scores = [{"ref_chosen": 0.0, "ref_rejected": 0.0, "kept": i % 2 == 0} for i in range(100)]
    rows, held_out = split_pairs(pairs, scores, RECIPE)
    numbers = [row["prompt_ids"][0] for row in held_out]
    assert len(rows) == 45
    assert len(numbers) == 5
    assert max(numbers) > 80
    assert min(numbers) < 20
    assert not {row["prompt_ids"][0] for row in rows} & set(numbers)


def test_too_few_pairs_with_contrast() -> None:
    pairs = [{"prompt_ids": [1], "chosen_ids": [1], "rejected_ids": [2]}] * 9
    scores = [{"ref_chosen": 0.0, "ref_rejected": 0.0, "kept": i < 2} for i in range(9)]
    with pytest.raises(UserError) as error:
        split_pairs(pairs, scores, RECIPE)
    assert error.value.what == ("Only 2 of 9 pairs show any contrast: too few to learn from.")


def test_every_lora_gradient_of_the_4_bit_model_is_that_of_its_16_bit_weights(
    builtin_base: Base,
) -> None:
    """Also after sampling: on CPUs with AVX512-BF16 that repacks weights unless it is kept off."""
    ids = torch.tensor([builtin_base.encode("What is my dog called?", USER.text)])
    builtin_base.model.generate(ids, max_new_tokens=4)

    plain = load_base(find_base("builtin"), quantized=False).model.float()
    quantized = dict(builtin_base.model.named_modules())
    for name, module in plain.named_modules():
        source = quantized[name]
        if isinstance(source, Linear4bit):
            weight = dequantize_4bit(source.weight.data, source.weight.quant_state)
            module.weight.data = weight.float().reshape(module.weight.shape)

    def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        peft = get_peft_model(model, lora_config(RECIPE))
        generator = torch.Generator().manual_seed(1)
        for parameter in peft.parameters():
            if parameter.requires_grad:
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.02
        peft.train()
        peft(input_ids=ids, labels=ids).loss.backward()
        found = {name: p.grad for name, p in peft.named_parameters() if p.requires_grad}
        peft.unload()
        return found

    expected = gradients(plain)
    found = gradients(builtin_base.model)
    builtin_base.model.eval()
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert gradient.abs().max() > 0, name
        error = (gradient - expected[name]).norm() / expected[name].norm()
        assert error < 1e-3, (name, float(error))


def test_dpo_options_reach_trl(builtin_base: Base, pairs_and_scores, tmp_path: Path) -> None:
    recipe = RECIPE.model_copy(update={"loss": "ipo", "epochs": 0.5, "prefix_sharing": False})
    result = train(builtin_base, *pairs_and_scores, recipe, tmp_path / "a", tmp_path / "c")
    assert result.prefix_sharing == "off: the recipe says so"
    # IPO's first loss is (0 - 1 / (2 beta))^2 = 25 at beta 0.1.
    assert result.history[0]["loss"] == pytest.approx(25.0, abs=0.01)


def test_a_second_gpu_is_left_alone(builtin_base: Base, tmp_path: Path, monkeypatch) -> None:
    def two_gpus(arguments: DPOConfig) -> torch.device:
        arguments._n_gpu = 2
        return torch.device("cpu")

    monkeypatch.setattr(DPOConfig, "_setup_devices", property(two_gpus))
    assert _arguments(RECIPE, tmp_path, 100, builtin_base, 4).n_gpu == 1
