"""An optional judge: a language model that the user runs compares the answers pairwise.

Speaks the chat-completions protocol of OpenAI, as the servers of llama.cpp, Ollama and vLLM do.
Every pair is asked in both orders, since judges favour a position (Zheng et al. 2023, arXiv
2306.05685, section 3.3); it counts as won only if both say so, else as a tie. The judge reads the
user's page, so an address that is not this machine is refused unless the user insists.
"""

from __future__ import annotations

import ipaddress
import json
import re
import socket
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any, Literal
from urllib.parse import urlsplit

from .compare import Choice, Comparison, Comparisons, WinRate
from .errors import UsageError, UserError
from .run import append_jsonl, read_json, read_jsonl

JUDGEMENTS_FILE = "judgements.jsonl"
DEFAULT_MODEL = "default"  # what a server of one model is asked for
LONGEST_ANSWER = 1_000_000  # bytes; a verdict is one letter

_INSTRUCTION = """\
You compare two answers that an assistant gave to the same request of the same user. The user has \
told the assistant this about themselves:

{page}

Which answer serves this user better? It should answer the request, use what is known about the \
user where that helps and leave it out where it does not, and state nothing false about them. \
Length alone is no merit. Reply with one letter: A, B, or T when neither is better."""

_REQUEST = "Request: {prompt}\n\nAnswer A: {first}\n\nAnswer B: {second}\n\nBetter (A, B or T):"

Letter = Literal["A", "B", "T"]


class Judge:
    """A chat-completions server that is asked for verdicts.

    Args:
        url: the API's root, for example http://127.0.0.1:8080/v1.
        model: the name that the server knows the model by; any, where it serves only one.
        allow_remote: send the user's page to another machine.

    Raises UsageError for an address that is none, or not this machine's without `allow_remote`.
    """

    def __init__(
        self,
        url: str,
        model: str = DEFAULT_MODEL,
        *,
        allow_remote: bool = False,
        timeout: float = 120,
    ) -> None:
        check_address(url, allow_remote)
        self.url = url.rstrip("/") + "/chat/completions"
        self.model = model
        self.timeout = timeout
        # No proxy and no redirect: the page goes where the user said, and nowhere else.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirect())

    def ask(self, page: str, prompt: str, first: str, second: str) -> Letter | None:
        """Which of two answers is better, or None when the reply holds no verdict.

        Raises UserError when the server can not be reached or does not speak the protocol.
        """
        system = _INSTRUCTION.format(page=page)
        user = _REQUEST.format(prompt=prompt, first=first, second=second)
        body = {
            "model": self.model,
            "messages": [
                {"role": "system", "content": system},
                {"role": "user", "content": user},
            ],
            "temperature": 0,
            "max_tokens": 1024,  # room for a model that thinks first
        }
        reply = self._post(body)
        try:
            return read_letter(reply["choices"][0]["message"]["content"])
        except (KeyError, IndexError, TypeError) as error:
            raise UserError(
                f"{self.url} does not answer like a chat-completions server.",
                "Give the root of an OpenAI-compatible API; it usually ends in /v1.",
            ) from error

    def _post(self, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(
            self.url,
            data=json.dumps(body).encode("utf-8"),
            headers={"Content-Type": "application/json"},
        )
        try:
            with self._opener.open(request, timeout=self.timeout) as response:
                return json.loads(response.read(LONGEST_ANSWER))
        except urllib.error.HTTPError as error:
            raise UserError(
                f"{self.url} answered with status {error.code}.",
                "Check the address and the model's name; the server's log says more.",
            ) from error
        except (OSError, TimeoutError) as error:
            raise UserError(
                f"No server answers at {self.url}.",
                "Start one, for example `llama-server -m MODEL.gguf`, and give its address.",
            ) from error
        except ValueError as error:
            raise UserError(
                f"{self.url} answers with something that is not JSON.",
                "Give the root of an OpenAI-compatible API; it usually ends in /v1.",
            ) from error


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def check_address(url: str, allow_remote: bool) -> None:
    """Raises UsageError unless `url` is HTTP and, without `allow_remote`, of this machine."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UsageError(f"{url} is not an address.", "For example: http://127.0.0.1:8080/v1")
    if not allow_remote and not is_local(parts.hostname):
        raise UsageError(
            f"{parts.hostname} is not this machine, and the judge would read your page.",
            "Use a server on this machine, or say --allow-remote.",
        )


def is_local(host: str) -> bool:
    """Whether every address of `host` is a loopback address."""
    try:
        found = socket.getaddrinfo(host, None)
    except OSError:
        return False
    addresses = {str(entry[4][0]).partition("%")[0] for entry in found}
    return bool(addresses) and all(ipaddress.ip_address(a).is_loopback for a in addresses)


def read_letter(reply: str) -> Letter | None:
    """The verdict in a judge's reply: the first lone A, B or T."""
    # Thinking models say much before they answer.
    answer = re.sub(r"<think>.*?(</think>|$)", "", reply, flags=re.S)
    found = re.search(r"(?<![A-Za-z'’])([ABT])(?![A-Za-z'’])", answer)
    return found[1] if found else None  # type: ignore[return-value]


def both_orders(judge: Judge, page: str, comparison: Comparison) -> tuple[Choice, list[str | None]]:
    """The verdict on one comparison, and the two letters it comes from.

    A win needs both orders to agree; disagreement, a tie or no verdict is a tie.
    """
    before, after = comparison.before["text"], comparison.after["text"]
    letters = [
        judge.ask(page, comparison.prompt, before, after),
        judge.ask(page, comparison.prompt, after, before),
    ]
    if letters == ["B", "A"]:
        return "after", list(letters)
    if letters == ["A", "B"]:
        return "before", list(letters)
    return "tie", list(letters)


def judge_all(
    judge: Judge, comparisons: Comparisons, advance: Callable[[int], None] = lambda n: None
) -> WinRate:
    """Judge what this model has not judged yet, append to judgements.jsonl, and count."""
    run = comparisons.run
    page = read_json(run / "context.json")["text"]
    file = run / JUDGEMENTS_FILE
    server = {"url": judge.url, "model": judge.model}
    done = {row["id"]: row for row in read_jsonl(file) if server.items() <= row.items()}
    for comparison in comparisons.all:
        if comparison.id not in done:
            choice, letters = both_orders(judge, page, comparison)
            row = {"id": comparison.id, **server, "choice": choice, "letters": letters}
            append_jsonl(file, [row])
            done[comparison.id] = row
        advance(1)
    chosen = [done[comparison.id]["choice"] for comparison in comparisons.all]
    return WinRate(chosen.count("after"), chosen.count("before"), chosen.count("tie"))
