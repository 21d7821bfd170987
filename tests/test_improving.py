"""What is special to `improve`: its negatives, its evaluation, and that answers stay out of it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file

from mipo_lite.base import Base
from mipo_lite.errors import UserError
from mipo_lite.evaluation import policies
from mipo_lite.filtering import score_pairs
from mipo_lite.improving import answer, evaluate, held_out_questions, measure, summarize
from mipo_lite.infonce import _logprobs, infonce_loss, train_infonce
from mipo_lite.negatives import (
    NEGATIVES,
    answer_information,
    choose_candidates,
    likelihoods,
    make_pairs,
    pair_answers,
    plan_by_likelihood,
    sample_answers,
)
from mipo_lite.problems import Problem, load_problems, split_problems
from mipo_lite.prompts import Prompt
from mipo_lite.recipe import Recipe
from mipo_lite.run import read_jsonl
from mipo_lite.scoring import response_logprobs
from mipo_lite.training import lora_config, train

RECIPE = Recipe(
    pairs=16,
    max_new_tokens=12,
    sampling_batch=8,
    min_contrast=0.0,
    learning_rate=1e-3,
    batch_size=4,
    micro_batch=4,
    evaluations=2,
    gradient_checkpointing=False,
    eval_prompts=6,
    eval_samples=3,
    eval_contexts=4,
)


def sums(count: int) -> list[dict[str, str]]:
    return [
        {"question": f"What is {n + 1} plus {n % 4 + 1}?", "answer": str(n + n % 4 + 2)}
        for n in range(count)
    ]


def problems(count: int = 18) -> list[Problem]:
    rows = [
        Problem(f"q{i}", row["question"], i, answer=row["answer"])
        for i, row in enumerate(sums(count), start=1)
    ]
    return list(split_problems(rows)[0])


def training(count: int = 18) -> list[Problem]:
    return [problem for problem in problems(count) if problem.split == "train"]


PROMPTS = [Prompt(f"p{i}", f"Question {i}?") for i in range(5)]


# --- negatives ---------------------------------------------------------------------------------


def test_candidates_are_others() -> None:
    for index, row in enumerate(choose_candidates(PROMPTS, seed=0, count=3)):
        assert len(set(row)) == 3
        assert index not in row
    everyone = choose_candidates(PROMPTS, seed=0)
    assert [sorted(row) for row in everyone] == [
        [other for other in range(5) if other != index] for index in range(5)
    ]
    assert choose_candidates(PROMPTS, 0, 3) == choose_candidates(PROMPTS, 0, 3)
    assert choose_candidates(PROMPTS, 0, 3) != choose_candidates(PROMPTS, 1, 3)
    with pytest.raises(UserError, match="only one prompt"):
        choose_candidates(PROMPTS[:1], seed=0)


def test_near_and_far_follow_the_likelihood() -> None:
    candidates = choose_candidates(PROMPTS, seed=0)
    likelihood = torch.tensor([[-float((i + j) % 4) for j in range(4)] for i in range(5)])
    recipe = RECIPE.model_copy(update={"pairs": 12})
    for distance, best in (("near", 0.0), ("far", -3.0)):
        plans = plan_by_likelihood(recipe, PROMPTS, candidates, likelihood, distance)
        assert [plan.index for plan in plans] == list(range(12))
        of = [PROMPTS.index(plan.positive.prompt) for plan in plans]
        assert sorted(of[:5]) == sorted(of[5:10]) == list(range(5))
        for number, (index, plan) in enumerate(zip(of, plans, strict=True)):
            place = candidates[index].index(PROMPTS.index(plan.negative.prompt))
            # Each later visit of a prompt goes one place down its ranking.
            step = number // 5 * (1 if distance == "near" else -1)
            assert likelihood[index][place] == best - step
            assert plan.without == plan.negative
            assert plan.positive.context is None


def test_likelihoods_are_those_of_the_greedy_responses(builtin_base: Base) -> None:
    prompts = [problem.prompt for problem in training(6)]
    candidates = choose_candidates(prompts, seed=0, count=2)
    found = likelihoods(builtin_base, prompts, candidates, RECIPE)
    for prompt, row, values in zip(prompts, candidates, found, strict=True):
        ids = builtin_base.encode(prompt.text, None)
        greedy = builtin_base.model.generate(
            torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), do_sample=False,
            max_new_tokens=RECIPE.max_new_tokens, eos_token_id=builtin_base.eos_ids,
            pad_token_id=builtin_base.pad_id,
        )[0, len(ids):].tolist()  # fmt: skip
        slow = [
            response_logprobs(
                builtin_base.model, [(builtin_base.encode(prompts[j].text, None), greedy)]
            )[0].sum()
            for j in row
        ]
        torch.testing.assert_close(values.float(), torch.stack(slow), rtol=1e-3, atol=1e-2)


def test_information_of_answers_by_hand() -> None:
    answers = [["1", "1", "2", None], ["2", "2", "2", "2"]]
    first, second = answer_information(answers)
    assert first["1"] == pytest.approx(2 / 4 * math.log((2 / 4) / (2 / 8)))
    assert first["2"] == pytest.approx(1 / 4 * math.log((1 / 4) / (5 / 8)))
    assert len(first) == 2
    assert second == {"2": pytest.approx(math.log(1 / (5 / 8)))}
    assert answer_information([[None, None]]) == [{}]


def test_a_slip_that_nobody_else_makes_is_not_chosen() -> None:
    """PMI alone would choose it: log p(a | x) / p(a) is highest for the rarest answer."""
    answers = [["7", "7", "7", "99"], ["3", "3", "7", "3"], ["4"] * 4, ["8"] * 4]
    pairs = [pair for pair in pair_answers(answers, pairs=9, seed=0) if pair.question == 0]
    assert [answers[0][pair.rejected] for pair in pairs] == ["99"]


def test_answers_are_contrasted_within_a_question() -> None:
    answers = [
        ["5", "5", "6", None, "5"],
        ["7", "7", "7", "7", "7"],  # nothing to contrast
        [None, None, None, None, None],
        ["8", "9", "9", "9", "9"],
    ]
    pairs = pair_answers(answers, pairs=100, seed=0)
    assert {pair.question for pair in pairs} == {0, 3}
    for pair in pairs:
        given = answers[pair.question]
        assert given[pair.chosen] == {0: "5", 3: "9"}[pair.question]
        assert given[pair.rejected] != given[pair.chosen]
    assert len({(pair.question, pair.rejected) for pair in pairs}) == len(pairs) == 3
    assert pair_answers(answers, pairs=2, seed=0) == pairs[:2], "one of each question first"
    assert {pair.question for pair in pairs[:2]} == {0, 3}


def test_samples_go_on_to_the_same_file(builtin_base: Base, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    found = sample_answers(builtin_base, training(), 2, RECIPE, whole)
    assert [len(own) for own in found] == [2] * 12
    lines = whole.read_bytes().splitlines(keepends=True)
    cut.write_bytes(b"".join(lines[:11]) + lines[11][:9])  # killed within a line, within a chunk
    assert sample_answers(builtin_base, training(), 2, RECIPE, cut) == found
    assert cut.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("negatives", NEGATIVES)
def test_pairs_train_on_the_question_alone(
    builtin_base: Base, tmp_path: Path, negatives: Any
) -> None:
    """Both responses stand behind the question's ids; what conditioned the negative does not."""
    asked = {p.id: builtin_base.encode(p.text, None) for p in training()}
    make_pairs(builtin_base, training(), negatives, 6, RECIPE, tmp_path)
    rows = read_jsonl(tmp_path / "pairs.jsonl")
    assert rows
    for row in rows:
        assert row["prompt_ids"] == asked[row["prompt_id"]]
        same = row["negative"]["prompt_id"] == row["prompt_id"]
        assert same == (negatives == "answers")
        assert row["without_ids"] in asked.values()
        assert row["without_ids"] != row["prompt_ids"]
        assert row["chosen_ids"] != row["rejected_ids"] or negatives != "answers"


