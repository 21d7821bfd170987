"""The rows of the before/after table, for the terminal and for the page."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..verdict import figure


@dataclass(frozen=True)
class Row:
    """A row.

    Attributes:
        where: (condition, mode, measure) in metrics.json.
        name: what the figure is, for a reader who knows no field terms.
        unit: "%" for shares, "exp" for a log that is shown as its exponential, else the unit.
        good: 1 when more is better, -1 when less is, 0 when neither.
    """

    where: tuple[str, str, str]
    name: str
    unit: str
    good: int

    def show(self, value: float) -> str:
        if self.unit == "%":
            return f"{100 * value:.0f} %"
        if self.unit == "exp":
            plain = math.exp(value)
            return f"{plain:,.0f}" if plain >= 100 else f"{plain:.3g}"
        return f"{value:.2f}"

    def show_change(self, value: float) -> str:
        if self.unit == "exp":
            return f"× {math.exp(value):.2f}"
        text = f"{100 * value:+.0f}" if self.unit == "%" else f"{value:+.2f}"
        # What is rounded to nothing has no sign.
        return text.replace("-", "−") if text.strip("+-0.") else text[1:]

    def show_interval(self, entry: dict[str, Any]) -> str:
        """The 95 % interval of the change; "" when no measurement changed at all."""
        if entry["low"] == entry["high"] == 0:
            return ""
        high = self.show_change(entry["high"]).removeprefix("× ")
        return f"{self.show_change(entry['low'])} to {high}"


_WITH = ("with_context", "sampled")
GROUPS: tuple[tuple[str, tuple[Row, ...]], ...] = (
    (
        "Answers with your page",
        (
            Row((*_WITH, "fact_use"), "use a fact that fits", "%", 1),
            Row(("with_context", "greedy", "fact_use"), "the same, greedy", "%", 1),
            Row((*_WITH, "own_words"), "use a word only your page has", "%", 1),
            Row((*_WITH, "wrong_fact"), "state a wrong fact", "%", -1),
            Row((*_WITH, "which_context"), "tell you from other people", "%", 1),
            Row((*_WITH, "pmi"), "information about you (PMI)", "nats", 1),
            Row((*_WITH, "pmi_per_token"), "the same per token", "nats", 1),
            Row((*_WITH, "bits"), "information about you (InfoNCE)", "bits", 1),
        ),
    ),
    (
        "Answers to held-out questions",
        (
            Row(("question", "sampled", "exact_match"), "are right", "%", 1),
            Row(("question", "greedy", "exact_match"), "the same, greedy", "%", 1),
            Row(("question", "majority", "exact_match"), "the same, by majority", "%", 1),
            Row(("question", "sampled", "bits"), "I(y; x), bound", "bits", 1),
            Row(("question", "sampled", "own_bits"), "the same, by its own score", "bits", 1),
            Row(("question", "sampled", "pmi"), "PMI against other questions", "nats", 1),
            Row(("question", "sampled", "length"), "length", "tokens", 0),
            Row(("question", "sampled", "distinct_2"), "variety (distinct-2)", "%", 1),
            Row(("question", "sampled", "ended"), "come to an end", "%", 1),
        ),
    ),
    (
        "Side effects",
        (
            Row((*_WITH, "length"), "length", "tokens", 0),
            Row((*_WITH, "distinct_2"), "variety (distinct-2)", "%", 1),
            Row((*_WITH, "repetition"), "repetition within an answer", "%", -1),
            Row((*_WITH, "ended"), "come to an end", "%", 1),
            Row((*_WITH, "shared_run"), "longest run copied from your page", "words", 0),
            Row(("neutral", "sampled", "own_words"), "bring you up where it is no matter", "%", -1),
            Row(("neutral", "sampled", "kl_per_token"), "drift where it is no matter", "nats", -1),
            Row(("neutral_text", "", "nll_per_token"), "perplexity of plain text", "exp", -1),
        ),
    ),
    (
        "Leaks",
        (
            Row(("without_context", "sampled", "user_facts"), "your facts, no page given", "%", -1),
            Row(("without_context", "sampled", "own_words"), "your words, no page given", "%", -1),
            Row(("other_context", "sampled", "user_facts"), "your facts told to others", "%", -1),
            Row(("other_context", "sampled", "which_context"), "follow another's page", "%", 1),
            Row(("other_context", "sampled", "fact_use"), "use the other's facts", "%", 1),
        ),
    ),
)


def measured_rows(
    metrics: dict[str, Any],
) -> Iterator[tuple[str, list[tuple[Row, dict[str, Any]]]]]:
    """Group by group, the rows that were measured, each with its comparison."""
    for title, rows in GROUPS:
        found = [(row, entry) for row in rows if (entry := figure(metrics, *row.where))]
        if found:
            yield title, found
