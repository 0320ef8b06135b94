"""Files that are written whole or not at all, and who may read them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from headtune.analysis.utils.files import atomic_folder, write_text


@pytest.fixture(params=[0o022, 0o027, 0o077], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_modes_follow_the_umask(umask: int, tmp_path: Path) -> None:
    """As `open` and `mkdir` give them, not as `tempfile` does, and never wider."""
    write_text(tmp_path / "file", "text")
    with atomic_folder(tmp_path / "folder") as temporary:
        (temporary / "weights.safetensors").touch(mode=0o600)
    modes = {
        name: (tmp_path / name).stat().st_mode & 0o777 for name in ("file", "folder", "folder/weights.safetensors")
    }
    assert modes == {
        "file": 0o666 & ~umask,
        "folder": 0o777 & ~umask,
        "folder/weights.safetensors": 0o666 & ~umask,
    }
