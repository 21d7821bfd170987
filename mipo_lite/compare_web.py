"""The blind test as a page in the browser: this machine only, behind a token.

Listens on 127.0.0.1 at a free port. Every address carries a random token, so that another user of
the machine, or another site open in the browser, can neither read the answers nor choose. Plain
forms, no script, nothing loaded from anywhere.
"""

from __future__ import annotations

import hmac
import secrets
import threading
from collections.abc import Callable
from html import escape
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

from .compare import Choice, Comparison, Comparisons

_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; form-action 'self'; "
    "img-src data:; base-uri 'none'; frame-ancestors 'none'"
)
_LARGEST_FORM = 4096  # bytes; ours are below 100


class CompareServer:
    """Serves the comparisons until they are all judged or `stop` is called.

    Attributes:
        url: what to open; it holds the token.
    """

    def __init__(self, comparisons: Comparisons) -> None:
        self.comparisons = comparisons
        self.token = secrets.token_urlsafe(24)
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self.host = f"127.0.0.1:{self._server.server_address[1]}"
        self.url = f"http://{self.host}/{self.token}/"

    def serve(self, ready: Callable[[str], None] = lambda url: None) -> None:
        """Serve until `stop`, or until the last comparison is judged and seen."""
        ready(self.url)
        try:
            self._server.serve_forever(poll_interval=0.2)
        finally:
            self._server.server_close()

    def stop(self) -> None:
        # From a thread of its own: shutdown waits for the loop that may be handling this request.
        threading.Thread(target=self._server.shutdown, daemon=True).start()

    def choose(self, name: str, given: str) -> None:
        """Record what a form said; anything that is no open comparison changes nothing."""
        with self._lock:
            found = [c for c in self.comparisons.open if c.id == name]
            if not found or given not in ("1", "2", "tie"):
                return
            choice: Choice = "tie" if given == "tie" else found[0].reveal(int(given) - 1)
            self.comparisons.choose(found[0], choice)

    def page(self) -> str:
        with self._lock:
            left = self.comparisons.open
            total = len(self.comparisons.all)
            if not left:
                return _frame(_result(self.comparisons))
            return _frame(_question(left[0], total - len(left) + 1, total))


def _handler(server: CompareServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        server_version = "mipo-lite"
        sys_version = ""
        timeout = 30

        def do_GET(self) -> None:
            if not self._allowed():
                return
            self._send(200, server.page())
            if not server.comparisons.open:
                server.stop()

        def do_POST(self) -> None:
            if not self._allowed():
                return
            length = self.headers.get("Content-Length", "")
            if not length.isdecimal() or int(length) > _LARGEST_FORM:
                self._send(400, _frame("<p>Not a form of this page.</p>"))
                return
            form = parse_qs(self.rfile.read(int(length)).decode("utf-8", "replace"))
            server.choose(form.get("id", [""])[0], form.get("choice", [""])[0])
            self.send_response(303)  # so that reloading the page does not choose again
            self.send_header("Location", f"/{server.token}/")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def _allowed(self) -> bool:
            """The right token, and a name of this machine: no other site may be behind it."""
            token = urlsplit(self.path).path.strip("/")
            right = hmac.compare_digest(token.encode(), server.token.encode())
            if right and self.headers.get("Host") == server.host:
                return True
            self._send(404, _frame("<p>Nothing here.</p>"))
            return False

        def _send(self, status: int, html: str) -> None:
            body = html.encode("utf-8")
            self.send_response(status)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Content-Security-Policy", _POLICY)
            self.send_header("Cache-Control", "no-store")
            self.send_header("Referrer-Policy", "no-referrer")
            self.send_header("X-Content-Type-Options", "nosniff")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing: the address holds the token."""

    return Handler


def _question(comparison: Comparison, number: int, total: int) -> str:
    answers = "".join(
        f'<button name="choice" value="{i}"><span>{escape(text) or "(an empty answer)"}</span>'
        f"<small>{i} is better</small></button>"
        for i, text in enumerate(comparison.shown, start=1)
    )
    return (
        f'<p class="soft">{number} of {total}</p><h1>{escape(comparison.prompt)}</h1>'
        f'<form method="post"><input type="hidden" name="id" value="{comparison.id}">'
        f'<div class="answers">{answers}</div>'
        '<button class="tie" name="choice" value="tie">Neither is better</button></form>'
        '<p class="soft">You may stop at any time: what you chose is kept.</p>'
    )


def _result(comparisons: Comparisons) -> str:
    result = comparisons.win_rate()
    text = str(result)
    return (
        f"<h1>{'Thank you' if result.n else 'Nothing to judge'}</h1>"
        f"<p>{escape(text[0].upper() + text[1:])}.</p>"
        '<p class="soft">You can close this page.</p>'
    )


def _frame(body: str) -> str:
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Which is better?</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">
<style>{_STYLE}</style></head><body><main>{body}</main></body></html>
"""


_STYLE = """
:root { --paper: #fbfaf7; --card: #fff; --ink: #1d2430; --soft: #5b6472; --line: #d9d6cd;
  --accent: #2461a8; }
@media (prefers-color-scheme: dark) { :root { --paper: #15181d; --card: #1d2127; --ink: #e6e8eb;
  --soft: #a0a8b3; --line: #3a414b; --accent: #79b0ee; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 17px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 56rem; margin: 0 auto; padding: 2rem 1rem; }
h1 { font-size: 1.3rem; overflow-wrap: anywhere; }
.soft, small { color: var(--soft); font-size: .9rem; }
.answers { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem; margin: 1rem 0; }
button { font: inherit; color: inherit; text-align: left; background: var(--card);
  border: 1px solid var(--line); border-radius: .6rem; padding: 1rem; cursor: pointer; }
button:hover, button:focus-visible { border-color: var(--accent); outline: none; }
button span { display: block; white-space: pre-wrap; overflow-wrap: anywhere;
  margin-bottom: .8rem; }
.tie { width: 100%; text-align: center; }
@media (max-width: 40rem) { .answers { grid-template-columns: 1fr; } }
"""
