"""What answers show: measures of each answer, and their summary before and after.

The frozen base judges how much an answer tells about its context: PMI, InfoNCE's bits, and which
of K contexts explains it best. That is close to what was optimized; facts and words found in the
answers are evidence of another kind. Harm is measured beside it: length, repetition, answers that
do not end, divergence from the base where the context does not matter, reciting the page.
Samples nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .base import Base
from .builtin.facts import fact_use, wrong_fact
from .contexts import Persona
from .metrics import (
    SharedRun,
    compare,
    compare_distinct_n,
    information,
    own_words,
    repetition,
    words,
)
from .scoring import response_logprobs, score_matrix

if TYPE_CHECKING:
    from .evaluation import Question, Use

Measures = dict[str, float | None]


def measure(
    base: Base,
    use: Use,
    user: Persona,
    questions: Sequence[Question],
    answers: Sequence[dict[str, Any]],
    pool: Sequence[Persona],
    advance: Callable[[int], None] = lambda n: None,
) -> list[Measures]:
    """What each answer shows, in the order of `answers`; None where a measure does not apply.

    Under the frozen base, of sampled answers: `pmi`, log p(y|x,c) - log p(y|x) in nats, c the
    subject's page; `pmi_per_token`; and of the first answer to a question with rivals `bits` and
    `which_context` (see `metrics.information`). `kl_per_token`, log policy(y) - log base(y) of
    the policy's samples to neutral prompts: its mean estimates their KL divergence.

    By looking: `length` in tokens, `ended`, `repetition`, `own_words` (a word that only the
    user's page has), `shared_run` (longest run of consecutive words shared with the user's
    page), and where facts are known `fact_use` (a fact of the subject that fits the prompt),
    `wrong_fact` (built-in base only) and `user_facts` (a fact of the user where nobody gave it).
    """
    found = _information(base, use, questions, answers, advance)
    _divergence(base, use, questions, answers, found)
    own = own_words(user.text, [p.text for p in pool] + [q.prompt.text for q in questions])
    shared_run = SharedRun(user.text)
    for row, measures in zip(answers, found, strict=True):
        question, text = questions[row["question"]], row["text"]
        measures |= {
            "length": float(len(row["token_ids"])),
            "ended": float(row["ended"]),
            "repetition": repetition(row["token_ids"]),
            "own_words": float(not own.isdisjoint(words(text))),
            "shared_run": float(shared_run(text)),
        }
        measures |= _facts(question, user, text, base.source.name == "builtin")
    return found


def summarize(
    questions: Sequence[Question],
    answers: Sequence[dict[str, Any]],
    measures: Sequence[Measures],
    text_nll: Mapping[str, list[float]],
    before: str,
    after: str,
) -> dict[str, Any]:
    """Condition -> mode -> measure -> before, after, difference with its 95 % interval, n.

    `neutral_text` holds the negative log-likelihood per token of the neutral texts.
    """
    varied = {
        "distinct_2": [row["token_ids"] for row in answers],
        "distinct_2_words": [words(row["text"]) for row in answers],
    }
    blocks: dict[tuple[str, str, str], list[int]] = {}
    for i, row in enumerate(answers):
        condition = questions[row["question"]].condition
        blocks.setdefault((condition, row["mode"], row["model"]), []).append(i)
    summary: dict[str, Any] = {}
    for (condition, mode, which), first in blocks.items():
        if which != before:
            continue
        second = blocks[condition, mode, after]
        groups = [answers[i]["question"] for i in first]
        names = dict.fromkeys(name for i in (*first, *second) for name in measures[i])
        block = {
            name: compare(
                [measures[i].get(name) for i in first],
                [measures[i].get(name) for i in second],
                groups,
            )
            for name in names
        }
        for name, parts in varied.items():
            block[name] = compare_distinct_n(
                [parts[i] for i in first], [parts[i] for i in second], groups
            )
        summary.setdefault(condition, {})[mode] = {
            name: comparison.as_dict() for name, comparison in block.items() if comparison
        }
    text = compare(text_nll[before], text_nll[after], range(len(text_nll[before])))
    summary["neutral_text"] = {"nll_per_token": text.as_dict() if text else None}
    return summary


def _information(
    base: Base,
    use: Use,
    questions: Sequence[Question],
    answers: Sequence[dict[str, Any]],
    advance: Callable[[int], None],
) -> list[Measures]:
    """PMI of sampled answers; bits and rank of the first one where the question has rivals.

    Ranking among K contexts costs K scores, and a second answer to the same prompt narrows the
    interval little.
    """
    found: list[Measures] = [{} for _ in answers]
    widths = [len(questions[a["question"]].rivals) if a["sample"] == 0 else 0 for a in answers]
    for width in sorted(set(widths), reverse=True):
        # Policy and base often give the same answer: it is scored once.
        same: dict[tuple[int, tuple[int, ...]], list[int]] = {}
        for i, row in enumerate(answers):
            if row["mode"] == "sampled" and widths[i] == width:
                same.setdefault((row["question"], tuple(row["token_ids"])), []).append(i)
        if not same:
            continue
        prompts = {
            index: [
                base.encode(questions[index].prompt.text, page)
                for page in _pages(questions[index], ranked=width > 0)
            ]
            for index in {index for index, _ in same}
        }
        with use("before"):
            scores = score_matrix(
                base.model,
                [prompts[index] for index, _ in same],
                [list(ids) for _, ids in same],
            ).numpy()
        values = information(scores)
        for number, indices in enumerate(same.values()):
            pmi = float(values["pmi"][number])
            length = len(answers[indices[0]]["token_ids"])
            for i in indices:
                found[i] |= {"pmi": pmi, "pmi_per_token": pmi / max(length, 1)}
                if width:
                    found[i]["bits"] = float(values["bits"][number])
                    found[i]["which_context"] = float(values["which_context"][number])
            advance(len(indices))
    return found


def _pages(question: Question, ranked: bool) -> Iterable[str | None]:
    """The contexts under which an answer is scored: none, its subject's, then its rivals'."""
    pages = question.rivals if ranked else (question.subject,)
    return (None, *(persona.text for persona in pages))


def _divergence(
    base: Base,
    use: Use,
    questions: Sequence[Question],
    answers: Sequence[dict[str, Any]],
    found: Sequence[Measures],
) -> None:
    """Add `kl_per_token` to the sampled answers to neutral prompts."""
    rows: dict[str, list[int]] = {}
    for i, row in enumerate(answers):
        if row["condition"] == "neutral" and row["mode"] == "sampled":
            rows.setdefault(row["model"], []).append(i)
    for which, indices in rows.items():
        if which == "before":
            for i in indices:
                found[i]["kl_per_token"] = 0.0
            continue
        pairs = [
            (questions[answers[i]["question"]].asked.encode(base), answers[i]["token_ids"])
            for i in indices
        ]
        sums = []
        for model in (which, "before"):
            with use(model):
                sums.append([float(t.double().sum()) for t in response_logprobs(base.model, pairs)])
        for i, policy, reference in zip(indices, *sums, strict=True):
            found[i]["kl_per_token"] = (policy - reference) / max(len(answers[i]["token_ids"]), 1)


def _facts(question: Question, user: Persona, text: str, builtin: bool) -> Measures:
    """The measures by string match; all None where no facts are known."""
    subject = question.subject
    if not subject.facts:
        return {"fact_use": None, "wrong_fact": None, "user_facts": None}
    use = fact_use(text, subject.facts, question.prompt.topics)
    context = question.asked.context.text if question.asked.context else ""
    wrong = wrong_fact(text, subject.facts, context, question.prompt.text) if builtin else None
    # The facts of the user that neither the asked context nor the request holds itself.
    given = f"{context} {question.prompt.text}".lower()
    foreign = {
        topic: [value for value in values if value.lower() not in given]
        for topic, values in user.facts.items()
    }
    leak = any(fact_use(text, foreign, [topic]) for topic in foreign)
    return {
        "fact_use": None if use is None else float(use),
        "wrong_fact": None if wrong is None else float(wrong),
        "user_facts": float(leak) if user.facts and question.asked.context is not user else None,
    }
