"""Six tasks learnt one after the other: SEEKR, its controls and baselines, on the same data with the same steps.

    python benchmarks/continual.py --data DATA             every method, three seeds, two orders; resumable
    python benchmarks/continual.py --data DATA --small     for two cores: three seeds for the core rows, else one
    python benchmarks/continual.py --data DATA --missing   runs without a result file alone
    python benchmarks/continual.py --data DATA --search    weights of the penalties, on the first three tasks
    python benchmarks/continual.py --table                 the table from the result files alone

DATA holds `function_vectors/` (Todd et al. 2024). Each run is a `headtune train` in a process of its own; a finished
one is not repeated, a broken one goes on. One result file a run in benchmarks/results/continual/, the table of them all
in benchmarks/results/continual.json. OP and BWT are means over seeds; their intervals are 95% percentile bootstraps
over held-out examples within each task, of the mean over seeds. Differences are paired over examples and seeds.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grid
import numpy as np
from grid import RESULTS
from readme import cell, put, rows

ORDERS = {
    "first": (
        "country-capital",
        "person-instrument",
        "product-company",
        "landmark-country",
        "present-past",
        "singular-plural",
    ),
    "second": (
        "singular-plural",
        "landmark-country",
        "present-past",
        "person-instrument",
        "country-capital",
        "product-company",
    ),
}
ROWS, STEPS, BATCH, RATE = 128, 16, 8, 5e-5
HEADS, LAYERS = 34, 22  # the paper's shares of 1024 heads and 32 layers, 128 and 24, of 270 and 30
REPLAY = 0.05


@dataclass(frozen=True)
class Method:
    """A row: the recipe's method block and heads.

    Attributes:
        core: run with every seed, and in both orders with one, in the small grid too.
        control: the row it is compared with.
    """

    method: dict[str, Any]
    heads: dict[str, Any] | None = None
    core: bool = False
    control: str | None = None


def seekr(**distil: Any) -> dict[str, Any]:
    return {"strategy": "seekr", "distil": {"layers": LAYERS, "heads": HEADS, "attention_weight": 100.0, **distil}}


METHODS: dict[str, Method] = {
    "sequential": Method({"strategy": "sequential"}, core=True),
    "replay": Method({"strategy": "replay"}, core=True, control="sequential"),
    "SEEKR": Method(seekr(), core=True, control="replay"),
    "SEEKR, random heads, same layers": Method(seekr(choice="random_matched"), core=True, control="SEEKR"),
    "SEEKR, random heads, any layer": Method(seekr(choice="random"), control="SEEKR"),
    "SEEKR, recall heads": Method(seekr(), {"from": "{heads}", "role": "recall", "top": 16}, control="SEEKR"),
    "SEEKR, all heads": Method(seekr(), {"all": True}, control="SEEKR"),
    "SEEKR, no attention": Method(seekr(attention_weight=0.0), control="SEEKR"),
    "DER++": Method({"strategy": "der"}, control="replay"),
    "EWC": Method({"strategy": "ewc"}, control="sequential"),
    "LwF": Method({"strategy": "lwf"}, control="sequential"),
    "multitask": Method({"strategy": "multitask"}),
}
SEARCH: dict[str, Sequence[tuple[str, float]]] = {
    "SEEKR": [("distil.attention_weight", weight) for weight in (10.0, 100.0, 1000.0)],
    "EWC": [("ewc_weight", weight) for weight in (1e3, 1e5)],
    "DER++": [("der_weight", weight) for weight in (0.05, 0.5)],
}


def recipe_of(data: Path, folder: Path, name: str, seed: int, order: str, out: Path, tasks: int = 6) -> dict[str, Any]:
    """The whole recipe of one run."""
    row = METHODS[name]
    recipe: dict[str, Any] = {
        "recipe": "seekr",
        "model": {"name": "smollm2-135m"},
        "task": {
            "sequence": [f"pairs:{data}/function_vectors/{task}.json" for task in ORDERS[order][:tasks]],
            "max_train_examples": ROWS,
            "max_eval_examples": 24,
        },
        "method": {"tune": "full", "replay": {"ratio": REPLAY}, "keep": "none", **row.method},
        "training": {
            "max_steps": STEPS,
            "per_device_train_batch_size": BATCH,
            "learning_rate": RATE,
            "lr_scheduler_type": "linear",
            "warmup_steps": 2,
            "weight_decay": 0.0,
            "save_strategy": "no",
            "logging_steps": 10,
        },
        "evaluation": {"n_items": 3, "batch_size": 24},
        "tracking": {"wandb": "disabled", "group": "continual"},
        "name": out.name,
        "output_dir": str(out),
        "seed": seed,
    }
    if tasks == len(ORDERS[order]):
        recipe["evaluation"]["general"] = ["one_to_many:test"]
    if row.heads is not None:
        heads = {key: str(folder / "heads") if value == "{heads}" else value for key, value in row.heads.items()}
        recipe["heads"] = heads
    return recipe


def of_metrics(one: Mapping[str, Any]) -> list[str]:
    return list(one["rows"][0]["values"])


def keep(run: grid.Run) -> None:
    """The run's result file."""
    assert run.result is not None
    state = json.loads((run.out / "run.json").read_text())
    sequence = json.loads((run.out / "sequence.json").read_text())
    recipe = grid.of_recipe(run, run.out.parents[1], ("heads", "method", "training", "task"))
    general = {
        name: {
            metric: float(np.mean([row["values"][metric] for row in one["rows"]]))
            for metric in one["rows"][0]["values"]
        }
        for name, one in sequence["general_after"].items()
    }
    content = {
        "order": run.task,
        "method": run.name,
        "seed": run.seed,
        "recipe": {key: value for key, value in recipe.items() if key != "task"},
        "tasks": [spec["train"].rsplit("/", 1)[-1].removesuffix(".json") for spec in recipe["task"]["sequence"]],
        "before": [one["values"] for one in sequence["before"]],
        "after": [[one["values"] for one in column] for column in sequence["after"]],
        "heads": sequence["heads"],
        "general": general,
        "perplexity": [sequence["perplexity_before"], sequence["perplexity_after"]],
        "buffer": state["buffer"],
        "parameters": state["parameters"],
        "training": state["training"],
        **grid.of_state(state),
    }
    grid.write(run.result, content)


