"""Room on the disk: what is said when there is too little."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from mipo_lite import disk
from mipo_lite.disk import require_disk
from mipo_lite.errors import UserError


def test_the_way_out_is_that_of_the_caller(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 2, 7))
    require_disk(tmp_path / "not" / "there", 7, "a file")
    with pytest.raises(UserError) as error:
        require_disk(tmp_path / "not" / "there", 1007, "a file")
    assert error.value.what == (
        f"Too little disk for a file: it needs 1,007 bytes, {tmp_path} has 7 free."
    )
    assert error.value.fix == (
        "Free 1,000 bytes there, or write to another disk: a new run with --run, exports and "
        "merges with --out."
    )
    with pytest.raises(UserError, match=r"there, or set HF_HOME elsewhere\.$"):
        require_disk(tmp_path, 8, "a base", instead="set HF_HOME elsewhere")
