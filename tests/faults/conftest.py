"""One parent process for all runs that go wrong, and of each family one run that does not."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from helpers import machine as machines


@pytest.fixture(scope="session")
def machine() -> Iterator[machines.Machine]:
    made = machines.Machine()
    yield made
    made.close()


@pytest.fixture(scope="session")
def unbroken(
    machine: machines.Machine, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """By family, the folder of a run that was left alone. Read-only."""
    made: dict[str, Path] = {}

    def run(family: str) -> Path:
        if family not in made:
            folder = machines.write(family, tmp_path_factory.mktemp("unbroken") / family, tiny_llama)
            code, said = machine.run(folder)
            assert code == 0, said
            made[family] = folder
        return made[family]

    return run


@pytest.fixture(scope="session")
def broken(
    machine: machines.Machine, tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """By family, the folder of a run that was killed after some checkpoints. Read-only: copy it."""
    made: dict[str, Path] = {}

    def run(family: str) -> Path:
        if family not in made:
            folder = machines.write(family, tmp_path_factory.mktemp("broken") / family, tiny_llama)
            child = machine.start(folder)
            if family == "seekr":
                child.wait_for("task 2 of 3")
            while len(machines.checkpoints_in(folder)) < 2 or (
                family == "seekr" and not list(folder.glob("run/tasks/02*/checkpoints/*/complete.json"))
            ):
                time.sleep(0.05)
            child.signal(9)
            child.wait()
            assert len(machines.checkpoints_in(folder)) >= 2 and machines.state(folder) == "running", child.said()
            made[family] = folder
        return made[family]

    return run
