"""The files a user gets: one GGUF for each quantization type, a LoRA GGUF, a Modelfile."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ..checkpoint import Checkpoint
from ..console import console
from ..disk import require_disk
from ..errors import UsageError
from ..merging import Onto, Progress
from ..run import partial_path
from .architectures import architecture, context_length
from .export import export, load_config
from .kinds import KINDS, PLAIN, needs_imatrix, require_imatrix
from .modelfile import write_modelfile
from .quantize import Imatrix, estimate, quantize
from .verify import Row, agreement, cap_rows, gguf_distributions
from .vocabulary import load_tokenizer, read_vocabulary
from .window import chat_window


def export_model(
    model_dir: Path | str,
    out_dir: Path | str,
    name: str,
    *,
    quants: Sequence[str] = ("Q4_K_M",),
    adapter_dir: Path | str | None = None,
    onto: Onto = "full",
    context: str | None = None,
    modelfile: bool = True,
    imatrix: Imatrix | None = None,
    progress: Progress | None = None,
) -> list[Path]:
    """Write `NAME-TYPE.gguf` for every type in `quants`, and a `Modelfile` for the first.

    K- and IQ-types are made from an F16 file, which stays only when it was asked for.

    Args:
        model_dir: a Hugging Face directory.
        quants: F32, F16, BF16 or a key of `kinds.KINDS`, in any case.
        adapter_dir: a LoRA adapter to merge on the way; None when `model_dir` is merged already.
        onto: as in `merging.merge`.
        context: the user's page; goes into the Modelfile as system message.
        modelfile: False leaves the Modelfile of the directory alone.
        imatrix: importance matrix for the quantized types.
        progress: e.g. `console.progress`.

    Returns:
        The GGUF files in the order of `quants`.

    Raises:
        UserError, UsageError: as `export` and `quantize`; too little disk for all files together.
    """
    model_dir, out_dir = Path(model_dir), Path(out_dir)
    kinds = list(dict.fromkeys(kind.upper() for kind in quants))
    if not kinds:
        raise UsageError("No quantization type was asked for.", "Name one, such as q4_k_m.")
    require_imatrix(kinds, given=imatrix is not None)
    _require_space(model_dir, out_dir, kinds)
    out_dir.mkdir(parents=True, exist_ok=True)
    files = {kind: out_dir / f"{name}-{kind}.gguf" for kind in kinds}

    def write(path: Path, outtype: str = "f16") -> None:
        export(
            model_dir,
            path,
            outtype=outtype,
            adapter_dir=adapter_dir,
            onto=onto,
            name=name,
            progress=progress,
        )

    for kind in kinds:
        if kind in PLAIN:
            write(files[kind], kind.lower())
    coarse = [kind for kind in kinds if kind in KINDS]
    if coarse:
        source = files.get("F16", out_dir / f".{name}-F16.partial")
        try:
            if "F16" not in files:
                write(source)
            for kind in coarse:
                lines = quantize(source, files[kind], kind, imatrix=imatrix, progress=progress)
                for line in lines:
                    console.print(f"  {kind}: {line}.")
        finally:
            if "F16" not in files:
                source.unlink(missing_ok=True)
    _tell_limits(model_dir)
    if modelfile:
        _modelfile(model_dir, files[kinds[0]], context)
    return list(files.values())


def imatrix_effect(
    model_dir: Path | str,
    kind: str,
    imatrix: Imatrix,
    rows: Sequence[Row],
    *,
    adapter_dir: Path | str | None = None,
    onto: Onto = "full",
    work_dir: Path,
) -> dict[str, float | None]:
    """Mean KL in nats to the F16 file of a quantization without and with an importance matrix.

    Args:
        kind: a key of `kinds.KINDS`.
        rows: (prompt ids, response ids) to measure on.
        adapter_dir, onto: as `export_model`.
        work_dir: a directory of the user; two files, the merged model as F16 and the quantized one,
            are in a hidden directory there meanwhile.

    Returns:
        {"without": ..., "with": ...}; without is None for types that need the matrix.
    """
    rows = cap_rows(rows, load_config(Path(model_dir)).vocab_size)
    with _work_in(work_dir) as work:
        source = work / "f16.gguf"
        export(model_dir, source, adapter_dir=adapter_dir, onto=onto)
        reference = list(gguf_distributions(source, rows))

        def mean_kl(matrix: Imatrix | None) -> float:
            quantize(source, work / "quantized.gguf", kind, imatrix=matrix)
            found = gguf_distributions(work / "quantized.gguf", rows)
            return float(agreement(reference, found)["mean_kl"])

        without = None if needs_imatrix(kind) else mean_kl(None)
        return {"without": without, "with": mean_kl(imatrix)}


@contextmanager
def _work_in(place: Path) -> Iterator[Path]:
    """A directory that is removed at the end; one that a killed process left is emptied first."""
    work = partial_path(place / "imatrix")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(mode=0o700, parents=True)
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _tell_limits(model_dir: Path) -> None:
    """Say where the file is less than the model."""
    config = load_config(model_dir)
    positions = context_length(architecture(config), config)
    if positions < config.max_position_embeddings:
        console.print(
            f"  llama.cpp has no sliding window for {config.model_type}: the file claims "
            f"{positions:,} positions, the model {config.max_position_embeddings:,}."
        )


def _modelfile(model_dir: Path, file: Path, context: str | None) -> None:
    config, tokenizer = load_config(model_dir), load_tokenizer(model_dir)
    page = len(tokenizer.encode(context or "", add_special_tokens=False))
    window = chat_window(page, context_length(architecture(config), config))
    vocabulary = read_vocabulary(tokenizer, config.vocab_size)
    write_modelfile(
        file.with_name("Modelfile"),
        file.name,
        tokenizer,
        vocabulary,
        context=context,
        window=window,
    )


def _require_space(model_dir: Path, out_dir: Path, kinds: list[str]) -> None:
    entries = Checkpoint(model_dir).entries.values()
    half = sum(2 * math.prod(entry.shape) for entry in entries)
    direct = {"F32": 2 * half, "F16": half, "BF16": half}
    needed = sum(direct.get(kind) or estimate(half, kind) for kind in kinds)
    if "F16" not in kinds and any(kind in KINDS for kind in kinds):
        needed += half
    require_disk(out_dir, needed, ", ".join(kinds))
