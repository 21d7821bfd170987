"""Proof, on the file as written, that llama.cpp can load it and encodes text as the model expects.

Every string of a corpus that is known to separate tokenizers is encoded by both sides; a single
difference stops the export. Two things are outside it. llama.cpp does not
normalize unicode: `llama.encode`, and so our chat, does; other programs encode text differently
that is not in normal form already. And what opens a text without a chat around it: see `plain` of
`Vocabulary`.
"""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import UserError
from .llama import encode, is_end, open_gguf, read_back
from .vocabulary import SPACE, Vocabulary

HARD_STRINGS = (
    "Hello, world!",
    " leading and trailing ",
    "two  spaces,   three,    four",
    "\ttab\t\ttwo tabs \t mixed",
    "one\ntwo\n\nthree\n\n\n",
    "windows\r\nlines\r\n\r\nand\rold ones",
    " \n \n\n \t\n x",
    "It's, it'll, we've, I'D, YOU'RE, y'all, 'tis, rock'n'roll, don't",
    "it’s a curly apostrophe’s string",
    "1 12 123 1234 12345 123456 1234567 3.14 1,000,000 -7 1e-5 0xFF",
    "2024-11-23T10:15:00Z room 42b 7up b2b",
    "½ ² ³ ① Ⅷ ٣ ३ 五",
    "def f(x):\n    return x ** 2  # comment\n\n\tif x:\n\t\tpass",
    'for(int i=0;i<10;++i){printf("%d\\n",i);}',
    "<html><body class='a'>&nbsp;</body></html> {{ jinja }} {% if %}",
    "https://example.org/a_b-c?d=e&f=%20#g user@example.org C:\\dir\\file.txt",
    "!!! ... --- ??? ***bold*** __init__ ~~~ ``` $$ @@ ## %% ^^ && (( ))",
    "CamelCase snake_case SCREAMING_CASE kebab-case XMLHttpRequest iPhone",
    "Füße, naïve café, Ærøskøbing, İstanbul, ŁÓDŹ, straße, ÇA",
    "нещо на Български, Привет, мир! ЁЖИК",
    "Καλημέρα κόσμε, ΑΒΓ",
    "我想在apple工作1314151天～ 你好，世界！",
    "日本語のテキスト、カタカナとひらがな。東京都",
    "안녕하세요 세계",
    "สวัสดีชาวโลก កាន់តែពិសេស",
    "مرحبا بالعالم ١٢٣ שלום עולם",
    "नमस्ते दुनिया",
    "🚀 😶‍🌫️ 👩‍👩‍👧‍👦 🇩🇪 👍🏽 ✅ ❤️",
    "x\u00a0y\u2003z\u200bw\u2028v\ufeffu\u00adt",
    "ｆｕｌｌｗｉｄｔｈ １２３",
    "∑ ∫ √2 ≈ 1.414 → ∞ ≤ ≥ ≠ ±",
    "a" * 64 + " " + "=" * 64 + " " * 64 + "end",
    "",
    " ",
    "\n",
    "x",
)


def random_strings(count: int, seed: int = 0) -> list[str]:
    """Strings of random characters from scripts, symbols, spaces and controls, NFC-normalized."""
    rng = random.Random(seed)
    blocks = (
        (0x20, 0x7E),
        (0x20, 0x7E),
        (0xA1, 0x24F),
        (0x300, 0x36F),
        (0x370, 0x52F),
        (0x590, 0x6FF),
        (0x900, 0xDFF),
        (0xE00, 0xEFF),
        (0x1E00, 0x1FFF),
        (0x2000, 0x2BFF),
        (0x3000, 0x30FF),
        (0x4E00, 0x9FFF),
        (0xAC00, 0xD7A3),
        (0xFF00, 0xFFEF),
        (0x1F300, 0x1FAFF),
    )
    spaces = " \n\t\r\u00a0\u2003\u3000"

    def character() -> str:
        if rng.random() < 0.2:
            return rng.choice(spaces)
        return chr(rng.randint(*rng.choice(blocks)))

    def string() -> str:
        text = "".join(character() for _ in range(rng.randint(1, 24)))
        # Characters that no Unicode version has assigned are split by the tables of whoever asks.
        known = "".join(c for c in text if unicodedata.category(c) != "Cn")
        return unicodedata.normalize("NFC", known)

    return [string() for _ in range(count)]


def prove_loads(path: Path, expected: tuple[str, int]) -> None:
    """Raise UserError unless llama.cpp finds the whole model in the file.

    Args:
        expected: architecture and number of parameters, as `llama.read_back` gives them.
    """
    found = read_back(path)
    if found != expected:
        raise UserError(
            f"llama.cpp finds {found[1]:,} parameters of {found[0]} in {path.name} instead of "
            f"{expected[1]:,} of {expected[0]}.",
            "Please report the model's name.",
        )


def prove_tokenizer(
    path: Path | str,
    tokenizer: Any,
    vocabulary: Vocabulary,
    strings: Iterable[str] | None = None,
) -> int:
    """Compare both tokenizers on `strings`, alone and inside a rendered chat.

    Args:
        path: the GGUF file; only its vocabulary is loaded.
        strings: by default `HARD_STRINGS` and 200 random ones.

    Returns:
        The number of strings that were compared.

    Raises:
        UserError: the first difference, or an end token at which llama.cpp would not stop.
    """
    strings = [*HARD_STRINGS, *random_strings(200)] if strings is None else list(strings)
    cases = _chats(tokenizer, strings) if vocabulary.chat_template else []
    if vocabulary.plain != "none":
        cases += [s for s in strings if vocabulary.plain == "all" or s[:1] not in (" ", SPACE)]
    with open_gguf(path, vocab_only=True) as llama:
        for text in cases:
            ours = tokenizer.encode(text, add_special_tokens=False)
            theirs = encode(llama, text)
            if ours != theirs:
                raise UserError(
                    f"llama.cpp would encode {text!r} as {theirs}, the model was trained on "
                    f"{ours} (pre-tokenizer {vocabulary.pre}).",
                    "Do not use this file; please report the model's name, so that its tokenizer "
                    "can be added.",
                )
        for kind in ("eos", "eot"):
            token = vocabulary.special.get(kind)
            if token is not None and not is_end(llama, token):
                raise UserError(
                    f"llama.cpp would not stop at the model's {kind} token {token}.",
                    "Please report the model's name.",
                )
    return len(cases)


def _chats(tokenizer: Any, strings: list[str]) -> list[str]:
    """Each string as the answer in a chat: templates keep answers as they are, or strip them."""
    mark = "an-answer"
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": mark}]
    before, _, after = tokenizer.apply_chat_template(turns, tokenize=False).rpartition(mark)
    return [before + text + after for text in strings]