# --- the table --------------------------------------------------------------------------------------------------------


def numbers(result: Mapping[str, Any], draws: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """OP and BWT of a run in every resampling, `[n]`; the first draw is the examples as they are."""
    last = np.stack([d @ np.array(v) / len(v) for d, v in zip(draws, result["after"][-1], strict=True)])
    values = {"op": last.mean(0)}
    if len(result["after"]) > 1:
        accuracies = np.stack(
            [draws[i] @ np.array(column[i]) / len(column[i]) for i, column in enumerate(result["after"])]
        )
        values["bwt"] = (last - accuracies)[:-1].mean(0)
    return values


def summarise(results: dict[str, list[dict[str, Any]]], n: int = 4000) -> list[dict[str, Any]]:
    """One line a method: OP and BWT with intervals, and paired differences from its control over their shared seeds."""
    sizes = [len(values) for values in next(iter(results.values()))[0]["before"]]
    generator = np.random.default_rng(0)
    draws = [np.vstack([np.ones(s), generator.multinomial(s, np.full(s, 1 / s), size=n)]) for s in sizes]
    by_seed = {name: {r["seed"]: numbers(r, draws) for r in runs} for name, runs in results.items()}

    def over_seeds(values: Sequence[np.ndarray]) -> dict[str, Any]:
        mean = np.mean(values, axis=0)
        ci = [float(x) for x in np.percentile(mean[1:], [2.5, 97.5])]
        return {"mean": float(mean[0]), "ci": ci, "by_seed": [float(value[0]) for value in values]}

    table = []
    for name in METHODS:
        if name not in results:
            continue
        runs, numbers_of_seed = results[name], by_seed[name]
        line: dict[str, Any] = {"method": name, "seeds": sorted(numbers_of_seed)}
        for metric in ("op", "bwt"):
            if metric not in next(iter(numbers_of_seed.values())):
                continue
            line[metric] = over_seeds([values[metric] for values in numbers_of_seed.values()])
            other = by_seed.get(METHODS[name].control or "", {})
            shared = sorted(set(numbers_of_seed) & set(other))
            if shared:
                line[metric]["minus_control"] = over_seeds(
                    [numbers_of_seed[s][metric] - other[s][metric] for s in shared]
                )
        line["control"] = METHODS[name].control
        line["perplexity"] = float(np.mean([r["perplexity"][1] for r in runs]))
        line["perplexity_before"] = runs[0]["perplexity"][0]
        line["general"] = {
            task: {metric: float(np.mean([r["general"][task][metric] for r in runs])) for metric in metrics}
            for task, metrics in runs[0]["general"].items()
        }
        line["seconds_per_step"] = float(np.median([r["training"]["seconds_per_step"] for r in runs]))
        line["peak_memory_gib"] = max(r["peak_memory_gib"] for r in runs)
        line["parameters"] = runs[0]["parameters"]
        table.append(line)
    return table


def markdown(table: Sequence[Mapping[str, Any]]) -> str:
    columns = ["method", "seeds", "OP, %", "BWT", "control", "OP minus control", "BWT minus control"]
    columns += ["perplexity", "lists: repeats, %", "lists: correct new, %", "s/step", "GiB"]
    lines = []
    for row in table:
        op, bwt = row["op"], row.get("bwt")
        line = [row["method"], str(len(row["seeds"])), cell(op), cell(bwt, "+"), row["control"] or ""]
        line += [cell(op.get("minus_control"), "+"), cell((bwt or {}).get("minus_control"), "+")]
        general = next(iter(row["general"].values()))
        line += [f"{row['perplexity']:.1f}"]
        line += [f"{100 * general[metric]:.1f}" for metric in ("repeat_rate", "correct_new_rate")]
        lines.append([*line, f"{row['seconds_per_step']:.2f}", f"{row['peak_memory_gib']:.1f}"])
    return rows(columns, lines)


def write_table() -> None:
    results: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for path in sorted((RESULTS / "continual").glob("*/*.json")):
        result = json.loads(path.read_text())
        results.setdefault(result["order"], {}).setdefault(result["method"], []).append(result)
    tables = {order: summarise(runs) for order, runs in results.items()}
    if tables:
        (RESULTS / "continual.json").write_text(json.dumps(tables, indent=1) + "\n")
    for order, table in tables.items():
        print(f"\n{order} order: {', '.join(ORDERS[order])}\n\n{markdown(table)}")
    fill()


def fill(check: bool = False) -> list[str]:
    """Put the tables of continual.json into the README of recipes/seekr; the names of those that were others."""
    tables = json.loads((RESULTS / "continual.json").read_text())
    texts = {f"{order} order": markdown(rows) for order, rows in tables.items()}
    return [name for name, text in texts.items() if not put("recipes/seekr/README.md", name, text, check)]


def search(data: Path, folder: Path, jobs: int, threads: int) -> None:
    """OP and BWT of a few penalty weights on the first three tasks, seed 100, which the grid does not use."""
    runs, settings = [], {}
    for name, options in SEARCH.items():
        for key, value in options:
            out = folder / "search" / f"{name}-{key}-{value:g}".replace("+", "p")
            recipe = recipe_of(data, folder, name, 100, "first", out, tasks=3)
            block = recipe["method"] = json.loads(json.dumps(recipe["method"]))
            *path, last = key.split(".")
            for part in path:
                block = block[part]
            block[last] = value
            runs.append(grid.Run("search", f"{name} {key}={value:g}", 100, recipe))
            settings[runs[-1].name] = out
    grid.run_all(runs, jobs, threads, lambda _run: None)
    rows = []
    for name, out in settings.items():
        after = json.loads((out / "evaluation.json").read_text())["after"]
        rows.append({"run": name, "op": after["op"]["mean"], "bwt": after["bwt"]["mean"]})
        rows[-1]["neutral_perplexity"] = after["neutral_perplexity"]
        print(rows[-1])
    (RESULTS / "continual_search.json").write_text(json.dumps(rows, indent=1) + "\n")


def identify(data: Path, folder: Path) -> None:
    """Recall heads, on training subjects of the first tasks, where they are not there yet."""
    from headtune.cli.main import main

    out = folder / "heads"
    if not (out / "heads.json").is_file():
        task = f"pairs:{data}/function_vectors/{ORDERS['first'][0]}.json:train"
        command = ["identify", "smollm2-135m", "--task", task, "--max-examples", "64", "--top", "16"]
        if main([*command, "--out", str(out), "--wandb", "disabled"]):
            sys.exit(f"identify failed on {task}")


def main() -> None:
    parser = grid.parser(__doc__, METHODS, "benchmark-continual")
    parser.add_argument("--orders", nargs="+", choices=ORDERS, default=list(ORDERS))
    parser.add_argument("--small", action="store_true")
    arguments = parser.parse_args()
    if arguments.table:
        return write_table()
    if arguments.search:
        return search(arguments.data, arguments.folder, arguments.jobs, arguments.threads)
    if arguments.only is None or "SEEKR, recall heads" in arguments.only:
        identify(arguments.data, arguments.folder)
    runs = []
    for seed in arguments.seeds:
        for order in arguments.orders:
            for name, method in METHODS.items():
                if arguments.only and name not in arguments.only:
                    continue
                extra = seed != arguments.seeds[0] or order != arguments.orders[0]
                twice = seed != arguments.seeds[0] and order != arguments.orders[0]
                if arguments.small and ((extra and not method.core) or twice):
                    continue
                out = arguments.folder / order / grid.stem(name, seed)
                recipe = recipe_of(arguments.data, arguments.folder, name, seed, order, out)
                first = arguments.folder / order / grid.stem(next(iter(METHODS)), arguments.seeds[0])
                if out != first:  # the base model is measured once an order
                    recipe["evaluation"]["before"] = str(first / "evaluation.json")
                result = RESULTS / "continual" / order / f"{grid.stem(name, seed)}.json"
                runs.append(grid.Run(order, name, seed, recipe, result, alone=out == first))
    if arguments.missing:
        runs = grid.without_kept(runs)
    grid.run_all(runs, arguments.jobs, arguments.threads, keep)
    write_table()


if __name__ == "__main__":
    main()
