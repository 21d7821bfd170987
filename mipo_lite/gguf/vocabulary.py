"""The tokenizer of a model, said the way llama.cpp reads it.

The one source is the tokenizer as transformers loads it, because that is what the model is trained
and sampled with; files beside it (tokenizer.model, merges.txt) are not read. Two kinds are known:
byte-level BPE, where llama.cpp has to be told by name how text is split before merging, and
SentencePiece BPE with byte fallback. Nothing is guessed: a split that is not in the table is
refused. Whether the result really encodes alike is proved on the written file, in `proof`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import gguf
from gguf import TokenType

from ..errors import UserError
from .llama import NORMALIZER_KEY

SPACE = "▁"  # how SentencePiece writes a space
_WAY_OUT = "Export it with llama.cpp's own converter, which may know this tokenizer."

# Regular expressions of `Split` pre-tokenizers, as the families publish them.
_CONTRACTION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_TAIL}"
_LLAMA3 = rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_TAIL}"
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# (how the tokenizer splits, whether a word that is a token skips the merges) -> tokenizer.ggml.pre
_PRE = {
    ((_QWEN2,), False): "qwen2",
    ((_LLAMA3,), True): "llama-bpe",
    ((_LLAMA3,), False): "smaug-bpe",
    ((_TEKKEN,), True): "tekken",
    (("digits", "gpt2"), False): "smollm",
    (("gpt2",), False): "gpt-2",
}


@dataclass(frozen=True)
class Vocabulary:
    """What goes into the tokenizer.* keys.

    Attributes:
        model: "gpt2" (byte-level BPE) or "llama" (SentencePiece).
        pre: name of the pre-tokenizer.
        tokens: one string a row of the embedding table, padded with [PADi].
        types: gguf.TokenType of each.
        merges: "a b" strings, for gpt2.
        scores: one a token, for llama.
        special: "bos", "eos", "pad", "unk", "eot" -> token id.
        add_bos, add_eos: what encoding plain text adds.
        add_space_prefix: whether text begins with a space of its own, for llama.
        chat_template: Jinja source.
        plain: which texts, without a chat around them, llama.cpp can encode alike: all, those that
            do not begin with a space, or none. SentencePiece and llama.cpp put a space before every
            text; newer tokenizers (Metaspace) only where there is none yet, or only at the very
            beginning.
        normalizer: unicode normal form that the tokenizer applies and llama.cpp does not.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[TokenType]
    merges: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    special: dict[str, int] = field(default_factory=dict)
    add_bos: bool = False
    add_eos: bool = False
    add_space_prefix: bool = False
    chat_template: str | None = None
    plain: Literal["all", "unspaced", "none"] = "all"
    normalizer: Literal["NFC"] | None = None

    def write(self, writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.types)
        if self.merges:
            writer.add_token_merges(self.merges)
        if self.scores:
            writer.add_token_scores(self.scores)
        for kind, token in self.special.items():
            getattr(writer, f"add_{kind}_token_id")(token)
        writer.add_add_bos_token(self.add_bos)
        writer.add_add_eos_token(self.add_eos)
        if self.model == "llama":
            writer.add_add_space_prefix(self.add_space_prefix)
        if self.normalizer:
            writer.add_string(NORMALIZER_KEY, self.normalizer)
        if self.chat_template:
            writer.add_chat_template(self.chat_template)


def load_tokenizer(model_dir: Path | str) -> Any:
    """The tokenizer of a model directory; UserError when there is none that can be exported."""
    from transformers import AutoTokenizer

    error = None
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_dir)
    except (OSError, ValueError) as found:
        error = found
    # Without tokenizer.json transformers makes an empty tokenizer for some families.
    if error or not tokenizer.encode("a", add_special_tokens=False):
        raise UserError(
            f"{model_dir} has no tokenizer that transformers can load.",
            "Copy the tokenizer files of the base into it.",
        ) from error
    if not getattr(tokenizer, "is_fast", False):
        raise UserError(f"The tokenizer of {model_dir} is a slow one.", _WAY_OUT)
    return tokenizer


def read_vocabulary(tokenizer: Any, rows: int) -> Vocabulary:
    """Say `tokenizer` in llama.cpp's terms.

    Args:
        tokenizer: a fast transformers tokenizer.
        rows: of the embedding table; the token list is padded to it.

    Raises:
        UserError: the tokenizer is of a kind that llama.cpp has no name for.
    """
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    if backend["model"]["type"] != "BPE":
        raise UserError(f"The tokenizer is {backend['model']['type']}, not BPE.", _WAY_OUT)
    tokens, types = _tokens(tokenizer, backend, rows)
    common: dict[str, Any] = {
        "special": _special_ids(tokenizer),
        "chat_template": _template(tokenizer),
        **_added(tokenizer),
    }
    if backend["model"]["byte_fallback"]:
        return _sentencepiece(tokenizer, backend, tokens, types, common)
    merges = [_merge(pair) for pair in backend["model"]["merges"]]
    normalizer = _byte_level_normalizer(backend["normalizer"])
    return Vocabulary(
        "gpt2", _pre(backend), tokens, types, merges=merges, normalizer=normalizer, **common
    )


