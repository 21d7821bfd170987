"""Talk to a GGUF file in llama.cpp, streaming, with the user's context as system message.

The chat template comes from the file and the messages are built as for training, so what is heard
here is what was trained. Nothing that is said is stored.
"""

from __future__ import annotations

import codecs
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from .contexts import Messages, build_messages, has_system_role
from .errors import UserError
from .gguf.llama import encode, is_end, open_gguf
from .gguf.template import ChatTemplate

if TYPE_CHECKING:
    from llama_cpp import Llama

LEAVE = ("/exit", "/quit")
ROOM = 256  # tokens of the window that are kept free for an answer


class Conversation:
    """A chat with one open model: remembers its turns, forgets the oldest when they do not fit.

    Attributes:
        turns: user and assistant messages so far; the context is not among them.
    """

    def __init__(
        self,
        llama: Llama,
        *,
        context: str | None = None,
        temperature: float = 0.7,
        seed: int = 0,
    ) -> None:
        self.turns: Messages = []
        self._llama = llama
        self._template = ChatTemplate(llama)
        self._context = context
        self._has_system = context is not None and has_system_role(self._template)
        self._temperature = temperature
        self._window = min(llama.n_ctx(), int(llama._model.n_ctx_train()))
        llama.set_seed(seed)

    def answer(self, text: str) -> Iterator[str]:
        """Pieces of the answer to `text`, as they are sampled.

        The turn is remembered however the iteration ends, with the answer as far as it got.

        Raises:
            UserError: not even this one message fits into the window.
        """
        self.turns.append({"role": "user", "content": text})
        prompt = self._prompt()
        pieces: list[str] = []
        try:
            for piece in self._sample(prompt):
                pieces.append(piece)
                yield piece
        finally:
            self.turns.append({"role": "assistant", "content": "".join(pieces).strip()})

    def _prompt(self) -> list[int]:
        while True:
            first, *later = self.turns
            messages = build_messages(first["content"], self._context, self._has_system) + later
            text = self._template.apply_chat_template(messages, answer=True)
            tokens = encode(self._llama, text)
            if len(tokens) <= self._window - min(ROOM, self._window // 4):
                return tokens
            if len(self.turns) == 1:
                self.turns.clear()
                raise UserError(
                    f"Context and message are {len(tokens)} tokens, too many for the window of "
                    f"{self._window}.",
                    "Shorten the message or the context.",
                )
            del self.turns[:2]

    def _sample(self, prompt: list[int]) -> Iterator[str]:
        # A character may be spread over several tokens.
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        room = self._window - len(prompt)
        tokens = self._llama.generate(
            prompt, temp=self._temperature, top_k=0, top_p=1.0, min_p=0.0, repeat_penalty=1.0
        )
        for _, token in zip(range(room), tokens, strict=False):
            if is_end(self._llama, token):
                break
            piece = decoder.decode(self._llama.detokenize([token]))
            if piece:
                yield piece
        if rest := decoder.decode(b"", final=True):
            yield rest


def chat(
    gguf_path: Path | str,
    *,
    context: str | None = None,
    message: str | None = None,
    plain: bool = False,
    temperature: float = 0.7,
    seed: int = 0,
    window: int = 4096,
    out: TextIO | None = None,
) -> None:
    """Chat in the terminal until /exit, Ctrl-D or Ctrl-C; Ctrl-C in an answer stops the answer.

    Args:
        context: the user's page, as system message (or in the first user turn where the template
            has no system role).
        message: answer this one message and return.
        plain: the file is the base, which is said in the greeting.
        temperature: 0 is greedy.
        window: tokens of context, at most what the model was trained for.
        out: where to write; standard output by default.

    Raises:
        UserError: the file can not be loaded or has no chat template.
    """
    out = out or sys.stdout
    with open_gguf(gguf_path, n_ctx=window) as llama:
        talk = Conversation(llama, context=context, temperature=temperature, seed=seed)
        if message is not None:
            _say(talk, message, out)
            return
        who = "the base, before training" if plain else Path(gguf_path).name
        print(f"Chatting with {who}. /exit or Ctrl-D ends, Ctrl-C stops an answer.", file=out)
        while True:
            try:
                text = input("> ").strip()
            except (EOFError, KeyboardInterrupt):
                print(file=out)
                return
            if text in LEAVE:
                return
            if not text:
                continue
            try:
                _say(talk, text, out)
            except KeyboardInterrupt:
                print(" [stopped]", file=out)
            except UserError as error:
                print(f"{error.what} {error.fix}", file=out)


def _say(talk: Conversation, text: str, out: TextIO) -> None:
    for piece in talk.answer(text):
        out.write(piece)
        out.flush()
    print(file=out)