# --- answers never reach training ---------------------------------------------------------------


@pytest.mark.parametrize("negatives", ["random", "answers"])
def test_shuffled_answers_give_the_same_adapter(
    builtin_base: Base, tmp_path: Path, negatives: Any
) -> None:
    """Bit for bit, the whole way from the file to the adapter."""
    recipe = RECIPE.model_copy(update={"temperature": 2.0})  # or too few answers differ
    rows = sums(18)
    shuffled = [
        {**row, "answer": other["answer"]} for row, other in zip(rows, rows[::-1], strict=True)
    ]
    adapters = []
    for name, variant in (("right", rows), ("shuffled", shuffled)):
        directory = tmp_path / name
        directory.mkdir()
        file = directory / "questions.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in variant), "utf-8")
        found, _ = split_problems(load_problems(file, print).problems)
        on = [problem for problem in found if problem.split == "train"]
        make_pairs(builtin_base, on, negatives, 6, recipe, directory)
        pairs = read_jsonl(directory / "pairs.jsonl")
        score_pairs(builtin_base, pairs, RECIPE, directory / "scores.jsonl")
        scores = read_jsonl(directory / "scores.jsonl")
        adapter = directory / "adapter"
        train(builtin_base, pairs, scores, RECIPE, adapter, directory / "checkpoints")
        adapters.append(load_file(adapter / "adapter_model.safetensors"))
    right, wrong = adapters
    assert right.keys() == wrong.keys()
    assert any(tensor.abs().max() > 0 for name, tensor in right.items() if "lora_B" in name)
    for name, tensor in right.items():
        assert torch.equal(tensor, wrong[name]), name


