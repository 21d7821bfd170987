"""Recipe: every setting of a run, with its unit, its range and its default.

Settings come from four places, the later one wins: the defaults below, a recipe (one of
`recipes/*.yaml` by name, or a file), `--set key=value`, and the flags of the command. An unknown
key is refused by name, with the nearest known one.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from .errors import UsageError
from .gguf.kinds import KINDS, PLAIN, needs_imatrix

# Installed, the recipes lie inside the package; in a checkout, beside it.
_PACKAGE = Path(__file__).parent
_SHIPPED = next(
    (path for path in (_PACKAGE / "recipes", _PACKAGE.parent / "recipes") if path.is_dir()),
    _PACKAGE / "recipes",
)

Loss = Literal[
    "sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair",
    "sppo_hard", "aot", "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft",
]  # fmt: skip


class Recipe(BaseModel):
    """Every setting of a run. Defaults fit a real instruct model; they are starting points.

    `model_fields_set` holds what a recipe, `--set` or a flag states. `planning` keeps that, and
    decides on a GPU some of what is left to its default.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    base: str = Field("auto", description="auto, builtin, a Hugging Face id, or a directory")
    seed: int = Field(0, ge=0, lt=2**31, description="seeds sampling, LoRA and data order")

    pairs: int = Field(400, ge=4, description="preference pairs to sample")
    negatives: Literal["missing", "random", "mixed", "near", "far", "answers"] = Field(
        "mixed",
        description="what conditions the rejected response. personalize: no context (missing), "
        "another persona's (random), either (mixed). improve: a random, near or far other "
        "question, or the same one, its answers contrasted (answers)",
    )
    pool_positives: float = Field(
        0.1, ge=0, lt=1, description="share of pairs whose chosen response saw a pool persona"
    )
    answers_per_question: int = Field(
        8, ge=2, description="responses to choose from, for negatives=answers"
    )
    rounds: int = Field(1, ge=1, description="improve: how often the policy writes new pairs")
    reference: Literal["previous", "base"] = Field(
        "previous", description="improve: the reference of later rounds"
    )
    instruction: str = Field("", description="improve: said after every question")
    temperature: float = Field(1.0, ge=0, le=5, description="of the pairs; 1 is the method's")
    top_p: float = Field(1.0, gt=0, le=1, description="of the pairs; 1 is the method's")
    max_new_tokens: int = Field(256, ge=4, description="longest response, tokens")
    sampling_batch: int = Field(16, ge=1, description="responses sampled at once")

    min_contrast: float = Field(
        0.5, ge=0, description="drop pairs whose PMI(chosen) - PMI(rejected) is within this, nats"
    )
    scoring_tokens: int = Field(8192, ge=256, description="tokens scored at once")
    use_choices: bool = Field(
        False, description="also train on your choices in the blind test (mipo-lite compare)"
    )

    loss: Loss = Field("sigmoid", description="a loss_type of TRL's DPOConfig")
    sft_weight: float = Field(
        0.0, ge=0, description="times TRL's sft loss on the chosen responses, added to the loss"
    )
    beta: float = Field(0.1, gt=0, description="DPO's beta")
    learning_rate: float = Field(2e-5, gt=0, description="peak, AdamW, linear decay")
    warmup: float = Field(0.1, ge=0, lt=1, description="share of the steps")
    epochs: float = Field(1.0, gt=0, description="passes over the pairs")
    batch_size: int = Field(16, ge=1, description="pairs per optimizer step")
    micro_batch: int = Field(4, ge=1, description="pairs per forward pass")
    lora_rank: int = Field(16, ge=1, description="r, on all linear layers")
    lora_alpha: int = Field(32, ge=1, description="scale of the adapter is alpha / r")
    optimizer: Literal["adamw_torch", "adamw_8bit", "paged_adamw_8bit"] = Field(
        "adamw_torch", description="its state takes 8, 2 or (paged) no bytes a parameter on the GPU"
    )
    activation_offload: bool = Field(
        False, description="layer inputs go to main memory; with gradient_checkpointing"
    )
    gradient_checkpointing: bool = Field(True, description="less memory, about a third slower")
    prefix_sharing: bool = Field(True, description="compute shared prompt prefixes once")
    held_out: float = Field(0.1, gt=0, lt=0.5, description="share of pairs kept for early stopping")
    patience: int = Field(3, ge=1, description="evaluations without a better held-out margin")
    evaluations: int = Field(6, ge=1, description="held-out evaluations over the training")

    sft_baseline: bool = Field(
        False, description="also train and measure SFT on the chosen responses, to compare"
    )
    eval_prompts: int = Field(40, ge=2, description="held-out prompts of the evaluation")
    eval_samples: int = Field(1, ge=1, description="sampled responses per held-out prompt")
    eval_contexts: int = Field(8, ge=2, description="contexts that a response is ranked among")

    compare_merges: bool = Field(
        False, description="say which merge is closer to what was trained: 16-bit or 4-bit weights"
    )
    quants: list[str] = Field(["q4_k_m"], min_length=1, description="GGUF files to write")

    @field_validator("quants")
    @classmethod
    def _check_quants(cls, quants: list[str]) -> list[str]:
        for kind in quants:
            if kind.upper() not in (*PLAIN, *KINDS):
                known = (k.lower() for k in (*PLAIN, *KINDS) if not needs_imatrix(k))
                raise UsageError(
                    f"quants can not be {quants!r}: there is no type {kind}.",
                    f"Known: {', '.join(known)}.",
                )
            if needs_imatrix(kind):
                raise UsageError(
                    f"quants can not be {quants!r}: {kind} needs an importance matrix, which the "
                    "export of a finished run makes.",
                    f"Leave it out, and afterwards: mipo-lite export RUN --imatrix --quant {kind}",
                )
        return [kind.lower() for kind in quants]

    @property
    def losses(self) -> dict[str, float]:
        """TRL's loss types with their weights; `sft` is not added to itself."""
        weights: dict[str, float] = {self.loss: 1.0}
        if self.sft_weight and self.loss != "sft":
            weights["sft"] = self.sft_weight
        return weights

    @property
    def departures(self) -> list[str]:
        """How a run departs from the method, which is DPO on pairs as the base samples them."""
        found = []
        if self.temperature != 1:
            found.append(f"temperature {self.temperature} instead of 1")
        if self.top_p != 1:
            found.append(f"top_p {self.top_p} instead of 1")
        if self.loss != "sigmoid":
            found.append(f"loss {self.loss} instead of DPO's")
        if len(self.losses) > 1:
            found.append(f"the SFT loss on chosen responses is added, times {self.sft_weight:g}")
        return found


