"""What the planner chooses, why, and that its words and tables come out."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from mipo_lite import calibration, machine, pipeline, plan_report, planning
from mipo_lite.bases import BUILTIN
from mipo_lite.errors import UserError
from mipo_lite.fitting import PERSONA, PROMPT, Case, Device
from mipo_lite.known_bases import KNOWN
from mipo_lite.memory import CPU_PROCESS, CUDA_CONTEXT, GIB
from mipo_lite.planning import PLANNED, choose_base, count_tokens, find_device, plan, settle
from mipo_lite.recipe import load_recipe, make_recipe
from mipo_lite.shapes import shape_of

ROOT = Path(__file__).parents[1]
QWEN_7B = "Qwen/Qwen2.5-7B-Instruct"
CONFIG = {known.name: known.config for known in KNOWN}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A machine that remembers nothing, without a GPU."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path))
    monkeypatch.setattr(planning, "find_gpu", lambda: None)
    return tmp_path


def free(name: str, size: float) -> Device:
    return Device(name, round(size * GIB), True)


# Choices

SHAPES_12 = [
    (name, context)
    for name in (
        "Qwen/Qwen2.5-0.5B-Instruct",
        "Qwen/Qwen2.5-1.5B-Instruct",
        "meta-llama/Llama-3.2-3B-Instruct",
        "meta-llama/Llama-3.1-8B-Instruct",
    )
    for context in (200, 1200, 3000)
]


@pytest.mark.parametrize(("name", "context"), SHAPES_12)
def test_more_memory_is_never_slower_and_a_fitting_plan_fits(name, context):
    cost = float("inf")
    fitted = False
    for size in (4, 6, 8, 12, 16, 24, 48):
        planned = plan(name, vram_gib=size, context_tokens=context)
        case = Case(planned.shape, planned.device, make_recipe({}), context, frozenset())
        assert not (fitted and not planned.fits)
        if planned.fits:
            fitted = True
            assert planned.least <= planned.peak <= planned.device.budget
            now = case.cost(case.best_training())
            assert now <= cost
            options = list(case.training_options())
            fitting = [o for o in options if case.training(o).peak <= planned.device.budget]
            assert now == min(map(case.cost, fitting))
            cost = now
        else:
            assert any("does not fit" in reason for reason in planned.reasons)
    assert fitted


def test_a_longer_context_or_answer_takes_more():
    device = free("a card", 24)
    fixed = ("sampling_batch", "micro_batch", "gradient_checkpointing", "optimizer")
    recipe = make_recipe({})

    def peaks(context: int, answer: int) -> list[int]:
        case = Case(
            shape_of(CONFIG[QWEN_7B]),
            device,
            recipe.model_copy(update={"max_new_tokens": answer}),
            context,
            frozenset(fixed),
        )
        option = planning.Training(4, True, False, "adamw_torch")
        return [case.sampling(16).peak, case.scoring(1024).peak, case.training(option).peak]

    for short, long in ((peaks(500, 256), peaks(3000, 256)), (peaks(500, 128), peaks(500, 512))):
        assert all(a < b for a, b in zip(short, long, strict=True))


def test_the_largest_context_is_the_boundary():
    planned = plan(QWEN_7B, vram_gib=8)
    assert 512 < planned.max_context < planned.shape.window
    assert plan(QWEN_7B, vram_gib=8, context_tokens=planned.max_context).fits
    beyond = plan(QWEN_7B, vram_gib=8, context_tokens=planned.max_context + 1)
    assert not beyond.fits
    assert beyond.max_context == planned.max_context


def test_the_window_limits_the_context_where_memory_does_not():
    name = "HuggingFaceTB/SmolLM2-360M-Instruct"
    recipe = make_recipe({"max_new_tokens": 100})
    planned = plan(name, vram_gib=24, recipe=recipe)
    assert planned.max_context == 8192 - PROMPT - 100
    assert not plan(name, vram_gib=24, recipe=recipe, context_tokens=8192).fits


def test_prefix_sharing_is_counted():
    shared, plain = (
        Case(
            shape_of(CONFIG[QWEN_7B]),
            free("a card", 24),
            make_recipe({"prefix_sharing": on, "pool_positives": 0}),
            2000,
            frozenset(),
        ).batch(4)
        for on in (True, False)
    )
    assert shared.tokens == 2000 + 4 * (PROMPT + 2 * 256)
    assert plain.tokens == 8 * (2000 + PROMPT + 256)
    assert shared.labels == plain.labels == 8 * 256


def test_pool_positives_bring_their_page_along():
    case = Case(shape_of(CONFIG[QWEN_7B]), free("a card", 24), make_recipe({}), 2000, frozenset())
    without = replace(case, recipe=make_recipe({"pool_positives": 0}))
    assert case.batch(4).tokens - without.batch(4).tokens == PERSONA
    assert case.batch(1).tokens == without.batch(1).tokens


def test_what_the_user_has_set_is_kept():
    stated = {"sampling_batch": 5, "scoring_tokens": 3000, "micro_batch": 8}
    stated["gradient_checkpointing"] = True
    recipe = make_recipe(stated)
    planned = plan(QWEN_7B, vram_gib=24, recipe=recipe)
    assert {key: planned.settings[key] for key in stated} == stated
    assert "5 responses are sampled at once, as the recipe says." in planned.reasons
    too_much = plan(QWEN_7B, vram_gib=8, recipe=recipe)
    assert not too_much.fits
    assert any(reason.startswith("The stage train does not fit") for reason in too_much.reasons)


def test_offloading_without_checkpointing_is_planned_when_it_is_stated():
    stated = {"activation_offload": True, "gradient_checkpointing": False}
    planned = plan(QWEN_7B, vram_gib=24, recipe=make_recipe(stated))
    assert {key: planned.settings[key] for key in stated} == stated
    either = plan(QWEN_7B, vram_gib=24, recipe=make_recipe({"activation_offload": True}))
    assert either.settings["gradient_checkpointing"]


def test_micro_batches_divide_the_batch():
    for size in (6, 8, 12, 24):
        planned = plan(QWEN_7B, vram_gib=size, recipe=make_recipe({"batch_size": 12}))
        assert 12 % planned.settings["micro_batch"] == 0


def test_reasons_name_what_the_next_step_would_need():
    planned = plan(QWEN_7B, vram_gib=8)
    assert planned.settings["gradient_checkpointing"]
    text = "\n".join(planned.reasons)
    assert "instead of" in text
    assert "Checkpointing, since without it training would need" in text
    roomy = plan("Qwen/Qwen2.5-0.5B-Instruct", vram_gib=24)
    assert "No checkpointing" in "\n".join(roomy.reasons)


def test_applied_to_a_recipe():
    recipe = load_recipe("default")
    planned = plan(QWEN_7B, vram_gib=12, recipe=recipe)
    applied = planned.apply(recipe)
    assert applied.sampling_batch == planned.settings["sampling_batch"]
    assert applied.micro_batch == planned.settings["micro_batch"]
    assert applied.pairs == recipe.pairs


# auto


def test_auto_takes_the_largest_that_fits():
    choices = [choose_base(vram_gib=size) for size in (4, 6, 12)]
    parameters = [choice.plan.shape.parameters for choice in choices]
    assert parameters == sorted(parameters)
    assert parameters[0] < 4e9 < 8e9 < parameters[-1]
    assert all(choice.plan.fits for choice in choices)


def test_auto_passes_over_what_can_not_be_had():
    choice = choose_base(vram_gib=12, why_not=lambda known: "gated" if known.gated else "not here")
    assert choice.name == "builtin"
    assert choice.plan is None
    assert "built-in" in choice.reason
    only = choose_base(vram_gib=12, why_not=lambda k: "" if "SmolLM2-1.7B" in k.name else "no")
    assert only.name == "HuggingFaceTB/SmolLM2-1.7B-Instruct"
    verdicts = {known.name: verdict for known, _, verdict in only.candidates}
    assert verdicts["Qwen/Qwen3-8B"] == "no"
    assert verdicts[only.name] == ""


def test_auto_on_a_card_too_small_for_anything():
    choice = choose_base(vram_gib=1)
    assert choice.name == "builtin"
    assert all("GiB" in verdict for _, _, verdict in choice.candidates)


# Devices


def test_the_gpu_that_is_there(monkeypatch):
    gpu = machine.Gpu("A card", 8 * GIB, 6 * GIB)
    monkeypatch.setattr(planning, "find_gpu", lambda: gpu)
    device = find_device()
    # The context that asking has opened is counted by the plan itself.
    assert device == Device("A card", 6 * GIB + CUDA_CONTEXT, True)
    assert find_device(6).budget < 6 * GIB


def test_without_a_gpu_the_plan_is_for_main_memory():
    recipe = load_recipe("builtin")
    planned = plan("builtin", recipe=recipe)
    assert not planned.device.is_gpu
    assert planned.settings["optimizer"] == "adamw_torch"
    assert not planned.settings["activation_offload"]
    assert planned.peak < 2 * GIB
    assert all(getattr(planned.apply(recipe), name) == getattr(recipe, name) for name in PLANNED)
    assert planned.stages[0].overhead == CPU_PROCESS


def test_no_driver_means_no_torch():
    """On a machine without a driver `plan` answers without loading torch."""
    code = (
        "import sys; from mipo_lite.plan_report import report; "
        "report('auto', vram_gib=8, user_context=None); "
        "sys.exit(bool({'torch', 'transformers'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "auto would take" in done.stdout


# Calibration


def test_a_measured_peak_corrects_the_next_plan():
    device = free("A card", 8)
    before = plan(QWEN_7B, device=device)
    stage = before.stage("train")
    assert stage.measured is None
    assert stage.allowance > 0
    varying = stage.planned - stage.fixed
    measured = stage.fixed + round(1.3 * varying)
    for seen in (0.7, 1.3):
        peak = stage.fixed + round(seen * varying)
        ratio = calibration.record(
            "A card", "train", planned=stage.planned, fixed=stage.fixed, measured=peak
        )
        assert ratio == pytest.approx(seen)
    recipe = make_recipe({})
    case = Case(before.shape, device, recipe, before.context_tokens, frozenset())
    option = planning.Training(**{k: before.settings[k] for k in planning.Training.__annotations__})
    after = case.training(option)
    assert after.measured == pytest.approx(1.3)  # the larger of the two
    assert after.peak == pytest.approx(measured + CUDA_CONTEXT, rel=1e-6)
    assert plan(QWEN_7B, device=free("Another card", 8)).stage("train").measured is None


def test_calibration_keeps_the_last_few_and_no_nonsense(cache):
    def record(measured: int) -> float | None:
        return calibration.record("A card", "pairs", planned=200, fixed=100, measured=measured)

    assert record(90) is None  # below the weights: not this stage's peak
    assert record(100_000) is None
    assert calibration.record("A card", "pairs", planned=100, fixed=100, measured=120) is None
    assert calibration.factor("A card", "pairs") is None
    for measured in (300, 210, 220, 230, 240, 250):
        record(measured)
    assert calibration.factor("A card", "pairs") == 1.5  # 2.0 has been forgotten
    known = json.loads((cache / "mipo-lite" / "calibration.json").read_text("utf-8"))
    assert known == {"A card": {"pairs": [1.1, 1.2, 1.3, 1.4, 1.5]}}


def test_a_small_ratio_promises_little():
    calibration.record("A card", "pairs", planned=200, fixed=100, measured=150)
    assert calibration.factor("A card", "pairs") == calibration.FLOOR


@pytest.mark.parametrize("text", ["", "[]", '{"A card": 3}', '{"A card": {"pairs": "x"}}', "\0"])
def test_a_damaged_calibration_is_forgotten(cache, text):
    file = calibration.cache_directory() / "calibration.json"
    file.parent.mkdir()
    file.write_text(text, "utf-8")
    assert calibration.factor("A card", "pairs") is None
    assert calibration.record("A card", "pairs", planned=2, fixed=1, measured=2) == 1.0
    assert calibration.factor("A card", "pairs") == 1.0


def test_a_cache_that_can_not_be_written_stops_nothing(cache, monkeypatch):
    (cache / "a file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache / "a file"))
    monkeypatch.setenv("LOCALAPPDATA", str(cache / "a file"))
    assert calibration.record("A card", "pairs", planned=2, fixed=1, measured=2) is None
    assert calibration.factor("A card", "pairs") is None


# In a run


def test_a_run_gets_what_fits_and_keeps_it(monkeypatch):
    recipe = load_recipe("default", ["micro_batch=4"])
    assert settle(recipe, BUILTIN, "a page") == (recipe, None)  # no GPU
    gpu = machine.Gpu("A card", 8 * GIB, 8 * GIB)
    monkeypatch.setattr(planning, "find_gpu", lambda: gpu)
    chosen, planned = settle(recipe, BUILTIN, "a page")
    assert planned is not None
    assert planned.fits
    assert chosen.sampling_batch == planned.settings["sampling_batch"] == 64
    assert chosen.micro_batch == recipe.micro_batch


def test_a_run_keeps_what_its_recipe_file_states(monkeypatch, tmp_path):
    gpu = machine.Gpu("A card", 8 * GIB, 8 * GIB)
    monkeypatch.setattr(planning, "find_gpu", lambda: gpu)
    file = tmp_path / "mine.yaml"
    file.write_text("sampling_batch: 5\ngradient_checkpointing: true\n", "utf-8")
    monkeypatch.chdir(tmp_path)
    flow = pipeline.prepare(
        ROOT / "examples" / "me.txt",
        base="builtin",
        prompts=None,
        recipe=str(file),
        settings=["micro_batch=2"],
        seed=None,
        run=None,
    )
    chosen = flow.run.meta["recipe"]
    assert (chosen["sampling_batch"], chosen["micro_batch"]) == (5, 2)
    assert chosen["gradient_checkpointing"] is True
    free, _ = settle(load_recipe("default"), BUILTIN, "a page")
    assert free.sampling_batch == 64 and free.gradient_checkpointing is False


def test_the_peak_of_a_stage_is_kept(monkeypatch):
    recipe = load_recipe("builtin")
    entry: dict = {}
    with planning.watch_memory("train", recipe, BUILTIN, "a page", entry):
        pass
    assert entry == {}  # no GPU
    gpu = machine.Gpu("A card", 8 * GIB, 8 * GIB)
    monkeypatch.setattr(planning, "find_gpu", lambda: gpu)
    asked = []
    monkeypatch.setattr("torch.cuda.empty_cache", lambda: asked.append("empty"))
    monkeypatch.setattr("torch.cuda.reset_peak_memory_stats", lambda: asked.append("reset"))
    monkeypatch.setattr("torch.cuda.max_memory_reserved", lambda: GIB // 2)
    with planning.watch_memory("export", recipe, BUILTIN, "a page", entry):
        pass
    assert entry == {} and not asked
    with planning.watch_memory("train", recipe, BUILTIN, "a page", entry):
        assert asked == ["empty", "reset"]
    assert entry["memory"]["measured"] == GIB // 2
    assert 0 < entry["memory"]["planned"] < GIB // 2
    assert calibration.factor("A card", "train") > 1
    with (
        pytest.raises(RuntimeError),
        planning.watch_memory("pairs", recipe, BUILTIN, "a page", entry),
    ):
        raise RuntimeError
    assert calibration.factor("A card", "pairs") is None


# Words


def test_report_as_json(capsys, tmp_path):
    page = tmp_path / "me.txt"
    page.write_text("My dog is called Biscuit. " * 50, "utf-8")
    plan_report.report(QWEN_7B, vram_gib=8, user_context=page, recipe="default", as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert found["base"] == QWEN_7B
    assert found["fits"] is True
    assert found["context_tokens"] == count_tokens(page.read_text("utf-8").strip(), QWEN_7B)
    assert found["settings"].keys() == set(planning.PLANNED)
    for stage in found["stages"].values():
        parts = stage["parts"]
        held = sum(part["bytes"] for part in parts if not part["in_turn"])
        in_turn = max(part["bytes"] for part in parts if part["in_turn"])
        assert stage["planned_bytes"] == held + in_turn
        assert stage["fixed_bytes"] < stage["planned_bytes"] < stage["peak_bytes"]


def test_report_for_people(capsys):
    plan_report.report("auto", vram_gib=8, user_context=None, recipe="default")
    text = capsys.readouterr().out
    for words in ("auto would take", "weights, NF4", "a tile of logits", "CUDA context", "It fits"):
        assert words in text
    assert "not measured" in text
    plan_report.report(QWEN_7B, vram_gib=3, user_context=None)
    assert "It does not fit" in capsys.readouterr().out


@pytest.mark.parametrize("recipe", [None, "quick", "6gb"])
@pytest.mark.parametrize("gpu", [None, machine.Gpu("A card", 8 * GIB, 8 * GIB)])
def test_the_report_says_what_a_run_would_do(monkeypatch, capsys, tmp_path, recipe, gpu):
    for module in (machine, planning):
        monkeypatch.setattr(module, "find_gpu", lambda: gpu)
    page = ROOT / "examples" / "me.txt"
    settings = ["scoring_tokens=1500"]
    plan_report.report(
        None, vram_gib=None, user_context=page, recipe=recipe, settings=settings, as_json=True
    )
    found = json.loads(capsys.readouterr().out)
    flow = pipeline.prepare(
        page,
        base=None,
        prompts=None,
        recipe=recipe,
        settings=settings,
        seed=None,
        run=tmp_path / "run",
    )
    chosen = flow.run.meta["recipe"]
    assert found["base"] == flow.run.meta["base"]["name"] == "builtin"
    assert found["settings"] == {name: chosen[name] for name in planning.PLANNED}


def test_the_report_says_why_auto_is_builtin(capsys):
    plan_report.report(None, vram_gib=None, user_context=None)
    text = capsys.readouterr().out
    assert "auto would take builtin: no CUDA GPU found" in text
    assert "Without a GPU the settings are those of the recipe." in text
    at_once = load_recipe("builtin").sampling_batch
    assert f"{at_once} responses are sampled at once, as the recipe says." in text


def test_report_for_a_base_that_can_not_be_had(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="not in the local cache"):
        plan_report.report("org/none", vram_gib=8, user_context=None)


def test_tokens_are_counted_where_the_tokenizer_is_here(tmp_path):
    assert count_tokens("abcdef", QWEN_7B) == 2  # a third of the bytes
    assert count_tokens("日本語", QWEN_7B) == 3
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"my": 0, "dog": 1, "?": 2}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert count_tokens("my dog barks", str(tmp_path)) == 3
