"""Shapes and bytes against what models really hold, and against published figures."""

from __future__ import annotations

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from tiny_models import CONFIGS, SHAPE, with_lora
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    DynamicCache,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

from mipo_lite import memory
from mipo_lite.base import keep_backward_on_cpu
from mipo_lite.errors import UserError
from mipo_lite.known_bases import KNOWN
from mipo_lite.memory import CUDA_CONTEXT, GIB, Attention, Batch, total
from mipo_lite.prefix_sharing import backbone_of, run_trie
from mipo_lite.shapes import shape_of
from mipo_lite.trie import build_trie
from mipo_lite.trie_attention import BLOCK, FLEX_FROM, plan_blocks

# Published numbers of parameters; an embedding that is also the LM head counts once.
PUBLISHED = {
    "Qwen/Qwen3-8B": 8_190_735_360,
    "meta-llama/Llama-3.1-8B-Instruct": 8_030_261_248,
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
    "mistralai/Mistral-7B-Instruct-v0.3": 7_248_023_552,
    "Qwen/Qwen3-4B-Instruct-2507": 4_022_468_096,
    "meta-llama/Llama-3.2-3B-Instruct": 3_212_749_824,
    "Qwen/Qwen2.5-3B-Instruct": 3_085_938_688,
    "Qwen/Qwen3-1.7B": 1_720_574_976,
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": 1_711_376_384,
    "Qwen/Qwen2.5-1.5B-Instruct": 1_543_714_304,
    "meta-llama/Llama-3.2-1B-Instruct": 1_235_814_400,
    "google/gemma-3-1b-it": 999_885_952,
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen2.5-0.5B-Instruct": 494_032_768,
    "HuggingFaceTB/SmolLM2-360M-Instruct": 361_821_120,
}
BY_NAME = {known.name: shape_of(known.config) for known in KNOWN}

# Shapes


@pytest.mark.parametrize("name", PUBLISHED)
def test_known_bases_have_the_published_number_of_parameters(name):
    assert BY_NAME[name].parameters == PUBLISHED[name]


def test_every_known_base_is_held_against_a_published_figure():
    assert [known.name for known in KNOWN] == list(PUBLISHED)


@pytest.mark.parametrize("family", [*CONFIGS, "phi3", "llama with biases"])
def test_parameters_are_those_of_the_model(family):
    config = CONFIGS.get(family) or Phi3Config(**{**SHAPE, "num_key_value_heads": 4})
    if family == "llama with biases":
        config = type(CONFIGS["llama"])(**SHAPE, attention_bias=True, mlp_bias=True)
    model = AutoModelForCausalLM.from_config(config)
    shape = shape_of(config)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    lora = with_lora(model)  # rank 4
    trained = sum(p.numel() for p in lora.parameters() if p.requires_grad)
    assert shape.lora_parameters(4) == trained


def test_what_published_configs_leave_out():
    gemma = {k: v for k, v in KNOWN[11].config.items() if k != "tie_word_embeddings"}
    assert shape_of(gemma) == shape_of(KNOWN[11].config)  # Gemma ties unless it says otherwise
    assert shape_of(gemma).sliding_layers == 22  # 5 of 6, 26 layers
    qwen = {**KNOWN[2].config, "sliding_window": 131072, "use_sliding_window": False}
    del qwen["head_dim"]
    assert shape_of(qwen) == shape_of(KNOWN[2].config)
    assert shape_of({"text_config": KNOWN[0].config, "model_type": "gemma3"}).layers == 36


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"num_experts": 8}, "mixture of experts"),
        ({"vocab_size": None}, "lacks"),
        ({"hidden_size": 0}, "lacks"),
    ],
)
def test_configs_that_can_not_be_planned(change, word):
    with pytest.raises(UserError, match=word):
        shape_of({**KNOWN[0].config, **change})


# Bytes, counted


@pytest.fixture(scope="module", params=["qwen2", "qwen3"])
def nf4(request, tmp_path_factory):
    """(config, NF4 model in float32 with LoRA of rank 4), large enough for several scales."""
    sizes = {**SHAPE, "hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
    config = {"qwen2": Qwen2Config, "qwen3": Qwen3Config}[request.param](**sizes)
    path = tmp_path_factory.mktemp(request.param)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(path)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, quantization_config=quantization, device_map={"": "cpu"}
    )
    keep_backward_on_cpu(model)
    return config, with_lora(model.requires_grad_(False))


def test_nf4_weights_to_the_byte(nf4):
    config, model = nf4
    held = 0
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            continue
        held += parameter.numel() * parameter.element_size()
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            scales = state.state2
            constants = (state.absmax, state.code, state.offset, scales.absmax, scales.code)
            held += sum(t.numel() * t.element_size() for t in constants)
    assert memory.weight_bytes(shape_of(config), 4) == held


def test_bits_of_a_weight():
    assert memory.nf4_bytes(2**24) * 8 / 2**24 == pytest.approx(
        4 + 8 / 64 + 32 / (64 * 256), rel=1e-3
    )


