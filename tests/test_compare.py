"""The blind test: blind, resumable, and on the web for this machine only."""

from __future__ import annotations

import http.client
import json
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from types import SimpleNamespace
from urllib.parse import urlencode, urlsplit

import pytest
from finished_run import PAGE, make_run

from mipo_lite import compare
from mipo_lite.compare import (
    WinRate,
    choice_pairs,
    compare_in_terminal,
    judged_prompts,
    load_comparisons,
    read_prompts,
)
from mipo_lite.compare_web import CompareServer
from mipo_lite.errors import UserError
from mipo_lite.run import Run, append_jsonl, read_jsonl

CHROMEDRIVER = shutil.which("chromedriver")


@pytest.fixture
def run(tmp_path) -> Run:
    return make_run(tmp_path / "run")


def test_order_is_random_but_stays(run: Run) -> None:
    first, again = load_comparisons(run), load_comparisons(run)
    assert [c.id for c in first.all] == [c.id for c in again.all]
    assert [c.swapped for c in first.all] == [c.swapped for c in again.all]
    assert {c.swapped for c in first.all} == {True, False}
    assert [c.prompt for c in first.all] != sorted(c.prompt for c in first.all)


def test_positions_reveal_whose_answer_it_was(run: Run) -> None:
    for comparison in load_comparisons(run).all:
        for position, text in enumerate(comparison.shown):
            assert comparison.reveal(position) == ("after" if "Quibbix" in text else "before")


def test_equal_answers_are_not_asked_about(run: Run) -> None:
    rows = read_jsonl(run / "evaluation.jsonl")
    for row in rows:
        if row["prompt_id"] == "p0":
            row["text"] = "The same."
    (run / "evaluation.jsonl").unlink()
    append_jsonl(run / "evaluation.jsonl", rows)
    assert len(load_comparisons(run).all) == 5


def test_own_requests_are_asked_too(run: Run) -> None:
    rows = [
        {"model": model, "prompt": "My own?", "text": model, "token_ids": [i]}
        for i, model in enumerate(("before", "after"))
    ]
    append_jsonl(run / "compare.jsonl", rows)
    assert "My own?" in [c.prompt for c in load_comparisons(run).all]


def answer_with(monkeypatch, answers: Iterator[str]) -> None:
    monkeypatch.setattr(compare.Ask, "ask", lambda *args, **kwargs: next(answers))


def test_terminal_counts_resumes_and_reveals_nothing(run: Run, monkeypatch, capsys) -> None:
    comparisons = load_comparisons(run)
    right = ["2" if c.reveal(1) == "after" else "1" for c in comparisons.all]
    wrong = {"1": "2", "2": "1"}
    answer_with(monkeypatch, iter([right[0], wrong[right[1]], "t", "q"]))
    compare_in_terminal(comparisons)
    shown = capsys.readouterr().out
    assert "preferred in 50% of 3 comparisons (1 won, 1 lost, 1 ties" in shown
    assert "3 left to judge" in shown and "could be chance" in shown
    before_result = shown.split("Blind test")[0]
    assert "before" not in before_result and "after" not in before_result

    again = load_comparisons(run)
    assert len(again.open) == 3
    answer_with(monkeypatch, iter(right[3:]))
    compare_in_terminal(again)
    assert "75% of 6" in capsys.readouterr().out


def test_a_choice_is_made_once(run: Run) -> None:
    comparisons = load_comparisons(run)
    comparisons.choose(comparisons.all[0], "after")
    comparisons.choose(comparisons.all[0], "before")
    assert load_comparisons(run).win_rate() == WinRate(1, 0, 0)


def test_win_rate_with_its_interval() -> None:
    text = str(WinRate(5, 3, 4))
    assert "58% of 12" in text and "32% to 81%" in text  # Wilson, 7 of 12


def test_nothing_to_compare(tmp_path) -> None:
    with pytest.raises(UserError, match="no answers to compare"):
        load_comparisons(make_run(tmp_path / "half", finished=False))


