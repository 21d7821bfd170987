"""GGUF export that proves itself, without a llama.cpp checkout.

`export_model` writes the files a user gets, `export_lora` the adapter alone. The steps are in
modules of their own: `export.export` writes one file, `quantize.quantize` makes a smaller one of
it, `imatrix` measures what matters, `verify` compares with torch. Every file is read back by
llama.cpp before it gets its name.
"""

from .deliver import export_model
from .lora import export_lora
from .modelfile import start_lines

__all__ = ["export_lora", "export_model", "start_lines"]
