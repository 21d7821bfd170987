"""`mipo-lite doctor`: what of this machine and this installation works, each failure with its mend.

Every check does the thing it speaks of: multiplies with a 4-bit weight, loads llama.cpp, writes
to the cache, asks the hub. Nothing is downloaded, and nothing is left behind.
"""

from __future__ import annotations

import json
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from .bases import BUILTIN, check_weights, hub_reachable
from .console import console
from .errors import UserError
from .machine import available_memory, find_gpu, has_driver
from .memory import GIB
from .planning import gib

State = Literal["ok", "warning", "failed"]

PYTHON = ((3, 10), (3, 13))
PACKAGES = ("torch", "transformers", "trl", "peft", "bitsandbytes", "llama-cpp-python")
# A run on the built-in base writes some MB; one on a 7 B base a download, a merged model and a
# 16-bit GGUF of 15 GB each.
DISK_LEAST, DISK_LARGE = GIB, 50 * GIB
# A base is loaded through main memory, tensor by tensor; comparing an exported file with the model
# in torch holds the 16-bit model as a whole (`gguf.room`): here, one of 8 B.
MEMORY_LEAST, MEMORY_LARGE = 4 * GIB, 18 * GIB
# A product in NF4 against one with the weight unpacked first, relative: rounding in float32 and
# in bfloat16.
TOLERANCE = {"cpu": 1e-4, "cuda": 2e-2}
# NF4 against the weights themselves, relative: 9 % for normally distributed ones.
NF4_ROUNDING = 0.15


@dataclass(frozen=True)
class Check:
    """A finding.

    Attributes:
        state: failed means that mipo-lite can not work as it is; a warning limits what it can do.
        found: what is there.
        mend: what to do about it; "" when it is ok.
    """

    name: str
    state: State
    found: str
    mend: str = ""


def diagnose() -> list[Check]:
    """All checks, in the order of a reader. A check that itself fails is a failed check."""
    with ThreadPoolExecutor(1) as pool:
        hub = pool.submit(hub_reachable)  # may wait two seconds; the others use them
        checks = [_guarded(name, check) for name, check in CHECKS.items()]
        return [*checks, _hub(hub.result())]


def print_checks(checks: list[Check], as_json: bool = False) -> bool:
    """Print them; whether nothing failed."""
    if as_json:
        print(json.dumps([asdict(check) for check in checks], indent=2))
    else:
        marks = {
            "ok": "[green]ok[/]     ",
            "warning": "[yellow]limited[/]",
            "failed": "[red]FAILED[/] ",
        }
        for check in checks:
            console.print(
                f"{marks[check.state]} [bold]{check.name:<13}[/] {check.found}", soft_wrap=True
            )
            if check.mend:
                console.print(f"{'':<22}{check.mend}", soft_wrap=True)
    return all(check.state != "failed" for check in checks)


def _guarded(name: str, check: Callable[[], Check]) -> Check:
    try:
        return check()
    # Whatever a broken installation raises on import or in a kernel is the finding.
    except Exception as error:
        reason = str(error).strip().splitlines()
        return Check(
            name,
            "failed",
            f"{type(error).__name__}: {reason[0] if reason else 'no message'}",
            "Install again in a fresh environment: make install.",
        )


def _python() -> Check:
    found = f"{platform.python_version()}, {platform.system()} {platform.machine()}"
    if not PYTHON[0] <= sys.version_info[:2] <= PYTHON[1]:
        low, high = (".".join(map(str, bound)) for bound in PYTHON)
        return Check("Python", "failed", found, f"Use Python {low} to {high}.")
    return Check("Python", "ok", found)


def _packages() -> Check:
    found, missing = [], []
    for package in PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            missing.append(package)
    if missing:
        words = ", ".join(missing)
        return Check(
            "packages",
            "failed",
            f"not installed: {words}",
            f"pip install {' '.join(missing)} -c constraints.txt",
        )
    return Check("packages", "ok", ", ".join(found))


def _torch() -> Check:
    import torch

    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    found = f"{torch.__version__} ({build})"
    if not has_driver():
        if torch.version.cuda:
            mend = "Install the NVIDIA driver, if this machine has such a GPU."
            return Check("torch", "warning", f"{found}, but no NVIDIA driver", mend)
        return Check("torch", "ok", f"{found}, no NVIDIA driver")
    if torch.version.cuda is None:
        return Check(
            "torch",
            "failed",
            f"{found}, though there is an NVIDIA driver",
            "Install a CUDA build of torch: https://pytorch.org/get-started/locally",
        )
    if not torch.cuda.is_available():
        return Check(
            "torch",
            "failed",
            f"{found}, but it can not use the GPU",
            f"The driver is older than CUDA {torch.version.cuda} wants: update it, or install a "
            "torch for an older CUDA. CUDA_VISIBLE_DEVICES may also hide the GPU.",
        )
    return Check("torch", "ok", found)


