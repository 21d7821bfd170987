"""GGUF export that proves itself, without a llama.cpp checkout.

`export_model` writes the files a user gets, `export_lora` the adapter alone. The steps are in
modules of their own: `export.export` writes one file, `quantize.quantize` makes a smaller one of
it, `imatrix` measures what matters, `verify` compares with torch. Every file is read back by
llama.cpp before it gets its name.
"""

from .deliver import export_model, imatrix_effect
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
    "start_lines",
]
