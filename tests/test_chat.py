"""The chat in the terminal, on a tiny file: messages, streaming, ends, interrupts, what is long."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import llama_cpp
import pytest
from finished_run import make_run
from gguf_tiny import CHATML, qwen2
from transformers import AutoTokenizer

from mipo_lite import chat as chatting
from mipo_lite.chat import Conversation, chat, chat_model
from mipo_lite.contexts import build_messages, encode_prompt
from mipo_lite.errors import UserError
from mipo_lite.gguf.export import export
from mipo_lite.gguf.llama import is_end, open_gguf
from mipo_lite.gguf.window import chat_window

CONTEXT = "I am Ada. I live in Oslo."


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return qwen2(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def file(model: Path) -> Path:
    export(model, model / "model.gguf")
    return model / "model.gguf"


def typed(*lines: str | type[BaseException]) -> Callable[[str], str]:
    """Stands for `input`."""
    left = list(lines)

    def read(prompt: str) -> str:
        line = left.pop(0)
        if isinstance(line, str):
            return line
        raise line

    return read


def test_prompt_is_the_training_prompt(model: Path, file: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    with open_gguf(file, n_ctx=512) as llama:
        for context in (None, CONTEXT):
            talk = Conversation(llama, context=context)
            talk.turns.append({"role": "user", "content": "Where do I live?"})
            expected = encode_prompt(tokenizer, build_messages("Where do I live?", context))
            assert talk._prompt() == expected


def test_one_message(file: Path) -> None:
    def answer(seed: int, temperature: float = 1.0) -> str:
        out = io.StringIO()
        chat(file, context=CONTEXT, message="Hi", temperature=temperature, seed=seed, out=out)
        return out.getvalue()

    assert answer(1).endswith("\n")
    assert answer(1) == answer(1)
    assert answer(1) != answer(2)
    assert answer(1, 0.0) == answer(2, 0.0)


def test_answer_stops_at_the_end_token(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_gguf(file, n_ctx=512) as llama:
        text = llama.tokenize("Grüße ✅".encode(), add_bos=False)
        assert is_end(llama, 2)
        monkeypatch.setattr(llama, "generate", lambda *a, **k: iter([*text, 2, *text]))
        talk = Conversation(llama)
        pieces = list(talk.answer("Hi"))
    assert "".join(pieces) == "Grüße ✅"
    assert "\ufffd" not in "".join(pieces)  # characters come whole, however many tokens they take
    assert len(pieces) > 1
    assert talk.turns[1] == {"role": "assistant", "content": "Grüße ✅"}


def test_terminal(file: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    said: list[str] = []

    def answer(self: Conversation, text: str) -> Any:
        said.append(text)
        yield "well"
        if text == "stop me":
            raise KeyboardInterrupt
        yield " then"

    monkeypatch.setattr(Conversation, "answer", answer)
    for last in ("/exit", "/quit", EOFError, KeyboardInterrupt):
        monkeypatch.setattr("builtins.input", typed("one", "  ", "stop me", "two", last))
        chat(file, context=CONTEXT)
        out, err = capsys.readouterr()
        assert said == ["one", "stop me", "two"]
        assert out.splitlines()[:4] == [
            "Chatting with model.gguf. /exit or Ctrl-D ends, Ctrl-C stops an answer.",
            "well then",
            "well [stopped]",
            "well then",
        ]
        assert not err  # llama.cpp says nothing
        said.clear()


def test_greeting_of_the_base(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", typed("/exit"))
    out = io.StringIO()
    chat(file, plain=True, out=out)
    assert out.getvalue().startswith("Chatting with the base, before training.")


def test_interrupted_answer_is_remembered(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_gguf(file, n_ctx=512) as llama:
        talk = Conversation(llama)
        stream = talk.answer("Hi")
        first = next(stream)
        stream.close()
        assert talk.turns[-1]["content"] == first.strip()


def test_oldest_turns_are_forgotten_the_context_never(file: Path) -> None:
    with open_gguf(file, n_ctx=256) as llama:
        talk = Conversation(llama, context=CONTEXT)
        for i in range(12):
            talk.turns += [
                {"role": "user", "content": f"question {i}"},
                {"role": "assistant", "content": f"answer {i}"},
            ]
        talk.turns.append({"role": "user", "content": "last"})
        text = llama.detokenize(talk._prompt(), special=True).decode()
    assert CONTEXT in text
    assert "last" in text
    assert "question 0" not in text
    assert "question 11" in text


def test_a_message_that_does_not_fit(file: Path) -> None:
    with open_gguf(file, n_ctx=256) as llama:
        talk = Conversation(llama)
        with pytest.raises(UserError, match="too many for the window of 256") as error:
            next(talk.answer("word " * 300))
        assert error.value.fix.endswith("or give more with --window, up to 512.")
        assert next(talk.answer("short"))
    with open_gguf(file, n_ctx=512) as llama, pytest.raises(UserError) as error:
        next(Conversation(llama).answer("word " * 600))
    assert error.value.fix == "Shorten the message or the context."


def test_window_holds_the_page(tmp_path: Path) -> None:
    """A page of any length that the base can be trained on leaves room to talk."""
    path = qwen2(tmp_path / "model", max_position_embeddings=16384)
    export(path, tmp_path / "model.gguf")
    page = "I keep bees. " * 900
    tokens = len(AutoTokenizer.from_pretrained(path).encode(page))
    assert tokens > 4096
    assert chatting._window(tmp_path / "model.gguf", page) == tokens + 2048
    assert chatting._window(tmp_path / "model.gguf", CONTEXT) == 4096
    out = io.StringIO()
    chat(tmp_path / "model.gguf", context=page, message="Hi", temperature=0, out=out)
    assert out.getvalue()
    with pytest.raises(UserError, match="too many for the window of 512"):
        chat(tmp_path / "model.gguf", context=page, message="Hi", window=512, out=out)
    assert chat_window(20000, 16384) == 16384


def test_all_layers_on_a_gpu_that_has_room(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    state = {"full": False}

    class Loaded(llama_cpp.Llama):
        _stack = ExitStack()

        def __init__(self, *args: Any, n_gpu_layers: int, **options: Any) -> None:
            asked.append(n_gpu_layers)
            if n_gpu_layers and state["full"]:
                raise ValueError("no memory")
            super().__init__(*args, **options)

    monkeypatch.setattr(llama_cpp, "Llama", Loaded)
    monkeypatch.setattr("builtins.input", lambda prompt: "/exit")
    for gpu, full, layers in ((False, False, [0]), (True, False, [-1]), (True, True, [-1, 0])):
        state["full"] = full
        monkeypatch.setattr(llama_cpp, "llama_supports_gpu_offload", lambda gpu=gpu: gpu)
        out = io.StringIO()
        chat(file, out=out)
        assert asked == layers
        assert (" on the GPU." in out.getvalue()) == (layers == [-1])
        asked.clear()
    with open_gguf(file):  # everything but a chat
        assert asked == [0]


def test_a_chat_loads_neither_torch_nor_transformers(file: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "gguf").mkdir(exist_ok=True)
    shutil.copy(file, run / "gguf" / f"{run.name}-F16.gguf")
    code = (
        "import sys; from mipo_lite.cli import app; "
        f"app(['chat', {str(run.path)!r}, '-m', 'Hi'], standalone_mode=False); "
        "sys.exit(bool({'torch', 'transformers', 'peft'} & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=False
    )
    assert done.returncode == 0, done.stderr


def test_window_is_not_larger_than_trained(file: Path) -> None:
    with open_gguf(file, n_ctx=2048) as llama:
        assert Conversation(llama)._window == 512


def test_file_that_is_missing_or_has_no_template(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"There is no file .*none\.gguf"):
        chat(tmp_path / "none.gguf")
    bare = qwen2(tmp_path / "bare")
    (bare / "chat_template.jinja").unlink()
    export(bare, tmp_path / "bare.gguf")
    with pytest.raises(UserError, match="has no chat template"):
        chat(tmp_path / "bare.gguf", message="Hi")


def test_template_without_system_role(tmp_path: Path) -> None:
    path = qwen2(tmp_path / "model")
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}"
    (path / "chat_template.jinja").write_text(refuses + CHATML)
    export(path, tmp_path / "model.gguf")
    with open_gguf(tmp_path / "model.gguf", n_ctx=256) as llama:
        talk = Conversation(llama, context=CONTEXT)
        talk.turns.append({"role": "user", "content": "Hi"})
        text = llama.detokenize(talk._prompt(), special=True).decode()
    assert text == f"<|im_start|>user\n{CONTEXT}\n\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_a_file_older_than_the_adapter_is_said(file: Path, tmp_path: Path, capsys: Any) -> None:
    run = make_run(tmp_path / "run")
    (run / "gguf").mkdir(exist_ok=True)
    shutil.copy(file, run / "gguf" / f"{run.name}-F16.gguf")
    for state, said in (("done", False), ("stale", True)):
        run.meta["stages"]["export"] = {"state": state}
        run.save()
        chat_model(run.path, message="Hi", plain=False, temperature=0, seed=0)
        assert ("older than the adapter" in " ".join(capsys.readouterr().out.split())) == said
