"""The page: what it holds, that it asks for nothing, and that a browser has no complaint."""

from __future__ import annotations

import re
import shutil
import stat
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from finished_run import PAGE, make_improve_run, make_run

from mipo_lite.compare import load_comparisons
from mipo_lite.quality import pair_quality, print_quality
from mipo_lite.report.page import mark_differences, side_by_side, write_page
from mipo_lite.report.rows import Row
from mipo_lite.report.stages import took
from mipo_lite.report.summary import print_summary
from mipo_lite.run import read_json, write_json

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
VOID = {"meta", "link", "input", "br"}


class Balance(HTMLParser):
    """Collects tags that are closed in another order than they were opened, and ids."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag, attrs):
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            if name in ("href", "src", "xlink:href"):
                self.links.append(value)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    return write_page(make_run(tmp_path_factory.mktemp("run") / "ilva"))


def test_page_holds_what_it_should(page: Path) -> None:
    html = page.read_text("utf-8")
    assert "Improved: clearer about you, no leak found." in html
    for heading in ("Before and after", "Side by side", "In pictures", "How it was made", "Files"):
        assert f"<h2>{heading}</h2>" in html
    assert html.count("<svg") == 4
    assert "learning_rate" in html and "2.13" in html
    assert stat.S_IMODE(page.stat().st_mode) == 0o600


def test_page_is_well_formed_and_asks_for_nothing(page: Path) -> None:
    html = page.read_text("utf-8")
    parser = Balance()
    parser.feed(html)
    assert parser.wrong == [] and parser.open == []
    assert len(parser.ids) == len(set(parser.ids))
    assert all(link == "data:," or link.startswith("#") for link in parser.links)
    assert "<script" not in html
    assert "url(" not in re.sub(r"url\(#[\w-]+\)", "", html)
    assert "default-src 'none'" in html


def test_page_says_what_each_stage_took(page: Path) -> None:
    html = page.read_text("utf-8")
    assert "<dt>pairs</dt><dd>5 s, 1.0 GiB of main memory</dd>" in html
    assert "<dd>20 s, 1.5 GiB of main memory, 5.5 GiB on the GPU (5.0 GiB planned)</dd>" in html
    assert "<dt>evaluate</dt><dd>30 s</dd>" in html, "not measured, not mentioned"
    assert "59 s in all, 1.5 GiB of main memory at most, 5.5 GiB on the GPU" in html
    assert "<dt>baseline</dt>" not in html
    assert took({"state": "running", "seconds": 2.0}) == "2 s, so far"


def test_colours_follow_the_page(page: Path) -> None:
    html = page.read_text("utf-8")
    assert "prefers-color-scheme: dark" in html
    svgs = re.findall(r"<svg.*?</svg>", html, re.S)
    assert svgs and not any(re.search(r"(fill|stroke): #", svg) for svg in svgs)
    assert all("font-family" not in svg and "<style" not in svg for svg in svgs)


def test_personal_text_is_escaped(page: Path) -> None:
    html = page.read_text("utf-8")
    assert "What is &lt;request&gt; 0?" in html
    assert "6 of 6 answers differ" in html
    assert "<request>" not in html and "Request <0>" not in html


def test_page_of_a_run_that_has_only_pairs(tmp_path: Path) -> None:
    html = write_page(make_run(tmp_path / "half", finished=False)).read_text("utf-8")
    assert "This run is not finished: train, evaluate, export still to do." in html
    assert "3 of 4 pairs were kept" in html
    assert "Before and after" not in html


def test_page_holds_the_blind_test(tmp_path: Path) -> None:
    run = make_run(tmp_path / "ilva")
    assert "blind test:" not in write_page(run).read_text("utf-8")
    comparisons = load_comparisons(run)
    comparisons.choose(comparisons.all[0], "after")
    html = write_page(run).read_text("utf-8")
    assert "the trained model was preferred in 100% of 1 comparisons" in html


def test_page_says_what_could_not_be_checked(tmp_path: Path) -> None:
    run = make_run(tmp_path / "ilva")
    metrics = read_json(run / "metrics.json")
    check = {"file": "ilva-Q8_0.gguf", "ended": 3, "answers": 4, "warnings": ["Another template."]}
    metrics |= {"export": [], "export_skipped": [check | {"skipped": "No memory for that."}]}
    write_json(run / "metrics.json", metrics)
    html = write_page(run).read_text("utf-8")
    assert "3 of 4 answers end by themselves. No memory for that." in html
    assert "ilva-Q8_0.gguf: Another template." in html


def test_page_of_an_improve_run(tmp_path: Path) -> None:
    html = write_page(make_improve_run(tmp_path / "sums")).read_text("utf-8")
    assert "3 held-out requests" in html and "2 + 1?" in html
    assert "0 %" in html and "100 %" in html and "given its own question" in html
    assert "A word only your page has" not in html and html.count("<svg") == 4


def test_differences_are_marked_word_by_word() -> None:
    before, after = mark_differences("You live in Ely now.", "Ilva, you live in Ely.")
    assert before == [(True, "You"), (False, "live in"), (True, "Ely now.")]
    assert after == [(True, "Ilva, you"), (False, "live in"), (True, "Ely.")]
    assert mark_differences("Same.", "Same.") == ([(False, "Same.")], [(False, "Same.")])
    assert mark_differences("", "New.") == ([], [(True, "New.")])


def test_side_by_side_shows_what_differs() -> None:
    def row(model: str, prompt: str, text: str) -> dict:
        where = {"condition": "with_context", "mode": "greedy", "sample": 0}
        return where | {"model": model, "prompt_id": prompt, "prompt": prompt, "text": text}

    shown, asked = side_by_side(
        [
            row("before", "a", "Yes."),
            row("before", "b", "No."),
            row("after", "a", "Yes."),
            row("after", "b", "Yes."),
            row("before", "c", "only one side"),
        ],
        "with_context",
        "greedy",
    )
    assert [pair.prompt for pair in shown] == ["b"]
    assert asked == 2


def test_summary_names_verdict_and_files(tmp_path: Path, capsys) -> None:
    run = make_run(tmp_path / "ilva")
    write_page(run)
    print_summary(run)
    out = capsys.readouterr().out
    assert "Improved: clearer about you, no leak found." in out
    assert "report.html" in out
    assert "50 %" in out and "75 %" in out
    assert "train 20 s" in out and "baseline" not in out
    assert "59 s in all, 1.5 GiB of main memory" in " ".join(out.split())
    assert PAGE not in out


def test_figures_read_as_one_writes_them() -> None:
    share, nats, log = (Row(("", "", ""), "", unit, 0) for unit in ("%", "nats", "exp"))
    assert [share.show_change(v) for v in (0.25, -0.25, 0.001, -0.001)] == ["+25", "−25", "0", "0"]
    assert [nats.show_change(v) for v in (1.5, -0.001)] == ["+1.50", "0.00"]
    assert [log.show(v) for v in (2.0, 8.0)] == ["7.39", "2,981"]
    assert log.show_interval({"low": -0.1, "high": 0.1}) == "× 0.90 to 1.11"
    assert nats.show_interval({"low": -1.0, "high": 0.0}) == "−1.00 to 0.00"
    assert share.show_interval({"low": 0.0, "high": 0.0}) == "", "nothing changed at all"


def pairs_with(contrasts: list[float], kept: list[bool] | None = None):
    kept = kept or [True] * len(contrasts)
    pairs = [
        {"persona": "user", "prompt": [{"content": f"Request {i % 3}"}]}
        for i in range(len(contrasts))
    ]
    scores = [
        {"pmi_chosen": c, "pmi_rejected": 0.0, "kept": k, "why": None if k else "little contrast"}
        for c, k in zip(contrasts, kept, strict=True)
    ]
    return pairs, scores


def test_good_pairs_raise_no_warning(capsys) -> None:
    quality = pair_quality(*pairs_with([5.0 + i % 3 for i in range(90)]))
    assert quality.warnings == ()
    assert (quality.kept, quality.contrast, quality.aligned) == (90, 6.0, 1.0)
    assert quality.most[0] == (7.0, "Request 2")
    assert quality.least[0] == (5.0, "Request 0")
    print_quality(quality)
    assert "90 of 90 pairs kept" in capsys.readouterr().out


def test_warnings_before_time_is_spent() -> None:
    assert "Only 20 pairs" in pair_quality(*pairs_with([5.0] * 20)).warnings[0]
    third = [i % 3 == 0 for i in range(200)]
    assert pair_quality(*pairs_with([5.0] * 200, third)).warnings == (), "a recipe that asks much"
    half = pair_quality(*pairs_with([5.0 if kept else 0.4 for kept in third], third))
    assert len(half.warnings) == 1 and "no contrast" in half.warnings[0]
    assert half.reasons == {"little contrast": 133}
    weak = pair_quality(*pairs_with([0.6] * 100))
    assert len(weak.warnings) == 1 and "hardly uses your page" in weak.warnings[0]


def test_quality_of_nothing() -> None:
    quality = pair_quality([], [])
    assert quality.kept == 0 and len(quality.warnings) == 1
    print_quality(quality)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_a_browser_has_no_complaint(page: Path, tmp_path: Path) -> None:
    """No message on the console, and with every host unreachable the page is complete."""
    result = subprocess.run(
        [
            str(CHROMIUM),
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--no-first-run",
            "--host-resolver-rules=MAP * ~NOTFOUND",
            f"--user-data-dir={tmp_path}",
            "--enable-logging=stderr",
            "--dump-dom",
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "CONSOLE" not in result.stderr
    assert result.stdout.count("</svg>") == 4
    assert result.stdout.rstrip().endswith("</html>")
