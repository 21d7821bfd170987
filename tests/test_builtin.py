"""The corpus program, the string-match rules, the data files and the shipped model."""

from __future__ import annotations

import json
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from mipo_lite.base import BaseSource, load_base
from mipo_lite.builtin import phrasings, values
from mipo_lite.builtin.corpus import Mix, blocks, document, make_profile
from mipo_lite.builtin.facts import contains, fact_use, wrong_fact
from mipo_lite.builtin.measure import MODEL, answers, copying
from mipo_lite.builtin.train import (
    LENGTHS,
    Muon,
    Round,
    Settings,
    chunk,
    learning_rate,
    token_weights,
    train,
)

DATA = Path(values.__file__).parents[1] / "data"
EXAMPLES = Path(__file__).parents[1] / "examples"


def jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def corpus_sample(count: int, seed: int = 3) -> list[str]:
    rng = random.Random(seed)
    return [document(rng, Mix(repeats=0.05)).text for _ in range(count)]


def test_same_seed_same_corpus():
    assert corpus_sample(50) == corpus_sample(50)
    assert corpus_sample(50) != corpus_sample(50, seed=4)


def test_answers_end_their_turn_and_weigh_most():
    rng = random.Random(1)
    for _ in range(100):
        doc = document(rng, Mix())
        assert doc.text.endswith("<|im_end|>\n")
        for start, end, weight in doc.weights:
            assert 0 <= start <= end <= len(doc.text)
            if weight >= 1.0:
                assert doc.text.rfind("<|im_start|>", 0, start) == doc.text.rfind(
                    "<|im_start|>assistant", 0, start
                )


def test_facts_are_used_about_as_often_as_the_mix_says():
    rng = random.Random(5)
    mix = Mix(turns=(1, 1), no_profile=0.0, sums=0.0, neutral=0.0, fact_weight=4.0)
    for direct, rate in ((1.0, mix.direct_fact), (0.0, mix.indirect_fact)):
        docs = [document(rng, replace(mix, direct=direct)) for _ in range(1500)]
        used = sum(any(weight == 4.0 for *_, weight in doc.weights) for doc in docs) / len(docs)
        # some requests fit no fact of the profile
        assert rate - 0.2 < used <= rate + 0.03


def test_every_slot_of_the_templates_has_a_value():
    known = set(values.TOPICS) | {"kind", "thing"}
    for block in blocks():
        assert set(block.topics) <= known
        assert block.pairs or (block.asks and block.generic), block.id
        for template in block.facts:
            assert set(re.findall(r"\{(\w+)\}", template)) <= known
        for text in block.asks + block.facts + block.generic:
            assert text.count("[") == text.count("]"), text


def test_held_out_prompts_are_not_in_the_corpus():
    held_out = {row["text"].lower().rstrip("?.! ") for row in jsonl(DATA / "prompts.jsonl")
                if row["split"] == "held_out"}  # fmt: skip
    for text in corpus_sample(4000):
        for ask in re.findall(r"<\|im_start\|>user\n(.*?)<\|im_end\|>", text):
            assert ask.lower().rstrip("?.! ") not in held_out


def test_held_out_phrasings_are_apart():
    trained = {text for texts in phrasings.SENTENCES.values() for text in texts}
    kept = [text for texts in phrasings.HELD_OUT.values() for text in texts]
    assert not trained & set(kept)
    profile = make_profile(random.Random(2), Mix(topics=(6, 6), fillers=(0, 0), held_out=True))
    openings = {text.split("{")[0] for text in kept}
    assert any(opening and opening in profile.text for opening in openings)


def test_evaluation_values_stand_in_no_training_text():
    people = jsonl(values.EVAL_CONTEXTS)
    assert len(people) == 3
    tables = values.table_words()
    mine = {value for person in people for accepted in person["facts"].values()
            for value in accepted}  # fmt: skip
    for person in people:
        for accepted in person["facts"].values():
            assert any(contains(person["text"], value) for value in accepted)
    everyday = {"no", "free"}
    for value in mine:
        assert set(value.lower().split()) - everyday - tables, value
    text = "\n".join(corpus_sample(3000))
    personas = "\n".join(row["text"] for row in jsonl(DATA / "personas.jsonl"))
    for value in mine:
        assert not contains(text, value), value
        assert not contains(personas, value), value
    rng = random.Random(0)
    assert not {values.invented(rng) for _ in range(20_000)} & values.reserved()


