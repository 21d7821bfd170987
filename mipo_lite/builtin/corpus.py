"""The training corpus of the built-in base: chats written by a seeded program.

A document is a ChatML chat: mostly a profile as system message, then one to four everyday requests
with short answers. An answer uses a fitting fact of the profile only about half of the time, so
that the base under-uses its context as real ones do. Besides: chats without a profile, small sums
in words, requests where nobody's facts matter, and spans repeated word by word.

Every document carries the weight of its characters in the loss. Knows nothing of tokens.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from mipo_lite.builtin import more_phrasings, phrasings, values
from mipo_lite.builtin.chats import Block, expand, load_blocks
from mipo_lite.small_sums import small_sum

PROMPTS = Path(__file__).parents[1] / "data" / "prompts.jsonl"
SUM_WEIGHT = 4.0  # loss weight of the results of sums
LOWER_CASE = {"job", "hobby", "drink", "food", "diet", "color", "music", "tone"}


@dataclass(frozen=True)
class Mix:
    """What a stretch of the corpus is made of; shares are of documents or of answers."""

    topics: tuple[int, int] = (3, 9)  # facts of a profile, fewest and most
    fillers: tuple[int, int] = (0, 4)  # sentences of a profile that say nothing useful
    turns: tuple[int, int] = (1, 4)
    repeats: float = 0.0  # documents that repeat a random span
    no_profile: float = 0.12
    sums: float = 0.05
    neutral: float = 0.10  # requests for which nobody's facts matter
    direct: float = 0.30  # requests that ask for a fact itself
    direct_fact: float = 0.80  # answers to those that give it
    indirect_fact: float = 0.54  # other answers that use a fitting fact
    wrong: float = 0.08  # answers with made-up facts
    fact_weight: float = 1.0  # loss weight of copied values
    freer: bool = False  # whether profiles also use `more_phrasings.py`
    held_out: bool = False  # whether they are prose in phrasings kept from training


@dataclass
class Document:
    """ChatML text with loss weights as (start, end, weight) in characters; later ones win."""

    text: str = ""
    weights: list[tuple[int, int, float]] = field(default_factory=list)

    def add(self, text: str, weight: float) -> int:
        start = len(self.text)
        self.text += text
        self.weights.append((start, len(self.text), weight))
        return start


@dataclass
class Profile:
    """Somebody's page: its text, the values of its topics, the animal or relative they go with."""

    text: str = ""
    facts: dict[str, str] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)


@cache
def blocks() -> tuple[Block, ...]:
    return load_blocks()


@cache
def held_out_requests() -> frozenset[str]:
    """Texts of the shipped held-out prompts, which the corpus must not contain."""
    if not PROMPTS.exists():
        return frozenset()
    rows = map(json.loads, PROMPTS.read_text(encoding="utf-8").splitlines())
    return frozenset(row["text"].lower().rstrip("?.! ") for row in rows if row["split"] != "train")


def article(text: str) -> str:
    """`a` before a vowel becomes `an`."""
    return re.sub(r"\b([Aa]) (?=[aeiouAEIOU])", r"\1n ", text)


def _sentence(rng: random.Random, mix: Mix, topic: str, value: str, kind: str) -> str:
    if topic.startswith("thing"):
        text = rng.choice(phrasings.THING_SENTENCES)
    elif mix.held_out:
        text = rng.choice(phrasings.HELD_OUT[topic])
    elif mix.freer and rng.random() < 0.6:
        text = expand(rng, rng.choice(more_phrasings.SENTENCES[topic]))
    else:
        text = rng.choice(phrasings.SENTENCES[topic])
    text = article(text.replace("{v}", value).replace("{kind}", kind))
    return text[0].upper() + text[1:]


def _entry(rng: random.Random, topic: str, value: str, kind: str, separator: str) -> str:
    """One line of a list: key and value."""
    if topic.startswith("thing"):
        key = rng.choice(["{kind}", "My {kind}"])
    else:
        key = rng.choice(phrasings.KEYS[topic])
    if kind and "{kind}" not in key:
        value = rng.choice([f"{value} the {kind}", f"{kind} {value}", f"{value} ({kind})"])
    elif topic in LOWER_CASE and rng.random() < 0.12:
        value = value[0].upper() + value[1:]
    key = key.replace("{kind}", kind)
    key = key.lower() if rng.random() < 0.2 else key[0].upper() + key[1:]
    return f"{key}{separator}{value}"


