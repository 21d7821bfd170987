"""What conditions the rejected response of an `improve` pair, beyond a random other prompt.

"near" and "far" rank other prompts by how likely they would have led the base to the same
response. "answers" contrasts two responses to one question: their answers, not their words.

Planning is pure; `likelihoods` and `sample_answer_pairs` are what asks the base. Knows nothing of
reference answers.
"""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from .answers import find_answer
from .base import Base
from .console import progress
from .errors import NothingToLearn, UserError
from .pairs import PairPlan, plan_improve, sample_pairs
from .problems import Problem
from .prompts import Condition, Prompt
from .recipe import Recipe
from .responses import respond, seed_of
from .run import append_jsonl, atomic_write, read_jsonl, truncate_jsonl
from .sampling import Sample, SampleRequest
from .scoring import score_matrix

Negatives = Literal["random", "near", "far", "answers"]
NEGATIVES: tuple[Negatives, ...] = get_args(Negatives)

# Other prompts that are ranked for each prompt. All of them would cost their number squared.
CANDIDATES = 32


def make_pairs(
    base: Base,
    problems: Sequence[Problem],
    negatives: Negatives,
    samples: int,
    recipe: Recipe,
    directory: Path,
) -> None:
    """Sample `recipe.pairs` pairs at most on `problems` into pairs.jsonl of `directory`.

    Goes on where an interrupted start stopped, to the same file.

    Args:
        samples: responses to each question that "answers" chooses from (samples.jsonl).

    Raises UserError when there is nothing to contrast a question with.
    """
    prompts = [problem.prompt for problem in problems]
    if negatives == "answers":
        with progress("Sampling answers", len(problems) * samples) as advance:
            path = directory / "samples.jsonl"
            responses = sample_answers(base, problems, samples, recipe, path, advance)
        rows = answer_pair_rows(base, problems, responses, recipe)
        with atomic_write(directory / "pairs.jsonl") as partial:
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            partial.write_text("".join(lines), "utf-8")
        return
    if negatives == "random":
        plans = plan_improve(recipe, prompts)
    else:
        candidates = choose_candidates(prompts, recipe.seed)
        with progress("Comparing questions", sum(map(len, candidates))) as advance:
            likelihood = likelihoods(base, prompts, candidates, recipe, advance)
        plans = plan_by_likelihood(recipe, prompts, candidates, likelihood, negatives)
    with progress("Sampling pairs", len(plans)) as advance:
        sample_pairs(base, plans, recipe, directory / "pairs.jsonl", advance)


def choose_candidates(
    prompts: Sequence[Prompt], seed: int, count: int = CANDIDATES
) -> list[list[int]]:
    """For each prompt the indices of `count` random others, or of all where there are fewer.

    Raises UserError when there is no other prompt.
    """
    if len(prompts) < 2:
        raise UserError(
            "There is only one prompt to train on, so no other one to contrast it with.",
            "Add prompts; a hundred different ones are a good start.",
        )
    rng = random.Random(f"candidates {seed}")
    others = len(prompts) - 1
    chosen = []
    for index in range(len(prompts)):
        drawn = rng.sample(range(others), min(count, others))
        chosen.append([other + (other >= index) for other in drawn])
    return chosen


def likelihoods(
    base: Base,
    prompts: Sequence[Prompt],
    candidates: Sequence[Sequence[int]],
    recipe: Recipe,
    advance: Callable[[int], None] = lambda n: None,
) -> torch.Tensor:
    """log p(y_i | x_j), in nats, for the greedy response y_i to prompt i and its candidates j.

    Returns float64 [prompts, candidates]. Compare within a row only: each has its own response.
    """
    encoded = [Condition(prompt).encode(base) for prompt in prompts]
    responses = [
        response.token_ids
        for response in respond(
            base, [SampleRequest(ids, 0) for ids in encoded], recipe, temperature=0.0
        )
    ]
    asked = [[encoded[j] for j in row] for row in candidates]
    return score_matrix(base.model, asked, responses, progress=advance)


def plan_by_likelihood(
    recipe: Recipe,
    prompts: Sequence[Prompt],
    candidates: Sequence[Sequence[int]],
    likelihood: torch.Tensor,
    distance: Literal["near", "far"],
) -> list[PairPlan]:
    """Pairs whose negative answers the nearest, or the farthest, of each prompt's candidates.

    Near: the base would have given the same response there most easily. A prompt that has several
    pairs goes down its ranking, so that each has another negative.

    Args:
        candidates, likelihood: [prompts, candidates] of `choose_candidates` and `likelihoods`.
    """
    rng = random.Random(f"pairs {recipe.seed}")
    order = likelihood.argsort(dim=1, descending=distance == "near", stable=True).tolist()
    plans: list[PairPlan] = []
    while len(plans) < recipe.pairs:
        visit = len(plans) // len(prompts)
        for index in rng.sample(range(len(prompts)), len(prompts))[: recipe.pairs - len(plans)]:
            ranked = order[index]
            other = Condition(prompts[candidates[index][ranked[visit % len(ranked)]]])
            positive = Condition(prompts[index])
            plans.append(PairPlan(len(plans), positive, other, other, recipe.seed))
    return plans