def recipe_names() -> list[str]:
    return sorted(path.stem for path in _SHIPPED.glob("*.yaml"))


def recipe_text(name: str) -> str:
    """The text of a shipped recipe. Raises UsageError for an unknown name."""
    path = _SHIPPED / f"{name}.yaml"
    if name not in recipe_names():
        raise UsageError(
            f"There is no recipe {name!r}.{_nearest(name, recipe_names())}",
            f"Known: {', '.join(recipe_names())}; or give a YAML file.",
        )
    return path.read_text("utf-8")


def load_recipe(
    name_or_file: str | None = None,
    assignments: Iterable[str] = (),
    flags: dict[str, Any] | None = None,
) -> Recipe:
    """Defaults < recipe < `key=value` assignments < flags (None values are not given).

    Raises UsageError for an unknown recipe, an unknown key or a value out of range.
    """
    values: dict[str, Any] = {}
    if name_or_file is not None:
        path = Path(name_or_file)
        is_file = path.suffix in (".yaml", ".yml") or path.is_file()
        values |= _parse(
            _read(path) if is_file else recipe_text(name_or_file),
            str(path) if is_file else f"recipe {name_or_file}",
        )
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals:
            raise UsageError(
                f"--set {assignment} is not key=value.", "For example: --set learning_rate=1e-4"
            )
        values[key.strip()] = _value(text)
    values |= {key: value for key, value in (flags or {}).items() if value is not None}
    return make_recipe(values)


def load_recipe_for(
    base: str,
    name_or_file: str | None = None,
    assignments: Iterable[str] = (),
    flags: dict[str, Any] | None = None,
    defaults: tuple[str, str] = ("builtin", "default"),
) -> Recipe:
    """As `load_recipe`, but without a recipe the base decides: `defaults` (built-in, other)."""
    default = defaults[base != "builtin"]
    return load_recipe(default if name_or_file is None else name_or_file, assignments, flags)


def given_settings(assignments: Iterable[str]) -> set[str]:
    """The names of the settings in `key=value` assignments."""
    return {assignment.partition("=")[0].strip() for assignment in assignments}


def make_recipe(values: dict[str, Any]) -> Recipe:
    """Validate; the first thing wrong is raised as a UsageError that names it."""
    for key in values:
        if key not in Recipe.model_fields:
            raise UsageError(
                f"There is no setting {key!r}.{_nearest(key, Recipe.model_fields)}",
                "`mipo-lite recipes default` prints them all.",
            )
    try:
        return Recipe(**values)
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0])
        about = Recipe.model_fields[key].description
        raise UsageError(
            f"{key} can not be {values[key]!r}: {first['msg'][0].lower()}{first['msg'][1:]}.",
            f"{key} is: {about}.",
        ) from error


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"The recipe {path} can not be read.",
            f"Give a YAML file, or one of: {', '.join(recipe_names())}.",
        ) from error


def _parse(text: str, source: str) -> dict[str, Any]:
    try:
        values = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" (line {mark.line + 1})" if mark else ""
        raise UsageError(
            f"{source} is not valid YAML{where}.", "Write `key: value` lines."
        ) from error
    if not isinstance(values, dict):
        raise UsageError(f"{source} is not a list of settings.", "Write `key: value` lines.")
    return {str(key): _number(value) for key, value in values.items()}


def _value(text: str) -> Any:
    try:
        return _number(yaml.safe_load(text))
    except yaml.YAMLError:
        return text


def _number(value: Any) -> Any:
    # YAML 1.1 reads 1e-4 as a string, since it wants 1.0e-4.
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            pass
    return value


def _nearest(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(known), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""
