"""Tokenizers, real and made here, against llama.cpp's on hard, random and real strings."""

from __future__ import annotations

import json
import unicodedata
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
import sentencepiece
from gguf_tiny import CHATML, QWEN2_SPLIT, SHAPE, byte_level_tokenizer, save, shared
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast, Qwen2Config

from mipo_lite.errors import UserError
from mipo_lite.gguf import export, vocabulary
from mipo_lite.gguf.llama import encode, is_end, open_gguf
from mipo_lite.gguf.proof import HARD_STRINGS, prove_tokenizer, random_strings
from mipo_lite.gguf.vocabulary import Vocabulary, end_of_turn, read_vocabulary

LLAMA3_SPLIT = QWEN2_SPLIT.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} "
    "[/INST]{% else %}{{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
BUILTIN = Path(__file__).parents[1] / "mipo_lite/builtin/model"


def vocabulary_file(path: Path, content: Vocabulary) -> Path:
    """A GGUF with a vocabulary and no tensors."""
    writer = gguf.GGUFWriter(path, "llama")
    content.write(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    return path


def prompts() -> list[str]:
    """Texts of the public prompt sets beside the checkout; none where they are absent."""
    folder = Path(__file__).parents[2] / "shared/data/prompts"
    texts = []
    for file in sorted(folder.glob("*.jsonl")):
        for line in file.read_text("utf-8").splitlines():
            row = json.loads(line)
            texts += [row.get("instruction", ""), row.get("text", ""), *row.get("turns", [])]
            texts.append(line)
    return [text for text in texts if text]


def prove(tokenizer: Any, path: Path, strings: list[str] | None = None) -> Vocabulary:
    made = read_vocabulary(tokenizer, len(tokenizer) + 7)
    vocabulary_file(path, made)
    if strings is None:
        strings = [*HARD_STRINGS, *random_strings(2000, seed=1), *prompts()]
    prove_tokenizer(path, tokenizer, made, strings)
    return made


@pytest.mark.parametrize(("name", "pre"), [("qwen2.5", "qwen2"), ("smollm2", "smollm")])
def test_real_tokenizers(name: str, pre: str, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared("tokenizers") / name)
    found = prove(tokenizer, tmp_path / "v.gguf")
    assert found.pre == pre
    assert found.tokens[-1] == f"[PAD{len(tokenizer) + 6}]"
    assert found.types[-1] == gguf.TokenType.UNUSED


def test_as_llama_cpp_itself_holds_it(tmp_path: Path) -> None:
    """The ids in llama.cpp's own tests, a third opinion."""
    folder = shared("tokenizers") / "qwen2.5"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    path = vocabulary_file(tmp_path / "v.gguf", read_vocabulary(tokenizer, len(tokenizer)))
    texts = (folder / "hard_strings.inp").read_text("utf-8").split("\n__ggml_vocab_test__\n")
    ids = (folder / "hard_strings.out").read_text().split("\n")
    with open_gguf(path, vocab_only=True) as llama:
        for text, line in zip(texts, ids, strict=False):
            assert encode(llama, text) == [int(word) for word in line.split()]


def test_builtin_tokenizer(tmp_path: Path) -> None:
    if not (BUILTIN / "tokenizer.json").is_file():
        pytest.skip("the built-in model is not there")
    assert prove(AutoTokenizer.from_pretrained(BUILTIN), tmp_path / "v.gguf").pre == "qwen2"


@pytest.mark.parametrize(
    ("split", "ignore_merges", "pre"),
    [
        (QWEN2_SPLIT, False, "qwen2"),
        (LLAMA3_SPLIT, True, "llama-bpe"),
        (LLAMA3_SPLIT, False, "smaug-bpe"),
        (vocabulary._TEKKEN, True, "tekken"),
    ],
)
def test_splits(split: str, ignore_merges: bool, pre: str, tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer(split, size=600)
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend["model"]["ignore_merges"] = ignore_merges
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(backend)),
        eos_token="<|im_end|>",
        chat_template=CHATML,
    )
    strings = [*HARD_STRINGS, *random_strings(500, seed=2)]
    assert prove(tokenizer, tmp_path / "v.gguf", strings).pre == pre


@pytest.mark.parametrize("wrong", ["gpt-2", "smollm", "default"])
def test_wrong_pre_is_caught(wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "model", Qwen2Config(**SHAPE))
    right = export.read_vocabulary
    monkeypatch.setattr(export, "read_vocabulary", lambda *args: replace(right(*args), pre=wrong))
    with pytest.raises(UserError, match=rf"llama\.cpp would encode .*pre-tokenizer {wrong}"):
        export.export(path, tmp_path / "model.gguf")
    assert not list(tmp_path.glob("*.gguf*"))


def test_unknown_split_is_refused() -> None:
    tokenizer = byte_level_tokenizer(r"\p{L}+|\s")
    with pytest.raises(UserError, match="splits text in a way that has no name here"):
        read_vocabulary(tokenizer, 400)


