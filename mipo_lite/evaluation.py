"""Before and after: what the adapter changed, on prompts it was never trained on.

The base and the policy (base + adapter) answer the same held-out prompts with the same seeds in
three conditions: with the user's context, with none, and with another persona's. The frozen base
judges how much an answer tells about the context: PMI, and which of K contexts explains it best.
That is close to what was optimized; facts and words found in the answers are evidence of another
kind. Nothing is trained here.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from peft import PeftModel

from .base import Base
from .builtin.facts import fact_use, wrong_fact
from .contexts import Persona
from .metrics import compare, distinct_n, own_words, words
from .prompts import Condition, Prompt
from .recipe import Recipe
from .run import append_jsonl, read_jsonl, truncate_jsonl
from .sampling import SampleRequest, sample
from .scoring import score_matrix

CONDITIONS = ("with_context", "without_context", "other_context")
MODES = ("sampled", "greedy")
MODELS = ("before", "after")


@dataclass(frozen=True)
class Question:
    """A held-out prompt in one condition.

    Attributes:
        asked: what the response is conditioned on.
        subject: whose page the information is about: the user, or the other persona.
        rivals: the K personas among whom the response is ranked, `subject` first.
    """

    condition: str
    asked: Condition
    subject: Persona
    rivals: tuple[Persona, ...]

    @property
    def prompt(self) -> Prompt:
        return self.asked.prompt


def questions_about(
    user: Persona, prompts: Sequence[Prompt], pool: Sequence[Persona], recipe: Recipe
) -> list[Question]:
    """Held-out prompts, `recipe.eval_prompts` of them at most, in all three conditions."""
    held_out = [prompt for prompt in prompts if prompt.split == "held_out"]
    # The list is ordered by topic: take a fixed random part of it, not its head.
    held_out = random.Random(0).sample(held_out, min(len(held_out), recipe.eval_prompts))
    rivals = pool[: recipe.eval_contexts - 1]
    others = pool[recipe.eval_contexts - 1 :]
    questions = []
    for condition in CONDITIONS:
        for number, prompt in enumerate(held_out):
            other = others[number % len(others)]
            subject = other if condition == "other_context" else user
            context = None if condition == "without_context" else subject
            asked = Condition(prompt, context)
            questions.append(Question(condition, asked, subject, (subject, *rivals)))
    return questions


def answer(
    base: Base,
    adapter: Path,
    questions: Sequence[Question],
    recipe: Recipe,
    path: Path,
    advance: Callable[[int], None] = lambda n: None,
) -> list[dict[str, Any]]:
    """Answers of base and policy to all questions, sampled and greedy, appended to `path`.

    Base and policy answer with the same seeds. A block (model, mode) that an earlier start has
    written completely is not sampled again.
    """
    rows: list[dict[str, Any]] = []
    done = read_jsonl(path)
    model = PeftModel.from_pretrained(base.model, adapter)
    try:
        for which, mode in product(MODELS, MODES):
            asked = [
                (index, number)
                for index in range(len(questions))
                for number in range(recipe.eval_samples if mode == "sampled" else 1)
            ]
            block = done[len(rows) : len(rows) + len(asked)]
            if len(block) < len(asked):
                truncate_jsonl(path, len(rows))
                done = []
                with _policy(model, enabled=which == "after"):
                    block = _answers(base, model, questions, asked, which, mode, recipe, advance)
                append_jsonl(path, block)
            else:
                advance(len(block))
            rows += block
    finally:
        model.unload()
    return rows


def count_answers(questions: Sequence[Question], recipe: Recipe) -> int:
    """How many responses `answer` samples."""
    return len(questions) * len(MODELS) * (recipe.eval_samples + 1)


def measure(
    base: Base,
    user: Persona,
    questions: Sequence[Question],
    answers: Sequence[dict[str, Any]],
    pool: Sequence[Persona],
    advance: Callable[[int], None] = lambda n: None,
) -> list[dict[str, float | None]]:
    """What each answer shows, in the order of `answers`.

    Under the frozen base: `pmi`, log p(y|x,c) - log p(y|x) in nats; `pmi_per_token`;
    `which_context`, 1 if c explains y better than K - 1 other contexts do. By looking:
    `length` in tokens, `ended`, `own_words` (a word that only the user's page has), and where
    facts are known `fact_use` (a fact of the subject that fits the prompt), `wrong_fact`
    and `user_facts` (any fact of the user). None where a measure does not apply.
    """
    asked = [questions[row["question"]] for row in answers]
    own = own_words(user.text, [p.text for p in pool] + [q.prompt.text for q in questions])
    prompts = [
        [base.encode(q.prompt.text, context) for context in (None, *(p.text for p in q.rivals))]
        for q in questions
    ]
    scores = score_matrix(
        base.model,
        [prompts[row["question"]] for row in answers],
        [row["token_ids"] for row in answers],
        progress=advance,
    )
    measures: list[dict[str, float | None]] = []
    for question, row, score in zip(asked, answers, scores, strict=True):
        text, length = row["text"], len(row["token_ids"])
        pmi = float(score[1] - score[0])
        found: dict[str, float | None] = {
            "pmi": pmi,
            "pmi_per_token": pmi / max(length, 1),
            "which_context": float(score[1:].argmax() == 0),
            "length": float(length),
            "ended": float(row["ended"]),
            "own_words": float(not own.isdisjoint(words(text))),
        }
        measures.append(found | _facts(question, user, text))
    return measures


def summarize(
    questions: Sequence[Question],
    answers: Sequence[dict[str, Any]],
    measures: Sequence[dict[str, float | None]],
) -> dict[str, Any]:
    """Condition -> mode -> measure -> before, after, difference with its 95 % interval, n."""
    summary: dict[str, Any] = {}
    for condition, mode in product(CONDITIONS, MODES):
        before, after = (
            [
                (row, values)
                for row, values in zip(answers, measures, strict=True)
                if (row["model"], row["mode"]) == (which, mode)
                and questions[row["question"]].condition == condition
            ]
            for which in MODELS
        )
        groups = [row["question"] for row, _ in before]
        block: dict[str, Any] = {}
        for name in before[0][1] if before else ():
            comparison = compare([m[name] for _, m in before], [m[name] for _, m in after], groups)
            if comparison is not None:
                block[name] = comparison.as_dict()
        diversity = [distinct_n([row["token_ids"] for row, _ in side]) for side in (before, after)]
        block["distinct_2"] = {
            "before": round(diversity[0], 4),
            "after": round(diversity[1], 4),
            "difference": round(diversity[1] - diversity[0], 4),
        }
        summary.setdefault(condition, {})[mode] = block
    return summary


def _answers(
    base: Base,
    model: PeftModel,
    questions: Sequence[Question],
    asked: Sequence[tuple[int, int]],
    which: str,
    mode: str,
    recipe: Recipe,
    advance: Callable[[int], None],
) -> list[dict[str, Any]]:
    samples = sample(
        model,
        [
            SampleRequest(questions[index].asked.encode(base), _seed(recipe.seed, index, number))
            for index, number in asked
        ],
        max_new_tokens=recipe.max_new_tokens,
        eos_ids=base.eos_ids,
        pad_id=base.pad_id,
        temperature=1.0 if mode == "sampled" else 0.0,
        batch_size=recipe.sampling_batch,
    )
    rows = []
    for (index, number), response in zip(asked, samples, strict=True):
        rows.append(
            {
                "model": which,
                "mode": mode,
                "question": index,
                "sample": number,
                "text": base.decode(response.token_ids),
                "token_ids": response.token_ids,
                "ended": response.ended,
            }
        )
        advance(1)
    return rows


def _facts(question: Question, user: Persona, text: str) -> dict[str, float | None]:
    """The measures by string match; all None where no facts are known."""
    subject = question.subject
    if not subject.facts:
        return {"fact_use": None, "wrong_fact": None, "user_facts": None}
    use = fact_use(text, subject.facts, question.prompt.topics)
    context = question.asked.context.text if question.asked.context else ""
    wrong = wrong_fact(text, subject.facts, context, question.prompt.text)
    # The facts of the user that the asked context does not hold itself.
    foreign = {
        topic: [value for value in values if value.lower() not in context.lower()]
        for topic, values in user.facts.items()
    }
    leak = any(fact_use(text, foreign, [topic]) for topic in foreign)
    return {
        "fact_use": None if use is None else float(use),
        "wrong_fact": float(wrong),
        "user_facts": None if question.condition == "with_context" else float(leak),
    }


@contextmanager
def _policy(model: PeftModel, enabled: bool) -> Iterator[None]:
    """The policy, or with `enabled` False the base it was trained from."""
    if enabled:
        yield
    else:
        with model.disable_adapter():
            yield


def _seed(seed: int, question: int, number: int) -> int:
    digest = hashlib.sha256(f"evaluation {seed} {question} {number}".encode()).digest()
    return int.from_bytes(digest[:7], "big")
