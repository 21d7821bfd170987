"""An Ollama Modelfile for an exported GGUF, and the lines that start llama.cpp's programs with it.

Ollama does not read the Jinja template of the file, so a Go template is derived: the chat template
is rendered for a few turns and taken apart at the contents. A template that is not made of such
parts is left out, and the Modelfile says so.

With a context the Modelfile holds private text: it belongs into the run directory and nowhere else.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..run import atomic_write
from .vocabulary import Vocabulary

_S, _U, _A, _V = "a-system-text", "a-first-question", "an-answer", "a-second-question"
Around = tuple[str, str]


@dataclass(frozen=True)
class Parts:
    """The text around the contents of a chat.

    Attributes:
        begin: before everything.
        default: stands in place of a system message when there is none (Qwen2.5 has one).
        system: before and after the system message; None when the template has no such role.
        inside: the system message lies inside the first user turn, so `system[0]` is the start of
            that turn (Gemma).
        user, assistant: before and after the content.
        open: lets the assistant answer.
    """

    begin: str
    default: str
    system: Around | None
    inside: bool
    user: Around
    assistant: Around
    open: str

    def render(self, messages: list[dict[str, str]]) -> str:
        """The messages as a prompt for the next answer."""
        has_system = messages[0]["role"] == "system"
        text = self.begin + ("" if has_system else self.default)
        for i, message in enumerate(messages):
            before, after = getattr(self, message["role"])
            opened = self.inside and has_system and i == 1
            text += ("" if opened else before) + message["content"] + after
        return text + self.open

    def as_go(self) -> str:
        """The same as a template of Ollama."""
        user = "{{ .Content }}".join(self.user)
        text = self.begin
        turns = ""
        if self.system and self.inside:
            text += "{{ $opened := false }}"
            turns = '{{ if eq .Role "system" }}' + "{{ .Content }}".join(self.system)
            turns += "{{ $opened = true }}{{ else "
            start, end = self.user
            user = "{{ if not $opened }}" + start + "{{ end }}{{ $opened = false }}{{ .Content }}"
            user += end
        elif self.system:
            text += "{{ if .System }}" + "{{ .System }}".join(self.system)
            text += ("{{ else }}" + self.default if self.default else "") + "{{ end }}"
        else:
            text += self.default
        text += "{{ range .Messages }}" + (turns or "{{ ")
        text += 'if eq .Role "user" }}' + user
        text += '{{ else if eq .Role "assistant" }}' + "{{ .Content }}".join(self.assistant)
        return text + "{{ end }}{{ end }}" + self.open


def take_apart(tokenizer: Any) -> Parts | None:
    """The parts of a tokenizer's chat template; None when it is not made of such parts."""

    def render(*turns: tuple[str, str], answer: bool = False) -> str:
        messages = [{"role": role, "content": text} for role, text in turns]
        text: str = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=answer, enable_thinking=False
        )
        return text

    try:
        head, user_end = _split(render(("user", _U)), _U)
        opened = render(("user", _U), answer=True).removeprefix(head + _U + user_end)
        two = render(("user", _U), ("assistant", _A), ("user", _V))
        _, to_answer, to_question, _ = _split(two, _U, _A, _V)
        answer_end = _split(render(("user", _U), ("assistant", _A)), _A)[1]
        user = (to_question.removeprefix(answer_end), user_end)
        assistant = (to_answer.removeprefix(user_end), answer_end)
        begin = head.removesuffix(user[0])
        parts = Parts(begin, "", None, False, user, assistant, opened)
        # Some templates treat the last turn differently: then there is no such thing as a part.
        if parts.render(_chat("user", "assistant", "user")) != two + opened:
            return None
    except Exception:  # templates refuse with jinja's own error types
        return None
    try:
        before, between, _ = _split(render(("system", _S), ("user", _U)), _S, _U)
    except Exception:
        return parts
    inside = before == begin + user[0]
    default = "" if before.startswith(begin) else begin
    system = (before.removeprefix(begin), between if inside else between.removesuffix(user[0]))
    return Parts(begin if not default else "", default, system, inside, user, assistant, opened)


def write_modelfile(
    path: Path,
    gguf_name: str,
    tokenizer: Any,
    vocabulary: Vocabulary,
    *,
    context: str | None = None,
    window: int,
) -> None:
    """Write the Modelfile, mode 0600.

    Args:
        gguf_name: name of the GGUF file in the same directory.
        context: the user's page, as system message.
        window: num_ctx, tokens.
    """
    lines = [f"FROM ./{gguf_name}", f"PARAMETER num_ctx {window}"]
    parts = take_apart(tokenizer) if vocabulary.chat_template else None
    template = _without_bos(parts, vocabulary).as_go() if parts else ""
    if template and '"""' not in template:
        lines.append(f'TEMPLATE """{template}"""')
    else:
        lines.append("# The chat template can not be said in Ollama's language: write a TEMPLATE.")
    for kind in ("eos", "eot"):
        if kind in vocabulary.special:
            lines.append(f'PARAMETER stop "{vocabulary.tokens[vocabulary.special[kind]]}"')
    if context:
        # The format has no escape for its own quotes.
        lines.append('SYSTEM """' + context.replace('"""', "'''") + '"""')
    with atomic_write(path) as partial:
        partial.write_text("\n".join(lines) + "\n", "utf-8")


def start_lines(gguf: Path) -> list[str]:
    """The commands that start the file in Ollama and llama.cpp."""
    file = shlex.quote(str(gguf))
    return [
        f"ollama create {gguf.stem.lower()} -f {shlex.quote(str(gguf.with_name('Modelfile')))}",
        f"llama-server -m {file} --jinja",
        f"llama-cli -m {file} --jinja -cnv",
    ]


def _without_bos(parts: Parts, vocabulary: Vocabulary) -> Parts:
    """llama.cpp puts bos in front by itself where the file says so."""
    if not vocabulary.add_bos:
        return parts
    bos = vocabulary.tokens[vocabulary.special["bos"]]
    values = dict(vars(parts), begin=parts.begin.removeprefix(bos))
    if parts.default:
        values["default"] = parts.default.removeprefix(bos)
        if parts.system:
            values["system"] = (parts.system[0].removeprefix(bos), parts.system[1])
    return Parts(**values)


def _chat(*roles: str) -> list[dict[str, str]]:
    texts = iter((_U, _A, _V))
    return [{"role": role, "content": next(texts)} for role in roles]


def _split(text: str, *marks: str) -> list[str]:
    pieces = []
    for mark in marks:
        before, found, text = text.partition(mark)
        if not found:
            raise ValueError(f"{mark} is not in the rendered chat")
        pieces.append(before)
    return [*pieces, text]
