r"""Answers: what a response answers, and whether that is right.

Finds the final answer where responses and reference solutions put it: `\boxed{}`, `#### n`, "the
answer is", else the last number; for multiple choice a letter in its usual disguises, else the
text of a choice. Numbers are compared exactly, as fractions. Text is only looked at, never run.

Extraction is our own: math-verify, the library for it, does not know `####` (2 of the first 400
reference solutions of GSM8K's test set come out wrong) and finds no letter in "The answer is (B)".
It does know when two LaTeX expressions are equal, and is asked that where it is installed.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from fractions import Fraction
from importlib.util import find_spec
from typing import Any

CHOICE_LABELS = tuple("ABCDEFGHIJ")

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
_NUMBER = re.compile(
    # A minus between two numbers is no sign: it stands after one ("9-5"), or before a space.
    r"(?P<sign>(?<![\w.)\]}])-)?(?<![A-Za-z_])\\?[$€£]?"
    rf"(?:\\[dt]?frac\{{(?P<above>{_DIGITS})\}}\{{(?P<below>{_DIGITS})\}}"
    rf"|(?:(?P<whole>\d+) )?(?P<top>\d+)/(?P<bottom>\d+)(?![\d/])"
    rf"|(?P<number>{_DIGITS}))"
)
_UNIT = re.compile(r"\s*(?:\\?%|°|\\text\{[^{}]*\}|\s[A-Za-z][A-Za-z ]*)?\.?")
_MARKER = re.compile(r"\banswer(?:\s+(?:is|would\s+be|should\s+be|must\s+be))?\s*[:=]?", re.I)
_SENTENCE_END = re.compile(r"\.(?=\s|$)|\n")
# A letter in brackets, one that opens a list item, or a bare capital. The article of "A dog barks"
# is no choice; right after "the answer is", an A that is explained is one.
_ITEM = r"[(\[](?P<inside>[A-Ja-j])[)\]]|(?<!\w)(?P<item>[A-Ja-j])[).:](?=\s|$)"
_MENTION = re.compile(_ITEM + r"|\b(?P<bare>[B-J]|A(?!\s+(?!(?:or|and)\b)[a-z]))\b", re.M)
_EXPLAINED = r"A(?!\s+(?!(?:because|since|as|and|for|so|from)\b)[a-z])"
_MARKED_MENTION = re.compile(_ITEM + rf"|\b(?P<bare>[B-J]|{_EXPLAINED})\b", re.M)
_OPENING = re.compile(r"^\s*[(\[]?(?P<letter>[A-Ja-j])(?:[).:\]]|\s+[-–—]\s|\s*$)", re.M)


def find_answer(response: str, choices: Sequence[str] = ()) -> str | None:
    """The final answer of a response in a form that can be compared, or None if it gives none.

    A number comes back as "12", "-7/2"; with `choices`, a letter; anything else as its text.
    """
    text = _clean(response)
    if choices:
        return _find_choice(text, choices)
    marked = _marked(text)
    if marked is not None:
        return _canonical(marked)
    numbers = list(_numbers(text))
    if numbers:
        return str(numbers[-1])
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return _plain(lines[-1]) if lines else None


def reference_answer(solution: str) -> str:
    """The answer of a reference: a bare answer, or a solution that ends in `####` or a box."""
    text = _clean(solution).strip()
    marked = _boxed(text) or _after_hashes(text)
    if marked is None and len(text.split()) > 4:  # prose: read it as one reads a response
        return find_answer(solution) or _plain(text)
    return _canonical(marked if marked is not None else text)


def is_right(answer: str | None, reference: str) -> bool:
    """Whether `find_answer` found the reference's answer: the same number, letter or text.

    No answer is not right.
    """
    return answer is not None and (answer == reference or _equal_expressions(answer, reference))


def majority(answers: Sequence[str | None]) -> str | None:
    """The answer that most samples give; of equally many, the one given first. None if none does.

    Self-consistency (Wang et al. 2022, arXiv 2203.11171).
    """
    votes = Counter(answer for answer in answers if answer is not None)
    return max(votes, key=votes.__getitem__) if votes else None


def parse_choice(given: Any, labels: Sequence[str], choices: Sequence[str]) -> str | None:
    """The letter of a reference answer, given as label, index from 0, or text of a choice."""
    if isinstance(given, int) and not isinstance(given, bool) and str(given) not in labels:
        return CHOICE_LABELS[given] if 0 <= given < len(choices) else None
    text = str(given).strip()
    for names in (labels, choices):
        folded = [_plain(name) for name in names]
        if folded.count(_plain(text)) == 1:
            return CHOICE_LABELS[folded.index(_plain(text))]
    if text.isdecimal() and int(text) < len(choices):
        return CHOICE_LABELS[int(text)]
    return None


def _clean(text: str) -> str:
    """One form for what is written in several: digits, minus signs, spaces, emphasis."""
    text = unicodedata.normalize("NFKC", text).replace("−", "-")
    text = text.replace("{,}", ",").replace("\\!", "").replace("\\,", " ")
    text = re.sub(r"\\(?:text|mathrm|mathbf|textbf)\{\s*([^{}]*?)\s*\}", r" \1", text)
    text = re.sub(r"(\\[dt]?frac)(\d)(\d)", r"\1{\2}{\3}", text)
    return re.sub(r"\*\*|__|`", "", text)


def _marked(text: str) -> str | None:
    """What stands in the last box, else after the last ####, else after the last "answer is"."""
    found = _boxed(text)
    if found is None:
        found = _after_hashes(text)
    if found is not None:
        return found
    markers = list(_MARKER.finditer(text))
    if not markers:
        return None
    rest = text[markers[-1].end() :].lstrip()
    sentence = _SENTENCE_END.split(rest, maxsplit=1)[0].strip(" $")
    number = next(_numbers(sentence.rpartition("=")[2]), None)
    return str(number) if number is not None else sentence or None


