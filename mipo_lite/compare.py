"""The blind test: the user reads two answers to a request, not knowing which is whose, and chooses.

`Comparisons` holds what is to be judged and what was chosen; the terminal (here) and the local
page (`compare_web`) are two ways to ask, and `judge` lets a model answer instead. Choices are
appended to choices.jsonl as they are made, so the test goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.panel import Panel
from rich.prompt import Prompt as Ask

from .console import console
from .errors import UserError
from .metrics import wilson_interval
from .run import Run, append_jsonl, read_json, read_jsonl

Choice = Literal["before", "after", "tie"]
CHOICES_FILE = "choices.jsonl"
QUESTIONS_FILE = "compare.jsonl"


@dataclass(frozen=True)
class Comparison:
    """Two answers to one request.

    Attributes:
        id: the same for the same request and answers.
        before, after: rows with "text" and "token_ids".
        swapped: the answer of the trained model is shown first.
    """

    id: str
    prompt: str
    before: dict[str, Any]
    after: dict[str, Any]
    swapped: bool

    @property
    def shown(self) -> tuple[str, str]:
        """The two texts in the order in which they are shown."""
        texts = (self.before["text"], self.after["text"])
        return texts[::-1] if self.swapped else texts

    def reveal(self, position: int) -> Choice:
        """Whose answer stands at position 0 or 1."""
        return "after" if (position == 0) == self.swapped else "before"


@dataclass(frozen=True)
class WinRate:
    """How often the trained model's answer was preferred; a tie counts one half."""

    wins: int
    losses: int
    ties: int

    @property
    def n(self) -> int:
        return self.wins + self.losses + self.ties

    @property
    def rate(self) -> float:
        return (self.wins + self.ties / 2) / max(self.n, 1)

    @property
    def interval(self) -> tuple[float, float]:
        return wilson_interval(self.wins + self.ties / 2, self.n)

    def __str__(self) -> str:
        low, high = self.interval
        return (
            f"the trained model was preferred in {self.rate:.0%} of {self.n} comparisons"
            f" ({self.wins} won, {self.losses} lost, {self.ties} ties;"
            f" 95 % interval {low:.0%} to {high:.0%})"
        )


class Comparisons:
    """The comparisons of a run, in a random order that stays the same, and the choices so far."""

    def __init__(self, run: Run, answers: Iterable[dict[str, Any]]) -> None:
        """`answers` are rows with prompt, model ("before" or "after"), text and token_ids."""
        self.run = run
        self.file = run / CHOICES_FILE
        self.all = _pair_up(answers, run.meta["seed"])
        known = {comparison.id for comparison in self.all}
        self.choices = {row["id"]: row for row in read_jsonl(self.file) if row["id"] in known}

    @property
    def open(self) -> list[Comparison]:
        """What was not judged yet."""
        return [comparison for comparison in self.all if comparison.id not in self.choices]

    def choose(self, comparison: Comparison, choice: Choice) -> None:
        """Record a choice; a second one for the same comparison is ignored."""
        if comparison.id in self.choices:
            return
        row = {
            "id": comparison.id,
            "prompt": comparison.prompt,
            "choice": choice,
            "shown_first": "after" if comparison.swapped else "before",
            "before": comparison.before["text"],
            "after": comparison.after["text"],
            "before_ids": comparison.before["token_ids"],
            "after_ids": comparison.after["token_ids"],
        }
        append_jsonl(self.file, [row])
        self.choices[comparison.id] = row

    def win_rate(self) -> WinRate:
        chosen = [row["choice"] for row in self.choices.values()]
        return WinRate(chosen.count("after"), chosen.count("before"), chosen.count("tie"))


def load_comparisons(run: Run) -> Comparisons:
    """What the evaluation asked, with the user's page; and what `answer_own` added.

    Raises UserError when there is nothing to compare, or nothing of what was trained last.
    """
    if run.meta["stages"].get("evaluate", {}).get("state") == "stale":
        raise UserError(
            f"{run.path} was trained anew since its answers were given.",
            f"Run `mipo-lite evaluate {run.path}` first.",
        )
    answers = [
        row
        for row in read_jsonl(run / "evaluation.jsonl")
        if row["condition"] == "with_context" and row["mode"] == "sampled" and row["sample"] == 0
    ]
    comparisons = Comparisons(run, [*read_jsonl(run / QUESTIONS_FILE), *answers])
    if not comparisons.all:
        raise UserError(
            f"{run.path} holds no answers to compare.",
            f"Run `mipo-lite evaluate {run.path}` first.",
        )
    return comparisons


