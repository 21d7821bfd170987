"""Settings: where they come from, which are refused, and with what words."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mipo_lite.errors import UsageError
from mipo_lite.planning import PLANNED
from mipo_lite.recipe import Recipe, load_recipe, recipe_names, recipe_text


def test_later_sources_win(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("pairs: 10\nbeta: 0.2\nseed: 3\n")
    recipe = load_recipe(str(file), ["beta=0.3", "seed=4"], {"seed": 5, "base": None})
    assert (recipe.pairs, recipe.beta, recipe.seed, recipe.base) == (10, 0.3, 5, "auto")


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipes_are_valid_and_say_what_they_are_for(name: str) -> None:
    load_recipe(name)
    assert recipe_text(name).startswith("# ")


@pytest.mark.parametrize(
    ("text", "value"), [("1e-4", 1e-4), ("1.0e-4", 1e-4), ("0.0001", 1e-4), ("2", 2.0)]
)
def test_numbers_as_people_write_them(text: str, value: float) -> None:
    assert load_recipe(None, [f"learning_rate={text}"]).learning_rate == value


@pytest.mark.parametrize(
    ("assignments", "what", "fix"),
    [
        (
            ["learning_rat=1"],
            "There is no setting 'learning_rat'. Did you mean 'learning_rate'?",
            "`mipo-lite recipes default` prints them all.",
        ),
        (
            ["beta=-1"],
            "beta can not be -1: input should be greater than 0.",
            "beta is: DPO's beta.",
        ),
        (["beta"], "--set beta is not key=value.", "For example: --set learning_rate=1e-4"),
        (
            ["quants=q9_k"],
            "quants can not be 'q9_k': input should be a valid list.",
            "quants is: GGUF files to write.",
        ),
    ],
)
def test_bad_settings(assignments: list[str], what: str, fix: str) -> None:
    with pytest.raises(UsageError) as error:
        load_recipe(None, assignments)
    assert (error.value.what, error.value.fix) == (what, fix)
    assert error.value.exit_code == 2


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("pairs: [", "is not valid YAML (line 1)."),
        ("- pairs", "is not a list of settings."),
        ("pears: 3", "There is no setting 'pears'. Did you mean 'pairs'?"),
    ],
)
def test_bad_recipe_files(tmp_path: Path, content: str, what: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(content)
    with pytest.raises(UsageError) as error:
        load_recipe(str(file))
    assert error.value.what.endswith(what)


def test_unknown_recipes() -> None:
    with pytest.raises(UsageError) as error:
        load_recipe("buildin")
    assert error.value.what == "There is no recipe 'buildin'. Did you mean 'builtin'?"
    with pytest.raises(UsageError, match="can not be read"):
        load_recipe("no/such.yaml")


def test_departures_from_the_method_are_named() -> None:
    assert Recipe().departures == []
    assert Recipe(temperature=0.7).departures == ["temperature 0.7 instead of 1"]
    assert Recipe(loss="ipo", sft_weight=0.5).departures == [
        "loss ipo instead of DPO's",
        "the SFT loss on chosen responses is added, times 0.5",
    ]
    assert Recipe(loss="sft", sft_weight=0.5).departures == ["loss sft instead of DPO's"]


@given(st.text(max_size=40), st.sampled_from([*Recipe.model_fields, "nothing"]))
def test_no_assignment_ends_in_a_traceback(text: str, key: str) -> None:
    try:
        load_recipe(None, [f"{key}={text}"])
    except UsageError as error:
        assert error.what
        assert error.fix


def test_the_default_recipe_shows_every_setting_with_its_default() -> None:
    """Those that are planned behind a "#", since what is stated is kept."""
    assert load_recipe("default") == Recipe()
    stated = yaml.safe_load(re.sub(r"(?m)^# (?=\w+: )", "", recipe_text("default")))
    assert stated == Recipe().model_dump()
    assert load_recipe("default").model_fields_set.isdisjoint(PLANNED)
