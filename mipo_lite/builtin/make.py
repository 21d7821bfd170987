"""`python -m mipo_lite.builtin.make --out DIR`: the built-in base, from nothing but a seed.

Trains the tokenizer and the model into DIR/work (a broken-off run goes on from there), then leaves
the finished model directory in DIR/model. How long that takes: see README.md.
"""

from __future__ import annotations

import argparse
import random
import shutil
from pathlib import Path

from tokenizers import Tokenizer

from mipo_lite.builtin.corpus import document
from mipo_lite.builtin.tokenizer import train_tokenizer
from mipo_lite.builtin.train import NATURAL, Settings, train


def make(out: Path, settings: Settings, compiled: bool = True) -> Path:
    """Writes everything under `out`; returns the model directory."""
    work = out / "work"
    work.mkdir(parents=True, exist_ok=True)
    tokenizer_file = work / "tokenizer.json"
    if not tokenizer_file.exists():
        rng = random.Random(settings.seed)
        texts = [document(rng, NATURAL).text for _ in range(20_000)]
        train_tokenizer(texts).save(str(tokenizer_file))
    train(settings, Tokenizer.from_file(str(tokenizer_file)), work, compiled)
    target = out / "model"
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(work / "model", target)
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--plain", action="store_true", help="without torch.compile")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    print(make(given.out, Settings(seed=given.seed), compiled=not given.plain))


if __name__ == "__main__":
    main()
