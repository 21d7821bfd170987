"""Loading a base: what is refused before anything is sampled from it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from transformers import GraniteConfig, GraniteForCausalLM, Qwen3NextConfig, Qwen3NextForCausalLM

from mipo_lite.base import BUILTIN, BaseSource, find_base, load_base, load_tokenizer
from mipo_lite.errors import UsageError, UserError

SIZES = {
    "vocab_size": 1536,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
LINEAR = {"layer_types": ["linear_attention", "full_attention"], "mlp_only_layers": [0, 1]}


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (
            lambda: GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=8.0)),
            "granite scales its logits by logits_scaling",
        ),
        (
            lambda: Qwen3NextForCausalLM(Qwen3NextConfig(**SIZES, head_dim=8, **LINEAR)),
            "Qwen3NextModel has layers of type linear_attention",
        ),
    ],
)
def test_a_family_that_cannot_share_prefixes_is_refused(tmp_path: Path, model, reason: str) -> None:
    model().save_pretrained(tmp_path)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(find_base("builtin").path / file, tmp_path)
    with pytest.raises(UserError) as caught:
        load_base(BaseSource("org/strange", tmp_path), quantized=False)
    assert caught.value.what == f"org/strange cannot be used here: {reason}."
    assert "another family" in caught.value.fix


def test_code_of_a_base_runs_from_a_directory_only_and_is_shown(tmp_path: Path, capsys) -> None:
    shutil.copytree(BUILTIN, tmp_path / "base")
    load_tokenizer(BaseSource("mine", tmp_path / "base"), trust_remote_code=True)
    assert f"Code in {tmp_path / 'base'} will be run" in capsys.readouterr().out
    with pytest.raises(UsageError, match="is for a directory"):
        load_tokenizer(BaseSource("a/b", tmp_path / "base", "1" * 40), trust_remote_code=True)