def _tokens(
    tokenizer: Any, backend: dict[str, Any], rows: int
) -> tuple[list[str], list[TokenType]]:
    by_id = {id: token for token, id in backend["model"]["vocab"].items()}
    kinds = dict.fromkeys(by_id, TokenType.NORMAL)
    if backend["model"]["byte_fallback"]:
        for id, token in by_id.items():
            if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
                kinds[id] = TokenType.BYTE
    for added in backend["added_tokens"]:
        by_id[added["id"]] = added["content"]
        kinds[added["id"]] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    if backend["model"]["byte_fallback"] and tokenizer.unk_token_id is not None:
        kinds[tokenizer.unk_token_id] = TokenType.UNKNOWN
    if max(by_id) >= rows:
        raise UserError(
            f"The tokenizer has token {max(by_id)}, the embedding table only {rows} rows.",
            "Resize the embeddings to the tokenizer and save the model again.",
        )
    tokens = [by_id.get(id, f"[PAD{id}]") for id in range(rows)]
    if len(set(tokens)) != rows:  # llama.cpp aborts the process on a doubled token
        raise UserError("Two ids of the tokenizer stand for the same token.", _WAY_OUT)
    return tokens, [kinds.get(id, TokenType.UNUSED) for id in range(rows)]


def _sentencepiece(
    tokenizer: Any,
    backend: dict[str, Any],
    tokens: list[str],
    types: list[TokenType],
    common: dict[str, Any],
) -> Vocabulary:
    # llama.cpp joins the neighbours whose union scores highest; the tokenizer joins the pair that
    # stands first in its list. A token's score is therefore the rank of its first merge.
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(backend["model"]["merges"]):
        ranks.setdefault(_merge(pair).replace(" ", ""), rank)
    scores = [-float(ranks.get(token, len(ranks))) for token in tokens]
    # Added tokens are matched in the text before spaces become SPACE.
    tokens = [
        token.replace(SPACE, " ") if kind == TokenType.USER_DEFINED else token
        for token, kind in zip(tokens, types, strict=True)
    ]
    prefix, plain = _opening(backend, common["chat_template"])
    return Vocabulary(
        "llama",
        "default",
        tokens,
        types,
        scores=scores,
        add_space_prefix=prefix,
        plain=plain,
        **common,
    )


def _opening(
    backend: dict[str, Any], chat_template: str | None
) -> tuple[bool, Literal["all", "unspaced", "none"]]:
    """add_space_prefix, and `plain` of `Vocabulary`."""
    steps = [*_steps(backend["normalizer"]), *_steps(backend["pre_tokenizer"])]
    for step in steps:
        kind = step["type"]
        if kind == "Prepend" and step["prepend"] == SPACE:
            return True, "all"
        if kind == "Metaspace" and step["prepend_scheme"] != "never":
            # "first" means the beginning of the text and not what follows a special token, but
            # llama.cpp only knows both or none. A chat begins with a special token: none.
            if step["prepend_scheme"] == "first" and chat_template:
                return False, "none"
            return True, "unspaced"
        if kind not in ("Replace", "Split", "Metaspace"):
            raise UserError(f"The SentencePiece tokenizer has a {kind} step.", _WAY_OUT)
    return False, "all"


def _steps(part: dict[str, Any] | None) -> list[dict[str, Any]]:
    if part is None:
        return []
    if part["type"] == "Sequence":
        inner: list[dict[str, Any]] = part.get("pretokenizers") or part.get("normalizers") or []
        return inner
    return [part]


def _pre(backend: dict[str, Any]) -> str:
    """tokenizer.ggml.pre of a byte-level BPE."""
    split: list[str] = []
    for step in _steps(backend["pre_tokenizer"]):
        if step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
            split.append(step["pattern"].get("Regex", ""))
        elif step["type"] == "Digits" and step["individual_digits"]:
            split.append("digits")
        elif step["type"] == "ByteLevel" and not step["add_prefix_space"]:
            split += ["gpt2"] if step["use_regex"] else []
        else:
            split.append(step["type"])
    pre = _PRE.get((tuple(split), bool(backend["model"]["ignore_merges"])))
    if pre is None:
        raise UserError(
            f"The tokenizer splits text in a way that has no name here: {' then '.join(split)}.",
            _WAY_OUT,
        )
    return pre


def _byte_level_normalizer(part: dict[str, Any] | None) -> Literal["NFC"] | None:
    kinds = [step["type"] for step in _steps(part)]
    if kinds not in ([], ["NFC"]):
        raise UserError(f"The tokenizer normalizes text ({', '.join(kinds)}).", _WAY_OUT)
    return "NFC" if kinds else None


def _merge(pair: str | list[str]) -> str:
    return pair if isinstance(pair, str) else " ".join(pair)


def _special_ids(tokenizer: Any) -> dict[str, int]:
    if tokenizer.eos_token_id is None:
        raise UserError(
            "The tokenizer has no end token: the model would answer without end.",
            "Set eos_token in tokenizer_config.json to the token that ends a turn.",
        )
    ids = {kind: getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad", "unk")}
    ids["eot"] = end_of_turn(tokenizer)
    return {kind: id for kind, id in ids.items() if id is not None}


def end_of_turn(tokenizer: Any) -> int | None:
    """The special token that the chat template puts behind an answer, if it is not eos."""
    if not _template(tokenizer):
        return None
    mark = "an-answer"
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": mark}]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    rest = tokenizer.encode(text.rpartition(mark)[2], add_special_tokens=False)
    # What only opens the next turn is no end: the end follows the answer at once.
    if rest and rest[0] in tokenizer.all_special_ids and rest[0] != tokenizer.eos_token_id:
        return int(rest[0])
    return None


def _added(tokenizer: Any) -> dict[str, bool]:
    ids = tokenizer.encode("a")
    return {
        "add_bos": tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id,
        "add_eos": ids[-1] == tokenizer.eos_token_id,
    }


def _template(tokenizer: Any) -> str | None:
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    return template or None