def answer_own(run: Run, base: Any, prompts: Sequence[str], recipe: Any) -> None:
    """Let base and trained model answer the user's own requests, for `load_comparisons`.

    Args:
        base: a loaded Base; prompts that were answered before are not answered again.
    """
    from .evaluation import policies
    from .responses import respond, seed_of
    from .sampling import SampleRequest

    page = read_json(run / "context.json")["text"]
    done = {row["prompt"] for row in read_jsonl(run / QUESTIONS_FILE)}
    new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in done]
    requests = [
        SampleRequest(base.encode(prompt, page), seed_of("compare", prompt)) for prompt in new
    ]
    rows: list[dict[str, Any]] = []
    with policies(base, {"after": run / "adapter"}) as use:
        for model in ("before", "after"):
            with use(model):
                for prompt, answer in zip(new, respond(base, requests, recipe), strict=True):
                    text = base.decode(answer.token_ids)
                    rows.append(
                        {
                            "model": model,
                            "prompt": prompt,
                            "text": text,
                            "token_ids": answer.token_ids,
                        }
                    )
    append_jsonl(run / QUESTIONS_FILE, rows)


def compare_in_terminal(comparisons: Comparisons) -> None:
    """Ask until all is judged or the user has had enough, then say who won."""
    total = len(comparisons.all)
    for comparison in comparisons.open:
        done = total - len(comparisons.open)
        console.print(f"\n[bold]{done + 1} of {total}[/]")
        console.print(comparison.prompt, style="bold", markup=False)
        for number, text in enumerate(comparison.shown, start=1):
            console.print(Panel(_plain(text), title=str(number), title_align="left"))
        given = Ask.ask("Which is better?", choices=["1", "2", "t", "q"], console=console)
        if given == "q":
            break
        choice: Choice = "tie" if given == "t" else comparison.reveal(int(given) - 1)
        comparisons.choose(comparison, choice)
    print_result(comparisons)


def print_result(comparisons: Comparisons) -> None:
    result = comparisons.win_rate()
    if result.n == 0:
        console.print("Nothing was judged yet.")
        return
    left = len(comparisons.open)
    rest = f" {left} left to judge." if left else ""
    console.print(f"\nBlind test: {result}.{rest}", soft_wrap=True)
    low, high = result.interval
    if low <= 0.5 <= high:
        console.print("That could be chance: judge more to know.")


def choice_pairs(run: Run, base: Any, first_id: int) -> list[dict[str, Any]]:
    """The choices as lines of pairs.jsonl: what was preferred is chosen; ties teach nothing.

    Args:
        base: encodes the prompts (a Base).
        first_id: id of the first line.

    The requests were held out: an evaluation of what is trained on them must leave out
    `judged_prompts`.
    """
    page = read_json(run / "context.json")["text"]
    rows: list[dict[str, Any]] = []
    for row in usable_choices(run):
        chosen, rejected = ("after", "before") if row["choice"] == "after" else ("before", "after")
        rows.append(
            {
                "id": first_id + len(rows),
                "prompt": base.messages(row["prompt"], page),
                "prompt_id": f"choice-{row['id']}",
                "persona": "user",
                "chosen_by": "user",
                "negative": {"prompt_id": f"choice-{row['id']}", "persona": "user"},
                "chosen": row[chosen],
                "rejected": row[rejected],
                "prompt_ids": base.encode(row["prompt"], page),
                "chosen_ids": row[f"{chosen}_ids"],
                "rejected_ids": row[f"{rejected}_ids"],
                "without_ids": base.encode(row["prompt"], None),
                "seed": run.meta["seed"],
            }
        )
    return rows


def usable_choices(run: Run) -> list[dict[str, Any]]:
    """The lines of choices.jsonl that are no ties."""
    return [row for row in read_jsonl(run / CHOICES_FILE) if row["choice"] != "tie"]


def judged_prompts(run: Run) -> set[str]:
    """The requests whose choices `choice_pairs` trains on."""
    return {row["prompt"] for row in usable_choices(run)}


def read_prompts(path: Path) -> list[str]:
    """The user's own requests, a line each.

    Raises UserError when the file can not be read or is empty.
    """
    fix = "Write one request a line."
    try:
        prompts = [line.strip() for line in path.read_text("utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The prompts {path} can not be read as text.", fix) from error
    prompts = [prompt for prompt in prompts if prompt]
    if not prompts:
        raise UserError(f"{path} holds no request.", fix)
    return prompts


def _pair_up(answers: Iterable[dict[str, Any]], seed: int) -> list[Comparison]:
    """Comparisons in a random order; answers that are equal leave nothing to choose."""
    by_prompt: dict[str, dict[str, dict[str, Any]]] = {}
    for row in answers:
        by_prompt.setdefault(row["prompt"], {}).setdefault(row["model"], row)
    found = []
    for prompt, sides in by_prompt.items():
        if not {"before", "after"} <= sides.keys():
            continue
        before, after = sides["before"], sides["after"]
        if before["text"] == after["text"]:
            continue
        key = json.dumps([prompt, before["text"], after["text"]])
        name = hashlib.sha256(key.encode()).hexdigest()[:12]
        swapped = random.Random(f"order {seed} {name}").random() < 0.5
        found.append(Comparison(name, prompt, before, after, swapped))
    random.Random(f"comparisons {seed}").shuffle(found)
    return found


def _plain(text: str) -> Any:
    from rich.text import Text

    return Text(text or "(an empty answer)")
