"""String-match rules that say whether an answer uses a fact of its context, or makes one up.

`fact_use` works for any base. `wrong_fact` is for the built-in base only: it takes every word that
is neither in the context, nor in the request, nor in the answer templates of the corpus for a
made-up value. So it also counts misspelt words, and misses a wrong value that consists of words the
templates contain (`bread`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache

from mipo_lite.builtin.chats import REQUESTS
from mipo_lite.contexts import Facts, accepted

WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)?")


def contains(text: str, value: str) -> bool:
    """Whether `value` occurs in `text` as whole words, whatever the case."""
    return re.search(rf"(?<!\w){re.escape(value)}(?!\w)", text, re.IGNORECASE) is not None


def fact_use(response: str, facts: Facts, topics: Iterable[str]) -> bool | None:
    """Whether the response contains a fact of a fitting topic; None if the facts have none."""
    known = accepted(facts)
    fitting = [value for topic in topics for value in known.get(topic, ())]
    if not fitting:
        return None
    return any(contains(response, value) for value in fitting)


def bare_words(text: str) -> set[str]:
    """Lower-case words as they may stand elsewhere: both parts of `a-b`, no possessive `'s`.

    Finer than `metrics.words`, which counts words as a reader does.
    """
    return {re.sub(r"['’]s$", "", word) for word in WORD.findall(text.lower())}


@cache
def template_words() -> frozenset[str]:
    """Every word of the corpus's answers that is not a value."""
    text = re.sub(r"\{\w+\}|[\[\]|]", " ", REQUESTS.read_text(encoding="utf-8"))
    fixed = "perhaps maybe well just plus minus has is that apples books coins stamps cards eggs"
    fixed += " pens cups keys balls chairs flowers tickets now"
    return frozenset(bare_words(text) | set(fixed.split()))


def wrong_fact(response: str, facts: Facts, context: str, prompt: str) -> bool:
    """Whether the response contains a value-like word that nobody gave it.

    `facts` adds accepted spellings that the context itself may lack.
    """
    known = bare_words(context) | bare_words(prompt) | template_words()
    for values in accepted(facts).values():
        known |= bare_words(" ".join(values))
    return bool(bare_words(response) - known)
