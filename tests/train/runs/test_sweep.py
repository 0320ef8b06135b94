"""A grid of runs: checked whole before it starts, resumed, compared; and the same grid for others to run."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from headtune.analysis.utils.errors import InputError
from headtune.cli.main import main
from headtune.train.config import recipe
from headtune.train.runs import sweep
from helpers.small_runs import write_recipe


@pytest.fixture
def path(tmp_path: Path, tiny_llama: Path) -> Path:
    return write_recipe(tmp_path, tiny_llama, heads={"list": [[1, 0]]})


def test_an_axis_is_a_key_and_yaml_values() -> None:
    assert sweep.axis("method.top=4,8") == ("method.top", [4, 8])
    assert sweep.axis("training.learning_rate=1e-3, 0.5") == ("training.learning_rate", [1e-3, 0.5])
    assert sweep.axis("heads={list: [[1, 0], [2, 1]]},{all: true}")[1] == [{"list": [[1, 0], [2, 1]]}, {"all": True}]
    for wrong in ("method.top", "=1", "a=", "a=[1", "a=1,1"):
        with pytest.raises(InputError, match="--grid"):
            sweep.axis(wrong)


def test_every_combination_is_a_checked_run_of_its_own(path: Path, tmp_path: Path) -> None:
    grid = ["method.scale=vector,none", "training.learning_rate=1e-3,1e-2"]
    found = sweep.cells(str(path), grid, 2, tmp_path / "study", ["training.max_steps=1"])
    assert len(found) == 8 and len({cell.folder for cell in found}) == 8
    assert found[0].folder.name == "scale_vector-learning_rate_0.001-s0"
    loaded = recipe.load_recipe(str(path), found[3].overrides)
    assert (loaded.seed, loaded.training["learning_rate"], loaded.training["max_steps"]) == (1, 1e-2, 1)
    assert loaded.tracking.group == "study" and loaded.folder == found[3].folder


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        (["seed=1,2"], "use --seeds"),
        (["name=a,b"], "use --out"),
        (["heads={all: true},{list: [[1, 0]]}", "heads.top=1,2"], "join the two"),
        (["method.scale=2024-01-01"], "holds a date"),
        (["method.scale=vector", "method.scale=none"], "'method.scale' twice"),
        (["method.scael=vector"], "scael_vector-s0: .*scale"),
        (["training.learning_rate=1e-3,fast"], "learning_rate_fast-s0"),
        (["tracking.tags=[a],[a_]"], "same folder name"),
    ],
)
def test_a_grid_that_is_wrong_is_refused_before_it_starts(
    grid: list[str], message: str, path: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        sweep.cells(str(path), grid, 1, tmp_path / "study")
    assert not (tmp_path / "study").exists()


def test_what_is_finished_is_not_run_again_and_what_failed_is_named(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = sweep.cells(str(path), ["method.scale=vector,none"], 2, tmp_path / "study")
    commands: list[list[str]] = []
    ends = dict(zip((cell.folder for cell in grid), ("done", "done", "done", "failed"), strict=True))

    def leave(folder: Path, state: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "run.json").write_text(json.dumps({"state": state}))

    class Process:
        def __init__(self, command: list[str], stdout: Any, **_: Any) -> None:
            commands.append(command)
            self.cell = next(cell for cell in grid if cell.overrides[-1] in command and cell.overrides[-2] in command)
            stdout.write("headtune: no luck\n")

        def wait(self) -> int:
            leave(self.cell.folder, ends[self.cell.folder])
            return 2 if ends[self.cell.folder] == "failed" else 0

    monkeypatch.setattr(subprocess, "Popen", Process)
    for cell, state in zip(grid[:2], ("done", "failed"), strict=True):
        leave(cell.folder, state)
        (cell.folder / "recipe.yaml").write_text(recipe.load_recipe(str(path), cell.overrides).to_yaml())
    told: list[str] = []
    assert sweep.carry_out(str(path), grid, told.append) == [grid[3]]
    assert ["--resume" in command for command in commands] == [True, False, False]
    assert str(grid[1].folder) + ".log" in told[1]
    assert told[0].endswith("scale_vector-s0: finished before") and "headtune: no luck" in told[-1]
    ends[grid[3].folder] = "interrupted"  # by SIGTERM, with exit code 0
    with pytest.raises(KeyboardInterrupt, match="interrupted in scale_none-s1; run the same sweep again"):
        sweep.carry_out(str(path), grid, told.append)


def test_runs_that_need_a_failed_one_are_left_out(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that take the base model's numbers from it would fail one by one."""
    grid = sweep.cells(str(path), ["method.scale=vector,none"], 1, tmp_path / "study")
    before = f"evaluation.before={json.dumps(str(grid[0].folder / 'evaluation.json'))}"
    grid[1] = replace(grid[1], overrides=(*grid[1].overrides, before))
    started = []

    class Process:
        def __init__(self, command: list[str], stdout: Any, **_: Any) -> None:
            started.append(command)
            stdout.write("headtune: no luck\n")

        def wait(self) -> int:
            return 2

    monkeypatch.setattr(subprocess, "Popen", Process)
    notes: list[str] = []
    assert sweep.carry_out(str(path), grid, notes.append) == grid
    assert len(started) == 1 and "left out, since it takes the base model's numbers" in notes[-1]


def test_a_folder_with_another_recipe_is_refused(path: Path, tmp_path: Path) -> None:
    (cell,) = sweep.cells(str(path), ["method.scale=none"], 1, tmp_path / "study")
    cell.folder.mkdir(parents=True)
    (cell.folder / "recipe.yaml").write_text(
        recipe.load_recipe(str(path), [*cell.overrides, "training.max_steps=9"]).to_yaml()
    )
    with pytest.raises(InputError, match="holds a run with another training; choose another --out"):
        sweep.carry_out(str(path), [cell], lambda _line: None)


def test_the_grid_for_others(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["sweep", str(path), "--grid", "method.scale=vector,none", "--seeds", "2", "--out", str(tmp_path / "a b")]
    assert main([*words, "--print", "wandb", "training.max_steps=1"]) == 0
    content = yaml.safe_load(capsys.readouterr().out)
    assert content["parameters"] == {"method.scale": {"values": ["vector", "none"]}, "seed": {"values": [0, 1]}}
    assert content["command"][-2:] == ["training.max_steps=1", "${args_no_hyphens}"]
    assert main([*words, "--print", "slurm"]) == 0
    script = tmp_path / "script.sh"
    script.write_text(capsys.readouterr().out)
    assert "--array=0-3" in script.read_text()
    stub = tmp_path / "headtune"
    stub.write_text('#!/bin/bash\nprintf "%s\\n" "$@"\n')
    stub.chmod(0o755)
    folder = tmp_path / "a b" / "scale_none-s1"
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text("")
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_ARRAY_TASK_ID": "3"}
    done = subprocess.run(["bash", str(script)], env=environment, capture_output=True, text=True, check=True)
    given = done.stdout.splitlines()
    assert given[:2] == ["train", str(path)] and given[-1] == "--resume"
    assert recipe.load_recipe(str(path), given[2:-1]).folder == folder


@pytest.mark.slow
def test_a_sweep_runs_and_compares(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["sweep", str(path), "training.max_steps=1", "--grid", "method.scale=vector,none", "--out"]
    assert main([*words, str(tmp_path / "study"), "--json"]) == 0
    groups = json.loads(capsys.readouterr().out)["groups"]
    assert [group["name"] for group in groups] == ["base", "scale_none", "scale_vector"]
    assert {group["changed"].get("method.scale") for group in groups[1:]} == {"vector", "none"}
