"""What a run is known by outlives a process that is killed without a word."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from headtune.train.tracking import tracker
from helpers import machine as machines
from helpers.small_runs import train, write_recipe


class Board:
    """Stands for a W&B run: as it takes each number it looks at what a kill would leave behind."""

    def __init__(self, folder: Path, id: str) -> None:
        self.id, self.folder, self.noted = id, folder, []
        self.settings, self.summary, self.offline = SimpleNamespace(sync_dir=str(folder)), {}, True
        self.config = SimpleNamespace(update=lambda values, allow_val_change=False: None)

    def log(self, numbers: dict[str, Any]) -> None:
        if "train/loss" in numbers:
            self.noted.append(machines.read(self.folder / "run.json").get("wandb_id"))

    def log_artifact(self, artifact: Any) -> None:
        pass

    def finish(self, exit_code: int = 0) -> None:
        pass


def test_a_killed_run_goes_on_in_the_same_run_of_wandb(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(tmp_path, tiny_llama, tracking={"wandb": "offline"})
    boards: list[Board] = []

    def start(mode: str, run_dir: Path, options: dict[str, Any], resume_id: str | None) -> Any:
        boards.append(Board(run_dir, resume_id or "abc123"))
        assert resume_id == (None if len(boards) == 1 else "abc123")
        return boards[-1]

    monkeypatch.setattr(tracker, "start", start)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="went away"):
        real = tracker.Tracker.log

        def log(self: Any, values: Any, step: int | None = None) -> None:
            real(self, values, step)
            if step == 3:
                raise RuntimeError("the machine went away")

        patch.setattr(tracker.Tracker, "log", log)
        train(recipe)
    assert boards[0].noted == ["abc123"] * 3, "it was there while the training went on"
    assert train(recipe, "--resume") == 0 and len(boards) == 2
