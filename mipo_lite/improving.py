"""Before and after of `improve`, on questions it was never trained on.

The base and the policy (base + adapter) answer the same held-out questions with the same seeds,
greedily and sampled. Two kinds of evidence: how much a response tells about its question (the
InfoNCE bound on I(y; x) among K held-out questions, PMI against the others), which is close to
what was optimized; and whether its answer is right, which was not. Nothing is trained here, and
no other module compares anything with a reference answer.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .answers import find_answer, is_right, majority
from .base import Base
from .console import progress
from .errors import UserError
from .evaluation import AFTER, BEFORE, Use, answer, policies, write_measures
from .improving_verdict import conclude
from .metrics import compare, compare_distinct_n, information, repetition
from .problems import Problem
from .prompts import Condition
from .recipe import Recipe
from .scoring import score_matrix

MODES = ("sampled", "greedy")

Measures = dict[str, float | None]
Row = dict[str, Any]


@dataclass(frozen=True)
class HeldOut:
    """A question of the evaluation, and those among which responses to it are ranked.

    Attributes:
        rivals: other held-out questions, K - 1 of them.
        samples: sampled responses per model; one greedy response comes on top.
    """

    problem: Problem
    rivals: tuple[Problem, ...]
    samples: int
    condition: str = "question"
    greedy: bool = True

    @property
    def asked(self) -> Condition:
        return Condition(self.problem.prompt)


def evaluate(
    base: Base,
    problems: Sequence[Problem],
    recipe: Recipe,
    adapters: Mapping[str, Path],
    path: Path,
) -> dict[str, Any]:
    """Answer, measure, and conclude: what metrics.json of an `improve` run holds.

    Args:
        problems: all problems of the run; only those held out are asked.
        adapters: name -> adapter directory. "after" is the trained one; any other name is a
            baseline that is measured beside it.
        path: evaluation.jsonl, where answers are kept as they come, measures added at the end.
    """
    questions = held_out_questions(problems, recipe)
    models = (BEFORE, *adapters)
    total = len(models) * len(questions) * (recipe.eval_samples + 1)
    with policies(base, adapters) as use:
        with progress("Answering, before and after", total) as advance:
            answers = answer(base, use, models, questions, recipe, path, advance)
        with progress("Measuring", total) as advance:
            measures = measure(base, use, questions, answers, advance)
    write_measures(path, answers, measures)
    summaries = {
        name: {"question": summarize(questions, answers, measures, BEFORE, name)}
        for name in adapters
    }
    metrics = {
        "questions": len(questions),
        "with_reference": sum(q.problem.answer is not None for q in questions),
        "samples_per_question": recipe.eval_samples,
        "prompts_ranked": 1 + len(questions[0].rivals),
        **summaries.pop(AFTER, {}),
        "baselines": summaries,
    }
    return metrics | {"verdict": conclude(metrics).as_dict()}


def held_out_questions(problems: Sequence[Problem], recipe: Recipe) -> list[HeldOut]:
    """`recipe.eval_prompts` held-out problems at most, each with `recipe.eval_contexts` - 1 rivals.

    Raises UserError when fewer than two are held out: one can not be told from another.
    """
    held_out = [problem for problem in problems if problem.split == "held_out"]
    # A file is often ordered: take a fixed random part of it, not its head.
    held_out = random.Random(0).sample(held_out, min(len(held_out), recipe.eval_prompts))
    if len(held_out) < 2:
        raise UserError(
            f"Only {len(held_out)} questions are held out for the evaluation; 2 is the least.",
            "Give more questions.",
        )
    rng = random.Random(f"rivals {recipe.seed}")
    count = min(recipe.eval_contexts, len(held_out)) - 1
    return [
        HeldOut(
            problem,
            tuple(rng.sample([p for p in held_out if p is not problem], count)),
            recipe.eval_samples,
        )
        for problem in held_out
    ]


def measure(
    base: Base,
    use: Use,
    questions: Sequence[HeldOut],
    answers: Sequence[Row],
    advance: Callable[[int], None] = lambda n: None,
) -> list[Measures]:
    """What each answer shows, in the order of `answers`.

    Sampled answers, as the frozen base scores them: `bits`, the answer's summand of the InfoNCE
    bound on I(y; x) among K questions; `pmi`, log p(y | x) - log mean p(y | x') over the K - 1
    rivals, nats; `which_prompt`, 1 if no rival explains it as well. `own_bits`: the same bound
    as the model scores it that wrote the answer, so that information the base cannot see counts.

    By looking: `exact_match` (None without a reference answer), `answered` (a final answer was
    found), `length` in tokens, `ended`, `repetition`.
    """
    found = [_looked_at(row, questions[row["question"]].problem) for row in answers]
    prompts = [
        [Condition(p.prompt).encode(base) for p in (question.problem, *question.rivals)]
        for question in questions
    ]
    by_base = _scores(base, use, BEFORE, prompts, answers, range(len(answers)))
    for which in dict.fromkeys(row["model"] for row in answers):
        own = [i for i, row in enumerate(answers) if row["model"] == which]
        by_writer = by_base if which == BEFORE else _scores(base, use, which, prompts, answers, own)
        for i in own:
            if i in by_writer:
                values = information(_with_marginal(by_base[i]))
                found[i] |= {
                    "bits": float(values["bits"][0]),
                    "pmi": float(values["pmi"][0]),
                    "which_prompt": float(values["which_context"][0]),
                    "own_bits": float(information(_with_marginal(by_writer[i]))["bits"][0]),
                }
        advance(len(own))
    return found


def _scores(
    base: Base,
    use: Use,
    which: str,
    prompts: Sequence[Sequence[Sequence[int]]],
    answers: Sequence[Row],
    indices: Sequence[int],
) -> dict[int, np.ndarray]:
    """Index of a sampled answer -> [K] log p(answer | prompt) under `which`, the own prompt first.

    Models often give the same answer to a question: it is scored once.
    """
    same: dict[tuple[int, tuple[int, ...]], list[int]] = {}
    for i in indices:
        row = answers[i]
        if row["mode"] == "sampled":
            same.setdefault((row["question"], tuple(row["token_ids"])), []).append(i)
    with use(which):
        scores = score_matrix(
            base.model,
            [prompts[question] for question, _ in same],
            [list(token_ids) for _, token_ids in same],
        ).numpy()
    return {i: row for row, group in zip(scores, same.values(), strict=True) for i in group}


def _with_marginal(scores: np.ndarray) -> np.ndarray:
    """[K] scores under the prompts -> [1, 1 + K] as `metrics.information` takes them.

    What stands for p(y) is the mean of p(y | x') over the rivals.
    """
    marginal = np.logaddexp.reduce(scores[1:]) - math.log(len(scores) - 1)
    return np.concatenate([[marginal], scores])[None]


def _looked_at(row: Row, problem: Problem) -> Measures:
    given = find_answer(row["text"], problem.choices)
    return {
        "exact_match": _right(given, problem),
        "answered": float(given is not None),
        "length": float(len(row["token_ids"])),
        "ended": float(row["ended"]),
        "repetition": repetition(row["token_ids"]),
    }


def summarize(
    questions: Sequence[HeldOut],
    answers: Sequence[Row],
    measures: Sequence[Measures],
    before: str,
    after: str,
) -> dict[str, Any]:
    """Mode -> measure -> before, after, difference with its 95 % interval, n.

    Modes: sampled; greedy; and majority, the answer that most samples of a question give.
    """
    summary: dict[str, Any] = {}
    for mode in MODES:
        first, second = (
            [i for i, row in enumerate(answers) if (row["model"], row["mode"]) == (which, mode)]
            for which in (before, after)
        )
        groups = [answers[i]["question"] for i in first]
        block = {
            name: compare(
                [measures[i][name] for i in first], [measures[i][name] for i in second], groups
            )
            for name in measures[first[0]]
        }
        block["distinct_2"] = compare_distinct_n(
            [answers[i]["token_ids"] for i in first],
            [answers[i]["token_ids"] for i in second],
            groups,
        )
        summary[mode] = {name: found.as_dict() for name, found in block.items() if found}
    votes = [_majority_right(questions, answers, which) for which in (before, after)]
    found = compare(votes[0], votes[1], range(len(questions)))
    summary["majority"] = {"exact_match": found.as_dict()} if found else {}
    return summary


def _majority_right(
    questions: Sequence[HeldOut], answers: Sequence[Row], which: str
) -> list[float | None]:
    """Per question, whether the majority of its sampled answers is right."""
    given: list[list[str | None]] = [[] for _ in questions]
    for row in answers:
        if (row["model"], row["mode"]) == (which, "sampled"):
            choices = questions[row["question"]].problem.choices
            given[row["question"]].append(find_answer(row["text"], choices))
    return [
        _right(majority(votes), question.problem)
        for question, votes in zip(questions, given, strict=True)
    ]


def _right(given: str | None, problem: Problem) -> float | None:
    return None if problem.answer is None else float(is_right(given, problem.answer))
