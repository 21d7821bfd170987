"""Where a base lies and how it is downloaded; which one `auto` takes.

Downloads take safetensors, the tokenizer and the configuration, never pickled weights and never
code; they go on where they were interrupted, and the commit is returned so that a run can record
it. Loads no weights: `base` does. What fits a GPU is `planning`'s business.
"""

from __future__ import annotations

import errno
import json
import struct
import threading
import urllib.error
import urllib.request
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .console import console
from .disk import require_disk
from .errors import UserError
from .known_bases import KNOWN, KnownBase

if TYPE_CHECKING:
    from .recipe import Recipe

BUILTIN = Path(__file__).parent / "builtin" / "model"
NO_GPU = "no CUDA GPU found, so the built-in base"

_NAMES = "Give builtin, a Hugging Face id such as Qwen/Qwen2.5-1.5B-Instruct, or a directory."


@dataclass(frozen=True)
class BaseSource:
    """Where a base lies.

    Attributes:
        name: what the user calls it: builtin, a Hugging Face id, or a directory.
        path: a directory with config.json, *.safetensors and the tokenizer.
        revision: the commit on the hub; None for local directories.
        reason: why `auto` took this one; "" when the user named it.
    """

    name: str
    path: Path
    revision: str | None = None
    reason: str = ""