def test_normalizer_is_applied_by_encode(tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    apart = unicodedata.normalize("NFD", "é")
    found = prove(tokenizer, tmp_path / "v.gguf", [apart])
    assert found.normalizer == "NFC"
    path = vocabulary_file(tmp_path / "without.gguf", replace(found, normalizer=None))
    with pytest.raises(UserError, match=r"llama\.cpp would encode"):
        prove_tokenizer(path, tokenizer, found, [apart])


@pytest.fixture(scope="module")
def pieces(tmp_path_factory: pytest.TempPathFactory) -> sentencepiece.SentencePieceProcessor:
    """A SentencePiece BPE with byte fallback, trained on this repository's text."""
    folder = tmp_path_factory.mktemp("spm")
    lines = [Path(__file__).read_text("utf-8"), *HARD_STRINGS]
    (folder / "text").write_text("\n".join(lines), "utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"),
        model_prefix=str(folder / "spm"),
        model_type="bpe",
        vocab_size=900,
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "spm.model"))


def vocab_and_merges(pieces: Any) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """What a conversion to tokenizer.json holds: every way to make a piece, best piece first."""
    vocab = {pieces.id_to_piece(i): i for i in range(pieces.vocab_size())}
    merges = []
    for piece, i in vocab.items():
        splits = [(piece[:k], piece[k:]) for k in range(1, len(piece))]
        if not pieces.is_byte(i) and not pieces.is_control(i) and not pieces.is_unknown(i):
            merges += [(i, a, b) for a, b in splits if a in vocab and b in vocab]
    return vocab, [(a, b) for _, a, b in sorted(merges, key=lambda m: m[0])]


STRINGS = [*HARD_STRINGS, *random_strings(2000, seed=3)]


@pytest.mark.parametrize("template", [None, MISTRAL])
def test_sentencepiece_of_llama_2(pieces: Any, template: str | None, tmp_path: Path) -> None:
    vocab, merges = vocab_and_merges(pieces)
    tokenizer = LlamaTokenizer(
        vocab=vocab, merges=merges, legacy=True, add_bos_token=True, chat_template=template
    )
    found = prove(tokenizer, tmp_path / "v.gguf", [*STRINGS, *prompts()])
    assert (found.model, found.pre) == ("llama", "default")
    assert found.add_space_prefix
    assert found.add_bos
    with open_gguf(tmp_path / "v.gguf", vocab_only=True) as llama:
        for text in (*HARD_STRINGS, *prompts()):  # a third opinion: sentencepiece itself
            assert encode(llama, text) == pieces.encode(text)


def test_sentencepiece_as_first_converted(pieces: Any, tmp_path: Path) -> None:
    """Older tokenizer.json of Llama 2 and Mistral put the space there as SentencePiece does."""
    vocab, merges = vocab_and_merges(pieces)
    backend = Tokenizer(models.BPE(vocab, merges, byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    assert prove(tokenizer, tmp_path / "v.gguf", STRINGS).plain == "all"


def test_sentencepiece_of_new_mistral(pieces: Any, tmp_path: Path) -> None:
    """The space that opens a text only: llama.cpp can not say it, a chat does not need it."""
    vocab, merges = vocab_and_merges(pieces)
    tokenizer = LlamaTokenizer(vocab=vocab, merges=merges, legacy=False, chat_template=MISTRAL)
    found = prove(tokenizer, tmp_path / "v.gguf", STRINGS)
    assert (found.add_space_prefix, found.plain) == (False, "none")


def test_sentencepiece_of_gemma(pieces: Any, tmp_path: Path) -> None:
    vocab, merges = vocab_and_merges(pieces)
    backend = Tokenizer(models.BPE(vocab, merges, byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback()])
    backend.add_tokens(["▁▁▁▁"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=["<end_of_turn>"],
        chat_template=CHATML.replace("<|im_end|>", "<end_of_turn>"),
    )
    found = prove(tokenizer, tmp_path / "v.gguf", STRINGS)
    assert not found.add_space_prefix
    assert found.special["eot"] == tokenizer.convert_tokens_to_ids("<end_of_turn>")


def test_end_tokens(tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer()
    assert end_of_turn(tokenizer) is None  # it is eos already
    tokenizer.eos_token = "<|endoftext|>"
    path = vocabulary_file(tmp_path / "v.gguf", read_vocabulary(tokenizer, 400))
    with open_gguf(path, vocab_only=True) as llama:
        ends = [token for token in range(400) if is_end(llama, token)]
    assert ends == [0, 2]  # <|endoftext|>, and <|im_end|> that the template puts behind answers
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="has no end token"):
        read_vocabulary(tokenizer, 400)


def test_fewer_rows_than_tokens() -> None:
    with pytest.raises(UserError, match="the embedding table only 300 rows"):
        read_vocabulary(byte_level_tokenizer(), 300)
