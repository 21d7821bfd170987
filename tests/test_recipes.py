"""Every recipe of `personalize`: it runs on the built-in base, and fits the card it is made for."""

from __future__ import annotations

from pathlib import Path

import pytest

from mipo_lite import plan_report
from mipo_lite.bases import BUILTIN
from mipo_lite.plan_report import RECIPE_CARDS, recipe_table, shape_table
from mipo_lite.planning import PLANNED, choose_base
from mipo_lite.recipe import load_recipe, recipe_names

ROOT = Path(__file__).parents[1]
README = ROOT / "recipes" / "README.md"
# Those for `improve` are run in its tests.
RECIPES = [name for name in recipe_names() if not name.startswith(("math", "multiple"))]
# Everything else is as the recipe says: rank, checkpointing, loss, shares.
SMALL = (
    "pairs=8",
    "max_new_tokens=12",
    "sampling_batch=8",
    "min_contrast=0",
    "epochs=1",
    "batch_size=4",
    "micro_batch=2",
    "evaluations=1",
)


@pytest.fixture(autouse=True)
def no_memory_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def builtin():
    if not (BUILTIN / "config.json").is_file():
        pytest.skip("the built-in base is not there yet")
    from mipo_lite.base import find_base, load_base

    return load_base(find_base("builtin"))


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_runs(builtin, tmp_path, name):
    """Pairs, scores and training, with the recipe's own settings but for sizes."""
    from mipo_lite.flow import execute
    from mipo_lite.pipeline import prepare

    flow = prepare(
        ROOT / "examples" / "me.txt",
        base="builtin",
        prompts=None,
        recipe=name,
        settings=SMALL,
        seed=0,
        run=tmp_path / "run",
    )
    flow.base = builtin
    execute(flow, only="train")
    stages = flow.run.meta["stages"]
    assert all(stages[stage]["state"] == "done" for stage in ("pairs", "scores", "train"))
    assert stages["train"]["steps"] >= 1
    assert (flow.run / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("name", RECIPE_CARDS)
def test_recipe_fits_its_card_with_a_page_of_context(name):
    choice = choose_base(vram_gib=RECIPE_CARDS[name], recipe=load_recipe(name))
    assert choice.plan is not None
    assert choice.plan.fits


@pytest.mark.parametrize("name", [*RECIPE_CARDS, "math", "multiple-choice"])
def test_a_recipe_for_a_gpu_leaves_the_batch_sizes_to_the_planner(name):
    """What it stated would be kept on a card that is smaller, or fuller, than it was made for."""
    assert load_recipe(name).model_fields_set.isdisjoint(PLANNED)


def test_every_recipe_is_in_the_table():
    assert README.is_file()
    listed = README.read_text("utf-8")
    assert all(f"`{name}`" in listed for name in recipe_names())


@pytest.mark.parametrize("table", [recipe_table, shape_table])
def test_the_tables_are_what_the_command_prints(table):
    assert table() in README.read_text("utf-8")


def test_a_recipe_that_fits_nothing_is_not_passed_over(monkeypatch):
    monkeypatch.setattr(plan_report, "RECIPE_CARDS", {"24gb": 1})
    with pytest.raises(ValueError, match="24gb"):
        recipe_table()