def test_prompts_file():
    rows = jsonl(DATA / "prompts.jsonl")
    assert len(rows) >= 240
    assert len({row["id"] for row in rows}) == len({row["text"].lower() for row in rows})
    shares = [sum(row["split"] == split for row in rows) for split in ("train", "held_out")]
    assert sum(shares) == len(rows) and min(shares) > 60
    assert all(set(row["topics"]) <= set(values.TOPICS) for row in rows)
    without = sum(not row["topics"] for row in rows) / len(rows)
    assert 0.10 < without < 0.20


def test_personas_file():
    rows = jsonl(DATA / "personas.jsonl")
    assert len(rows) >= 60
    assert len({row["id"] for row in rows}) == len(rows)
    for row in rows:
        assert 40 <= len(row["text"].split()) <= 200, row["id"]
        for topic, value in row["facts"].items():
            assert topic in values.TOPICS
            if topic != "tone":
                options = [value] if isinstance(value, str) else value
                assert any(contains(row["text"], option) for option in options), value


@pytest.mark.parametrize("name", ["me", "prose", "long"])
def test_examples_state_their_facts(name):
    text = (EXAMPLES / f"{name}.txt").read_text(encoding="utf-8")
    facts = yaml.safe_load((EXAMPLES / f"{name}.facts.yaml").read_text(encoding="utf-8"))
    assert set(facts) <= set(values.TOPICS)
    text = " ".join(text.split())
    assert all(any(contains(text, value) for value in accepted) for accepted in facts.values())
    if name == "prose":
        for topic, sentences in phrasings.SENTENCES.items():
            for sentence in sentences:
                for value in facts.get(topic, []):
                    assert sentence.replace("{v}", value).strip(".") not in text


@pytest.mark.parametrize(
    ("response", "topics", "expected"),
    [
        ("Your dog is called Quib.", ["pet"], True),
        ("QUIB wants a walk", ["pet", "city"], True),
        ("Quibbler is a word.", ["pet"], False),
        ("Have some grape tea.", ["drink"], True),
        ("Have some tea.", ["drink"], False),
        ("Anything.", ["book"], None),
        ("Anything.", [], None),
    ],
)
def test_fact_use(response, topics, expected):
    facts = {"pet": "Quib", "drink": ["grape tea", "grapes"]}
    assert fact_use(response, facts, topics) is expected


def test_wrong_fact():
    facts = {"pet": ["Quib"]}
    context = "My dog is called Quib and I live in Zorn."
    assert not wrong_fact("Your dog is called Quib.", facts, context, "What is my pet called?")
    assert not wrong_fact("Walk through the old streets of Zorn.", facts, context, "Ideas?")
    assert wrong_fact("Your dog is called Blarf.", facts, context, "What is my pet called?")
    assert not wrong_fact("Blarf it is.", facts, context, "Do you know Blarf?")


def test_learning_rate_rises_stays_and_falls():
    one = Settings(rounds=(Round(20_000_000, natural=0, fall=5_000_000),))
    rates = [learning_rate(one, done) for done in range(0, 20_000_001, 250_000)]
    assert rates[0] < 0.1 and rates[4] == 1.0 and rates[-1] == 0.0
    assert learning_rate(one, 15_000_000) == 1.0
    assert learning_rate(one, 17_500_000) == pytest.approx(0.5)
    two = replace(one, rounds=(*one.rounds, Round(10_000_000, 0, rate=0.4, fall=10_000_000)))
    assert learning_rate(two, 17_500_000) == pytest.approx(0.5)
    assert learning_rate(two, 25_000_000) == pytest.approx(0.2)
    assert learning_rate(two, 30_100_000) == 0.0


@pytest.fixture(scope="module")
def small_tokenizer():
    from mipo_lite.builtin.tokenizer import train_tokenizer

    return train_tokenizer(corpus_sample(1500))


def test_tokenizer_gives_text_back(small_tokenizer):
    assert small_tokenizer.token_to_id("<|endoftext|>") == 0
    assert small_tokenizer.token_to_id("<|im_end|>") == 2
    for text in ("Grüße, 東京 🙂\n\n  x = 17;", "I'm  here\r\n\tnow"):
        assert small_tokenizer.decode(small_tokenizer.encode(text).ids) == text