@dataclass(frozen=True)
class BaseOffer:
    """A base that can be had, before anything of it is downloaded.

    Attributes:
        name, revision, reason: as of `BaseSource`.
        path: where it lies; None while it has to be downloaded.
        files: what has to be downloaded, file -> bytes.
    """

    name: str
    path: Path | None = None
    revision: str | None = None
    reason: str = ""
    files: Mapping[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        words = [self.name]
        if self.path is None:
            words.append(f"{sum(self.files.values()) / 1e9:.1f} GB to download")
        return ", ".join(words) + (f" ({self.reason})" if self.reason else "")

    def fetch(self) -> BaseSource:
        """Download it, or go on with an interrupted download. Raises UserError."""
        if self.path is not None:
            return BaseSource(self.name, self.path, self.revision, self.reason)
        path = download(self.name, self.revision, self.files)
        return BaseSource(self.name, path, path.name, self.reason)


def find_base(
    name: str,
    *,
    revision: str | None = None,
    recipe: Recipe | None = None,
    context_tokens: int | None = None,
) -> BaseSource:
    """Where the base `name` lies, downloading it when it is a Hugging Face id.

    What `auto` chose and what will be downloaded is printed before the download begins.

    Args:
        revision: the commit of a Hugging Face id; None takes the newest.
        recipe, context_tokens: what `auto` has to fit on the GPU.

    Raises UserError when there is no such base or it can not be had.
    """
    failed: dict[str, str] = {}
    while True:
        if name == "auto":
            offer = _choose(recipe, context_tokens, failed)
        else:
            offer = look_up(name, revision)
        try:
            return _announced(offer).fetch()
        except UserError as error:
            if name != "auto":
                raise
            failed[offer.name] = error.what


def look_up(
    name: str,
    revision: str | None = None,
    recipe: Recipe | None = None,
    context_tokens: int | None = None,
) -> BaseOffer:
    """The base that `find_base` would take. Downloads nothing; asks the hub for file sizes only.

    Raises UserError as `find_base` does, but for what only a download can show.
    """
    if name == "auto":
        return _choose(recipe, context_tokens, {})
    if name == "builtin":
        return BaseOffer("builtin", BUILTIN)
    if Path(name).is_dir():
        return BaseOffer(name, check_weights(Path(name)))
    _check_name(name)
    path = cached(name, revision)
    if path is not None:
        return BaseOffer(name, path, revision=path.name)
    return BaseOffer(name, revision=revision, files=files_to_download(name, revision))


def recorded_offer(record: dict[str, Any]) -> BaseOffer:
    """The base of an existing run, from the "base" entry of its run.json, at the same revision.

    Raises UserError as `look_up` does.
    """
    path = Path(record["path"])
    if record["name"] == "builtin" or not path.is_dir():
        return look_up(record["name"], record["revision"])
    return BaseOffer(record["name"], check_weights(path), record["revision"])


def recorded_source(record: dict[str, Any]) -> BaseSource:
    """The same, downloaded again where it is gone."""
    return _announced(recorded_offer(record)).fetch()


def _announced(offer: BaseOffer) -> BaseOffer:
    """Say what `auto` chose and what will be downloaded."""
    if offer.reason or offer.path is None:
        console.print(f"Base: {offer}", soft_wrap=True)
    return offer


def config_of(name: str) -> dict[str, Any]:
    """The config.json of a base, without its weights: from a directory, the cache, the table of
    known bases, or, as the only thing that is downloaded, from the hub.

    Raises UserError when there is none.
    """
    if name == "builtin":
        return _read_config(BUILTIN / "config.json")
    if Path(name).is_dir():
        return _read_config(Path(name) / "config.json")
    for known in KNOWN:
        if known.name == name:
            return known.config
    from huggingface_hub import hf_hub_download

    _check_name(name)
    with _hub_errors(name):
        return _read_config(Path(hf_hub_download(name, "config.json")))


def cached(name: str, revision: str | None = None) -> Path | None:
    """The complete snapshot of a Hugging Face id in the local cache; None when there is none."""
    from huggingface_hub import snapshot_download

    try:
        # Asked for the config only, since it is no matter if pictures or other weights are missing.
        path = snapshot_download(
            name, revision=revision, local_files_only=True, allow_patterns=["config.json"]
        )
        return check_weights(Path(path))
    except (FileNotFoundError, UserError):
        return None


def files_to_download(name: str, revision: str | None = None) -> dict[str, int]:
    """What a download of a base takes from the hub, file -> bytes.

    Raises UserError: no such model, a licence to agree to, no network, no safetensors, no disk.
    """
    from huggingface_hub import HfApi, constants

    with _hub_errors(name):
        found = HfApi().model_info(name, revision=revision, files_metadata=True, timeout=20)
    sizes = {file.rfilename: file.size or 0 for file in found.siblings or ()}
    wanted = wanted_files(sizes)
    if not any(file.endswith(".safetensors") for file in wanted):
        kinds = {Path(file).suffix for file in sizes} & {".bin", ".pt", ".pth", ".gguf"}
        raise UserError(
            f"{name} has no weights as safetensors"
            + (f", only {', '.join(sorted(kinds))}." if kinds else "."),
            "Choose a repository with *.safetensors; other weights are not loaded.",
        )
    files = {file: sizes[file] for file in wanted}
    instead = "set HF_HOME to a directory on another disk"
    require_disk(Path(constants.HF_HUB_CACHE), sum(files.values()), name, instead)
    return files


def download(name: str, revision: str | None, files: Iterable[str]) -> Path:
    """Download `files` of a base into the cache of huggingface_hub, or go on with a download.

    Raises UserError: a licence to agree to, no network, a download that is not whole.
    """
    from huggingface_hub import snapshot_download

    with _hub_errors(name):
        path = snapshot_download(name, revision=revision, allow_patterns=list(files))
    return check_weights(Path(path))


def wanted_files(names: Collection[str]) -> list[str]:
    """What a base needs of a repository: weights, tokenizer and configuration, from its root.

    Not `consolidated.safetensors`, which holds the same weights once more.
    """
    return sorted(
        name
        for name in names
        if "/" not in name
        and (
            (name.startswith("model") and name.endswith(".safetensors"))
            or name.endswith((".json", ".jinja"))
            or name in ("tokenizer.model", "merges.txt")
        )
    )


def check_weights(path: Path) -> Path:
    """The directory, if it holds a whole model: every shard there, none cut off.

    Reads the headers of the safetensors files, not their tensors.

    Raises UserError for a directory that holds no model this program can load.
    """
    if not (path / "config.json").is_file():
        raise UserError(
            f"{path} is not a model directory: it has no config.json.",
            "Name a directory with config.json, *.safetensors and a tokenizer.",
        )
    index = path / "model.safetensors.index.json"
    try:
        shards = {path / "model.safetensors"}
        if index.is_file():
            names = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
            # A shard is a file of this directory, whatever the index says.
            shards = {path / Path(name).name for name in names}
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(
            f"{index} is damaged.", "Download the model again, or restore the file."
        ) from error
    if not any(path.glob("*.safetensors")):
        raise UserError(
            f"{path} holds no weights: there is no *.safetensors file.",
            "Download the model completely; pickled weights (*.bin) are not loaded.",
        )
    for shard in sorted(shards):
        if not shard.is_file():
            raise UserError(
                f"{path} is incomplete: {shard.name} is missing.", "Download the model completely."
            )
        if shard.stat().st_size != _expected_size(shard):
            raise UserError(
                f"{shard} is damaged: its size is not what its header says.",
                "Remove that file and download the model again.",
            )
    return path


def hub_reachable(seconds: float = 2.0) -> bool:
    """Whether huggingface.co (or HF_ENDPOINT) answers; False at once with HF_HUB_OFFLINE=1."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    answered = threading.Event()

    def ask() -> None:
        request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
        try:
            with urllib.request.urlopen(request, timeout=seconds):
                answered.set()
        except urllib.error.HTTPError:  # it answered, whatever it said
            answered.set()
        except (OSError, ValueError):
            pass

    # In a thread, since the timeout of a socket does not cover looking up the name.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return answered.is_set()


def why_not(known: KnownBase, online: bool) -> str:
    """Why auto can not take this base: "" when it is in the cache or can be downloaded.

    Auto never agrees to a licence for the user: what asks for that has to be there already.
    """
    if cached(known.name):
        return ""
    if known.gated:
        return "gated, not downloaded yet"
    if known.restricted:
        return "restricted licence, not downloaded yet"
    return "" if online else "not in the cache, no network"


def _choose(recipe: Recipe | None, context_tokens: int | None, failed: dict[str, str]) -> BaseOffer:
    """The best base of the table that fits the GPU and can be had, else the built-in one.

    Args:
        failed: bases to pass over, with the reason; those that prove not to be had are added.
    """
    from .machine import find_gpu

    if find_gpu() is None:
        return BaseOffer("builtin", BUILTIN, reason=NO_GPU)
    from .planning import choose_base

    online = hub_reachable()
    while True:
        choice = choose_base(
            recipe=recipe,
            context_tokens=context_tokens,
            why_not=lambda known: failed.get(known.name) or why_not(known, online),
        )
        try:
            return replace(look_up(choice.name), reason=choice.reason)
        except UserError as error:
            failed[choice.name] = error.what


def _check_name(name: str) -> None:
    """Raises UserError for what can not be a Hugging Face id, before anybody is asked."""
    from huggingface_hub.utils import validate_repo_id

    with _hub_errors(name):
        validate_repo_id(name)


def _read_config(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text("utf-8"))
        if not isinstance(config, dict):
            raise ValueError("not an object")
    except FileNotFoundError as error:
        raise UserError(
            f"{file.parent} is not a model directory: it has no config.json.", _NAMES
        ) from error
    except (OSError, ValueError) as error:
        raise UserError(
            f"{file} can not be read as JSON.", "Download it again, or restore it."
        ) from error
    return config


def _expected_size(file: Path) -> int:
    """Bytes of a safetensors file by its header; -1 for a header that is none."""
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > 100 * 2**20:  # the format's own limit
                return -1
            header = json.loads(stream.read(length))
        ends = [tensor["data_offsets"][1] for key, tensor in header.items() if key[:2] != "__"]
        return int(8 + length + max(ends, default=0))
    except (struct.error, ValueError, KeyError, TypeError, IndexError, AttributeError):
        return -1


@contextmanager
def _hub_errors(name: str) -> Iterator[None]:
    """Turn what huggingface_hub raises into a UserError that says what to do."""
    from huggingface_hub import constants, errors

    try:
        yield
    except errors.HFValidationError as error:
        raise UserError(f"There is no base {name!r}.", _NAMES) from error
    except errors.GatedRepoError as error:
        raise UserError(
            f"{name} asks for an agreement to its licence first.",
            f"Agree on https://huggingface.co/{name}, run `hf auth login`, and start again.",
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"Hugging Face knows no model {name!r}, or it is private.",
            f"{_NAMES} For a private model run `hf auth login`.",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UserError(
            f"{name} no longer has the revision that this run was made with.",
            "Start a new run with another --run.",
        ) from error
    except errors.RemoteEntryNotFoundError as error:
        raise UserError(f"{name} is no model: it has no config.json.", _NAMES) from error
    except (OSError, errors.HTTPError) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise  # a full disk: the command line says so, whatever was being written
        if constants.HF_HUB_OFFLINE:
            raise UserError(
                f"{name} is not in the local cache, and HF_HUB_OFFLINE forbids a download.",
                "Unset HF_HUB_OFFLINE to download it, or use --base builtin.",
            ) from error
        raise UserError(
            f"{name} is not on this machine and can not be downloaded ({type(error).__name__}).",
            "Check the network and start again (a download goes on where it stopped), "
            "or use --base builtin.",
        ) from error
