"""The base: load a causal LM in 4-bit NF4, with its tokenizer and chat template.

Weights are safetensors only, code from a model repository runs only when the user says so, and
everything downstream gets a `Base` and never asks where it came from. `bases` finds it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

from .bases import BUILTIN, BaseSource, find_base
from .console import console
from .contexts import Messages, build_messages, encode_prompt, has_system_role
from .errors import UsageError, UserError

__all__ = ["BUILTIN", "Base", "BaseSource", "find_base", "load_base"]


@dataclass
class Base:
    """A loaded base.

    Attributes:
        model: the transformers causal LM, in evaluation mode, frozen.
        eos_ids: every token id that ends a response.
        system_role: whether its chat template has a system role.
    """

    source: BaseSource
    model: Any
    tokenizer: Any
    eos_ids: list[int]
    system_role: bool

    @property
    def pad_id(self) -> int:
        return int(self.tokenizer.pad_token_id)

    def messages(self, prompt: str, context: str | None) -> Messages:
        return build_messages(prompt, context, self.system_role)

    def encode(self, prompt: str, context: str | None) -> list[int]:
        """Token ids of the chat, up to where the assistant's answer begins."""
        return encode_prompt(self.tokenizer, self.messages(prompt, context))

    def decode(self, token_ids: list[int]) -> str:
        """The text of a response, without its end token."""
        return str(self.tokenizer.decode(token_ids, skip_special_tokens=True)).strip()


def load_base(
    source: BaseSource, *, quantized: bool = True, trust_remote_code: bool = False
) -> Base:
    """Load a base for sampling, scoring and training.

    Args:
        quantized: NF4 with double quantization; False loads 16 or 32 bits (for checks).

    On CUDA with bfloat16 the compute dtype is bfloat16. Elsewhere it is float32: only the newest
    CPUs multiply bfloat16 faster, and everything is then exact to check.

    Raises UserError when the tokenizer has no chat template, or the model's layers cannot share
    prefixes.
    """
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.utils.logging import disable_progress_bar

    from .scoring import UnsupportedModel, check_scorable

    disable_progress_bar()
    tokenizer = load_tokenizer(source, trust_remote_code)
    on_gpu = torch.cuda.is_available()
    bf16 = on_gpu and torch.cuda.is_bf16_supported()
    dtype = torch.bfloat16 if bf16 else torch.float16 if on_gpu else torch.float32
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )
    model = AutoModelForCausalLM.from_pretrained(
        source.path,
        dtype=dtype,
        quantization_config=quantization if quantized else None,
        device_map={"": torch.cuda.current_device() if on_gpu else "cpu"},
        use_safetensors=True,
        trust_remote_code=trust_remote_code,
    )
    try:
        check_scorable(model)
    except UnsupportedModel as error:
        raise UserError(
            f"{source.name} cannot be used here: {error}.",
            "Choose a base of another family: Llama, Mistral, Qwen2, Qwen3, SmolLM or Gemma.",
        ) from error
    keep_backward_on_cpu(model)
    model.requires_grad_(False)
    model.eval()
    eos = model.generation_config.eos_token_id
    eos_ids = set(eos if isinstance(eos, list) else [eos]) | {tokenizer.eos_token_id}
    return Base(
        source=source,
        model=model,
        tokenizer=tokenizer,
        eos_ids=sorted(token for token in eos_ids if token is not None),
        system_role=has_system_role(tokenizer),
    )


def load_tokenizer(source: BaseSource, trust_remote_code: bool = False) -> Any:
    """The tokenizer with its chat template and a padding token.

    Raises UserError when it has no chat template, or the directory holds no tokenizer, UsageError
    for code from a base of the hub.
    """
    from transformers import AutoTokenizer

    if trust_remote_code:
        _show_trust(source)

    try:
        tokenizer = AutoTokenizer.from_pretrained(source.path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{source.name} has no tokenizer that transformers can read.",
            "Complete its directory: tokenizer.json and tokenizer_config.json are missing or old.",
        ) from error
    if not tokenizer.chat_template:
        raise UserError(
            f"{source.name} has no chat template: it is not an instruct model.",
            "Choose its instruct version, or put a chat_template.jinja into its directory.",
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@cache
def _show_trust(source: BaseSource) -> None:
    """Say whose code is about to run. From the hub it is not even downloaded."""
    if source.revision is not None:
        raise UsageError(
            f"--trust-remote-code is for a directory, and {source.name} is a base of the hub.",
            "Download it, read its code, and give the directory as --base.",
        )
    console.print(
        f"Code in {source.path} will be run, as --trust-remote-code says.",
        markup=False,
        soft_wrap=True,
    )


def check_context_fits(
    source: BaseSource, context: str, max_new_tokens: int, trust_remote_code: bool = False
) -> None:
    """Raises UserError when the context leaves no room for a request and its answer.

    Reads the tokenizer and the config only, so that it can be asked before anything is made.
    """
    from transformers import AutoConfig

    tokenizer = load_tokenizer(source, trust_remote_code)
    config = AutoConfig.from_pretrained(source.path, trust_remote_code=trust_remote_code)
    messages = build_messages("", context, has_system_role(tokenizer))
    used = len(encode_prompt(tokenizer, messages))
    window = config.get_text_config().max_position_embeddings
    room = window - max_new_tokens - 64  # 64 tokens: a request of ordinary length
    if used > room:
        raise UserError(
            f"The user context takes {used} tokens; {source.name} has room for {room}.",
            "Shorten the file, or choose a base with a larger window.",
        )


def keep_backward_on_cpu(model: Any) -> None:
    """Keep bitsandbytes from repacking 4-bit weights for inference on CPUs with AVX512-BF16.

    The packed product has no backward: a model that has sampled would then train on broken
    gradients, in silence. Sampling and training share one model here, so packing stays off.
    """
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
