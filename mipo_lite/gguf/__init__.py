"""GGUF export that proves itself, without a llama.cpp checkout.

`export` writes one file, `quantize` makes a smaller one of it, `export_model` does both for a list
of types. Every file is read back by llama.cpp before it gets its name.
"""

from .deliver import export_model
from .export import export
from .modelfile import start_lines
from .quantize import KINDS, quantize

__all__ = ["KINDS", "export", "export_model", "quantize", "start_lines"]