def _gpu() -> Check:
    gpu = find_gpu()
    if gpu is None:
        return Check(
            "GPU",
            "warning",
            "no CUDA GPU: the built-in base trains in minutes, a real model takes days",
            "For a real model use a machine with an NVIDIA GPU of 6 GB or more.",
        )
    import torch

    found = f"{gpu.name}, {gib(gpu.free)} of {gib(gpu.total)} free"
    if gpu.free < 3 * GIB:
        mend = "Close what else uses the GPU (nvidia-smi lists it)."
        return Check("GPU", "warning", found, mend)
    if not torch.cuda.is_bf16_supported():
        return Check(
            "GPU", "warning", f"{found}, no bfloat16", "It works in float16, less exactly."
        )
    return Check("GPU", "ok", found)


def _bitsandbytes() -> Check:
    import torch

    with _without_compiler(torch):
        from bitsandbytes import functional, matmul_4bit

    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(512, 256, generator=generator).to(device)
    inputs = torch.randn(8, 256, generator=generator).to(device)
    dtype = torch.bfloat16 if device == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    packed, state = functional.quantize_4bit(
        weight.to(dtype), quant_type="nf4", compress_statistics=True
    )
    unpacked = functional.dequantize_4bit(packed, state).float()
    product = matmul_4bit(inputs.to(dtype), packed.t(), state).float()
    expected = inputs.to(dtype).float() @ unpacked.t()
    error = float((product - expected).norm() / expected.norm())
    rounding = float((unpacked - weight).norm() / weight.norm())
    found = f"a product in NF4 on {device}: off by {error:.0e}, the weights by {rounding:.0%}"
    if not (error <= TOLERANCE[device] and rounding < NF4_ROUNDING):  # so that NaN fails too
        mend = "Install the tested version: pip install bitsandbytes -c constraints.txt"
        return Check("bitsandbytes", "failed", found, mend)
    return Check("bitsandbytes", "ok", found)


@contextmanager
def _without_compiler(torch: Any) -> Iterator[None]:
    """Let `torch.compile` do nothing while bitsandbytes is imported.

    It wraps its fallbacks in it on import; loading the compiler for that takes longer than all
    checks together, and they compute the same without it.
    """
    compiler = torch.compile
    torch.compile = lambda function, **options: function
    try:
        yield
    finally:
        torch.compile = compiler


def _llama_cpp() -> Check:
    import llama_cpp

    where = "on the GPU" if llama_cpp.llama_supports_gpu_offload() else "on the CPU"
    return Check("llama.cpp", "ok", f"llama-cpp-python {llama_cpp.__version__}, chats {where}")


def _memory() -> Check:
    free = available_memory()
    found = f"{gib(free)} available"
    if free < MEMORY_LEAST:
        mend = "Close other programs; a base is loaded through main memory."
        return Check("memory", "warning", found, mend)
    if free < MEMORY_LARGE:
        mend = (
            "Enough to train and to export; comparing the exported file of an 8 B base with the "
            f"model in torch takes {gib(MEMORY_LARGE)}, here or on the GPU: else it is left out."
        )
        return Check("memory", "warning", found, mend)
    return Check("memory", "ok", found)


def _disk() -> Check:
    free = shutil.disk_usage(Path.cwd()).free
    found = f"{gib(free)} free in this directory"
    if free < DISK_LEAST:
        return Check("disk", "failed", found, "Free some space, or start in another directory.")
    if free < DISK_LARGE:
        mend = f"Enough for a small base; a 7 B base takes up to {gib(DISK_LARGE)}."
        return Check("disk", "warning", found, mend)
    return Check("disk", "ok", found)


def _cache() -> Check:
    from huggingface_hub import constants

    path = Path(constants.HF_HUB_CACHE)
    place = path
    while not place.exists():
        place = place.parent
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(b"\0" * 4096)
    except OSError as error:
        return Check(
            "model cache",
            "failed",
            f"{path} can not be written ({type(error).__name__})",
            "Give yourself permission, or set HF_HOME to another directory.",
        )
    return Check("model cache", "ok", f"{path}, {gib(shutil.disk_usage(place).free)} free")


def _builtin() -> Check:
    try:
        check_weights(BUILTIN)
    except UserError as error:
        return Check("built-in base", "failed", error.what, "Install mipo-lite again.")
    size = sum(file.stat().st_size for file in BUILTIN.glob("*.safetensors"))
    return Check("built-in base", "ok", f"{size / 1e6:.1f} MB, whole")


def _hub(reachable: bool) -> Check:
    from huggingface_hub import constants

    if reachable:
        return Check("hub", "ok", f"{constants.ENDPOINT} answers")
    if constants.HF_HUB_OFFLINE:
        return Check(
            "hub",
            "warning",
            "HF_HUB_OFFLINE forbids asking",
            "Only the built-in base and models in the cache can be used; unset it to download.",
        )
    return Check(
        "hub",
        "warning",
        f"{constants.ENDPOINT} does not answer within 2 s",
        "Only the built-in base and models in the cache can be used; check network and proxy.",
    )


CHECKS: dict[str, Callable[[], Check]] = {
    "Python": _python,
    "packages": _packages,
    "torch": _torch,
    "GPU": _gpu,
    "bitsandbytes": _bitsandbytes,
    "llama.cpp": _llama_cpp,
    "memory": _memory,
    "disk": _disk,
    "model cache": _cache,
    "built-in base": _builtin,
}
