"""The contrast: which prompt conditions the chosen and which the rejected response of a pair.

`plan_*` decide everything from the seed before anything is sampled; `sample_pairs` lets the base
write the responses and appends them to pairs.jsonl. Both responses of a pair are trained on the
same, correct prompt: what conditioned the negative never enters the training sequence.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .base import Base
from .contexts import Persona
from .errors import UserError
from .prompts import Condition, Prompt
from .recipe import Recipe
from .responses import respond, seed_of
from .run import append_jsonl, read_jsonl, truncate_jsonl
from .sampling import Sample, SampleRequest


@dataclass(frozen=True)
class PairPlan:
    """One pair before it is sampled.

    Attributes:
        positive: conditions the chosen response, and is the prompt both are trained on.
        negative: conditions the rejected response.
        without: what PMI compares with, log p(y | positive) - log p(y | without): the prompt
            without its context (personalize), or the other prompt (improve).
    """

    index: int
    positive: Condition
    negative: Condition
    without: Condition
    seed: int


def plan_personalize(
    recipe: Recipe, prompts: Sequence[Prompt], user: Persona, pool: Sequence[Persona]
) -> list[PairPlan]:
    """Pairs that raise I(y; c | x).

    The negative saw no context ("missing") or another persona's ("random"); "mixed" takes either
    with probability one half. A share `recipe.pool_positives` of the pairs is about a persona of
    the pool instead of the user, so that the model keeps reading its context; their random
    negatives are conditioned on the user's page half of the time, since an answer that shows the
    user's facts to somebody else is the leak to unlearn.

    Pairs about the same persona stand together: sampling then shares their context.
    """
    rng = random.Random(f"pairs {recipe.seed}")
    about_pool = round(recipe.pool_positives * recipe.pairs)
    plans = []
    for index, prompt in enumerate(_cycle(prompts, recipe.pairs, rng)):
        context = user if index < recipe.pairs - about_pool else rng.choice(pool)
        missing = recipe.negatives == "missing" or (
            recipe.negatives == "mixed" and rng.random() < 0.5
        )
        other = None if missing else _other(context, user, pool, rng)
        plans.append(
            PairPlan(
                index=index,
                positive=Condition(prompt, context),
                negative=Condition(prompt, other),
                without=Condition(prompt, None),
                seed=recipe.seed,
            )
        )
    return plans


def plan_improve(recipe: Recipe, prompts: Sequence[Prompt]) -> list[PairPlan]:
    """Pairs that raise I(y; x): the negative answers another, random prompt.

    Raises UserError when there is no other prompt.
    """
    if len({prompt.text for prompt in prompts}) < 2:
        raise UserError(
            "There is only one prompt to train on, so no other one to contrast it with.",
            "Add prompts; a hundred different ones are a good start.",
        )
    rng = random.Random(f"pairs {recipe.seed}")
    plans = []
    for index, prompt in enumerate(_cycle(prompts, recipe.pairs, rng)):
        other = rng.choice([other for other in prompts if other.text != prompt.text])
        negative = Condition(other, None)
        plans.append(PairPlan(index, Condition(prompt, None), negative, negative, recipe.seed))
    return plans


def sample_pairs(
    base: Base,
    plans: Sequence[PairPlan],
    recipe: Recipe,
    path: Path,
    advance: Callable[[int], None] = lambda n: None,
) -> None:
    """Sample the responses of all pairs that `path` does not hold yet, and append them.

    Pairs are sampled in fixed chunks of `recipe.sampling_batch`; a chunk that was not written
    completely is sampled again. A run that was interrupted therefore ends with the same file,
    byte for byte, as one that was not.
    """
    size = recipe.sampling_batch
    done = len(read_jsonl(path)) // size * size
    if done < len(plans):
        truncate_jsonl(path, done)
    advance(min(done, len(plans)))
    for start in range(done, len(plans), size):
        chunk = plans[start : start + size]
        chosen = _respond(base, [(p.positive, _seed(p, "chosen")) for p in chunk], recipe)
        rejected = _respond(base, [(p.negative, _seed(p, "rejected")) for p in chunk], recipe)
        append_jsonl(path, map(_row, [base] * len(chunk), chunk, chosen, rejected))
        advance(len(chunk))


def _respond(
    base: Base, conditions: Iterable[tuple[Condition, int]], recipe: Recipe
) -> Iterator[Sample]:
    requests = [SampleRequest(condition.encode(base), seed) for condition, seed in conditions]
    return respond(base, requests, recipe, temperature=recipe.temperature, top_p=recipe.top_p)


def _row(base: Base, plan: PairPlan, chosen: Sample, rejected: Sample) -> dict[str, Any]:
    """A line of pairs.jsonl."""
    positive, negative = plan.positive, plan.negative
    context = positive.context
    return {
        "id": plan.index,
        "prompt": base.messages(positive.prompt.text, context.text if context else None),
        "prompt_id": positive.prompt.id,
        "persona": context.id if context else None,
        "negative": {
            "prompt_id": negative.prompt.id,
            "persona": negative.context.id if negative.context else None,
        },
        "chosen": base.decode(chosen.token_ids),
        "rejected": base.decode(rejected.token_ids),
        "prompt_ids": positive.encode(base),
        "chosen_ids": chosen.token_ids,
        "rejected_ids": rejected.token_ids,
        "without_ids": plan.without.encode(base),
        "seed": plan.seed,
    }


def _seed(plan: PairPlan, role: str) -> int:
    return seed_of(plan.seed, plan.index, role)


def _cycle(prompts: Sequence[Prompt], count: int, rng: random.Random) -> Iterator[Prompt]:
    """`count` prompts: all of them in a random order, then all in another, and so on."""
    order: list[Prompt] = []
    for _ in range(count):
        if not order:
            order = rng.sample(prompts, len(prompts))
        yield order.pop()


def _other(context: Persona, user: Persona, pool: Sequence[Persona], rng: random.Random) -> Persona:
    if context is not user and rng.random() < 0.5:
        return user
    return rng.choice([persona for persona in pool if persona.id != context.id])
