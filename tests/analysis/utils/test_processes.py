"""What the launcher says in the environment."""

from __future__ import annotations

import pytest

from headtune.analysis.utils import processes


def test_a_process_alone_is_the_main_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert (processes.rank(), processes.local_rank(), processes.world_size()) == (0, 0, 1)
    assert processes.is_main()


def test_a_process_of_several(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "5"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "8")):
        monkeypatch.setenv(name, value)
    assert (processes.rank(), processes.local_rank(), processes.world_size()) == (5, 1, 8)
    assert not processes.is_main()
