"""Is the file the model that was trained? Next-token distributions of both, position by position.

The reference is the model in torch (or another GGUF file); its distributions are computed first
and kept, so that never two models are in memory. Positions are capped, because a distribution over
a large vocabulary is large.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from ..checkpoint import DTYPES, Checkpoint
from ..contexts import Messages, encode_prompt
from ..machine import available_memory
from ..merging import MergedCheckpoint, Onto
from ..sampling import Sample
from .llama import Reader, encode, is_end, open_gguf
from .room import NoRoom, find_device
from .template import ChatTemplate
from .vocabulary import load_tokenizer

Row: TypeAlias = tuple[list[int], list[int]]  # prompt ids, response ids
Distributions: TypeAlias = list[NDArray[np.float32]]  # a row: [response, vocabulary], log-probs

MAX_BYTES = 512 << 20  # of kept distributions
OTHER_TEMPLATE = (
    "llama.cpp renders the chat template differently than in training: answers may be worse there."
)


def cap_rows(rows: Sequence[Row], vocabulary: int) -> list[Row]:
    """As many of the first rows as fit into `MAX_BYTES`, at least one."""
    room = MAX_BYTES // (4 * vocabulary)
    kept: list[Row] = []
    for prompt, response in rows:
        if response and (not kept or sum(len(r) for _, r in kept) + len(response) <= room):
            kept.append((prompt, response[:room]))
    return kept


def torch_distributions(model: Any, rows: Sequence[Row]) -> Distributions:
    """Log-probs of a transformers model at every response position; plain, row by row."""
    result = []
    for prompt, response in rows:
        tokens = torch.tensor([prompt + response[:-1]], device=model.device)
        with torch.no_grad():
            logits = model(tokens, logits_to_keep=len(response)).logits[0]
        result.append(logits.float().log_softmax(-1).cpu().numpy())
    return result


def gguf_distributions(
    path: Path | str, rows: Sequence[Row], *, lora: Path | str | None = None, exact: bool = False
) -> Iterator[NDArray[np.float32]]:
    """The same from a GGUF file in llama.cpp, a row at a time.

    Args:
        lora: a LoRA GGUF on top.
        exact: keep keys and values in float32 instead of float16.
    """
    longest = max(len(prompt) + len(response) for prompt, response in rows)
    options: dict[str, Any] = {"n_ctx": longest + 8, "lora_path": str(lora) if lora else None}
    if exact:
        options |= {"type_k": 0, "type_v": 0}  # GGML_TYPE_F32
    with open_gguf(path, **options) as llama:
        reader = Reader(llama)
        for prompt, response in rows:
            yield log_softmax(reader.logits(prompt, response))


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Over the last axis."""
    shifted = logits - logits.max(-1, keepdims=True)
    result: NDArray[np.float32] = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result


def divergence(p: NDArray[np.float32], q: NDArray[np.float32]) -> NDArray[np.float32]:
    """KL(p || q) in nats at every position, of log-probs [positions, vocabulary]."""
    result: NDArray[np.float32] = (np.exp(p) * (p - q)).sum(-1)
    return result


def agreement(reference: Distributions, other: Iterator[NDArray[np.float32]]) -> dict[str, Any]:
    """How close `other` is to `reference`.

    Returns:
        positions; greedy_agreement, the share of positions with the same most likely token;
        mean_kl and p99_kl, KL(reference || other) in nats; max_difference of log-probs.
    """
    kl, same, largest = [], [], 0.0
    for p, q in zip(reference, other, strict=True):
        kl.append(divergence(p, q))
        same.append(p.argmax(-1) == q.argmax(-1))
        largest = max(largest, float(np.abs(p - q).max()))
    kls = np.concatenate(kl)
    return {
        "positions": len(kls),
        "greedy_agreement": float(np.concatenate(same).mean()),
        "mean_kl": max(0.0, float(kls.mean())),
        "p99_kl": max(0.0, float(np.quantile(kls, 0.99))),
        "max_difference": largest,
    }