def test_choices_become_pairs(run: Run) -> None:
    comparisons = load_comparisons(run)
    for comparison, choice in zip(comparisons.all, ("after", "before", "tie"), strict=False):
        comparisons.choose(comparison, choice)
    base = SimpleNamespace(
        encode=lambda prompt, context: [len(prompt), len(context or "")],
        messages=lambda prompt, context: [{"content": context}, {"content": prompt}],
    )
    first, second = choice_pairs(run, base, first_id=200)
    assert (first["id"], second["id"]) == (200, 201)
    assert "Quibbix" in first["chosen"] and "Quibbix" not in first["rejected"]
    assert "Quibbix" in second["rejected"]
    assert first["chosen_ids"] == comparisons.all[0].after["token_ids"]
    assert first["prompt_ids"][1] == len(PAGE) and first["without_ids"][1] == 0
    assert judged_prompts(run) == {c.prompt for c in comparisons.all[:2]}


def test_prompts_of_ones_own(tmp_path) -> None:
    file = tmp_path / "own.txt"
    file.write_text("One?\n\n  Two?  \n", "utf-8")
    assert read_prompts(file) == ["One?", "Two?"]
    file.write_text("\n", "utf-8")
    with pytest.raises(UserError, match="holds no request"):
        read_prompts(file)
    with pytest.raises(UserError, match="can not be read"):
        read_prompts(tmp_path / "missing.txt")


class Client:
    """A browser's requests, without the browser."""

    def __init__(self, server: CompareServer) -> None:
        self.server = server

    def request(self, method: str, path: str, form: dict[str, str] | None = None, host=None):
        connection = http.client.HTTPConnection(self.server.host, timeout=10)
        body = urlencode(form) if form else None
        headers = {"Content-Type": "application/x-www-form-urlencoded"} if form else {}
        headers["Host"] = host or self.server.host
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        return response.status, response.read().decode("utf-8"), dict(response.getheaders())

    def get(self) -> str:
        status, html, _ = self.request("GET", urlsplit(self.server.url).path)
        assert status == 200
        return html


@pytest.fixture
def served(run: Run) -> Iterator[tuple[Client, threading.Thread]]:
    server = CompareServer(load_comparisons(run))
    thread = threading.Thread(target=server.serve, daemon=True)
    thread.start()
    yield Client(server), thread
    server.stop()
    thread.join(timeout=5)


def test_web_page_asks_all_and_ends(run: Run, served) -> None:
    client, thread = served
    path = urlsplit(client.server.url).path
    for _ in range(6):
        html = client.get()
        assert "before" not in html and "after" not in html
        name = re.search(r'name="id" value="(\w+)"', html)[1]
        status, _, headers = client.request("POST", path, {"id": name, "choice": "1"})
        assert (status, headers["Location"]) == (303, path)
    assert "of 6 comparisons" in client.get()
    thread.join(timeout=5)
    assert not thread.is_alive()
    assert load_comparisons(run).win_rate().n == 6


def test_web_page_escapes_and_loads_nothing(served) -> None:
    client, _ = served
    _, html, headers = client.request("GET", urlsplit(client.server.url).path)
    assert "&lt;request&gt;" in html and "<request>" not in html
    assert "default-src 'none'" in headers["Content-Security-Policy"]
    assert headers["Cache-Control"] == "no-store"
    assert "Python" not in headers["Server"]
    assert "<script" not in html and "http" not in html


@pytest.mark.parametrize("path", ["/", "/wrong/", "/favicon.ico", "/../"])
def test_without_the_token_there_is_nothing(run: Run, served, path: str) -> None:
    client, _ = served
    for method in ("GET", "POST"):
        status, html, _ = client.request(method, path, {"id": "x", "choice": "1"})
        assert status == 404 and "request" not in html
    assert not (run / "choices.jsonl").exists()


