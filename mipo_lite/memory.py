"""Memory by part, in bytes, from a model's shape: what sampling, scoring and training hold.

Pure arithmetic on a `Shape`; no torch, no device. Every function states its formula. What it
counts as saved for the backward pass is what PyTorch, transformers, PEFT and bitsandbytes really
save (a test counts the saved tensors); the constants below it can not derive are marked as such.

Letters: h hidden, q and k widths of queries and keys, i MLP width, V vocabulary, r LoRA rank,
L layers, T tokens computed at once (after prefix sharing), c bytes of a number in the compute
dtype (2 on a GPU, 4 on a CPU).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .shapes import Shape

MIB = 2**20
GIB = 2**30

# Not derived and not measured by us: what a CUDA context with cuBLAS, the kernels of PyTorch,
# bitsandbytes and Triton takes on recent NVIDIA GPUs is reported between 0.3 and 0.6 GiB.
CUDA_CONTEXT = GIB // 2
# What Python with all libraries loaded holds on a CPU, resident.
CPU_PROCESS = 6 * GIB // 10
# Share of the varying memory that the caching allocator can not use again: blocks are rounded up,
# and batches differ in length. Not measured; calibration corrects it on the user's machine.
FRAGMENTATION = 0.10

# TRL's fused LM head projects at most this many positions and vocabulary entries at a time.
HEAD_POSITIONS, HEAD_VOCAB = 4096, 32768
# `scoring.token_logprobs` makes this many logits at a time.
SCORING_TILE = 16 * MIB
# `trie_attention.BLOCK` and `.FLEX_FROM`, which live beside torch.
QUERY_BLOCK, FLEX_FROM = 256, 1024
# With activation offloading TRL keeps up to this many saved tensors on the GPU.
OFFLOAD_STASH = 5

# Bytes of optimizer state per parameter that stay on the device. The 8-bit states carry one
# float32 scale per 256 elements each; paged states leave the GPU when it is full.
OPTIMIZER_BYTES = {
    "adamw_torch": 8.0,
    "adamw_8bit": 2 * (1 + 4 / 256),
    "paged_adamw_8bit": 0.0,
}


@dataclass(frozen=True)
class Part:
    """One line of a plan.

    Attributes:
        in_turn: it is needed at another moment than the other parts so marked: of those only the
            largest counts.
        varies: it depends on batch and length, so the measured factor applies to it.
    """

    name: str
    bytes: int
    in_turn: bool = False
    varies: bool = True


@dataclass(frozen=True)
class Attention:
    """How attention runs over the tokens of a batch (see `trie_attention`).

    Attributes:
        mask: elements of all boolean masks; 0 with FlexAttention, which needs none.
        picked: tokens whose keys and values are copied together for blocks of queries.
        flex: FlexAttention, which takes keys and values without repeating them to all heads.
    """

    mask: int
    picked: int = 0
    flex: bool = False


@dataclass(frozen=True)
class Batch:
    """What is computed at once in training.

    Attributes:
        tokens: T, slots of the trie, or all tokens of the rows without prefix sharing.
        rows: responses: two for a pair.
        length: tokens of the longest row.
        labels: tokens that are scored: those of the responses.
        shared: whether the rows are gathered back from a trie.
    """

    tokens: int
    rows: int
    length: int
    labels: int
    attention: Attention
    shared: bool


def trie_attention(
    context: int, prompts: int, prompt: int, answers: int, answer: int, *, gpu: bool
) -> Attention:
    """Attention over a trie: a context, then `prompts` prompts, each with `answers` answers.

    Args:
        context, prompt, answer: tokens of each.

    Queries go in blocks of 256: a block reads the ancestors of its first slot and its own slots;
    where those do not lie side by side they are copied together.
    """
    branch = prompt + answers * answer
    tokens = context + prompts * branch
    if gpu and tokens >= FLEX_FROM:
        return Attention(0, flex=True)
    mask = picked = 0
    for start in range(0, tokens, QUERY_BLOCK):
        within = (start - context) % branch if start > context else 0
        ancestors = start
        adjacent = True
        if start > context:
            # In its own branch it sees the prompt and its own response, not the ones before.
            own = within if within < prompt else prompt + (within - prompt) % max(answer, 1)
            ancestors = context + own
            adjacent = ancestors == start
        keys = ancestors + min(QUERY_BLOCK, tokens - start)
        chain = start == 0 and keys <= context + prompt + answer  # plainly causal: no mask
        mask += 0 if chain else min(QUERY_BLOCK, tokens - start) * keys
        picked += 0 if adjacent else keys
    return Attention(mask, picked)


def total(parts: list[Part]) -> int:
    """Bytes at the peak: everything held at once, and the largest of what comes in turn."""
    held = sum(part.bytes for part in parts if not part.in_turn)
    return held + max((part.bytes for part in parts if part.in_turn), default=0)


def nf4_bytes(elements: int) -> int:
    """A weight matrix in NF4 with double quantization, as bitsandbytes stores it.

    4 bits a weight; one 8-bit scale for 64 weights; one float32 for 256 of those scales: 4.127
    bits a weight. Plus what every matrix has of its own: the 16 values of NF4 and the 256 of the
    8-bit scales in float32, and the mean scale (1,092 bytes).
    """
    scales = math.ceil(elements / 64)
    return math.ceil(elements / 2) + scales + 4 * math.ceil(scales / 256) + 4 * (16 + 256 + 1)


def weight_bytes(shape: Shape, c: int) -> int:
    """The base: linear layers in NF4; embedding, LM head, norms and biases in the compute dtype."""
    linears = shape.layers * sum(nf4_bytes(n * m) for n, m in shape.linears)
    return linears + c * (shape.embedding_parameters + shape.small_parameters)


def cache_bytes(shape: Shape, rows: int, tokens: int, c: int) -> int:
    """Keys and values of `rows` rows of `tokens` tokens: 2 c k rows x tokens, summed over layers.

    A sliding-window layer keeps the last window - 1 tokens and the new one.
    """
    full = (shape.layers - shape.sliding_layers) * tokens
    sliding = shape.sliding_layers * min(tokens, shape.sliding_window or tokens)
    return 2 * c * shape.key * rows * (full + sliding)


def attention_bytes(shape: Shape, tokens: int, attention: Attention, c: int) -> int:
    """What attention saves in a layer, apart from normalized queries and keys.

    FlexAttention: c (3 q + 2 k) + 4 heads a token: queries, its result as computed and as a
    contiguous row, keys, values, and the log-sum-exp of every head. In query blocks: c 5 q +
    4 heads, keys and values being repeated to all heads, and the copies of picked keys and values;
    also the masks once more in the compute dtype.
    """
    q, k = shape.query, shape.key
    if attention.flex:
        return tokens * (c * (3 * q + 2 * k) + 4 * shape.heads)
    blocks = 2 * c * q * attention.picked + c * attention.mask
    return tokens * (c * 5 * q + 4 * shape.heads) + blocks


def layer_bytes(shape: Shape, batch: Batch, rank: int, c: int) -> int:
    """What one decoder layer saves for its backward pass, LoRA on all of its linear layers.

    Per token: 4 h + 4 for each norm (its input in float32, and the scale); 2 c h, the outputs of
    the two norms that the LoRA layers read; 4 c i in the MLP (gate, its activation, up, and their
    product); c r for each LoRA layer; and `attention_bytes`. Normalized queries and keys save
    4 (q + k) more. The frozen weights save nothing: bitsandbytes unpacks them again.
    """
    h, q, k, i = shape.hidden, shape.query, shape.key, shape.intermediate
    per_token = shape.hidden_norms * (4 * h + 4) + 2 * c * h
    per_token += 4 * c * i + len(shape.linears) * c * rank
    if shape.qk_norm:
        per_token += 4 * (q + k) + 4 * (shape.heads + shape.kv_heads)
    return batch.tokens * per_token + attention_bytes(shape, batch.tokens, batch.attention, c)


def saved_bytes(shape: Shape, batch: Batch, rank: int, c: int) -> int:
    """Everything the backbone saves for the backward pass without checkpointing.

    All layers, the input of the last norm, the rotary tables (2 c head_dim a token), and under
    autocast (c = 2) the 16-bit copies of the float32 LoRA weights.
    """
    rest = batch.tokens * (4 * shape.hidden + 4 + 2 * c * shape.head_dim)
    copies = 2 * shape.lora_parameters(rank) if c == 2 else 0
    return shape.layers * layer_bytes(shape, batch, rank, c) + rest + copies


def checkpoint_bytes(shape: Shape, batch: Batch, rank: int, c: int, offload: bool) -> int:
    """What is saved with gradient checkpointing: the input of every layer, c h a token.

    With activation offloading only the last few of them stay on the GPU.
    """
    kept = min(shape.layers, OFFLOAD_STASH) if offload else shape.layers
    rest = batch.tokens * (4 * shape.hidden + 4 + 2 * c * shape.head_dim)
    copies = 2 * shape.lora_parameters(rank) if c == 2 else 0
    return kept * batch.tokens * c * shape.hidden + rest + copies


def working_bytes(shape: Shape, tokens: int, attention: Attention, c: int) -> int:
    """What a layer needs beside what it saves, forward or backward.

    Three tensors as wide as the MLP (a result, its clone and its LoRA part forward; the gradients
    of gate, up and their product backward) or five as wide as the queries (attention), two as
    wide as the residual, the boolean masks, and the largest weight unpacked to the compute dtype.
    """
    widest = max(n * m for n, m in shape.linears)
    wide = max(3 * shape.intermediate, 5 * shape.query)
    return c * tokens * (wide + 2 * shape.hidden) + attention.mask + c * widest


def check_bytes(shape: Shape, batch: Batch, c: int) -> int:
    """Comparing both paths on a batch at the start of training, without gradients.

    The trainer compares four rows. The plain path computes all their tokens; both results are
    held in float32.
    """
    rows = min(batch.rows, 4)
    tokens = rows * batch.length
    plain = Attention(rows * batch.length**2)
    return working_bytes(shape, tokens, plain, c) + 2 * 4 * tokens * shape.hidden


def head_bytes(shape: Shape, batch: Batch, c: int) -> int:
    """The LM head of a training step.

    One tile of logits, c x min(labels, 4096) x min(V, 32768), never all of them; the labelled
    hidden states and their gradient in both dtypes, (2 c + 4) h each; the rows gathered back from
    the trie and their gradient, 2 c h for each token of the padded rows. Without Triton (on a
    CPU) TRL folds a tile with five float32 copies of it.
    """
    tile = min(batch.labels, HEAD_POSITIONS) * min(shape.vocab, HEAD_VOCAB)
    states = batch.labels * shape.hidden * (2 * c + 4)
    gathered = 2 * c * batch.rows * batch.length * shape.hidden if batch.shared else 0
    return tile * (c if c == 2 else c + 5 * 4) + states + gathered


def training_parts(
    shape: Shape,
    batch: Batch,
    *,
    rank: int,
    checkpointing: bool,
    offload: bool,
    optimizer: str,
    c: int,
) -> list[Part]:
    """Training: weights, LoRA in float32 with gradients, optimizer, activations, working space."""
    lora = shape.lora_parameters(rank)
    state = math.ceil(OPTIMIZER_BYTES[optimizer] * lora)
    working = working_bytes(shape, batch.tokens, batch.attention, c)
    if checkpointing:
        saved = checkpoint_bytes(shape, batch, rank, c, offload)
        working += layer_bytes(shape, batch, rank, c)
    else:
        saved = saved_bytes(shape, batch, rank, c)
    name = "layer inputs (checkpointing)" if checkpointing else "activations"
    # The check at the start has the room of the activations too.
    check = max(0, check_bytes(shape, batch, c) - saved) if batch.shared else 0
    return [
        Part("weights, NF4", weight_bytes(shape, c), varies=False),
        Part("LoRA and its gradient", 8 * lora, varies=False),
        Part(f"optimizer, {optimizer}", state, varies=False),
        Part(name, saved),
        Part("one layer at work", working, in_turn=True),
        Part("LM head, a tile of logits", head_bytes(shape, batch, c), in_turn=True),
        Part("the check of shared prefixes", check, in_turn=True),
    ]


def sampling_parts(
    shape: Shape,
    *,
    rows: int,
    length: int,
    prefill: int,
    attention: Attention,
    rank: int,
    c: int,
) -> list[Part]:
    """Sampling `rows` responses at once, the longest prompt and response `length` tokens.

    The cache, one layer of it twice while it grows by a token; reading the prompts (`prefill`
    tokens of the trie, with a cache of their own); or choosing tokens: logits in the compute
    dtype and about 26 bytes an entry for probabilities, their running sum and the draw.
    """
    cache = cache_bytes(shape, rows, length, c)
    reading = cache_bytes(shape, 1, prefill, c) + working_bytes(shape, prefill, attention, c)
    return [
        Part("weights, NF4", weight_bytes(shape, c), varies=False),
        Part("LoRA", 4 * shape.lora_parameters(rank), varies=False),
        Part("keys and values", cache + cache // shape.layers),
        Part("reading the prompts", reading, in_turn=True),
        Part("choosing tokens", rows * shape.vocab * (c + 26), in_turn=True),
    ]


def scoring_parts(
    shape: Shape, *, tokens: int, attention: Attention, rank: int, c: int
) -> list[Part]:
    """Scoring `tokens` tokens at once, without gradients: one layer at work, a tile of logits.

    A tile in the compute dtype and, for the softmax, twice in float32.
    """
    tile = SCORING_TILE * (c + 8)
    return [
        Part("weights, NF4", weight_bytes(shape, c), varies=False),
        Part("LoRA", 4 * shape.lora_parameters(rank), varies=False),
        Part("hidden states", 2 * c * tokens * shape.hidden),
        Part("one layer at work", working_bytes(shape, tokens, attention, c), in_turn=True),
        Part("a tile of logits", tile, in_turn=True),
    ]