# --- evaluation --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def idle_adapter(builtin_base: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that changes nothing: LoRA's B is 0."""
    directory = tmp_path_factory.mktemp("idle")
    model = get_peft_model(builtin_base.model, lora_config(RECIPE))
    model.save_pretrained(str(directory))
    model.unload()
    return directory


def test_held_out_questions() -> None:
    questions = held_out_questions(problems(), RECIPE)
    assert len(questions) == 6
    for question in questions:
        ids = [problem.id for problem in (question.problem, *question.rivals)]
        assert len(set(ids)) == 4
        assert {p.split for p in (question.problem, *question.rivals)} == {"held_out"}
    with pytest.raises(UserError, match="1 questions are held out"):
        held_out_questions([*training(), Problem("x", "X?", 1, split="held_out")], RECIPE)


def test_nothing_changes_without_training(
    builtin_base: Base, idle_adapter: Path, tmp_path: Path
) -> None:
    metrics = evaluate(
        builtin_base, problems(), RECIPE, {"after": idle_adapter}, tmp_path / "evaluation.jsonl"
    )
    assert metrics["verdict"]["word"] == "no change"
    assert metrics["questions"] == metrics["with_reference"] == 6
    assert metrics["prompts_ranked"] == 4
    for mode in ("sampled", "greedy", "majority"):
        for name, values in metrics["question"][mode].items():
            assert abs(values["difference"]) < 1e-3, (mode, name)
    assert metrics["question"]["sampled"]["exact_match"]["n"] == 18
    assert metrics["question"]["sampled"]["bits"]["before"] <= 2.0
    assert metrics["question"]["majority"]["exact_match"]["n"] == 6


def test_measures_against_a_slow_version(
    builtin_base: Base, idle_adapter: Path, tmp_path: Path
) -> None:
    questions = held_out_questions(problems(), RECIPE)
    with policies(builtin_base, {"after": idle_adapter}) as use:
        rows = answer(builtin_base, use, ["before"], questions, RECIPE, tmp_path / "a.jsonl")
        measures = measure(builtin_base, use, questions, rows)
    again = read_jsonl(tmp_path / "a.jsonl")
    assert again == rows
    for row, found in list(zip(rows, measures, strict=True))[:4]:
        question = questions[row["question"]]
        logprobs = np.array(
            [
                float(
                    response_logprobs(
                        builtin_base.model,
                        [(builtin_base.encode(problem.text, None), row["token_ids"])],
                    )[0].sum()
                )
                for problem in (question.problem, *question.rivals)
            ]
        )
        probabilities = np.exp(logprobs)
        assert found["bits"] == pytest.approx(
            math.log2(probabilities[0] / probabilities.mean()), abs=1e-3
        )
        assert found["own_bits"] == pytest.approx(found["bits"])
        assert found["pmi"] == pytest.approx(
            math.log(probabilities[0] / probabilities[1:].mean()), abs=1e-3
        )


