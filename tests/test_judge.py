"""The judge against a small server that speaks the real protocol over a real socket."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from finished_run import PAGE, make_improve_run, make_run

from mipo_lite import cli, judge
from mipo_lite.compare import load_comparisons
from mipo_lite.errors import UsageError, UserError
from mipo_lite.judge import Judge, is_local, judge_all, read_letter
from mipo_lite.run import read_jsonl


@contextmanager
def server(
    reply: Callable[[dict[str, Any]], str], status: int = 200, raw: bytes | None = None
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Serves chat completions; yields its address and the bodies it has received."""
    received: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert self.path == "/v1/chat/completions"
            received.append(body)
            message = {"role": "assistant", "content": reply(body)}
            answer = raw or json.dumps({"choices": [{"index": 0, "message": message}]}).encode()
            self.send_response(status)
            if status == 302:
                self.send_header("Location", "http://192.0.2.1/")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *args: object) -> None:
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=running.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{running.server_address[1]}/v1", received
    finally:
        running.shutdown()
        running.server_close()


def prefers_quibbix(body: dict[str, Any]) -> str:
    text = body["messages"][-1]["content"]
    return "A" if text.index("Quibbix") < text.index("Answer B") else "B"


def test_a_judge_that_knows_wins_in_both_orders(tmp_path) -> None:
    run = make_run(tmp_path / "run")
    with server(prefers_quibbix) as (url, received):
        result = judge_all(Judge(url, "m"), load_comparisons(run))
    assert (result.wins, result.losses, result.ties) == (6, 0, 0)
    assert len(received) == 12
    assert received[0]["model"] == "m" and received[0]["temperature"] == 0
    assert PAGE in received[0]["messages"][0]["content"]


@pytest.mark.parametrize("letter", ["A", "B", "T", "I can not say."])
def test_a_judge_that_looks_only_at_the_position_ties(tmp_path, letter: str) -> None:
    run = make_run(tmp_path / "run")
    with server(lambda body: letter) as (url, _):
        result = judge_all(Judge(url), load_comparisons(run))
    assert (result.wins, result.losses, result.ties) == (0, 0, 6)
    assert result.rate == 0.5


def test_judging_goes_on_where_it_stopped(tmp_path) -> None:
    run = make_run(tmp_path / "run")
    count = 0

    def breaks_down(body: dict[str, Any]) -> str:
        nonlocal count
        count += 1
        if count == 5:
            raise ConnectionError
        return prefers_quibbix(body)

    with server(breaks_down) as (url, received):
        with pytest.raises(UserError, match="No server answers"):
            judge_all(Judge(url, "m"), load_comparisons(run))
        assert len(read_jsonl(run / "judgements.jsonl")) == 2
        received.clear()
        assert judge_all(Judge(url, "m"), load_comparisons(run)).wins == 6
        assert len(received) == 8


def test_another_server_is_asked_anew(tmp_path) -> None:
    run = make_run(tmp_path / "run")
    for _ in range(2):
        with server(prefers_quibbix) as (url, received):
            judge_all(Judge(url), load_comparisons(run))
        assert len(received) == 12


@pytest.mark.parametrize(
    ("reply", "letter"),
    [
        ("A", "A"),
        ("**B**", "B"),
        ("Better: T", "T"),
        ("Answer B is better.", "B"),
        ("<think>A is fine, or is it</think>\n\nB", "B"),
        ("<think>A", None),
        ("Both are good.", None),
        ("", None),
    ],
)
def test_read_letter(reply: str, letter: str | None) -> None:
    assert read_letter(reply) == letter


@pytest.mark.parametrize(
    "url",
    ["http://192.0.2.1:8080/v1", "https://8.8.8.8/v1", "http://10.0.0.7/v1", "http://0.0.0.0"],
)
def test_another_machine_is_refused_unless_told(url: str) -> None:
    with pytest.raises(UsageError, match="is not this machine"):
        Judge(url)
    Judge(url, allow_remote=True)


@pytest.mark.parametrize("url", ["file:///etc/passwd", "127.0.0.1:8080", "", "ftp://127.0.0.1/v1"])
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(UsageError, match="is not an address"):
        Judge(url, allow_remote=True)


