"""Every check of the doctor: what it finds when things work, and its mend when they do not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from bitsandbytes import functional

from mipo_lite import doctor
from mipo_lite.doctor import CHECKS, Check, diagnose, print_checks
from mipo_lite.errors import UserError
from mipo_lite.machine import Gpu
from mipo_lite.memory import GIB


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr(doctor, "hub_reachable", lambda: False)


def test_this_installation():
    checks = {check.name: check for check in diagnose()}
    assert list(checks) == [*CHECKS, "hub"]
    assert checks["Python"].state == "ok"
    assert checks["packages"].state == "ok"
    assert checks["bitsandbytes"].state == "ok"
    assert checks["llama.cpp"].state == "ok"
    assert "llama-cpp-python 0." in checks["llama.cpp"].found
    assert all(check.mend for check in checks.values() if check.state != "ok")


def test_for_people_and_as_json(capsys):
    checks = [
        Check("one", "ok", "fine"),
        Check("two", "warning", "so so", "do this"),
        Check("three", "failed", "broken", "do that"),
    ]
    assert print_checks(checks[:2])
    assert not print_checks(checks)
    text = capsys.readouterr().out
    for words in ("limited", "FAILED", "do this", "do that"):
        assert words in text
    assert not print_checks(checks, as_json=True)
    assert json.loads(capsys.readouterr().out)[2] == {
        "name": "three",
        "state": "failed",
        "found": "broken",
        "mend": "do that",
    }


def test_a_check_that_breaks_is_a_finding(monkeypatch):
    monkeypatch.setitem(sys.modules, "llama_cpp", None)  # an import that fails
    check = doctor._guarded("llama.cpp", doctor._llama_cpp)
    assert (check.state, check.name) == ("failed", "llama.cpp")
    assert "ModuleNotFoundError" in check.found
    assert check.mend


def test_a_wrong_product_is_seen(monkeypatch):
    right = functional.dequantize_4bit
    monkeypatch.setattr(functional, "dequantize_4bit", lambda *a: right(*a) * 1.01)
    check = doctor._bitsandbytes()
    assert (check.state, check.name) == ("failed", "bitsandbytes")
    assert "constraints.txt" in check.mend


def test_badly_packed_weights_are_seen(monkeypatch):
    """The product agrees with the unpacked weight, but that is not the weight."""
    right = functional.quantize_4bit
    monkeypatch.setattr(functional, "quantize_4bit", lambda w, **options: right(2 * w, **options))
    assert doctor._bitsandbytes().state == "failed"


@pytest.mark.parametrize(
    ("cuda", "driver", "usable", "state", "words"),
    [
        (None, False, False, "ok", "CPU only"),
        ("12.8", False, False, "warning", "no NVIDIA driver"),
        (None, True, False, "failed", "CUDA build of torch"),
        ("12.8", True, False, "failed", "older than CUDA 12.8"),
        ("12.8", True, True, "ok", "CUDA 12.8"),
    ],
)
def test_torch_and_driver(monkeypatch, cuda, driver, usable, state, words):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: usable)
    monkeypatch.setattr(doctor, "has_driver", lambda: driver)
    check = doctor._torch()
    assert check.state == state
    assert words in f"{check.found} {check.mend}"


@pytest.mark.parametrize(
    ("gpu", "bf16", "state", "words"),
    [
        (None, True, "warning", "no CUDA GPU"),
        (Gpu("A card", 8 * GIB, GIB), True, "warning", "nvidia-smi"),
        (Gpu("A card", 8 * GIB, 7 * GIB), False, "warning", "float16"),
        (Gpu("A card", 8 * GIB, 7 * GIB), True, "ok", "7.0 GiB of 8.0 GiB free"),
    ],
)
def test_gpu(monkeypatch, gpu, bf16, state, words):
    monkeypatch.setattr(doctor, "find_gpu", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: bf16)
    check = doctor._gpu()
    assert check.state == state
    assert words in f"{check.found} {check.mend}"


@pytest.mark.parametrize(
    ("free", "state"), [(GIB // 2, "failed"), (10 * GIB, "warning"), (90 * GIB, "ok")]
)
def test_disk(monkeypatch, free, state):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    assert doctor._disk().state == state


@pytest.mark.parametrize(
    ("free", "state", "words"),
    [
        (GIB, "warning", "loaded through main memory"),
        (12 * GIB, "warning", "comparing the exported file of an 8 B base"),
        (20 * GIB, "ok", ""),
    ],
)
def test_memory(monkeypatch, free, state, words):
    monkeypatch.setattr(doctor, "available_memory", lambda: free)
    check = doctor._memory()
    assert check.state == state
    assert words in check.mend


@pytest.mark.parametrize(("offload", "words"), [(True, "on the GPU"), (False, "on the CPU")])
def test_where_chats_run(monkeypatch, offload, words):
    monkeypatch.setattr("llama_cpp.llama_supports_gpu_offload", lambda: offload)
    assert doctor._llama_cpp().found.endswith(f"chats {words}")


def test_model_cache(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "not" / "there"))
    assert doctor._cache().state == "ok"
    assert list(tmp_path.iterdir()) == []  # looked, and left nothing behind
    (tmp_path / "file").touch()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file"))
    check = doctor._cache()
    assert check.state == "failed"
    assert "HF_HOME" in check.mend


@pytest.mark.parametrize(
    ("found", "state"), [((3, 9), "failed"), ((3, 14), "failed"), ((3, 10), "ok")]
)
def test_python(monkeypatch, found, state):
    monkeypatch.setattr(doctor.sys, "version_info", (*found, 0))
    assert doctor._python().state == state


def test_missing_packages(monkeypatch):
    monkeypatch.setattr(doctor, "PACKAGES", ("torch", "no-such-package"))
    check = doctor._packages()
    assert check.state == "failed"
    assert "no-such-package" in check.mend


def test_builtin_base(monkeypatch):
    def broken(path):
        raise UserError("it is broken", "mend it")

    monkeypatch.setattr(doctor, "check_weights", broken)
    assert doctor._builtin().state == "failed"


def test_hub(monkeypatch):
    from huggingface_hub import constants

    assert doctor._hub(True).state == "ok"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert "does not answer" in doctor._hub(False).found
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in doctor._hub(False).found


def test_the_command_is_quick():
    """It loads neither the compiler nor transformers, which is most of the time it could take."""
    code = (
        "import sys; from mipo_lite.doctor import diagnose, print_checks; "
        "print_checks(diagnose(), as_json=True); "
        "sys.exit(bool({'torch._inductor.compile_fx', 'transformers', 'trl'} & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    checks = json.loads(done.stdout[done.stdout.index("[\n") :])
    assert [check["name"] for check in checks] == [*CHECKS, "hub"]
