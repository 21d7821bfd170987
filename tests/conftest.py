"""What several test files share: the built-in base, loaded once, and small finished stages."""

from __future__ import annotations

import os
from pathlib import Path

# Before any library that reads them is imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
from hypothesis import settings

from mipo_lite.console import quiet_libraries

quiet_libraries()
# The same examples everywhere: a check fails for what was changed, not by chance.
settings.register_profile("fixed", derandomize=True, deadline=None)
settings.load_profile("fixed")

# Tests of real tokenizers and question files are skipped without it.
DATA = Path(os.environ.get("MIPO_LITE_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real tokenizers and problems that lie beside the project on some machines."""
    if not DATA.is_dir():
        pytest.skip(f"{DATA} is not here")
    return DATA


@pytest.fixture(scope="session")
def builtin_base():
    """The built-in base in NF4. Tests must leave it as it was."""
    from mipo_lite.base import find_base, load_base

    return load_base(find_base("builtin"))