def answer_information(answers: Sequence[Sequence[str | None]]) -> list[dict[str, float]]:
    """What each answer to a question adds to I(a; x): p(a | x) log [p(a | x) / p(a)], in nats.

    From counts: p(a | x) is how often the samples of question x give the answer a, p(a) how often
    those of all questions do. This marginalizes over how an answer was reached: the words of a
    response that merely repeat the question carry none of it. The logarithm alone, PMI, is no
    guide: it is highest for slips that nobody else makes.

    Args:
        answers: [questions][samples]; None where a response gives no answer, which counts as a
            sample and adds nothing.
    """
    total = sum(map(len, answers))
    overall = Counter(answer for given in answers for answer in given if answer is not None)
    return [
        {
            answer: count / len(given) * math.log(count / len(given) / (overall[answer] / total))
            for answer, count in Counter(a for a in given if a is not None).items()
        }
        for given in answers
    ]


@dataclass(frozen=True)
class AnswerPair:
    """Two samples of one question, by their place among its samples.

    Attributes:
        contrast: how much more the chosen one's answer adds to I(a; x), nats.
    """

    question: int
    chosen: int
    rejected: int
    contrast: float


def pair_answers(
    answers: Sequence[Sequence[str | None]], pairs: int, seed: int
) -> list[AnswerPair]:
    """Contrast samples of the same question by how much their answers say about it.

    The chosen sample has the answer that adds most to I(a; x), the rejected one another answer,
    or none at all. A question whose samples all agree has no contrast and gives no pair. The pairs
    are spread over the questions; at most `pairs` are returned.

    Args:
        answers: [questions][samples] what `find_answer` found.
    """
    rng = random.Random(f"answer pairs {seed}")
    by_question = []
    for question, (given, added) in enumerate(
        zip(answers, answer_information(answers), strict=True)
    ):
        if not added:
            continue
        value = [added[answer] if answer is not None else 0.0 for answer in given]
        best = max(added, key=added.__getitem__)
        chosen = [i for i, answer in enumerate(given) if answer == best]
        rejected = [i for i, answer in enumerate(given) if answer != best]
        rng.shuffle(chosen)
        rng.shuffle(rejected)
        by_question.append(
            [
                AnswerPair(question, one, other, value[one] - value[other])
                for one, other in zip(chosen, rejected, strict=False)
            ]
        )
    rng.shuffle(by_question)
    found: list[AnswerPair] = []
    for depth in range(max(map(len, by_question), default=0)):
        found += [own[depth] for own in by_question if depth < len(own)]
    return found[:pairs]


def sample_answers(
    base: Base,
    problems: Sequence[Problem],
    samples: int,
    recipe: Recipe,
    path: Path,
    advance: Callable[[int], None] = lambda n: None,
) -> list[list[Sample]]:
    """`samples` responses to each problem, appended to `path` as they come: [problems][samples].

    A start that was interrupted goes on at the chunk of `recipe.sampling_batch` where it stopped.
    """
    requests = [
        SampleRequest(ids, seed_of("answers", recipe.seed, problem.id, number))
        for problem in problems
        for ids in [Condition(problem.prompt).encode(base)]
        for number in range(samples)
    ]
    size = recipe.sampling_batch
    done = len(read_jsonl(path)) // size * size
    if done < len(requests):
        truncate_jsonl(path, done)
    advance(min(done, len(requests)))
    for start in range(done, len(requests), size):
        chunk = requests[start : start + size]
        given = respond(base, chunk, recipe, temperature=recipe.temperature, top_p=recipe.top_p)
        append_jsonl(path, [{"token_ids": s.token_ids, "ended": s.ended} for s in given])
        advance(len(chunk))
    rows = read_jsonl(path)
    found = [Sample(row["token_ids"], row["ended"]) for row in rows]
    return [found[i : i + samples] for i in range(0, len(requests), samples)]


def answer_pair_rows(
    base: Base, problems: Sequence[Problem], responses: Sequence[Sequence[Sample]], recipe: Recipe
) -> list[dict[str, Any]]:
    """Lines of pairs.jsonl from the samples of `sample_answers`, as `pair_answers` chooses them.

    Beside what every pair has, a line holds `contrast`, how much more the chosen answer adds to
    I(a; x), in nats. The filter has to go by that: two responses that repeat the question and
    differ in their answer alone carry nearly the same PMI as whole texts.

    Raises UserError when fewer than two questions give a pair.
    """
    answers = [
        [find_answer(base.decode(response.token_ids), problem.choices) for response in own]
        for problem, own in zip(problems, responses, strict=True)
    ]
    pairs = pair_answers(answers, recipe.pairs, recipe.seed)
    if len({pair.question for pair in pairs}) < 2:
        raise NothingToLearn(
            "The samples of each question all give the same answer: there is nothing to contrast.",
            "Use --negatives random, more questions, or more samples per question.",
        )
    rng = random.Random(f"without {recipe.seed}")
    rows = []
    for number, pair in enumerate(pairs):
        problem, own = problems[pair.question], responses[pair.question]
        chosen, rejected = own[pair.chosen].token_ids, own[pair.rejected].token_ids
        other = rng.choice([other for other in problems if other.id != problem.id])
        rows.append(
            {
                "id": number,
                "prompt": base.messages(problem.text, None),
                "prompt_id": problem.id,
                "persona": None,
                "negative": {"prompt_id": problem.id, "persona": None},
                "chosen": base.decode(chosen),
                "rejected": base.decode(rejected),
                "prompt_ids": Condition(problem.prompt).encode(base),
                "chosen_ids": chosen,
                "rejected_ids": rejected,
                "without_ids": Condition(other.prompt).encode(base),
                "contrast": round(pair.contrast, 4),
                "seed": recipe.seed,
            }
        )
    return rows
