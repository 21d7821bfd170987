"""mipo-lite: personalize a language model on one consumer GPU from one page about its user."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

# Nothing is reported home, by whichever way the libraries come in. They read it when imported.
os.environ["HF_HUB_DISABLE_TELEMETRY"] = os.environ["DO_NOT_TRACK"] = "1"

if TYPE_CHECKING:
    from .improve_flow import improve as improve
    from .pipeline import personalize as personalize
    from .recipe import Recipe as Recipe
    from .run import Run as Run

__all__ = ["Recipe", "Run", "improve", "personalize"]

_HOMES = {
    "improve": "improve_flow",
    "personalize": "pipeline",
    "Recipe": "recipe",
    "Run": "run",
}


def __getattr__(name: str) -> Any:
    # Imported when first used: `import mipo_lite` must not cost a second of torch.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