def load_model(
    model_dir: Path | str,
    adapter_dir: Path | str | None = None,
    *,
    onto: Onto = "full",
    device: str = "cpu",
) -> Any:
    """The model in torch, merged with the adapter: in float32 where half of the memory holds it.

    Whether `device` has room is the caller's to ask, see `room`.
    """
    from transformers import AutoModelForCausalLM

    stored = Checkpoint(model_dir)
    numbers = sum(entry.nbytes // DTYPES[entry.dtype].itemsize for entry in stored.entries.values())
    roomy = device == "cpu" and numbers * 4 < available_memory() / 2
    model: Any = AutoModelForCausalLM.from_pretrained(
        model_dir,
        dtype=torch.float32 if roomy else "auto",
        device_map=None if device == "cpu" else device,  # past main memory, which may be smaller
        use_safetensors=True,
    )
    if adapter_dir is not None:
        # Not by PEFT: it would merge in float32, and the file holds 16 bits.
        merged = MergedCheckpoint(model_dir, adapter_dir, onto)
        for name in filter(merged.changes, merged.entries):
            model.get_parameter(name).data.copy_(merged.read(name))
    return model.eval()


def check_exports(
    files: Sequence[Path],
    model_dir: Path | str,
    chats: Sequence[Messages],
    responses: Sequence[list[int]],
    *,
    adapter_dir: Path | str | None = None,
    onto: Onto = "full",
) -> list[dict[str, Any]]:
    """`self_check` of every file against `model_dir` (with `adapter_dir`), loaded once and freed.

    Where no memory holds the model, only what llama.cpp does alone is checked, and "skipped" says
    why; nothing fails.

    Args:
        adapter_dir, onto: as the files were exported.
        chats: held-out prompts with the user's context, as messages.
        responses: token ids of an answer of the model to each.
    """
    tokenizer = load_tokenizer(model_dir)
    rows = check_rows(tokenizer, chats, responses)
    try:
        device = find_device(model_dir, "Comparing it with the model in torch")
    except NoRoom as error:
        checks = [self_check(file, tokenizer, chats, rows, None) for file in files]
        return [check | {"skipped": error.what} for check in checks]
    model = load_model(model_dir, adapter_dir, onto=onto, device=device)
    reference = torch_distributions(model, rows)
    del model
    return [self_check(file, tokenizer, chats, rows, reference) for file in files]


def self_check(
    path: Path | str,
    tokenizer: Any,
    chats: Sequence[Messages],
    rows: Sequence[Row],
    reference: Distributions | None,
    *,
    max_new_tokens: int = 256,
) -> dict[str, Any]:
    """Everything a user may ask of an exported file, for metrics.json.

    Args:
        tokenizer: of the merged model.
        chats: held-out prompts with the user's context, as messages.
        rows: `check_rows` of them.
        reference: `torch_distributions` of the merged model on the rows; None leaves `agreement`
            out.
        max_new_tokens: of the greedy answers that have to end by themselves.

    Returns:
        What `agreement` returns, and: file, bytes; template_equal, whether llama.cpp's side
        renders and encodes every chat as the tokenizer does; answers and ended, how many greedy
        answers were asked for and how many of them stopped at an end token; warnings, lines that
            say what is wrong with the file.
    """
    path = Path(path)
    result: dict[str, Any] = {"file": path.name, "bytes": path.stat().st_size}
    if reference is not None:
        result |= agreement(reference, gguf_distributions(path, rows))
    prompts = [encode_prompt(tokenizer, chat) for chat in chats]
    with open_gguf(path, n_ctx=max(map(len, prompts))) as llama:
        template = ChatTemplate(llama)
        rendered = [template.apply_chat_template(chat, answer=True) for chat in chats]
        result["template_equal"] = [encode(llama, text) for text in rendered] == prompts
    answers = gguf_answers(path, prompts[:8], max_new_tokens=max_new_tokens, temperature=0.0)
    result |= {"answers": len(answers), "ended": sum(a.ended for a in answers)}
    return result | {"warnings": [] if result["template_equal"] else [OTHER_TEMPLATE]}


def gguf_answers(
    path: Path | str,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    seed: int = 0,
) -> list[Sample]:
    """Answers of a GGUF file in llama.cpp, as `sampling.sample` gives them.

    Args:
        temperature: 0 is greedy.
        seed: of the first prompt; each further one takes the next.
    """
    samples = []
    with open_gguf(path, n_ctx=max(map(len, prompts)) + max_new_tokens) as llama:
        for number, prompt in enumerate(prompts):
            llama.set_seed(seed + number)
            stream = llama.generate(
                prompt, temp=temperature, top_k=0, top_p=1.0, min_p=0.0, repeat_penalty=1.0
            )
            tokens: list[int] = []
            for token in stream:
                tokens.append(token)
                if is_end(llama, token) or len(tokens) == max_new_tokens:
                    break
            samples.append(Sample(tokens, is_end(llama, tokens[-1])))
    return samples


def check_rows(
    tokenizer: Any, chats: Sequence[Messages], responses: Sequence[list[int]]
) -> list[Row]:
    """The rows that a check compares, capped for the tokenizer's vocabulary."""
    prompts = (encode_prompt(tokenizer, chat) for chat in chats)
    return cap_rows(list(zip(prompts, responses, strict=True)), len(tokenizer))


def merge_fidelity(
    policy: Any, merged: Mapping[str, Path], rows: Sequence[Row]
) -> dict[str, dict[str, Any]]:
    """How closely merged directories reproduce the trained policy, in torch.

    Args:
        policy: 4-bit base with the adapter, as trained.
        merged: "full" and "dequantized" -> merged directory.
    """
    rows = cap_rows(rows, policy.config.vocab_size)
    reference = torch_distributions(policy, rows)
    device = str(policy.device)
    return {
        name: agreement(reference, iter(torch_distributions(load_model(path, device=device), rows)))
        for name, path in merged.items()
    }