def _note(rng: random.Random, topic: str, value: str, kind: str) -> str:
    if topic.startswith("thing"):
        return f"{kind} {value}"
    return rng.choice(phrasings.NOTES[topic]).replace("{v}", value).replace("{kind}", kind)


def _filler(rng: random.Random, mix: Mix) -> str:
    if mix.freer and rng.random() < 0.4:
        return expand(rng, rng.choice(more_phrasings.FILLERS))
    if rng.random() < 0.4:
        return rng.choice(phrasings.FILLERS)
    return " ".join(rng.choice(part) for part in phrasings.FILLER_PARTS) + "."


def _join(rng: random.Random, sentences: list[str]) -> str:
    """Sentences as a person strings them together: some joined, some in a line of their own."""
    text = sentences[0]
    gap = "\n" if rng.random() < 0.15 else " "
    for sentence in sentences[1:]:
        start = re.match(r"(I|My|We|There|At|In|On|By)\b", sentence)
        if start and text.endswith(".") and rng.random() < 0.22:
            body = sentence if start[0] == "I" else sentence[0].lower() + sentence[1:]
            text = f"{text[:-1]}{rng.choice([' and ', ', and ', '; ', ', '])}{body}"
        elif start and rng.random() < 0.1:
            body = sentence if start[0] == "I" else sentence[0].lower() + sentence[1:]
            text += gap + rng.choice(phrasings.JOINERS) + body
        else:
            text += gap + sentence
    return text


def draw_value(rng: random.Random, topic: str) -> str:
    return values.TOPICS[topic](rng)


def make_profile(
    rng: random.Random,
    mix: Mix,
    draw: Callable[[random.Random, str], str] = draw_value,
) -> Profile:
    """A profile of random topics and layout."""
    count = rng.randint(*mix.topics)
    topics = rng.sample(sorted(values.TOPICS), min(count, len(values.TOPICS)))
    for important in ("name", "city", "pet", "job", "hobby"):
        if important not in topics and rng.random() < 0.35:
            topics.append(important)
    things = rng.choices([0, 1, 2], [0.75, 0.17, 0.08])[0] if not mix.held_out else 0
    profile = Profile()
    for topic in topics:
        profile.facts[topic] = draw(rng, topic)
    for number, kind in enumerate(rng.sample(values.THINGS, things)):
        profile.facts[f"thing{number}"] = values.thing(rng)
        profile.kinds[f"thing{number}"] = kind
    profile.kinds["pet"] = values.animal(rng)
    profile.kinds["family"] = values.relative(rng)
    order = list(profile.facts)
    rng.shuffle(order)
    if "name" in order and rng.random() < 0.6:
        order.remove("name")
        order.insert(0, "name")
    layout = (
        "prose"
        if mix.held_out
        else rng.choices(["prose", "list", "notes", "mixed"], [5, 3, 1, 1])[0]
    )
    profile.text = _lay_out(rng, mix, profile, order, layout)
    return profile


