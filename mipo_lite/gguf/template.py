"""The chat template inside a GGUF file, rendered without transformers.

`ChatTemplate` has the one method of a tokenizer that `contexts` asks for, so that a chat builds its
messages exactly as training did.
"""

from __future__ import annotations

from typing import Any

from llama_cpp import Llama
from llama_cpp.llama_chat_format import Jinja2ChatFormatter

from ..errors import UserError


class ChatTemplate:
    """Renders messages with the template that the file carries."""

    def __init__(self, llama: Llama) -> None:
        """Raises UserError when the file has none."""
        source = llama.metadata.get("tokenizer.chat_template")
        if not source:
            raise UserError(
                "The GGUF file has no chat template.",
                "Export it from a model directory that has one (chat_template.jinja).",
            )
        bos, eos = (_text(llama, token) for token in (llama.token_bos(), llama.token_eos()))
        self._render = {
            prompt: Jinja2ChatFormatter(
                source, eos_token=eos, bos_token=bos, add_generation_prompt=prompt
            )
            for prompt in (False, True)
        }

    def apply_chat_template(
        self, messages: list[dict[str, str]], *, tokenize: bool = False, answer: bool = False
    ) -> str:
        """The text of a chat.

        Args:
            tokenize: only False is offered; the keyword is there for callers of tokenizers.
            answer: end where the assistant's answer begins.
        """
        assert not tokenize
        copy: list[Any] = [dict(message) for message in messages]
        rendered = self._render[answer](messages=copy, enable_thinking=False)
        return str(rendered.prompt)


def _text(llama: Llama, token: int) -> str:
    return str(llama._model.token_get_text(token)) if token >= 0 else ""