def test_summary_by_hand() -> None:
    questions = held_out_questions(problems(), RECIPE.model_copy(update={"eval_prompts": 2}))
    right = [question.problem.answer for question in questions]
    rows, measures = [], []
    for which, given in (
        ("before", [["0", "0", right[0]], ["0", "0", "0"]]),
        ("after", [[right[0], right[0], "0"], ["0", right[1], None]]),
    ):
        for mode in ("sampled", "greedy"):
            for index, own in enumerate(given):
                for text in own if mode == "sampled" else own[:1]:
                    rows.append({"model": which, "mode": mode, "question": index,
                                 "text": text or "", "token_ids": [1, 2, 3]})  # fmt: skip
                    measures.append({"exact_match": float(text == right[index])})
    summary = summarize(questions, rows, measures, "before", "after")
    assert summary["sampled"]["exact_match"]["before"] == pytest.approx(1 / 6, abs=1e-4)
    assert summary["sampled"]["exact_match"]["after"] == pytest.approx(3 / 6)
    assert summary["greedy"]["exact_match"]["after"] == pytest.approx(1 / 2)
    assert summary["majority"]["exact_match"]["before"] == 0.0
    assert summary["majority"]["exact_match"]["after"] == pytest.approx(1 / 2)


# --- InfoNCE -----------------------------------------------------------------------------------


def test_infonce_loss_by_hand() -> None:
    logprobs = torch.tensor([[-1.0, -2.0], [-3.0, -1.0]])
    slow = -(
        math.log(math.exp(-1) / (math.exp(-1) + math.exp(-2)))
        + math.log(math.exp(-1) / (math.exp(-3) + math.exp(-1)))
    )
    assert infonce_loss(logprobs).item() == pytest.approx(slow / 2)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_infonce_tells_prompts_apart(
    builtin_base: Base, tmp_path: Path, checkpointing: bool
) -> None:
    """Also on a base on which a DPO before has left gradient checkpointing switched on."""
    if checkpointing:
        builtin_base.model.gradient_checkpointing_enable()
    try:
        learn_to_tell_prompts_apart(builtin_base, tmp_path)
    finally:
        builtin_base.model.gradient_checkpointing_disable()


def learn_to_tell_prompts_apart(builtin_base: Base, tmp_path: Path) -> None:
    make_pairs(builtin_base, training(), "random", 0, RECIPE, tmp_path)
    pairs = read_jsonl(tmp_path / "pairs.jsonl")
    batch = pairs[:4]
    rows = [(k["prompt_ids"], i["chosen_ids"]) for i in batch for k in batch]
    slow = torch.stack([response_logprobs(builtin_base.model, [row])[0].sum() for row in rows])
    with torch.no_grad():
        torch.testing.assert_close(
            _logprobs(builtin_base.model, batch).flatten(), slow, rtol=1e-4, atol=1e-3
        )
    # The base tells these prompts apart without fail. Responses to the prompt before have to be
    # learned.
    pairs = [pair | {"chosen_ids": pairs[i - 1]["chosen_ids"]} for i, pair in enumerate(pairs)]
    recipe = RECIPE.model_copy(update={"epochs": 4.0, "batch_size": 8, "learning_rate": 3e-3})
    train_infonce(builtin_base, pairs, recipe, tmp_path / "adapter")
    with policies(builtin_base, {"after": tmp_path / "adapter"}) as use, torch.no_grad():
        with use("before"):
            before = infonce_loss(_logprobs(builtin_base.model, pairs[:8]))
        with use("after"):
            after = infonce_loss(_logprobs(builtin_base.model, pairs[:8]))
    assert after < before / 2
