"""A grid of runs of one recipe: every combination of values, with every seed, one folder each, resumable, compared.

    headtune sweep lofit/relations --grid heads.top=4,8,16 --grid training.learning_rate=1e-3,1e-2 --seeds 3

Every recipe of the grid is checked before the first one starts. A folder that is finished is not run again, one that
was broken goes on from its checkpoint. Each run is a process of its own. The same grid for others to run: a W&B sweep
file (`wandb sweep FILE`), a SLURM array script (`sbatch FILE`).
"""

from __future__ import annotations

import itertools
import json
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from headtune import plugins
from headtune.analysis.utils.errors import InputError
from headtune.analysis.utils.progress import Notify
from headtune.train.config import recipe as recipes


@dataclass(frozen=True)
class Cell:
    """One run of a grid.

    Attributes:
        values: key of the recipe -> value, the seed among them.
        overrides: what makes it of the recipe, as `headtune train` takes them.
        plugins: modules that the recipe needs.
        recipe: what it is of; empty: the recipe of the whole grid.
    """

    folder: Path
    values: dict[str, Any]
    overrides: tuple[str, ...]
    plugins: tuple[str, ...] = ()
    recipe: str = ""

    def command(self, recipe: str, resume: bool) -> list[str]:
        words = [sys.executable, "-m", "headtune.train", self.recipe or recipe, *self.overrides]
        words += plugins.arguments_for(self.plugins)
        return [*words, *(["--resume"] if resume else [])]


def axis(text: str) -> tuple[str, list[Any]]:
    """`key.sub=1,2,3` -> the key and its values; values are YAML, so lists and mappings may hold commas.

    Raises:
        InputError: another form, or a value twice.
    """
    key, equals, listed = text.partition("=")
    try:
        values = recipes.read_yaml(f"[{listed}]")
    except yaml.YAMLError:
        values = None
    if not equals or not key or not isinstance(values, list) or not values:
        raise InputError(f"--grid {text!r} must read key=value,value, such as heads.top=4,8,16")
    try:
        different = {json.dumps(value, sort_keys=True) for value in values}
    except TypeError:
        raise InputError(f"--grid {text!r} holds a date, which is no value of a recipe; put it in quotes") from None
    if len(different) < len(values):
        raise InputError(f"--grid {text!r} names a value twice; each is a run of its own")
    return key, values


def cells(
    name: str,
    grid: Sequence[str],
    n_seeds: int,
    out: Path,
    overrides: Sequence[str] = (),
    group: str | None = None,
    seeds: Sequence[int] | None = None,
    prefix: str = "",
) -> list[Cell]:
    """The runs of a grid, all seeds of a combination one after the other; each recipe is checked.

    Args:
        grid: axes, see `axis`.
        n_seeds: seeds 0 .. n - 1.
        overrides: of every run.
        group: `tracking.group` of all; default: the name of `out`.
        seeds: in place of those of `n_seeds`.
        prefix: of every folder's name.

    Raises:
        InputError: a malformed axis, a key twice, a recipe of the grid that is refused (named with its values).
    """
    axes = [axis(text) for text in grid]
    keys = [key for key, _ in axes]
    for key in [*keys, *(override.partition("=")[0] for override in overrides)]:
        if key in ("seed", "name", "output_dir", "tracking.group"):
            raise InputError(f"{key}=... is what a sweep sets itself; use {'--seeds' if key == 'seed' else '--out'}")
    for key in keys:
        if any(other.startswith(f"{key}.") for other in keys):
            raise InputError(f"--grid {key}=... replaces the block that another axis sets a key of; join the two")
    if out.name in ("", ".."):
        raise InputError(
            f"--out {str(out)!r} has no name of its own, which the runs' group is called by; name a folder"
        )
    if len(set(keys)) < len(keys):
        raise InputError(
            f"--grid names {next(key for key in keys if keys.count(key) > 1)!r} twice; give all its values at once"
        )
    result = []
    for values in itertools.product(*(values for _, values in axes)):
        for seed in range(n_seeds) if seeds is None else seeds:
            chosen = dict(zip(keys, values, strict=True)) | {"seed": seed}
            folder = out / "-".join(
                [
                    *([prefix] if prefix else []),
                    *(_label(key, value) for key, value in chosen.items() if key != "seed"),
                    f"s{seed}",
                ]
            )
            settings = [f"{key}={_yaml(value)}" for key, value in chosen.items()]
            places = {"name": folder.name, "output_dir": str(folder), "tracking.group": group or out.name}
            settings += [f"{key}={_yaml(value)}" for key, value in places.items()]
            cell = Cell(folder, chosen, (*overrides, *settings))
            try:
                cell = replace(cell, plugins=tuple(recipes.load_recipe(name, cell.overrides).plugins))
            except InputError as error:
                raise InputError(f"{folder.name}: {error}") from None
            result.append(cell)
    if len({cell.folder for cell in result}) < len(result):
        raise InputError(
            "two combinations of the grid have the same folder name; use values that differ in letters or digits"
        )
    return result


def _label(key: str, value: Any) -> str:
    text = value if isinstance(value, str) else _yaml(value)
    plain = "".join(c if c.isalnum() or c in ".+-" else "_" for c in text).strip("_")
    return f"{key.rsplit('.', 1)[-1]}={plain[:40]}".replace("=", "_")


def _yaml(value: Any) -> str:
    return json.dumps(value)


