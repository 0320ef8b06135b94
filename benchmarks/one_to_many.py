"""The one-to-many recipe against its controls, on held-out subjects, over seeds.

    python benchmarks/one_to_many.py                   every method, three seeds; resumable, one folder a run
    python benchmarks/one_to_many.py --seeds 0         one seed
    python benchmarks/one_to_many.py --only lofit      one method

Each run is a `headtune train` of its own process; a finished run is not repeated. All runs share the head set, the
training prompts (per seed), the steps and the held-out prompts. Writes benchmarks/results/one_to_many.json and prints
the table that recipes/lofit/README.md shows. Intervals are 95% percentile bootstraps over held-out subjects of the mean
over seeds; "vs base" and "vs lofit" are paired differences over the same subjects.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from headtune.train.config.recipe import load_recipe
from headtune.train.config.resolve_tasks import tasks_of
from headtune.train.evaluation.evaluate import parse_items, score_items

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "one_to_many.json"
KINDS = ("repeat", "correct_new", "wrong", "missing")

# name -> (recipe, overrides, does the seed matter). {heads} and {seed} are filled in.
OURS = "heads={{from: {heads}, role: both, top: 16}}"
RANDOM = "heads={{random: {{like: {heads}, seed: {seed}}}, role: both, top: 16}}"
SCALE_ONLY = ["method.offset=false", "training.learning_rate=0.03"]
METHODS: dict[str, tuple[str, list[str], bool]] = {
    "lofit": ("lofit/one_to_many", [OURS], True),
    "steer suppression x1.5": (
        "steer/one_to_many",
        ["heads={{from: {heads}, role: suppression, top: 4}}", "method.factor=1.5"],
        False,
    ),
    "steer recall x1.5": (
        "steer/one_to_many",
        ["heads={{from: {heads}, role: recall, top: 4}}", "method.factor=1.5"],
        False,
    ),
    "steer both x1.25": ("steer/one_to_many", ["heads={{from: {heads}, role: both, top: 4}}"], False),
    "random heads": (
        "lofit/one_to_many",
        [RANDOM],
        True,
    ),
    "lora r=8": ("lora/one_to_many", [], True),
    "all heads": ("lofit/one_to_many", ["heads={{all: true}}"], True),
    # Offsets can be written by any head of a layer; scales act through what a head computes.
    "lofit, scale only": ("lofit/one_to_many", [OURS, *SCALE_ONLY], True),
    "random heads, scale only": ("lofit/one_to_many", [RANDOM, *SCALE_ONLY], True),
    # What each part of the objective does.
    "lofit, gold prefixes only": ("lofit/one_to_many", [OURS, "method.answer_set.own_lists=0.0"], True),
    "lofit, no retention": ("lofit/one_to_many", [OURS, "method.answer_set.retention=0.0"], True),
    "lofit, top 4 of each role": ("lofit/one_to_many", ["heads={{from: {heads}, role: both, top: 4}}"], True),
    "offsets, cross-entropy on gold answers": (
        "lofit/one_to_many",
        [OURS, "method={{objective: sft, scale: none, offset: true}}"],
        True,
    ),
}


def launch(command: list[str]) -> float:
    """Run a headtune command; seconds."""
    start = time.monotonic()
    print("$ headtune " + " ".join(command), flush=True)
    done = subprocess.run([sys.executable, "-m", "headtune", *command], cwd=ROOT, check=False)
    if done.returncode:
        sys.exit(f"headtune {' '.join(command)} ended with {done.returncode}")
    return time.monotonic() - start


def run_all(folder: Path, seeds: list[int], only: list[str] | None) -> list[dict[str, Any]]:
    heads = folder / "heads"
    if not (heads / "heads.json").is_file():
        command = ["identify", "smollm2-135m", "--task", "one_to_many:train", "--max-examples", "96", "--top", "16"]
        launch([*command, "--out", str(heads), "--wandb", "offline", "--group", "one_to_many"])
    for name, (recipe, overrides, seeded) in METHODS.items():
        if only and name not in only:
            continue
        for seed in seeds if seeded else seeds[:1]:
            out = place(folder, name, seed)
            if not finished(out):
                command = ["train", recipe, *(o.format(heads=heads, seed=seed) for o in overrides)]
                command += [f"seed={seed}", f"output_dir={out}", f"name={out.name}", "tracking.group=one_to_many"]
                measured = [path for path in sorted(folder.glob("*/evaluation.json")) if finished(path.parent)]
                command += [f"evaluation.before={path}" for path in measured[:1]]
                if out.exists():
                    command.append("--resume")
                before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
                seconds = launch(command)
                after = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
                note = {"seconds": round(seconds, 1)}
                if after > before:  # the maximum over all children so far; only a new maximum says something
                    note["peak_memory_gib"] = round(after / 2**20, 2)
                (out / "benchmark.json").write_text(json.dumps(note))
            write(collect(folder), folder)
    return collect(folder)


def place(folder: Path, name: str, seed: int) -> Path:
    return folder / f"{name.replace(' ', '_').replace(',', '').replace('=', '')}-s{seed}"


def collect(folder: Path) -> list[dict[str, Any]]:
    """Every finished run of the grid, also those that another process has just finished."""
    return [
        read(name, seed, place(folder, name, seed))
        for name in METHODS
        for seed in range(100)
        if finished(place(folder, name, seed))
    ]


def finished(out: Path) -> bool:
    path = out / "run.json"
    return path.is_file() and json.loads(path.read_text())["state"] == "done"


def read(name: str, seed: int, out: Path) -> dict[str, Any]:
    state = json.loads((out / "run.json").read_text())
    evaluation = rescored(json.loads((out / "evaluation.json").read_text()), out / "recipe.yaml")
    note = json.loads((out / "benchmark.json").read_text()) if (out / "benchmark.json").is_file() else {}
    return {
        "method": name,
        "seed": seed,
        "parameters": state["parameters"],
        "share": state["parameters_share"],
        "evaluation": evaluation,
        **note,
    }


def rescored(evaluation: dict[str, Any], recipe: Path) -> dict[str, Any]:
    """The same evaluation with every item's kind taken anew from the stored text, so that all rows follow one rule."""
    settings = load_recipe(str(recipe))
    _, task = tasks_of(settings.task)
    if task.sha256 != evaluation["task_sha256"]:
        sys.exit(f"{recipe}: the task has changed since this run; remove the run to repeat it")
    n = settings.evaluation.n_items
    for row, example in zip(evaluation["examples"], task.examples, strict=True):
        for when in ("before", "after"):
            row[f"{when}_kinds"] = score_items(example, parse_items(row[when], n, example), n)
    return evaluation