def _boxed(text: str) -> str | None:
    start = max(text.rfind("\\boxed{"), text.rfind("\\fbox{"))
    if start < 0:
        return None
    start = text.index("{", start) + 1
    depth = 1
    for end in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[start:end].strip() or None
    return None


def _after_hashes(text: str) -> str | None:
    found = re.findall(r"####[ \t]*(\S.*)", text)
    return found[-1].strip() if found else None


def _numbers(text: str) -> Iterator[Fraction]:
    for match in _NUMBER.finditer(text):
        number = _value(match)
        if number is not None:
            yield number


def _value(match: re.Match[str]) -> Fraction | None:
    def part(name: str) -> Fraction:
        return Fraction((match[name] or "0").replace(",", ""))

    with suppress(ZeroDivisionError, ValueError):  # no such number; thousands of digits
        if match["above"]:
            value = part("above") / part("below")
        elif match["top"]:
            value = part("whole") + part("top") / part("bottom")
        else:
            value = part("number")
        return -value if match["sign"] else value
    return None


def _canonical(answer: str) -> str:
    """A number, perhaps with a unit, as a fraction in lowest terms; anything else as plain text."""
    bare = answer.strip().strip("$").strip()
    if bare.startswith("- "):
        bare = f"-{bare[2:]}"
    match = _NUMBER.match(bare)
    if match and _UNIT.fullmatch(bare, match.end()):
        value = _value(match)
        if value is not None:
            return str(value)
    return _plain(bare)


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).strip(" .!?\"'$")


def _equal_expressions(answer: str, reference: str) -> bool:
    """Whether two LaTeX expressions are equal, if math-verify is there to say."""
    if not re.search(r"[\\^]", answer + reference) or find_spec("math_verify") is None:
        return False
    from math_verify import parse, verify

    return bool(verify(parse(f"${reference}$"), parse(f"${answer}$")))


def _find_choice(text: str, choices: Sequence[str]) -> str | None:
    letters = CHOICE_LABELS[: len(choices)]

    def named(pattern: re.Pattern[str], where: str) -> list[str]:
        found = (next(filter(None, match.groups())).upper() for match in pattern.finditer(where))
        return [letter for letter in found if letter in letters]

    for marked in (_boxed(text), _after_hashes(text)):
        if marked is not None:
            letter = marked.strip(" ().[]:$").upper()
            if letter in letters:
                return letter
            return next(iter(named(_OPENING, marked)), None) or _by_text(marked, choices)
    markers = list(_MARKER.finditer(text))
    if markers:
        rest = _SENTENCE_END.split(text[markers[-1].end() :].lstrip(), maxsplit=1)[0]
        found = named(_MARKED_MENTION, rest)
        choice = found[0] if found else _by_text(rest, choices, first=True)
        if choice is not None:
            return choice
    openings = named(_OPENING, text)
    if openings and (_OPENING.match(text) or len(set(openings)) == 1):
        return openings[0]
    mentioned = set(named(_MENTION, text))
    if mentioned:
        return mentioned.pop() if len(mentioned) == 1 else None
    return _by_text(text, choices)


def _by_text(text: str, choices: Sequence[str], first: bool = False) -> str | None:
    """The one choice whose text stands in `text`, or of several, with `first`, the first.

    A choice that stands there only inside a longer one does not count.
    """
    folded = _plain(text)
    found: dict[str, tuple[int, int]] = {}
    for letter, choice in zip(CHOICE_LABELS, choices, strict=False):
        plain = _plain(_clean(choice))
        match = re.search(rf"(?<!\w){re.escape(plain)}(?!\w)", folded)
        if plain and match:
            found[letter] = match.span()
    whole = {
        letter: span
        for letter, span in found.items()
        if not any(o != span and o[0] <= span[0] and span[1] <= o[1] for o in found.values())
    }
    if len(whole) == 1 or (first and whole):
        return min(whole, key=whole.__getitem__)
    return None