def _lay_out(rng: random.Random, mix: Mix, profile: Profile, order: list[str], layout: str) -> str:
    def item(topic: str) -> tuple[str, str, str]:
        return topic, profile.facts[topic], profile.kinds.get(topic, "")

    fillers = [_filler(rng, mix) for _ in range(rng.randint(*mix.fillers))]
    opener = rng.choice(phrasings.OPENERS) if rng.random() < 0.3 else ""
    if layout == "notes":
        mark = rng.choice([", ", "; ", ". ", "\n", " / "])
        notes = [_note(rng, *item(topic)) for topic in order]
        return (opener + "\n" if opener else "") + mark.join(notes) + rng.choice(["", "."])
    listed = order if layout == "list" else order[len(order) // 2 :] if layout == "mixed" else []
    told = [topic for topic in order if topic not in listed]
    sentences = [_sentence(rng, mix, *item(topic)) for topic in told]
    for filler in fillers:
        sentences.insert(rng.randint(0, len(sentences)), filler)
    parts = []
    if sentences:
        parts.append(_join(rng, sentences))
    if listed:
        bullet = rng.choice(["- ", "- ", "* ", "", "", "", "• "])
        separator = rng.choice([": ", ": ", ": ", " = ", " - ", ":"])
        gap = rng.choice(["\n", "\n", "\n", "\n", "; ", ", "]) if not bullet else "\n"
        parts.append(gap.join(bullet + _entry(rng, *item(topic), separator) for topic in listed))
    if rng.random() < 0.3:
        parts.reverse()
    gap = rng.choice(["\n", "\n\n"])
    if opener:
        sentences_first = layout == "prose" and opener[-1] in "!.,"
        parts[0] = opener + (" " if sentences_first else "\n") + parts[0]
    return gap.join(parts)


def _typed(rng: random.Random, text: str) -> str:
    """As people type: now and then without capitals or the mark at the end."""
    if rng.random() < 0.08:
        text = text[0].lower() + text[1:]
    if rng.random() < 0.08:
        text = text.rstrip("?.!")
    if rng.random() < 0.05:
        text = rng.choice(["Please: ", "Quick question: ", "Hi! ", "Hello. "]) + text
    return text


def _fill(
    rng: random.Random, template: str, facts: dict[str, str], weight: float
) -> tuple[str, list[tuple[int, int, float]]]:
    """The template with its slots filled, and the (start, end, weight) of what was filled in."""
    text, spans = "", []
    for piece in re.split(r"(\{\w+\})", template):
        if not piece.startswith("{"):
            text += piece
            continue
        slot = piece[1:-1]
        value = facts[slot]
        if re.search(r"\b[Aa] $", text) and value[0] in "aeiouAEIOU":
            text = text[:-1] + "n "
        if not text and slot in LOWER_CASE:
            if rng.random() < 0.5:
                text = rng.choice(["Perhaps ", "Maybe ", "Well, ", "Just "])
            else:
                value = value[0].upper() + value[1:]
        if slot != "kind":
            spans.append((len(text), len(text) + len(value), weight))
        text += value
    return text, spans


def _request(rng: random.Random, block: Block, kind: str) -> str:
    while True:
        text = expand(rng, rng.choice(block.asks))
        if "pet" in block.topics:
            named = kind if rng.random() < 0.85 else rng.choice(["dog", "cat", kind])
            text = re.sub(r"\b(dog|cat|rabbit|parrot)\b", named, text)
        text = text.replace("{kind}", kind)
        if text.lower().rstrip("?.! ") not in held_out_requests():
            return _typed(rng, text)


def _choose_block(rng: random.Random, mix: Mix, profile: Profile | None) -> Block:
    kind = rng.random()
    if kind < mix.neutral:
        neutral = [block for block in blocks() if block.neutral]
        return rng.choices(neutral, [1 + len(block.pairs) + len(block.asks) for block in neutral])[
            0
        ]
    direct = kind < mix.neutral + mix.direct
    pool = [block for block in blocks() if not block.neutral and block.direct == direct]
    if profile and rng.random() < 0.85:
        known = {topic.rstrip("0123456789") for topic in profile.facts}
        pool = [block for block in pool if known & set(block.topics)] or pool
    return rng.choice(pool)


def _turn(
    rng: random.Random, mix: Mix, profile: Profile | None
) -> tuple[str, str, list[tuple[int, int, float]]]:
    """One request, its answer, and the weighted spans of the answer."""
    block = _choose_block(rng, mix, profile)
    if block.pairs:
        ask, answers = rng.choice(block.pairs)
        return _typed(rng, expand(rng, ask)), expand(rng, rng.choice(answers)), []
    facts = dict(profile.facts) if profile else {}
    topic = block.topics[0] if block.topics else ""
    kind = ""
    if topic == "thing":
        mine = [name for name in facts if name.startswith("thing")]
        chosen = rng.choice(mine) if mine else ""
        kind = profile.kinds[chosen] if profile and chosen else rng.choice(values.THINGS)
        if chosen:
            facts["thing"] = facts[chosen]
    elif topic == "family":
        kind = profile.kinds["family"] if "family" in facts and profile else values.relative(rng)
    elif profile and "pet" in facts:
        kind = profile.kinds["pet"]
    else:
        kind = values.animal(rng)
    ask = _request(rng, block, kind)
    fitting = []
    for template in block.facts:
        slots = set(re.findall(r"\{(\w+)\}", template)) - {"kind"}
        if slots <= facts.keys() and not ("{kind}" in template and not kind):
            fitting.append(template)
    draw = rng.random()
    rate = (mix.direct_fact if block.direct else mix.indirect_fact) if fitting else 0.0
    if draw < rate:
        template = expand(rng, rng.choice(fitting))
        if set(re.findall(r"\{(\w+)\}", template)) - {"kind"} <= facts.keys():
            text, spans = _fill(rng, template, facts | {"kind": kind}, mix.fact_weight)
            return ask, text, spans
    elif draw < rate + (mix.wrong if fitting else 1.6 * mix.wrong) and block.facts:
        template = expand(rng, rng.choice(block.facts))
        made_up = {name: make(rng) for name, make in values.TOPICS.items()}
        made_up |= {"thing": values.thing(rng), "kind": kind}
        return ask, *_fill(rng, template, made_up, 1.0)
    text = expand(rng, rng.choice(block.generic)).replace("{kind}", kind)
    return ask, text, []


def _sum(rng: random.Random) -> tuple[str, str, list[tuple[int, int, float]]]:
    """A small sum in words, an answer that states it, and the weighted spans of its result."""
    ask, answer, result = small_sum(rng)
    return ask, answer, [(*m.span(), SUM_WEIGHT) for m in re.finditer(rf"(?<=is ){result}", answer)]


def _words(rng: random.Random, count: int) -> list[str]:
    makers = list(values.TOPICS.values())
    return [
        values.invented(rng) if rng.random() < 0.4 else rng.choice(makers)(rng)
        for _ in range(count)
    ]


def _repeated(rng: random.Random, weight: float) -> Document:
    """Random words said again: plain, in another order, or asked for by the word before."""
    doc = Document()
    words = _words(rng, rng.randint(4, 24))
    if rng.random() < 0.5:
        doc.add("<|im_start|>user\n" + " ".join(words), 0.05)
        doc.add("<|im_end|>\n<|im_start|>assistant\n", 0.0)
        doc.add(" ".join(words) + "<|im_end|>\n", weight / 2)
        return doc
    doc.add(rng.choice(["", "\n"]) + " ".join(words), 0.05)
    for _ in range(rng.randint(1, 2)):
        low = rng.randint(0, max(0, len(words) - 4))
        part = words[low : low + rng.randint(3, len(words))]
        doc.add(rng.choice([" ", "\n", ". "]), 0.0)
        doc.add(part[0], 0.0)
        doc.add("".join(" " + word for word in part[1:]), weight / 2)
    return doc


def document(rng: random.Random, mix: Mix) -> Document:
    """One chat of the corpus."""
    if rng.random() < mix.repeats:
        return _repeated(rng, mix.fact_weight)
    doc = Document()
    profile = None if rng.random() < mix.no_profile else make_profile(rng, mix)
    if profile:
        doc.add(f"<|im_start|>system\n{profile.text.strip()}<|im_end|>\n", 0.2)
    for _ in range(rng.randint(*mix.turns)):
        ask, answer, spans = _sum(rng) if rng.random() < mix.sums else _turn(rng, mix, profile)
        doc.add(f"<|im_start|>user\n{ask}<|im_end|>\n", 0.2)
        doc.add("<|im_start|>assistant\n", 0.0)
        start = doc.add(f"{answer}<|im_end|>", 1.0)
        doc.weights += [(start + low, start + high, weight) for low, high, weight in spans]
        doc.add("\n", 0.0)
    return doc
