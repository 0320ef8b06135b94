"""Grids of training runs: each a `headtune train` in a process of its own, resumable, one result file a run.

A run whose result file is there is not repeated with `--missing`; else one whose folder is finished with this very
recipe is not. A broken one goes on from its checkpoint.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from headtune.train.config.recipe import parse

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


@dataclass(frozen=True)
class Run:
    """One run of a grid.

    Attributes:
        task: of several tables the one it belongs to.
        result: its result file.
        alone: the later ones take its measurement over.
    """

    task: str
    name: str
    seed: int
    recipe: dict[str, Any]
    result: Path | None = None
    alone: bool = False

    @property
    def out(self) -> Path:
        return Path(self.recipe["output_dir"])

    def finished(self) -> bool:
        """Done, and with this very recipe; one with another is refused: its folder must go first."""
        path = self.out / "run.json"
        if not path.is_file() or json.loads(path.read_text())["state"] != "done":
            return False
        done, expected = yaml.safe_load((self.out / "recipe.yaml").read_text()), parse(self.recipe).dump()
        different = sorted(key for key in done.keys() | expected.keys() if done.get(key) != expected.get(key))
        if different:
            sys.exit(f"{self.out} was run with another {', '.join(different)}; remove it to run it again")
        return True

    def kept(self) -> bool:
        """Its result file is there."""
        return self.result is not None and self.result.is_file()


def stem(name: str, seed: int) -> str:
    """A file name for a row of a table."""
    return f"{''.join(c if c.isalnum() else '_' for c in name)}-s{seed}"


def carry_out(recipe: Path, log: Path, threads: int, resume: bool) -> None:
    """One run, in a process of its own, that talks to `log`."""
    import torch

    from headtune.cli.main import main

    torch.set_num_threads(threads)
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        sys.exit(main(["train", str(recipe), *(["--resume"] if resume else [])]))


def run_all(runs: Iterable[Run], jobs: int, threads: int, keep: Callable[[Run], None]) -> None:
    """Every run that is not finished, `jobs` at a time, each forked from a process that has imported what it needs.

    Args:
        keep: told of each that is finished.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["headtune.cli.main", "headtune.train.runs.run"])
    going: dict[Any, Run] = {}

    def wait(at_most: int) -> None:
        while len(going) > at_most:
            for process in [p for p in going if not p.is_alive()]:
                run = going.pop(process)
                if process.exitcode:
                    print(f"FAILED {run.task} {run.name} seed {run.seed}: see {run.out}.log", flush=True)
                else:
                    keep(run)
            time.sleep(0.2)

    for run in runs:
        if run.finished():
            keep(run)
            continue
        wait(jobs - 1)
        run.out.parent.mkdir(parents=True, exist_ok=True)
        path = run.out.with_suffix(".yaml")
        path.write_text(yaml.safe_dump(run.recipe))
        resume = (run.out / "recipe.yaml").is_file()
        print(f"{datetime.now(UTC):%H:%M:%S} {run.task}: {run.name}, seed {run.seed}", flush=True)
        process = context.Process(target=carry_out, args=(path, Path(f"{run.out}.log"), threads, resume))
        process.start()
        going[process] = run
        if run.alone:
            wait(0)
    wait(0)


def without_kept(runs: Iterable[Run]) -> list[Run]:
    """The runs that have no result file, and those whose measurement of the base one of them takes over."""
    runs = list(runs)
    missing = {id(run) for run in runs if not run.kept()}
    needed = {before for run in runs if id(run) in missing and (before := taken_over(run)) is not None}
    return [run for run in runs if id(run) in missing or (run.out / "evaluation.json") in needed]


def taken_over(run: Run) -> Path | None:
    """The evaluation.json whose measurement of the base a run takes over."""
    before = run.recipe["evaluation"].get("before")
    return None if before is None else Path(before)


def relative(value: Any, folder: Path) -> Any:
    """What a recipe says, with paths inside the folder of a grid written from there: no result names a machine's."""
    match value:
        case dict():
            return {key: relative(inner, folder) for key, inner in value.items()}
        case list():
            return [relative(inner, folder) for inner in value]
        case str() if value.startswith(f"{folder}/"):
            return value.removeprefix(f"{folder}/")
    return value


def of_recipe(run: Run, folder: Path, keys: Collection[str]) -> dict[str, Any]:
    """Blocks of the recipe that a run was carried out with."""
    recipe = yaml.safe_load((run.out / "recipe.yaml").read_text())
    return {key: relative(value, folder) for key, value in recipe.items() if key in keys}


def of_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """What every result file says of how it came about."""
    return {
        "peak_memory_gib": state["peak_memory_gib"],
        "created": state["created"],
        "versions": state["versions"],
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
    }


def write(path: Path, content: Mapping[str, Any]) -> None:
    """A result file, left alone where it says the same already."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, ensure_ascii=False) + "\n"
    if not path.is_file() or path.read_text() != text:
        path.write_text(text)


def parser(text: str | None, methods: Collection[str], folder: str) -> argparse.ArgumentParser:
    """The options that every grid has."""
    result = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data")
    result.add_argument("--only", nargs="+", choices=methods)
    result.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    result.add_argument("--missing", action="store_true", help="runs without a result file alone")
    result.add_argument("--search", action="store_true")
    result.add_argument("--table", action="store_true")
    result.add_argument("--jobs", type=int, default=1)
    result.add_argument("--threads", type=int, default=max(1, (os.cpu_count() or 2) // 2))
    result.add_argument("--folder", type=Path, default=ROOT / "runs" / folder)
    return result
