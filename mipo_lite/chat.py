"""Talk to a GGUF file in llama.cpp, streaming, with the user's context as system message.

The chat template comes from the file and the messages are built as for training, so what is heard
here is what was trained. Nothing that is said is stored. Neither torch nor transformers is loaded,
which takes seconds: only the base's GGUF, made when `--plain` first asks for it, needs them.
"""

from __future__ import annotations

import codecs
import glob
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from .console import console, progress
from .contexts import Messages, build_messages, has_system_role
from .errors import UserError
from .gguf.llama import ON_GPU, encode, has_gpu, is_end, open_gguf
from .gguf.template import ChatTemplate
from .gguf.window import TALK, USUAL, chat_window
from .run import Run

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
        self._positions = int(llama._model.n_ctx_train())
        self._window = min(llama.n_ctx(), self._positions)
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
                    self._more_room(),
                )
            del self.turns[:2]

    def _more_room(self) -> str:
        shorter = "Shorten the message or the context"
        if self._window == self._positions:
            return f"{shorter}."
        return f"{shorter}, or give more with --window, up to {self._positions}."

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
    window: int | None = None,
    out: TextIO | None = None,
) -> None:
    """Chat in the terminal until /exit, Ctrl-D or Ctrl-C; Ctrl-C in an answer stops the answer.

    Args:
        context: the user's page, as system message (or in the first user turn where the template
            has no system role).
        message: answer this one message and return.
        plain: the file is the base, which is said in the greeting.
        temperature: 0 is greedy.
        window: tokens of context; by default what `chat_window` says. No more is used than the
            model was trained for.
        out: where to write; standard output by default.

    Raises:
        UserError: the file can not be loaded or has no chat template.
    """
    out = out or sys.stdout
    with ExitStack() as stack:
        llama, on_gpu = _open(stack, gguf_path, window or _window(gguf_path, context))
        talk = Conversation(llama, context=context, temperature=temperature, seed=seed)
        if message is not None:
            _say(talk, message, out)
            return
        who = "the base, before training" if plain else Path(gguf_path).name
        where = " on the GPU" if on_gpu else ""
        keys = "/exit or Ctrl-D ends, Ctrl-C stops an answer."
        print(f"Chatting with {who}{where}. {keys}", file=out)
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


def _window(path: Path | str, context: str | None) -> int:
    # A token is at least a byte: most pages need not be counted.
    if len((context or "").encode()) + TALK <= USUAL:
        return USUAL
    with open_gguf(path, vocab_only=True) as llama:
        page = len(encode(llama, context or ""))
        kind = llama.metadata["general.architecture"]
        return chat_window(page, int(llama.metadata[f"{kind}.context_length"]))


def _open(stack: ExitStack, path: Path | str, window: int) -> tuple[Llama, bool]:
    """The model, on the GPU where it fits; and whether it is there."""
    if has_gpu():
        try:
            return stack.enter_context(open_gguf(path, n_ctx=window, **ON_GPU)), True
        except UserError:
            pass  # most likely its memory: the CPU says it again if it is the file
    return stack.enter_context(open_gguf(path, n_ctx=window)), False


def _say(talk: Conversation, text: str, out: TextIO) -> None:
    for piece in talk.answer(text):
        out.write(piece)
        out.flush()
    print(file=out)


def chat_model(
    model: Path,
    *,
    message: str | None,
    plain: bool,
    temperature: float,
    seed: int,
    window: int | None = None,
) -> None:
    """Talk to a run's GGUF (with the user's page as system message) or to any GGUF file.

    Raises UserError when there is no GGUF to talk to.
    """
    page = None
    file = model
    if model.is_dir():
        run = Run(model)
        page = run.page
        file = _plain_gguf(run) if plain else _best_gguf(run)
        if not plain and run.meta["stages"].get("export", {}).get("state") == "stale":
            console.print(
                "[yellow]This file is older than the adapter; the command that started the run "
                "renews it.[/]"
            )
    chat(
        file,
        context=page,
        message=message,
        plain=plain,
        temperature=temperature,
        seed=seed,
        window=window,
    )


def gguf_files(run: Run) -> list[Path]:
    """The models of a run as GGUF, without the adapter alone: first what its recipe asks for."""
    wanted = [kind.upper() for kind in run.meta["recipe"]["quants"]]

    def rank(file: Path) -> tuple[int, str]:
        kind = file.stem.removeprefix(f"{run.name}-")
        return (wanted.index(kind) if kind in wanted else len(wanted)), kind

    files = (run / "gguf").glob(f"{glob.escape(run.name)}-*.gguf")
    return sorted((file for file in files if not file.stem.endswith("-lora")), key=rank)


def _best_gguf(run: Run) -> Path:
    files = gguf_files(run)
    if not files:
        raise UserError(
            f"{run.path} holds no GGUF file yet.",
            "Finish the run: the command that started it goes on where it stopped.",
        )
    return files[0]


def _plain_gguf(run: Run) -> Path:
    """The base without the adapter as GGUF, made when first asked for."""
    directory = run / "gguf" / "base"
    file = directory / "base-Q4_K_M.gguf"
    if not file.is_file():
        from .bases import recorded_source
        from .gguf import export_model

        base = recorded_source(run.meta["base"]).path
        export_model(base, directory, "base", modelfile=False, progress=progress)
    return file