def state_of(folder: Path) -> str | None:
    """`done`, `failed`, ..., or None where nothing was started."""
    try:
        return str(json.loads((folder / "run.json").read_text(encoding="utf-8"))["state"])
    except (OSError, ValueError, KeyError):
        return None


def carry_out(name: str, grid: Sequence[Cell], notify: Notify) -> list[Cell]:
    """Run what is not finished, one after the other; returns those that failed, and those
    that need one of these. Their words are in FOLDER.log.

    A run that is interrupted (SIGTERM, Ctrl-C: both are passed on to it) interrupts the sweep.

    Raises:
        InputError: before the first starts, where a folder holds a run of another recipe.
    """
    for cell in grid:
        _require_same(name, cell)
    failed: list[Cell] = []
    for index, cell in enumerate(grid):
        if lacking := [each for each in failed if _needs(cell, each)]:
            notify(
                f"{index + 1}/{len(grid)} {cell.folder.name}: left out, since it takes the base model's numbers from "
                f"{lacking[0].folder.name}, which failed; mend that one and run the same sweep again"
            )
            failed.append(cell)
            continue
        if state_of(cell.folder) == "done":
            notify(f"{index + 1}/{len(grid)} {cell.folder.name}: finished before")
            continue
        cell.folder.parent.mkdir(parents=True, exist_ok=True)
        resume = (cell.folder / "recipe.yaml").is_file()
        path = cell.folder.with_name(f"{cell.folder.name}.log")
        notify(f"{index + 1}/{len(grid)} {cell.folder.name}{': going on' if resume else ''} (its words are in {path})")
        with path.open("a", encoding="utf-8") as log:
            command = cell.command(name, resume)
            # In a session of its own, so that Ctrl-C reaches it once: through `_ended`.
            code = _ended(subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True))
        if state_of(cell.folder) == "interrupted":
            raise KeyboardInterrupt(f"interrupted in {cell.folder.name}; run the same sweep again to go on")
        if code or state_of(cell.folder) != "done":
            last = path.read_text(encoding="utf-8").strip().splitlines()[-1:]
            notify(f"{cell.folder.name} failed with exit code {code}: {' '.join(last)} (all of it in {path})")
            failed.append(cell)
    return failed


def _needs(cell: Cell, other: Cell) -> bool:
    """Whether a run reads the other's measurement of the base model."""
    return f"evaluation.before={_yaml(str(other.folder / 'evaluation.json'))}" in cell.overrides


def _require_same(name: str, cell: Cell) -> None:
    path = cell.folder / "recipe.yaml"
    if not path.is_file():
        return
    old = recipes.load_recipe(str(path)).dump()
    new = recipes.load_recipe(cell.recipe or name, cell.overrides).dump()
    if changed := sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key)):
        raise InputError(
            f"{str(cell.folder)!r} holds a run with another {', '.join(changed)}; choose another --out, or remove it"
        )


def _ended(process: subprocess.Popen[bytes]) -> int:
    """The exit code of a run, which is told to stop where this process is, and left the time to."""

    def pass_on(signum: int, _frame: Any) -> None:
        process.send_signal(signum)

    before = {signum: signal.signal(signum, pass_on) for signum in (signal.SIGTERM, signal.SIGINT)}
    try:
        return process.wait()
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def wandb_sweep(name: str, grid: Sequence[str], n_seeds: int, overrides: Sequence[str]) -> str:
    """The same grid as W&B's sweep file; its agents run `headtune train`."""
    axes = dict(axis(text) for text in grid) | {"seed": list(range(n_seeds))}
    content = {
        "method": "grid",
        "command": ["headtune", "train", name, *overrides, *plugins.arguments_for(), "${args_no_hyphens}"],
        "parameters": {key: {"values": values} for key, values in axes.items()},
    }
    return yaml.safe_dump(content, sort_keys=False)


def _train_words(name: str, cell: Cell) -> list[str]:
    return ["headtune", "train", cell.recipe or name, *cell.overrides, *plugins.arguments_for(cell.plugins)]


def slurm_array(name: str, grid: Sequence[Cell]) -> str:
    """An array script: one task a run; a task that is started again goes on where it was.

    Two minutes before its time is up a run is told to stop; it keeps a checkpoint and the task is queued again.
    """
    lines = "\n".join("  " + shlex.quote(shlex.join(_train_words(name, cell))) for cell in grid)
    folders = "\n".join("  " + shlex.quote(str(cell.folder)) for cell in grid)
    return (
        "#!/bin/bash\n"
        f"#SBATCH --job-name=headtune\n#SBATCH --array=0-{len(grid) - 1}\n#SBATCH --gpus=1\n#SBATCH --requeue\n"
        "#SBATCH --signal=B:TERM@120\n\n"
        f"runs=(\n{lines}\n)\nfolders=(\n{folders}\n)\n"
        'resume=""\n[ -f "${folders[$SLURM_ARRAY_TASK_ID]}/recipe.yaml" ] && resume="--resume"\n'
        # bash answers a signal only between commands, unless it waits for one in the background.
        'eval "${runs[$SLURM_ARRAY_TASK_ID]} $resume" &\n'
        "trap 'kill -TERM $!; stopped=1' TERM\n"
        'wait $!; code=$?\n[ -n "$stopped" ] && { wait $!; scontrol requeue "$SLURM_JOB_ID"; exit; }\nexit $code\n'
    )