def rates(examples: list[dict[str, Any]], when: str) -> np.ndarray:
    """`[n_examples, len(KINDS)]` share of each kind."""
    return np.array([[e[f"{when}_kinds"].count(kind) / len(e[f"{when}_kinds"]) for kind in KINDS] for e in examples])


def interval(values: np.ndarray, subjects: list[str], n: int = 5000) -> list[float]:
    names, index = np.unique(np.array(subjects), return_inverse=True)
    draws = np.random.default_rng(0).multinomial(len(names), np.full(len(names), 1 / len(names)), size=n)[:, index]
    means = draws @ values / draws.sum(1)
    return [float(x) for x in np.percentile(means, [2.5, 97.5])]


def summarise(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    examples = rows[0]["evaluation"]["examples"]
    subjects = [e["subject"] for e in examples]
    base = rates(examples, "before")
    table = [{"method": "base", "seeds": 0, "parameters": 0, "share": 0.0, **_columns(base, base, None, subjects)}]
    table[0]["neutral_perplexity"] = rows[0]["evaluation"]["before"]["neutral_perplexity"]
    by_method: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_method.setdefault(row["method"], []).append(row)
    after = {
        name: np.mean([rates(r["evaluation"]["examples"], "after") for r in runs], axis=0)
        for name, runs in by_method.items()
    }
    for name, runs in by_method.items():
        line = {"method": name, "seeds": len(runs), "parameters": runs[0]["parameters"], "share": runs[0]["share"]}
        line |= _columns(after[name], base, after.get("lofit") if name != "lofit" else None, subjects)
        each = np.array([rates(r["evaluation"]["examples"], "after").mean(0) for r in runs])
        line["by_seed"] = {kind: [float(x) for x in each[:, i]] for i, kind in enumerate(KINDS)}
        for key in ("neutral_perplexity",):
            line[key] = float(np.mean([r["evaluation"]["after"][key] for r in runs]))
        for key in ("p_previous", "p_remaining"):
            line[key] = float(np.mean([r["evaluation"]["after"][key]["mean"] for r in runs]))
        line["seconds"] = [r.get("seconds") for r in runs]
        line["peak_memory_gib"] = max((r.get("peak_memory_gib", 0) for r in runs), default=0) or None
        table.append(line)
    return table


def _columns(values: np.ndarray, base: np.ndarray, ours: np.ndarray | None, subjects: list[str]) -> dict[str, Any]:
    columns: dict[str, Any] = {}
    for index, kind in enumerate(KINDS):
        columns[kind] = {"mean": float(values[:, index].mean()), "ci": interval(values[:, index], subjects)}
        for other, reference in (("vs_base", base), ("lofit_minus_this", ours)):
            if reference is not None:
                gap = values[:, index] - base[:, index] if other == "vs_base" else ours[:, index] - values[:, index]  # type: ignore[index]
                columns[kind][other] = {"mean": float(gap.mean()), "ci": interval(gap, subjects)}
    return columns


def write(rows: list[dict[str, Any]], folder: Path) -> None:
    heads = json.loads((folder / "heads" / "heads.json").read_text())
    first = rows[0]["evaluation"]
    content = {
        "command": "python benchmarks/one_to_many.py",
        "date": datetime.now(UTC).date().isoformat(),
        "model": heads["model"],
        "heads": {role: [[h["layer"], h["head"]] for h in entries] for role, entries in heads["roles"].items()},
        "task": first["task"],
        "task_sha256": first["task_sha256"],
        "n": first["before"]["n"],
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "versions": heads["versions"],
        "table": summarise(rows),
    }
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(content, indent=1) + "\n")


def markdown(table: list[dict[str, Any]]) -> str:
    lines = [
        "| method | seeds | parameters | repeat | correct new | lofit minus this: repeat | correct new | perplexity |",
        "|---|---|---|---|---|---|---|---|",
    ]

    def cell(value: dict[str, Any] | None, sign: str = "") -> str:
        if value is None:
            return ""
        low, high = value["ci"]
        return f"{100 * value['mean']:{sign}.1f}% [{100 * low:{sign}.1f}, {100 * high:{sign}.1f}]"

    for row in table:
        versus = [cell(row[kind].get("lofit_minus_this"), "+") for kind in ("repeat", "correct_new")]
        lines.append(
            f"| {row['method']} | {row['seeds'] or ''} | {row['parameters']:,} | {cell(row['repeat'])} "
            f"| {cell(row['correct_new'])} | {versus[0]} | {versus[1]} | {row['neutral_perplexity']:.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=METHODS)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "benchmark-one_to_many")
    arguments = parser.parse_args()
    found = run_all(arguments.folder, arguments.seeds, arguments.only)
    print(markdown(summarise(found)))