def test_token_weights_cover_the_answer(small_tokenizer):
    rng = random.Random(7)
    for _ in range(50):
        doc = document(rng, Mix(fact_weight=4.0, sums=0.0))
        encoded = small_tokenizer.encode(doc.text)
        weights = token_weights(doc, encoded.offsets)
        ends = [i for i, token in enumerate(encoded.tokens) if token == "<|im_end|>"]
        assert weights[ends[-1]] == 1.0
        for start, end, weight in doc.weights:
            if weight == 4.0:
                inside = [w for w, (_, e) in zip(weights, encoded.offsets, strict=True)
                          if start < e <= end]  # fmt: skip
                assert inside and all(w == 4.0 for w in inside)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
def test_muon_in_float32_is_torchs(shape):
    torch.manual_seed(0)
    start, gradients = torch.randn(shape), torch.randn(3, *shape)
    ends = []
    for make in (torch.optim.Muon, Muon):
        matrix = torch.nn.Parameter(start.clone())
        optimizer = make([matrix], lr=0.02, weight_decay=0.1)
        for gradient in gradients:
            matrix.grad = gradient.clone()
            optimizer.step()
        ends.append(matrix.detach())
    moved = (ends[0] - start).norm()
    assert (ends[1] - ends[0]).norm() < 0.02 * moved  # bfloat16 keeps 8 bits


def test_training_learns_and_goes_on_after_a_stop(small_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("mipo_lite.builtin.train.CHUNK_TOKENS", 12_000)
    settings = Settings(rounds=(Round(24_000, natural=0, fall=12_000),), batch_tokens=512)
    first = next(chunk(settings, small_tokenizer, 0, 0))
    again = next(chunk(settings, small_tokenizer, 0, 0))
    assert (first[0] == again[0]).all() and (first[1] == again[1]).all()
    assert first[0].shape[1] - 1 in LENGTHS
    half = replace(settings, rounds=(replace(settings.rounds[0], tokens=12_000),))
    train(half, small_tokenizer, tmp_path, compiled=False)
    assert (tmp_path / "state.pt").exists()
    train(settings, small_tokenizer, tmp_path, compiled=False)
    assert (tmp_path / "model" / "model.safetensors").exists()
    base = load_base(BaseSource("small", tmp_path / "model"), quantized=False)
    assert base.eos_ids == [2] and base.model.config.vocab_size == 1536
    rows = jsonl(tmp_path / "loss.jsonl")
    steps = [row["step"] for row in rows]
    assert len(steps) >= 2 and steps == sorted(set(steps))
    assert rows[-1]["tokens"] > 12_000 and rows[-1]["loss"] < rows[0]["loss"]


@pytest.mark.skipif(not (MODEL / "model.safetensors").exists(), reason="no built-in model yet")
class TestShippedModel:
    @pytest.fixture(scope="class")
    def loaded(self):
        return load_base(BaseSource("builtin", MODEL), quantized=False)

    def test_shape_and_size(self, loaded):
        config, tokenizer = loaded.model.config, loaded.tokenizer
        assert config.model_type == "qwen2" and config.tie_word_embeddings
        assert config.hidden_size % 256 == 0 and config.intermediate_size % 256 == 0
        assert config.vocab_size % 256 == 0 and config.max_position_embeddings == 4096
        assert tokenizer.pad_token_id == 0 and tokenizer.eos_token_id == 2
        assert sum(file.stat().st_size for file in MODEL.iterdir()) < 10_000_000

    def test_template(self, loaded):
        tokenizer = loaded.tokenizer
        text = tokenizer.apply_chat_template(
            [{"role": "system", "content": "I'm Zorn."}, {"role": "user", "content": "Hi"}],
            tokenize=False,
            add_generation_prompt=True,
        )
        assert text == (
            "<|im_start|>system\nI'm Zorn.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
            "<|im_start|>assistant\n"
        )

    def test_copies_made_up_values(self, loaded):
        right, asked = copying(loaded, profiles=12, held_out=False, seed=99)
        assert right.total() / asked.total() >= 0.85

    def test_stops_by_itself(self, loaded):
        prompts = jsonl(DATA / "prompts.jsonl")[:32]
        people = jsonl(values.EVAL_CONTEXTS)
        told = answers(loaded, [(people[0]["text"], row["text"]) for row in prompts])
        assert all(0 < len(text.split()) < 40 for text in told)
