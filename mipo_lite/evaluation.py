"""Before and after: what the adapter changed, on prompts it was never trained on.

The base and the policy (base + adapter) answer the same held-out prompts with the same seeds in
four conditions: with the user's context where it may matter and where it does not, with none, and
with another persona's. `evidence` then says what the answers show. Nothing is trained here.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib import resources
from itertools import product
from pathlib import Path
from typing import Any, Protocol

from peft import PeftModel

from .adapters import check_adapter
from .base import Base
from .console import progress
from .contexts import Persona, persona_pool
from .evidence import measure, summarize
from .prompts import Condition, Prompt, may_matter, shipped_prompts
from .recipe import Recipe
from .responses import respond, seed_of
from .run import append_jsonl, atomic_write, read_jsonl, truncate_jsonl
from .sampling import SampleRequest
from .scoring import response_logprobs
from .verdict import conclude

# What the prompt holds besides the request: the user's page where a fact of it may fit, the
# user's page where none does ("Why is the sky blue?"), nothing, or another persona's page.
CONDITIONS = ("with_context", "neutral", "without_context", "other_context")
BEFORE, AFTER = "before", "after"


class Asked(Protocol):
    """What `answer` needs to know of a question; those of improve have it as well."""

    @property
    def condition(self) -> str: ...
    @property
    def asked(self) -> Condition: ...
    @property
    def samples(self) -> int: ...
    @property
    def greedy(self) -> bool: ...


@dataclass(frozen=True)
class Question:
    """A held-out prompt in one condition.

    Attributes:
        asked: what the response is conditioned on.
        subject: whose page the information is about: the user, or the other persona.
        rivals: the personas among whom a response is ranked, `subject` first; () for no ranking.
            K of them for the user's page; for another's only that one and the user: does the
            answer follow the page it was given, or the one it was trained on?
        samples: sampled responses per model; one greedy response comes on top where `greedy`.
    """

    condition: str
    asked: Condition
    subject: Persona
    rivals: tuple[Persona, ...]
    samples: int
    greedy: bool

    @property
    def prompt(self) -> Prompt:
        return self.asked.prompt


def evaluate(
    base: Base,
    user: Persona,
    prompts: Sequence[Prompt],
    recipe: Recipe,
    adapters: Mapping[str, Path],
    path: Path,
) -> dict[str, Any]:
    """Answer, measure, and conclude: what metrics.json holds.

    Args:
        prompts: all prompts of the run; only those held out are asked.
        adapters: name -> adapter directory. "after" is the trained one; any other name is a
            baseline that is measured beside it.
        path: evaluation.jsonl, where answers are kept as they come, measures added at the end.
    """
    pool = persona_pool("held_out")
    questions = questions_about(user, prompts, pool, recipe)
    models = (BEFORE, *adapters)
    total = len(models) * sum(q.samples + q.greedy for q in questions)
    with policies(base, adapters) as use:
        with progress("Answering, before and after", total) as advance:
            answers = answer(base, use, models, questions, recipe, path, advance)
        scored = sum(row["mode"] == "sampled" for row in answers)
        with progress("Measuring", scored) as advance:
            measures = measure(base, use, user, questions, answers, pool, advance)
        text = neutral_text_nll(base, use, models)
    write_measures(path, answers, measures)
    metrics = {
        "prompts": sum(q.condition == "with_context" for q in questions),
        "neutral_prompts": sum(q.condition == "neutral" for q in questions),
        "samples_per_prompt": recipe.eval_samples,
        "contexts": recipe.eval_contexts,
        "context_words": len(user.text.split()),
        **summarize(questions, answers, measures, text, BEFORE, AFTER),
        "baselines": {
            name: summarize(questions, answers, measures, text, BEFORE, name)
            for name in adapters
            if name != AFTER
        },
    }
    return metrics | {"verdict": conclude(metrics).as_dict()}


def questions_about(
    user: Persona, prompts: Sequence[Prompt], pool: Sequence[Persona], recipe: Recipe
) -> list[Question]:
    """Held-out prompts in all conditions, `recipe.eval_prompts` at most in each.

    Where all prompts may matter, the neutral ones are the shipped ones.
    """
    all_matter = may_matter(prompts)
    matter = [prompt for prompt in all_matter if prompt.split == "held_out"]
    neutral = [p for p in prompts if p.split == "held_out" and p not in all_matter] or [
        prompt for prompt in shipped_prompts() if prompt.split == "held_out" and not prompt.topics
    ]
    # The list is ordered by topic: take a fixed random part of it, not its head.
    rng = random.Random(0)
    matter = rng.sample(matter, min(len(matter), recipe.eval_prompts))
    neutral = rng.sample(neutral, min(len(neutral), recipe.eval_prompts))
    rivals = tuple(pool[: recipe.eval_contexts - 1])
    others = pool[recipe.eval_contexts - 1 :]

    def about(condition: str, prompt: Prompt, number: int) -> Question:
        samples = recipe.eval_samples
        if condition == "with_context":
            ranked = (user, *rivals)
            return Question(condition, Condition(prompt, user), user, ranked, samples, True)
        if condition == "neutral":
            return Question(condition, Condition(prompt, user), user, (), samples, False)
        if condition == "without_context":
            return Question(condition, Condition(prompt), user, (), 1, False)
        # Neighbours get the same persona, so that a batch shares its page.
        other = others[number * len(others) // len(matter)]
        return Question(condition, Condition(prompt, other), other, (other, user), 1, False)

    return [
        about(condition, prompt, number)
        for condition in CONDITIONS
        for number, prompt in enumerate(neutral if condition == "neutral" else matter)
    ]


Use = Callable[[str], Any]


@contextmanager
def policies(base: Base, adapters: Mapping[str, Path]) -> Iterator[Use]:
    """Yields `use`: `with use(name):` makes `base.model` act as that adapter says.

    `use("before")` is the base itself. Afterwards the base is as it was, without LoRA layers.
    """
    model: Any = None
    for name, directory in adapters.items():
        check_adapter(directory)
        if model is None:
            model = PeftModel.from_pretrained(base.model, directory, adapter_name=name)
        else:
            model.load_adapter(directory, adapter_name=name)

    def use(name: str) -> Any:
        if name == BEFORE:
            return model.disable_adapter()
        model.set_adapter(name)
        return nullcontext()

    try:
        yield use
    finally:
        model.unload()


def answer(
    base: Base,
    use: Use,
    models: Sequence[str],
    questions: Sequence[Asked],
    recipe: Recipe,
    path: Path,
    advance: Callable[[int], None] = lambda n: None,
) -> list[dict[str, Any]]:
    """Answers of all models to all questions, sampled and greedy, appended to `path`.

    All models answer with the same seeds. A block (model, mode, condition) that an earlier start
    has written completely is not sampled again.
    """
    rows: list[dict[str, Any]] = []
    done = read_jsonl(path)
    conditions = list(dict.fromkeys(question.condition for question in questions))
    for which, mode, condition in product(models, ("sampled", "greedy"), conditions):
        asked = [
            (index, number)
            for index, question in enumerate(questions)
            if question.condition == condition
            for number in range(question.samples if mode == "sampled" else question.greedy)
        ]
        block = done[len(rows) : len(rows) + len(asked)]
        if len(block) < len(asked):
            truncate_jsonl(path, len(rows))
            done = []
            with use(which):
                block = _answers(base, questions, asked, which, mode, recipe, advance)
            append_jsonl(path, block)
        else:
            advance(len(block))
        rows += block
    return rows


def _answers(
    base: Base,
    questions: Sequence[Asked],
    asked: Sequence[tuple[int, int]],
    which: str,
    mode: str,
    recipe: Recipe,
    advance: Callable[[int], None],
) -> list[dict[str, Any]]:
    requests = [
        SampleRequest(
            questions[index].asked.encode(base), seed_of("evaluation", recipe.seed, index, number)
        )
        for index, number in asked
    ]
    temperature = 1.0 if mode == "sampled" else 0.0
    samples = respond(base, requests, recipe, temperature=temperature)
    rows = []
    for (index, number), response in zip(asked, samples, strict=True):
        question = questions[index]
        context = question.asked.context
        rows.append(
            {
                "model": which,
                "mode": mode,
                "condition": question.condition,
                "question": index,
                "prompt_id": question.asked.prompt.id,
                "prompt": question.asked.prompt.text,
                "persona": context.id if context else None,
                "sample": number,
                "text": base.decode(response.token_ids),
                "token_ids": response.token_ids,
                "ended": response.ended,
            }
        )
        advance(1)
    return rows


def neutral_text_nll(base: Base, use: Use, models: Sequence[str]) -> dict[str, list[float]]:
    """Model -> mean negative log-likelihood per token of each neutral text, nats.

    Its exponential is the perplexity. The texts are plain answers to plain requests, about
    nobody and given no context.
    """
    lines = (resources.files("mipo_lite") / "data/neutral.jsonl").read_text("utf-8").splitlines()
    texts = [
        (
            base.encode(row["prompt"], None),
            base.tokenizer(row["text"], add_special_tokens=False)["input_ids"],
        )
        for row in map(json.loads, lines)
    ]
    found = {}
    for which in models:
        with use(which):
            logprobs = response_logprobs(base.model, texts)
        found[which] = [-float(tokens.double().mean()) for tokens in logprobs]
    return found


def write_measures(
    path: Path, answers: Sequence[dict[str, Any]], measures: Sequence[dict[str, float | None]]
) -> None:
    """Write evaluation.jsonl anew, every answer with what it shows."""
    with atomic_write(path) as partial, partial.open("w", encoding="utf-8") as file:
        for row, found in zip(answers, measures, strict=True):
            file.write(json.dumps(row | {"measures": found}, ensure_ascii=False) + "\n")
