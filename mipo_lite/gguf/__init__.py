"""GGUF export that proves itself, without a llama.cpp checkout.

`export_model` writes the files a user gets, `export_lora` the adapter alone. The steps are in
modules of their own: `export.export` writes one file, `quantize.quantize` makes a smaller one of
it, `imatrix` measures what matters, `verify` compares with torch. llama.cpp loads every file before
it gets its name; a LoRA file, which only loads onto a model, where one is at hand, else it is read
back with the `gguf` package.

Names are resolved when they are used: a chat needs llama.cpp but not torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .deliver import export_model, imatrix_effect
    from .export import require_exportable
    from .imatrix import importance_matrix
    from .lora import export_lora
    from .modelfile import start_lines
    from .verify import check_exports, gguf_answers, load_model, merge_fidelity

__all__ = [
    "check_exports",
    "export_lora",
    "export_model",
    "gguf_answers",
    "imatrix_effect",
    "importance_matrix",
    "load_model",
    "merge_fidelity",
    "require_exportable",
    "start_lines",
]

_MODULES = {
    "check_exports": "verify",
    "export_lora": "lora",
    "export_model": "deliver",
    "gguf_answers": "verify",
    "imatrix_effect": "deliver",
    "importance_matrix": "imatrix",
    "load_model": "verify",
    "merge_fidelity": "verify",
    "require_exportable": "export",
    "start_lines": "modelfile",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)