@pytest.mark.parametrize("tokens", [3, 40])
@pytest.mark.parametrize("family", ["qwen2", "gemma3"])
def test_keys_and_values_to_the_byte(family, tokens):
    config = CONFIGS[family]
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    cache = DynamicCache(config=config)
    with torch.no_grad():
        model(torch.zeros(3, tokens, dtype=torch.long), past_key_values=cache, use_cache=True)
    held = sum(
        t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values)
    )
    # Between two steps a sliding-window layer holds one token less than while it attends.
    shape = shape_of(config)
    slack = (
        2 * 4 * shape.key * 3 * shape.sliding_layers if tokens > 4 and shape.sliding_layers else 0
    )
    assert memory.cache_bytes(shape, 3, tokens, 4) - held == slack


def trie_rows(
    context: int, prompts: int, prompt: int, answers: int, answer: int
) -> list[list[int]]:
    """Rows that share what a batch of pairs shares, and differ where they should."""
    rows = []
    for p in range(prompts):
        for a in range(answers):
            row = [1] * context + [2 + p] + [1] * (prompt - 1) + [2 + a] + [1] * (answer - 1)
            rows.append(row)
    return rows


@pytest.mark.parametrize(
    "sizes", [(600, 4, 20, 2, 100), (300, 3, 30, 2, 7), (10, 5, 9, 2, 200), (0, 1, 9, 2, 5)]
)
def test_blocks_of_queries_are_those_of_the_engine(sizes):
    trie = build_trie(trie_rows(*sizes))
    context, prompts, prompt, answers, answer = sizes
    assert trie.size == context + prompts * (prompt + answers * answer)
    blocks = plan_blocks(trie, None)
    mask = sum(block.mask.numel() for block in blocks if block.mask is not None)
    picked = sum(
        sum(part.stop - part.start for part in block.keys)
        for block in blocks
        if len(block.keys) > 1
    )
    assert memory.trie_attention(*sizes, gpu=False) == Attention(mask, picked)


def test_constants_of_the_engine():
    assert (memory.QUERY_BLOCK, memory.FLEX_FROM) == (BLOCK, FLEX_FROM)
    assert memory.trie_attention(1000, 1, 20, 2, 20, gpu=True) == Attention(0, flex=True)
    assert not memory.trie_attention(100, 1, 20, 2, 20, gpu=True).flex


@pytest.mark.parametrize("autocast", [False, True])
def test_saved_for_the_backward_pass(nf4, monkeypatch, autocast):
    """Every tensor that autograd keeps is counted, by storage, and the plan is within 1 %."""
    config, model = nf4
    dtype = torch.bfloat16 if autocast else torch.float32
    # As on CUDA, where PEFT leaves its inputs to autocast; it asks without naming the device.
    # (autocast itself asks too, and would leave itself on: it gets the truth.)
    asked = torch.is_autocast_enabled
    monkeypatch.setattr(
        torch, "is_autocast_enabled", lambda *device: asked(*device) if device else autocast
    )
    model.get_base_model().enable_input_require_grads()
    sizes = (300, 2, 20, 2, 60)
    trie = build_trie(trie_rows(*sizes))
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.is_floating_point() and tensor.untyped_storage().data_ptr() not in own:
            kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    backbone = backbone_of(model)
    embedding = backbone.get_input_embeddings()
    small = [p for p in backbone.parameters() if not p.requires_grad and p.is_floating_point()]
    try:
        for parameter in small:
            parameter.data = parameter.data.to(dtype)
        for module in model.modules():
            if isinstance(module, Linear4bit):
                module.compute_dtype = dtype
        own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        ):
            hidden = run_trie(backbone, backbone, trie, use_cache=False).last_hidden_state
        assert hidden.dtype == dtype == embedding.weight.dtype
    finally:
        for parameter in small:
            parameter.data = parameter.data.float()
    held = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    attention = memory.trie_attention(*sizes, gpu=False)
    batch = Batch(trie.size, 4, 380, 240, attention, True)
    planned = memory.saved_bytes(shape_of(config), batch, 4, 2 if autocast else 4)
    assert planned == pytest.approx(held, rel=0.01)


# Published figures

# What others publish as the least card for QLoRA, in GB rounded to halves, and a model of that
# size. SFT figures: one row, an 8-bit optimizer, checkpointing with offloading.
MINIMUMS = {
    "meta-llama/Llama-3.2-3B-Instruct": 3.5,
    "mistralai/Mistral-7B-Instruct-v0.3": 5.0,
    "meta-llama/Llama-3.1-8B-Instruct": 6.0,
}


@pytest.mark.parametrize("name", MINIMUMS)
def test_published_minimums_of_qlora(name):
    """Within 15 %, with the CUDA context: 3.0, 5.1 and 6.6 GiB for 3.5, 5 and 6 GB."""
    batch = Batch(512, 1, 512, 512, Attention(0, flex=True), shared=False)
    parts = memory.training_parts(
        BY_NAME[name],
        batch,
        rank=16,
        checkpointing=True,
        offload=True,
        optimizer="adamw_8bit",
        c=2,
    )
    card = (total(parts) + CUDA_CONTEXT) / GIB
    assert card == pytest.approx(MINIMUMS[name], rel=0.15)
