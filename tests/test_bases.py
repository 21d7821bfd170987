"""Finding and downloading a base, against a hub that is a table in this file."""

from __future__ import annotations

import errno
import json
import struct
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from mipo_lite import bases, cli, machine, pipeline, planning
from mipo_lite.bases import BUILTIN, cached, check_weights, config_of, find_base, wanted_files
from mipo_lite.errors import UserError
from mipo_lite.fitting import Device
from mipo_lite.flow import resolve
from mipo_lite.known_bases import KNOWN
from mipo_lite.memory import GIB

NAME = "org/model"
INDEX = "model.safetensors.index.json"
FIRST, SECOND = (f"model-0000{i}-of-00003.safetensors" for i in (1, 2))
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def safetensors(path: Path, size: int = 16, cut: int = 0) -> None:
    """A file with one tensor of `size` bytes, of which the last `cut` are missing."""
    header = json.dumps({"x": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}})
    data = struct.pack("<Q", len(header)) + header.encode() + b"\0" * (size - cut)
    path.write_bytes(data)


def model(path: Path, shards: int = 1) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(KNOWN[0].config), "utf-8")
    (path / "tokenizer.json").write_text("{}", "utf-8")
    if shards == 1:
        safetensors(path / "model.safetensors")
        return path
    names = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    for name in names:
        safetensors(path / name)
    index = {"weight_map": {f"layer.{i}": name for i, name in enumerate(names)}}
    (path / INDEX).write_text(json.dumps(index), "utf-8")
    return path


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The cache of huggingface_hub in tmp_path, and a hub that counts what is asked of it."""
    cache = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    state = SimpleNamespace(
        cache=cache,
        files={"config.json": 10, "model.safetensors": 100, "tokenizer.json": 5},
        error=None,
        downloads=[],
    )

    def snapshot(name: str, commit: str = COMMIT) -> Path:
        folder = cache / f"models--{name.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True, exist_ok=True)
        (folder / "refs" / "main").write_text(commit)
        return folder / "snapshots" / commit

    state.snapshot = snapshot
    original = huggingface_hub.snapshot_download

    def download(name, *, revision=None, local_files_only=False, allow_patterns=None):
        if local_files_only:
            return original(
                name,
                revision=revision,
                local_files_only=True,
                allow_patterns=allow_patterns,
                cache_dir=cache,
            )
        state.downloads.append((name, revision, allow_patterns))
        path = snapshot(name, revision or COMMIT)
        return str(model(path, shards=2 if (path / INDEX).exists() else 1))

    def info(self, name, **options):
        if state.error:
            raise state.error
        siblings = [SimpleNamespace(rfilename=f, size=s) for f, s in state.files.items()]
        return SimpleNamespace(siblings=siblings, sha=COMMIT)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", info)
    return state


def http_error(kind: type[Exception]) -> Exception:
    return kind("no", response=SimpleNamespace(headers={}, request=None, status_code=403))


# Directories


def test_builtin_and_directories(tmp_path):
    assert find_base("builtin").path == BUILTIN
    source = find_base(str(model(tmp_path / "m", shards=3)))
    assert (source.name, source.revision) == (str(tmp_path / "m"), None)


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (lambda p: (p / "config.json").unlink(), "no config.json"),
        (lambda p: [f.unlink() for f in p.glob("*.safetensors")], "holds no weights"),
        (lambda p: (p / SECOND).unlink(), "00002-of-00003.safetensors is miss"),
        (lambda p: safetensors(p / SECOND, cut=1), "is damaged: its size"),
        (lambda p: (p / FIRST).write_bytes(b"\xff" * 64), "is damaged"),
        (lambda p: (p / FIRST).write_bytes(b""), "is damaged"),
        (lambda p: (p / INDEX).write_text("{"), "index.json is damaged"),
        (lambda p: (p / INDEX).write_text("[]"), "index.json is damaged"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_directory(tmp_path, break_it, words):
    path = model(tmp_path / "m", shards=3)
    assert check_weights(path) == path
    break_it(path)
    with pytest.raises(UserError, match=words) as caught:
        find_base(str(path))
    assert caught.value.fix


def test_an_index_can_not_point_outside(tmp_path):
    safetensors(tmp_path / "other.safetensors")
    path = model(tmp_path / "m")
    index = {"weight_map": {"x": "../other.safetensors"}}
    (path / INDEX).write_text(json.dumps(index), "utf-8")
    with pytest.raises(UserError, match=r"other\.safetensors is missing"):
        check_weights(path)


# The hub


def test_a_download_takes_what_a_base_needs_and_names_its_commit(hub):
    hub.files |= {
        "consolidated.safetensors": 100,
        "pytorch_model.bin": 100,
        "a.py": 1,
        "x/model.safetensors": 1,
    }
    source = find_base(NAME)
    assert source.revision == COMMIT
    assert source.path.name == COMMIT
    assert hub.downloads == [(NAME, None, ["config.json", "model.safetensors", "tokenizer.json"])]
    assert find_base(NAME) == source  # from the cache
    assert len(hub.downloads) == 1


def test_a_run_goes_on_with_its_own_commit(hub):
    model(hub.snapshot(NAME))
    other = "f" * 40
    source = find_base(NAME, revision=other)
    assert source.revision == other
    assert hub.downloads[0][1] == other
    assert find_base(NAME, revision=COMMIT).revision == COMMIT


def test_an_interrupted_download_is_gone_on_with(hub):
    path = model(hub.snapshot(NAME), shards=2)
    assert cached(NAME) == path
    (path / "model-00002-of-00002.safetensors").unlink()
    assert cached(NAME) is None
    find_base(NAME)
    assert len(hub.downloads) == 1


@pytest.mark.parametrize(
    ("kind", "words", "fix"),
    [
        (errors.GatedRepoError, "asks for an agreement", "hf auth login"),
        (errors.RepositoryNotFoundError, "knows no model", "builtin"),
        (errors.RevisionNotFoundError, "no longer has the revision", "--run"),
        (errors.HfHubHTTPError, "can not be downloaded", "network"),
    ],
)
def test_what_the_hub_refuses(hub, kind, words, fix):
    hub.error = http_error(kind)
    with pytest.raises(UserError, match=words) as caught:
        find_base(NAME)
    assert fix in caught.value.fix


def test_offline(hub, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.error = errors.OfflineModeIsEnabled("offline")
    with pytest.raises(UserError, match="not in the local cache") as caught:
        find_base(NAME)
    assert "HF_HUB_OFFLINE" in caught.value.fix
    model(hub.snapshot(NAME))
    assert find_base(NAME).revision == COMMIT


def test_a_full_disk_is_left_to_who_says_so(hub):
    hub.error = OSError(errno.ENOSPC, "full")
    with pytest.raises(OSError, match="full"):
        find_base(NAME)


def test_a_download_that_does_not_fit_the_disk_is_not_begun(hub):
    hub.files["model.safetensors"] = 10**18
    with pytest.raises(UserError, match=r"Too little disk[^\n]*\n.*HF_HOME"):
        find_base(NAME)
    assert not hub.downloads


@pytest.mark.parametrize("name", ["no such thing", "../../etc", "a/b/c", "-x", "a" * 200])
def test_names_that_are_none(hub, name):
    with pytest.raises(UserError):
        find_base(name)
    assert not hub.downloads


@pytest.mark.parametrize(
    ("file", "word"),
    [
        ("pytorch_model.bin", r"only \.bin"),
        ("m.gguf", r"only \.gguf"),
        ("a.txt", "no weights"),
    ],
)
def test_pickled_weights_are_not_downloaded(hub, file, word):
    hub.files = {"config.json": 1, file: 1}
    with pytest.raises(UserError, match=word):
        find_base(NAME)
    assert not hub.downloads


def test_wanted_files():
    names = ["model-00001-of-00002.safetensors", "tokenizer.model", "chat_template.jinja", "a.py"]
    names += ["adapter_model.safetensors", "original/params.json", "consolidated.safetensors"]
    assert wanted_files(names) == ["chat_template.jinja", names[0], "tokenizer.model"]


# Configs


def test_configs_without_weights(hub, tmp_path, monkeypatch):
    assert config_of("builtin")["model_type"] == "qwen2"
    assert config_of(KNOWN[0].name) == KNOWN[0].config
    assert config_of(str(model(tmp_path / "m"))) == KNOWN[0].config
    asked = []

    def one_file(name, file):
        asked.append((name, file))
        return str(model(tmp_path / "other") / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", one_file)
    assert config_of(NAME) == KNOWN[0].config
    assert asked == [(NAME, "config.json")]
    (tmp_path / "m" / "config.json").write_text("{")
    with pytest.raises(UserError, match="can not be read"):
        config_of(str(tmp_path / "m"))


# auto


@pytest.fixture
def card(monkeypatch):
    """A GPU of 8 GiB, and a hub that answers."""
    gpu = machine.Gpu("A card", 8 * GIB, 8 * GIB)
    monkeypatch.setattr(machine, "find_gpu", lambda: gpu)
    monkeypatch.setattr(planning, "find_device", lambda vram=None: Device("A card", 8 * GIB, True))
    monkeypatch.setattr(bases, "hub_reachable", lambda: True)


def test_auto_without_a_gpu(monkeypatch):
    monkeypatch.setattr(machine, "find_gpu", lambda: None)
    source = find_base("auto")
    assert source.name == "builtin"
    assert source.reason == "no CUDA GPU found, so the built-in base"


def test_auto_downloads_the_best_that_fits(hub, card):
    source = find_base("auto")
    assert source.name == "Qwen/Qwen3-8B"
    assert "largest that fits 8.0 GiB" in source.reason
    assert [name for name, *_ in hub.downloads] == [source.name]


def test_auto_never_agrees_to_a_licence(hub, card):
    """Gated and restricted ones only when they are in the cache already."""
    gated = next(known for known in KNOWN if known.gated)
    restricted = next(known for known in KNOWN if known.restricted)
    assert bases.why_not(gated, online=True) == "gated, not downloaded yet"
    assert "restricted" in bases.why_not(restricted, online=True)
    model(hub.snapshot(gated.name))
    assert bases.why_not(gated, online=False) == ""


def test_auto_offline_takes_what_is_cached(hub, card, monkeypatch):
    monkeypatch.setattr(bases, "hub_reachable", lambda: False)
    assert find_base("auto").name == "builtin"
    model(hub.snapshot("Qwen/Qwen2.5-1.5B-Instruct"))
    source = find_base("auto")
    assert (source.name, source.revision) == ("Qwen/Qwen2.5-1.5B-Instruct", COMMIT)
    assert not hub.downloads


def test_auto_goes_on_when_a_download_fails(hub, card):
    model(hub.snapshot("Qwen/Qwen3-1.7B"))
    hub.error = http_error(errors.HfHubHTTPError)
    assert find_base("auto").name == "Qwen/Qwen3-1.7B"


def test_a_download_is_announced_before_it_begins(hub, card, monkeypatch, capsys):
    hub.files["model.safetensors"] = 2_500_000_000
    monkeypatch.setattr(bases, "require_disk", lambda *_: None)
    said = []
    begin = huggingface_hub.snapshot_download

    def download(*arguments, **options):
        if not options.get("local_files_only"):
            said.append(capsys.readouterr().out)
        return begin(*arguments, **options)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    find_base(NAME)
    find_base("auto")
    assert said[0] == f"Base: {NAME}, 2.5 GB to download\n"
    assert said[1].startswith("Base: Qwen/Qwen3-8B, 2.5 GB to download (the largest that fits")
    find_base(NAME)
    assert capsys.readouterr().out == ""


def test_auto_goes_on_when_a_download_breaks_off(hub, card, monkeypatch, capsys):
    begin = huggingface_hub.snapshot_download

    def download(name, **options):
        if not options.get("local_files_only") and name == "Qwen/Qwen3-8B":
            raise ConnectionError("broken off")
        return begin(name, **options)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert find_base("auto").name == "Qwen/Qwen2.5-7B-Instruct"
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("Base: Qwen/Qwen3-8B")
    assert second.startswith("Base: Qwen/Qwen2.5-7B-Instruct")


def test_looking_up_says_what_can_not_be_had(hub):
    hub.error = http_error(errors.GatedRepoError)
    with pytest.raises(UserError, match="asks for an agreement"):
        bases.look_up(NAME)
    hub.error = None
    hub.files["model.safetensors"] = 10**18
    with pytest.raises(UserError, match="Too little disk"):
        bases.look_up(NAME)


# --dry-run


@pytest.mark.parametrize("base", ["auto", NAME])
def test_a_dry_run_downloads_nothing_and_names_what_it_would(
    hub, card, tmp_path, monkeypatch, capsys, base
):
    hub.files["model.safetensors"] = 2_500_000_000
    monkeypatch.setattr(bases, "require_disk", lambda *_: None)
    page, run = tmp_path / "me.txt", tmp_path / "run"
    page.write_text("I like long walks. " * 500, "utf-8")
    prompts = tmp_path / "sums.txt"
    prompts.write_text("".join(f"What is {n} plus {n}?\n" for n in range(30)), "utf-8")
    for given in (
        ["personalize", "--user-context", str(page)],
        ["improve", "--prompts", str(prompts)],
    ):
        command = ["mipo-lite", *given, "--base", base, "--run", str(run), "--dry-run"]
        monkeypatch.setattr("sys.argv", command)
        with suppress(SystemExit):
            cli.main()
        output = capsys.readouterr().out
        assert "2.5 GB to download" in output
        assert "Nothing was started." in output
    assert not hub.downloads
    assert not run.exists()


def test_a_dry_run_names_the_base_that_the_run_takes(hub, card, tmp_path):
    """`auto` depends on how long the context is."""
    page = tmp_path / "me.txt"
    page.write_text("I like long walks. " * 500, "utf-8")
    given = {"base": "auto", "prompts": None, "recipe": None, "settings": [], "seed": None}
    foreseen = pipeline.preview(page, **given, run=tmp_path / "run")
    text = page.read_text("utf-8").strip()
    _, source = resolve(tmp_path / "run", None, [], {"base": "auto"}, text=text)
    assert foreseen.base.name == source.name
    assert foreseen.base.name != find_base("auto").name


def test_reachable(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert not bases.hub_reachable()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert not bases.hub_reachable(0.5)
