"""The verdict: from measured figures to words, by rules that stand here and nowhere else.

Word by word:

- "harmed": at least one rule of `HARMS` holds. Harm outweighs any gain.
- "improved": nothing is harmed; mean PMI of sampled answers rose by `MIN_GAIN` of itself or more;
  evidence of another kind rose as well (a fact that fits, a word that only the user's page has,
  or picking the user's page among K); and neither facts nor own words fell.
- "no change": anything else.

"Rose" and "fell" mean that the 95 % interval of the paired difference, over prompts, lies above or
below zero. Each threshold is a judgement about what a reader would mind, wide enough for what
successful training was seen to do. Interpretation only: nothing is measured here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

MIN_GAIN = 0.10
# Changes worth a word, but no harm.
NOTABLE_LENGTH = 0.10
NOTABLE_VARIETY = 0.15
NOTABLE_LEAK = 0.05


@dataclass(frozen=True)
class Verdict:
    """What came out.

    Attributes:
        word: "improved", "no change" or "harmed".
        sentence: the verdict in plain words.
        reasons: the figures behind it, one a line.
        advice: what to try next; () when there is nothing to mend.
    """

    word: str
    sentence: str
    reasons: tuple[str, ...]
    advice: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Rule:
    """A way to be harmed.

    Attributes:
        where: (condition, mode, measure) in the metrics.
        limit: how much the figure must have changed, in the measure's own unit, or as a share of
            its value before where `relative`; a negative limit is a fall.
        clause: said in the verdict's sentence.
        advice: what to try.
    """

    where: tuple[str, str, str]
    limit: float
    clause: str
    advice: str
    relative: bool = False

    def holds(self, metrics: dict[str, Any]) -> bool:
        entry = figure(metrics, *self.where)
        if entry is None:
            return False
        change = entry["difference"]
        if self.relative:
            change /= max(abs(entry["before"]), 1e-9)
        if self.limit > 0:
            return change > self.limit and entry["low"] > 0
        return change < self.limit and entry["high"] < 0


GENTLER = "train more gently: a lower learning_rate or fewer epochs"
MORE_POOL = "raise pool_positives, so that the model keeps reading its context"
WITH = ("with_context", "sampled")
HARMS = (
    Rule((*WITH, "pmi"), -0.10, "says less about you", GENTLER, relative=True),
    Rule((*WITH, "fact_use"), -0.05, "uses your facts less", GENTLER),
    Rule((*WITH, "ended"), -0.10, "often does not come to an end", GENTLER),
    Rule((*WITH, "length"), 1.00, "answers more than twice as long", GENTLER, relative=True),
    Rule((*WITH, "length"), -0.50, "answers less than half as long", GENTLER, relative=True),
    Rule((*WITH, "repetition"), 0.10, "repeats itself", GENTLER),
    Rule((*WITH, "distinct_2"), -0.50, "answers almost everything alike", GENTLER, relative=True),
    Rule((*WITH, "shared_run"), 4.0, "recites your page", GENTLER),
    Rule(("neutral", "sampled", "shared_run"), 2.0, "recites your page unasked", GENTLER),
    Rule(("neutral", "sampled", "own_words"), 0.40, "brings you up where it is no matter", GENTLER),
    # A KL of 1 nat a token: every token of the new answers is e times less likely to the base.
    Rule(("neutral", "sampled", "kl_per_token"), 1.0, "has forgotten other things", GENTLER),
    # Twice the perplexity.
    Rule(("neutral_text", "", "nll_per_token"), math.log(2), "reads plain text worse", GENTLER),
    Rule(("without_context", "sampled", "user_facts"), 0.20, "tells your facts unasked", MORE_POOL),
    Rule(("without_context", "sampled", "own_words"), 0.25, "tells of you unasked", MORE_POOL),
    Rule(("other_context", "sampled", "user_facts"), 0.10, "tells others your facts", MORE_POOL),
    Rule(("other_context", "sampled", "which_context"), -0.20, "ignores other pages", MORE_POOL),
)


def conclude(metrics: dict[str, Any]) -> Verdict:
    """The verdict on the content of metrics.json."""
    harms = [rule for rule in HARMS if rule.holds(metrics)]
    reasons = tuple(_reasons(metrics))
    if harms:
        clauses = list(dict.fromkeys(rule.clause for rule in harms))
        gain = "clearer about you, but it " if _improved(metrics) else "it "
        return Verdict(
            "harmed",
            f"Harmed: {gain}{_list(clauses[:4])}.",
            reasons,
            tuple(dict.fromkeys(_sentence(rule.advice) for rule in harms)),
        )
    asides = [*_asides(metrics), _leak(metrics)]
    if _improved(metrics):
        advice = (_sentence(MORE_POOL),) if _leaks(metrics) else ()
        sentence = f"Improved: {', '.join(['clearer about you', *asides])}."
        return Verdict("improved", sentence, reasons, advice)
    return Verdict(
        "no change",
        f"No change measurable: {_closest(metrics)}; {', '.join(asides)}.",
        reasons,
        (
            "Write more about yourself: what fits everyday requests counts most.",
            "Set more pairs, or a higher learning_rate or more epochs.",
        ),
    )


def figure(metrics: dict[str, Any], condition: str, mode: str, name: str) -> dict[str, Any] | None:
    """One comparison of the metrics, or None when it was not measured."""
    block = metrics.get(condition) or {}
    found = (block.get(mode) or {}).get(name) if mode else block.get(name)
    return found if found and "low" in found else None


def _rose(metrics: dict[str, Any], name: str) -> bool:
    entry = figure(metrics, *WITH, name)
    return entry is not None and entry["low"] > 0


def _fell(metrics: dict[str, Any], name: str) -> bool:
    entry = figure(metrics, *WITH, name)
    return entry is not None and entry["high"] < 0


def _improved(metrics: dict[str, Any]) -> bool:
    pmi = figure(metrics, *WITH, "pmi")
    return (
        pmi is not None
        and pmi["low"] > 0
        and pmi["difference"] >= MIN_GAIN * abs(pmi["before"])
        and any(_rose(metrics, name) for name in ("fact_use", "own_words", "which_context"))
        and not any(_fell(metrics, name) for name in ("fact_use", "own_words"))
    )


def _closest(metrics: dict[str, Any]) -> str:
    """Why it is not called an improvement."""
    pmi = figure(metrics, *WITH, "pmi")
    if pmi is None:
        return "nothing was measured"
    if pmi["low"] <= 0 <= pmi["high"]:
        return "information about you neither rose nor fell beyond chance"
    if pmi["difference"] < MIN_GAIN * abs(pmi["before"]):
        return f"information about you changed by less than {MIN_GAIN:.0%}"
    if any(_fell(metrics, name) for name in ("fact_use", "own_words")):
        return "information about you rose, but your facts or words are used less"
    return "information about you rose, but no other measure confirms it"


def _asides(metrics: dict[str, Any]) -> list[str]:
    """Side effects worth a word."""
    found = []
    length = figure(metrics, *WITH, "length")
    if length and not length["low"] <= 0 <= length["high"]:
        change = length["difference"] / max(length["before"], 1e-9)
        if abs(change) >= NOTABLE_LENGTH:
            much = "a little " if abs(change) < 0.3 else ""
            found.append(f"{much}{'longer' if change > 0 else 'shorter'}")
    variety = figure(metrics, *WITH, "distinct_2")
    if (
        variety
        and variety["high"] < 0
        and variety["difference"] <= -NOTABLE_VARIETY * variety["before"]
    ):
        found.append("less varied")
    return found


def _leaks(metrics: dict[str, Any]) -> bool:
    for condition in ("without_context", "other_context"):
        for name in ("user_facts", "own_words"):
            entry = figure(metrics, condition, "sampled", name)
            if entry and entry["low"] > 0 and entry["difference"] >= NOTABLE_LEAK:
                return True
    return False


def _leak(metrics: dict[str, Any]) -> str:
    return "a small leak of your facts" if _leaks(metrics) else "no leak found"


def _percent(value: float) -> str:
    return f"{100 * value:.0f} %"


def _number(value: float) -> str:
    return f"{value:.1f}"


_REASONS: tuple[tuple[tuple[str, str, str], str, Callable[[float], str]], ...] = (
    ((*WITH, "pmi"), "information about you, nats an answer", _number),
    ((*WITH, "fact_use"), "answers that use a fact that fits", _percent),
    ((*WITH, "own_words"), "answers with a word only your page has", _percent),
    ((*WITH, "which_context"), "answers that tell you from other people", _percent),
    ((*WITH, "length"), "length, tokens", _number),
    ((*WITH, "distinct_2"), "variety (distinct-2)", _percent),
    (("without_context", "sampled", "user_facts"), "your facts without your page", _percent),
    (("other_context", "sampled", "user_facts"), "your facts told to somebody else", _percent),
)


def _reasons(metrics: dict[str, Any]) -> list[str]:
    found = []
    for where, what, show in _REASONS:
        entry = figure(metrics, *where)
        if entry is not None:
            sure = "" if entry["low"] > 0 or entry["high"] < 0 else " (within chance)"
            if entry["low"] == entry["high"] == 0:
                sure = " (unchanged)"
            found.append(f"{what}: {show(entry['before'])} → {show(entry['after'])}{sure}")
    return found


def _list(clauses: list[str]) -> str:
    return clauses[0] if len(clauses) == 1 else f"{', '.join(clauses[:-1])} and {clauses[-1]}"


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."