def test_another_host_name_is_refused(served) -> None:
    """DNS rebinding: a name of somebody's that points to this machine."""
    client, _ = served
    path = urlsplit(client.server.url).path
    assert client.request("GET", path, host="example.org")[0] == 404


def test_only_this_machine_is_listened_to(served) -> None:
    client, _ = served
    assert client.server._server.server_address[0] == "127.0.0.1"


@pytest.mark.parametrize(
    "form", [{"id": "nobody", "choice": "1"}, {"choice": "1"}, {"id": "", "choice": "3"}]
)
def test_a_wrong_form_changes_nothing(run: Run, served, form: dict[str, str]) -> None:
    client, _ = served
    path = urlsplit(client.server.url).path
    assert client.request("POST", path, form)[0] == 303
    assert client.request("POST", path, {"id": "x" * 9000})[0] == 400
    assert not (run / "choices.jsonl").exists()


class Browser:
    """Headless Chromium, driven over the WebDriver protocol."""

    def __init__(self, profile: str) -> None:
        self._driver = subprocess.Popen(
            [str(CHROMEDRIVER), "--port=0"], stdout=subprocess.PIPE, text=True
        )
        assert self._driver.stdout is not None
        port = next(m[1] for line in self._driver.stdout if (m := re.search(r"port (\d+)\.", line)))
        self._address = f"127.0.0.1:{port}"
        flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"]
        flags += ["--disable-background-networking", "--disable-sync", "--no-first-run"]
        options = {"goog:chromeOptions": {"args": flags}, "goog:loggingPrefs": {"browser": "ALL"}}
        self._path = ""
        found = self.call("/session", {"capabilities": {"alwaysMatch": options}})
        self._path = f"/session/{found['sessionId']}"

    def call(self, path: str, body: dict | None = None, method: str = ""):
        connection = http.client.HTTPConnection(self._address, timeout=90)
        method = method or ("GET" if body is None else "POST")
        connection.request(method, self._path + path, None if body is None else json.dumps(body))
        value = json.loads(connection.getresponse().read())["value"]
        assert not (isinstance(value, dict) and "error" in value), value
        return value

    def find(self, selector: str) -> list[str]:
        found = self.call("/elements", {"using": "css selector", "value": selector})
        return [next(iter(element.values())) for element in found]

    def text(self, element: str) -> str:
        return self.call(f"/element/{element}/text")

    def wait_for(self, selector: str, text: str) -> None:
        """Until the page that a click leads to is there; the driver does not always wait."""
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            with suppress(AssertionError):  # the element may go away between the two calls
                if any(text in self.text(element) for element in self.find(selector)):
                    return
            time.sleep(0.05)
        raise TimeoutError(f"{text!r} did not come up in {selector}")

    def click(self, element: str) -> None:
        self.call(f"/element/{element}/click", {})

    def close(self) -> None:
        self.call("", method="DELETE")  # ends the browser, which would outlive its driver
        self._driver.terminate()
        self._driver.wait(timeout=20)


@pytest.mark.skipif(CHROMEDRIVER is None, reason="no chromedriver here")
def test_clicked_through_in_a_browser(run: Run, served, tmp_path) -> None:
    """Always takes the answer of the trained model, which a reader here can tell."""
    client, thread = served
    browser = Browser(str(tmp_path / "profile"))
    try:
        browser.call("/url", {"url": client.server.url})
        for number in range(1, 7):
            browser.wait_for(".soft", f"{number} of 6")
            first, second, tie = browser.find("button")
            if number == 6:
                browser.click(tie)
            else:
                browser.click(first if "Quibbix" in browser.text(first) else second)
        browser.wait_for("h1", "Thank you")
        assert "92% of 6 comparisons (5 won, 0 lost, 1 ties" in browser.text(browser.find("p")[0])
        assert browser.call("/se/log", {"type": "browser"}) == []
    finally:
        browser.close()
    thread.join(timeout=5)
    assert load_comparisons(run).win_rate() == WinRate(5, 0, 1)