def test_local_names() -> None:
    assert is_local("127.0.0.1") and is_local("localhost") and is_local("::1")
    assert not is_local("no-such-host.invalid")


def test_nothing_is_sent_elsewhere_by_a_redirect() -> None:
    with server(lambda body: "A", status=302) as (url, _), pytest.raises(UserError) as error:
        Judge(url).ask(PAGE, "Hi", "a", "b")
    assert "status 302" in error.value.what


@pytest.mark.parametrize("raw", [b"<html>", b"[]", b'{"choices": []}', b'{"choices": [{}]}'])
def test_a_server_of_another_kind(raw: bytes) -> None:
    with server(lambda body: "", raw=raw) as (url, _), pytest.raises(UserError) as error:
        Judge(url).ask(PAGE, "Hi", "a", "b")
    assert "/v1" in error.value.fix
    assert PAGE not in str(error.value)


def test_nobody_listens() -> None:
    with pytest.raises(UserError, match="No server answers"):
        Judge("http://127.0.0.1:9/v1", timeout=2).ask(PAGE, "Hi", "a", "b")


def command_line(monkeypatch, capsys, *arguments: object) -> tuple[int, str, str]:
    """Exit code, output and errors of `mipo-lite compare ARGUMENTS`."""
    monkeypatch.setattr(sys, "argv", ["mipo-lite", "compare", *map(str, arguments)])
    code = 0
    try:
        cli.main()
    except SystemExit as error:
        code = int(error.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_command_asks_the_model_that_was_named(tmp_path, monkeypatch, capsys) -> None:
    run = make_run(tmp_path / "run")
    with server(prefers_quibbix) as (url, received):
        given = [run.path, "--judge", url, "--judge-model", "qwen"]
        code, output, _ = command_line(monkeypatch, capsys, *given)
        assert code == 0
        command_line(monkeypatch, capsys, run.path, "--judge", url)
    assert "The judge: the trained model was preferred in 100% of 6 comparisons" in output
    assert {body["model"] for body in received[:12]} == {"qwen"}
    # Another model is asked anew.
    assert {body["model"] for body in received[12:]} == {"default"} and len(received) == 24
    assert not (run / "choices.jsonl").exists(), "what a judge says is no choice of the user's"


def test_the_command_sends_the_page_elsewhere_only_when_told(tmp_path, monkeypatch, capsys) -> None:
    run = make_run(tmp_path / "run")
    with server(prefers_quibbix) as (url, received):
        # A name that stands for another machine, as far as the check of addresses knows.
        monkeypatch.setattr(judge, "is_local", lambda host: False)
        code, _, errors = command_line(monkeypatch, capsys, run.path, "--judge", url)
        assert code == 2 and not received
        assert errors == (
            "Error: 127.0.0.1 is not this machine, and the judge would read your page.\n"
            "Use a server on this machine, or say --allow-remote.\n"
        )
        given = [run.path, "--judge", url, "--allow-remote"]
        code, output, _ = command_line(monkeypatch, capsys, *given)
    assert code == 0 and len(received) == 12 and "100%" in output


@pytest.mark.parametrize(
    ("given", "what"),
    [
        (["--judge-model", "m"], "--judge-model and --allow-remote need a judge."),
        (["--allow-remote"], "--judge-model and --allow-remote need a judge."),
        (["--judge", "http://127.0.0.1:9/v1", "--web"], "Either you choose (--web) or the judge"),
        (["--judge", ""], " is not an address."),
    ],
)
def test_flags_that_do_not_go_together(tmp_path, monkeypatch, capsys, given, what) -> None:
    run = make_run(tmp_path / "run")
    code, _, errors = command_line(monkeypatch, capsys, run.path, *given)
    assert code == 2
    assert errors.startswith(f"Error: {what}") and len(errors.splitlines()) == 2


def test_a_run_of_improve_has_nothing_to_choose(tmp_path, monkeypatch, capsys) -> None:
    run = make_improve_run(tmp_path / "sums")
    code, _, errors = command_line(monkeypatch, capsys, run.path)
    assert code == 1
    assert "no matter of taste" in errors and "report.html" in errors
