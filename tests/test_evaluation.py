"""What is asked, what answers show, and that an interrupted evaluation goes on where it stopped."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import VOCAB, tiny_model, with_lora

from mipo_lite import evaluation
from mipo_lite.contexts import Persona
from mipo_lite.evaluation import CONDITIONS, answer, evaluate, policies, questions_about
from mipo_lite.evidence import measure
from mipo_lite.prompts import Prompt
from mipo_lite.recipe import Recipe
from mipo_lite.run import read_jsonl

USER = Persona("user", "I am Ilva. My dog is Quibbix.", {"name": ["Ilva"], "pet": ["Quibbix"]})
POOL = [
    Persona(f"persona-{i}", f"I am person {i}. My cat is Tom{i}.", {"pet": [f"Tom{i}"]})
    for i in range(6)
]
PROMPTS = [
    Prompt("a", "What is my pet called?", ("pet",), "held_out"),
    Prompt("b", "Who am I?", ("name",), "held_out"),
    Prompt("c", "Say it.", ("pet",), "held_out"),
    Prompt("d", "Why is the sky blue?", (), "held_out"),
    Prompt("e", "Never asked.", ("pet",), "train"),
]
RECIPE = Recipe(eval_prompts=3, eval_samples=2, eval_contexts=3, max_new_tokens=6, sampling_batch=4)


class Tokenizer:
    """A token a character, after three special ones."""

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": [3 + ord(c) % (VOCAB - 3) for c in text]}


def make_base(model: Any) -> Any:
    tokenizer = Tokenizer()

    def encode(prompt: str, context: str | None) -> list[int]:
        return [1, *tokenizer(context or "")["input_ids"][:20], 1, *tokenizer(prompt)["input_ids"]]

    return SimpleNamespace(
        model=model,
        tokenizer=tokenizer,
        eos_ids=[2],
        pad_id=0,
        source=SimpleNamespace(name="tiny"),
        encode=encode,
        decode=lambda ids: "".join(chr(97 + i % 26) for i in ids),
    )


@pytest.fixture(scope="module")
def adapters(tmp_path_factory) -> dict[str, Path]:
    """One that does something, and one of zeros."""
    directory = tmp_path_factory.mktemp("adapters")
    with_lora(tiny_model("llama")).save_pretrained(str(directory / "after"))
    config = LoraConfig(r=4, target_modules="all-linear")  # B starts at zero
    get_peft_model(tiny_model("llama"), config).save_pretrained(str(directory / "zeros"))
    return {name: directory / name for name in ("after", "zeros")}


@pytest.fixture(autouse=True)
def small_pool(monkeypatch) -> None:
    monkeypatch.setattr(evaluation, "persona_pool", lambda split: tuple(POOL))


def test_only_held_out_prompts_are_asked_in_every_condition() -> None:
    questions = questions_about(USER, PROMPTS, POOL, RECIPE)
    by_condition = {
        condition: [q for q in questions if q.condition == condition] for condition in CONDITIONS
    }
    assert {q.prompt.id for q in by_condition["with_context"]} == {"a", "b", "c"}
    assert {q.prompt.id for q in by_condition["neutral"]} == {"d"}
    for q in by_condition["with_context"]:
        assert q.asked.context is USER and q.rivals[0] is USER
        assert len(q.rivals) == RECIPE.eval_contexts
    assert all(q.asked.context is None for q in by_condition["without_context"])
    for q in by_condition["other_context"]:
        # Nobody who is a rival of the user's is also the other persona.
        assert q.asked.context in POOL[RECIPE.eval_contexts - 1 :]
        assert q.rivals == (q.asked.context, USER)


def test_a_users_own_prompts_may_all_matter() -> None:
    own = [Prompt(f"o{i}", f"Own {i}", (), "held_out" if i % 2 else "train") for i in range(6)]
    questions = questions_about(USER, own, POOL, RECIPE)
    assert {q.prompt.id for q in questions if q.condition == "with_context"} == {"o1", "o3", "o5"}
    neutral = [q.prompt for q in questions if q.condition == "neutral"]
    assert len(neutral) == 3 and not any(p.id.startswith("o") or p.topics for p in neutral)


def test_policies_switch_and_leave_the_base_as_it_was(adapters) -> None:
    model = tiny_model("llama")
    base = make_base(model)
    ids = torch.tensor([[1, 5, 9, 4]])

    def logits() -> torch.Tensor:
        with torch.no_grad():
            return model(ids).logits

    plain = logits()
    names = [name for name, _ in model.named_modules()]
    with policies(base, adapters) as use:
        for name, same in (("after", False), ("before", True), ("zeros", True), ("after", False)):
            with use(name):
                assert torch.equal(logits(), plain) == same, name
    assert torch.equal(logits(), plain)
    assert [name for name, _ in model.named_modules()] == names


def test_evaluation_of_zeros_finds_no_difference_at_all(adapters, tmp_path) -> None:
    base = make_base(tiny_model("llama"))
    path = tmp_path / "evaluation.jsonl"
    metrics = evaluate(base, USER, PROMPTS, RECIPE, {"after": adapters["zeros"]}, path)
    assert metrics["verdict"]["word"] == "no change"
    checked = 0
    for condition in CONDITIONS:
        for block in metrics[condition].values():
            for entry in block.values():
                assert entry["difference"] == entry["low"] == entry["high"] == 0.0
                checked += 1
    assert checked > 20
    assert metrics["prompts"] == 3 and metrics["neutral_prompts"] == 1
    rows = read_jsonl(path)
    assert all("measures" in row for row in rows)
    half = len(rows) // 2
    assert [r["token_ids"] for r in rows[:half]] == [r["token_ids"] for r in rows[half:]]


def test_baselines_are_measured_beside(adapters, tmp_path) -> None:
    base = make_base(tiny_model("llama"))
    metrics = evaluate(base, USER, PROMPTS, RECIPE, adapters, tmp_path / "evaluation.jsonl")
    pmi = metrics["with_context"]["sampled"]["pmi"]
    beside = metrics["baselines"]["zeros"]["with_context"]["sampled"]["pmi"]
    assert pmi["difference"] != 0 and beside["difference"] == 0
    assert beside["before"] == pmi["before"]
    assert metrics["neutral"]["sampled"]["kl_per_token"]["before"] == 0
    assert metrics["neutral"]["sampled"]["kl_per_token"]["after"] > 0


def test_an_interrupted_evaluation_goes_on(adapters, tmp_path, monkeypatch) -> None:
    whole, broken = tmp_path / "whole.jsonl", tmp_path / "broken.jsonl"
    after = {"after": adapters["after"]}
    first = evaluate(make_base(tiny_model("llama")), USER, PROMPTS, RECIPE, after, whole)
    lines = whole.read_text("utf-8").splitlines()
    # Killed in the middle of a block, before anything was measured.
    rows = [{k: v for k, v in json.loads(line).items() if k != "measures"} for line in lines]
    broken.write_text("".join(json.dumps(row) + "\n" for row in rows[:-9]), "utf-8")
    asked: list[int] = []
    respond = evaluation.respond
    monkeypatch.setattr(
        evaluation,
        "respond",
        lambda b, reqs, *o, **k: asked.append(len(reqs)) or respond(b, reqs, *o, **k),
    )
    again = evaluate(make_base(tiny_model("llama")), USER, PROMPTS, RECIPE, after, broken)
    assert again == first
    assert broken.read_text("utf-8") == whole.read_text("utf-8")
    assert 0 < sum(asked) < len(rows) / 2


def test_measures_of_answers_made_by_hand(adapters) -> None:
    """Facts, own words, leaks and copied runs, on texts whose measures one can count."""
    base = make_base(tiny_model("llama"))
    questions = questions_about(USER, PROMPTS, POOL, RECIPE)

    def ask(condition: str, prompt: str, text: str) -> dict[str, float | None]:
        index = next(
            i for i, q in enumerate(questions) if (q.condition, q.prompt.id) == (condition, prompt)
        )
        row = {
            "model": "before",
            "mode": "sampled",
            "condition": condition,
            "question": index,
            "sample": 0,
            "text": text,
            "token_ids": [5, 6, 5, 6, 5, 6, 2],
            "ended": True,
        }
        with policies(base, adapters) as use:
            return measure(base, use, USER, questions, [row], POOL)[0]

    told = ask("with_context", "a", "Your dog is Quibbix, and my dog is Quibbix.")
    assert told["fact_use"] == 1.0 and told["own_words"] == 1.0
    assert told["shared_run"] == 4  # my dog is quibbix
    assert told["user_facts"] is None and told["wrong_fact"] is None
    assert told["length"] == 7 and told["repetition"] == pytest.approx(1 - 3 / 4)
    assert told["pmi_per_token"] == pytest.approx(told["pmi"] / 7)
    assert "which_context" in told and "kl_per_token" not in told

    assert ask("with_context", "a", "You are Ilva.")["fact_use"] == 0.0, "not the fact asked for"
    leak = ask("without_context", "a", "Quibbix, of course.")
    assert leak["user_facts"] == 1.0 and leak["own_words"] == 1.0
    assert ask("other_context", "a", "Quibbix?")["user_facts"] == 1.0
    assert ask("other_context", "a", "Nobody.")["user_facts"] == 0.0
    assert ask("neutral", "d", "Because.")["kl_per_token"] == 0.0


def test_answers_have_the_seeds_of_their_question(adapters, tmp_path) -> None:
    base = make_base(tiny_model("llama"))
    questions = questions_about(USER, PROMPTS, POOL, RECIPE)
    with policies(base, {"after": adapters["after"]}) as use:
        rows = answer(base, use, ("before", "after"), questions, RECIPE, tmp_path / "a.jsonl")
    key = ("mode", "condition", "prompt_id", "persona", "sample")
    sides = [
        [tuple(row[k] for k in key) for row in rows if row["model"] == model]
        for model in ("before", "after")
    ]
    assert sides[0] == sides[1]
    sampled = [r["token_ids"] for r in rows if r["condition"] == "with_context" and not r["sample"]]
    assert len({tuple(ids) for ids in sampled}) > 4
