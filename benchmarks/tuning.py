"""Head-targeted tuning against its controls and baselines: same data, same steps, three tasks.

    python benchmarks/tuning.py --data DATA                the whole grid: every method, three seeds; resumable
    python benchmarks/tuning.py --data DATA --small        for two cores: three seeds for the core rows, else one
    python benchmarks/tuning.py --data DATA --missing      runs without a result file alone
    python benchmarks/tuning.py --data DATA --tasks relations --only "recall heads" both
    python benchmarks/tuning.py --data DATA --search       learning rates, on validation subjects of the relations
    python benchmarks/tuning.py --data DATA --prior        what always giving a relation's most frequent answer reaches
    python benchmarks/tuning.py --table                    the table from the result files alone

DATA holds `relations/` (LRE, Hernandez et al. 2024) and `truthfulqa/fold_0_{train,test}.csv` (split by LoFiT);
one_to_many comes with headtune. Each run is a `headtune train` in a process of its own, forked from one that has
imported what it needs; a finished run is not repeated. One result file a run in benchmarks/results/tuning/, the table
of them all in benchmarks/results/tuning.json. Intervals are 95% percentile bootstraps over held-out subjects of the
mean over seeds; differences are paired over the same subjects.
"""

from __future__ import annotations

import json
import random
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grid
import numpy as np
import yaml
from grid import RESULTS, ROOT
from readme import cell, put, rows

from headtune.analysis.tasks.task import Example
from headtune.train.config.methods import TaskConfig
from headtune.train.config.resolve_tasks import tasks_of

K = 16  # heads tuned, 6% of 270
BATCH = 8


@dataclass(frozen=True)
class Setting:
    """One task: what is trained on, with which objective, and which metrics count (name -> more is better)."""

    task: dict[str, Any]
    objective: dict[str, Any]
    metrics: dict[str, bool]
    heads_from: str
    steps: int = 40
    rates: dict[str, float] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)


# Relations whose objects are few and shared, so that what one subject teaches can serve another; of the 26 together the
# model answers 6% and training on other subjects cannot tell it, say, somebody's father.
RELATIONS = (
    "landmark_in_country",
    "landmark_on_continent",
    "person_native_language",
    "person_plays_instrument",
    "person_plays_pro_sport",
    "product_by_company",
)


def link_relations(data: Path, folder: Path) -> None:
    """A folder that holds `RELATIONS` alone."""
    relations = folder / "data-relations"
    relations.mkdir(parents=True, exist_ok=True)
    for name in RELATIONS:
        if not (relations / f"{name}.json").exists():
            (relations / f"{name}.json").symlink_to(data.resolve() / "relations" / f"{name}.json")


def settings(data: Path, folder: Path) -> dict[str, Setting]:
    relations = folder / "data-relations"
    return {
        "relations": Setting(
            {"train": f"relation:{relations}", "max_train_examples": 160, "max_eval_examples": 150},
            {"objective": "sft"},
            {"exact_match": True, "prefix_match": True},
            "relations",
            rates={"lofit": 1e-1},
        ),
        "one_to_many": Setting(
            {"train": "one_to_many", "max_train_examples": 160, "max_eval_examples": 60},
            # No retention term, which needs a second pass and an adapter to switch off: full fine-tuning has none.
            {"objective": "answer_set", "answer_set": {"unlikelihood": 4.0, "own_lists": 0.5, "retention": 0.0}},
            {"repeat_rate": False, "correct_new_rate": True},
            "one_to_many",
        ),
        "truthfulqa": Setting(
            {
                "train": f"truthfulqa:{data}/truthfulqa/fold_0_train.csv",
                "eval": f"truthfulqa:{data}/truthfulqa/fold_0_test.csv",
                "max_train_examples": 80,
                "max_eval_examples": 60,
            },
            {"objective": "dpo"},
            {"mc1": True, "mc2": True},
            "one_to_many",  # its questions have no subject in many places: heads from another task
            20,  # pairs of long answers: half the steps and examples of the other tasks
            training={"beta": 0.5},
        ),
    }


OFFSET = {"scale": "none", "offset": True, "init_std": 1e-3}
# Learning rates: on validation subjects of the relations (--search) the one with the highest exact match; among rates
# within 2 points of it, the one that damages neutral text least. LoFiT's on the other tasks and on all heads: the
# published one (at the rate of 16 heads, all 270 diverge on the relations).
RATES = {"lofit": 1e-2, "all heads": 1e-2, "jola": 3e-3, "masked": 1e-3, "lora": 5e-4, "full": 3e-5, "ln": 3e-3}


@dataclass(frozen=True)
class Method:
    """A row: the recipe family, its heads ({heads} is the head set's folder) and method block.

    Attributes:
        core: run with every seed in the small grid too.
        seeded: False for what has no randomness.
        control: the row with the same method on random heads, as many in each of the same layers.
    """

    recipe: str
    heads: dict[str, Any] | None = None
    method: dict[str, Any] = field(default_factory=dict)
    core: bool = False
    seeded: bool = True
    control: str | None = None


def from_set(role: str, top: int) -> dict[str, Any]:
    return {"from": "{heads}", "role": role, "top": top}


def random_like(role: str, top: int) -> dict[str, Any]:
    return {"random": {"like": "{heads}", "seed": "{seed}"}, "role": role, "top": top}


METHODS: dict[str, Method] = {
    "base": Method("steer", {"list": [[0, 0]]}, {"kind": "scale", "factor": 1.0}, seeded=False),
    "LoFiT's own heads": Method("lofit", {"lofit": {"learning_rate": 5e-3, "l1": 5e-4}, "top": K}, OFFSET, core=True),
    "recall heads": Method("lofit", from_set("recall", K), OFFSET, core=True, control="random, layers of recall"),
    "random, layers of recall": Method("lofit", random_like("recall", K), OFFSET, core=True),
    "suppression heads": Method(
        "lofit", from_set("suppression", K), OFFSET, core=True, control="random, layers of suppression"
    ),
    "random, layers of suppression": Method("lofit", random_like("suppression", K), OFFSET, core=True),
    "both": Method("lofit", from_set("both", K // 2), OFFSET, core=True, control="random heads, same layers"),
    "random heads, same layers": Method("lofit", random_like("both", K // 2), OFFSET, core=True),
    "random heads, any layer": Method("lofit", {"list": "{anywhere}"}, OFFSET, core=True),
    "LoRA r=8": Method("lora", core=True),
    "all heads": Method("lofit", {"all": True}, OFFSET),
    "JoLA, all heads": Method("jola", {"all": True}),
    "masked fine-tuning, both": Method(
        "masked", from_set("both", K // 2), control="masked fine-tuning, random, same layers"
    ),
    "masked fine-tuning, random, same layers": Method("masked", random_like("both", K // 2)),
    "LN tuning": Method("ln"),
    "full fine-tuning": Method("full", None, {"keep": False}),
    "ITI alpha=5": Method(
        "steer", {"probe": {"max_examples": 160}, "top": K}, {"kind": "iti", "alpha": 5.0, "max_examples": 160}
    ),
    "ITI alpha=15": Method(
        "steer", {"probe": {"max_examples": 160}, "top": K}, {"kind": "iti", "alpha": 15.0, "max_examples": 160}
    ),
}
SEARCH = {
    "both": ("lofit", [1e-2, 3e-2, 1e-1]),
    "JoLA, all heads": ("jola", [3e-3, 1e-2, 3e-2]),
    "masked fine-tuning, both": ("masked", [3e-4, 1e-3]),
    "LoRA r=8": ("lora", [5e-4, 2e-3]),
    "full fine-tuning": ("full", [3e-5, 1e-4]),
    "LN tuning": ("ln", [3e-3, 1e-2]),
}


def recipe_of(
    setting: Setting, name: str, seed: int, folder: Path, out: Path, rate: float | None = None
) -> dict[str, Any]:
    """The whole recipe of one run."""
    row = METHODS[name]
    fill = {
        "{heads}": str(folder / f"heads-{setting.heads_from}"),
        "{seed}": seed,
        "{anywhere}": [list(divmod(index, 9)) for index in sorted(random.Random(seed).sample(range(270), K))],
    }
    heads = None if row.heads is None else {key: _filled(value, fill) for key, value in row.heads.items()}
    trained = row.recipe != "steer"
    recipe: dict[str, Any] = {
        "recipe": row.recipe,
        "model": {"name": "smollm2-135m"},
        "task": setting.task,
        "method": {**(setting.objective if trained else {}), **row.method},
        "evaluation": {"n_items": 3, "batch_size": 32},
        "tracking": {"wandb": "disabled", "group": "tuning"},
        "name": out.name,
        "output_dir": str(out),
        "seed": seed,
    }
    if heads is not None:
        recipe["heads"] = heads
    if trained:
        recipe["training"] = {
            "max_steps": setting.steps,
            "per_device_train_batch_size": BATCH,
            "learning_rate": rate or RATES.get(name) or (RATES | setting.rates)[row.recipe],
            "lr_scheduler_type": "linear",
            "warmup_steps": 4,
            "weight_decay": 0.0,
            "save_strategy": "no",
            "logging_steps": 10,
            **setting.training,
        }
    if name != "base":
        recipe["evaluation"]["before"] = str(folder / out.parent.name / "base" / "evaluation.json")
    return recipe


def _filled(value: Any, fill: dict[str, Any]) -> Any:
    if isinstance(value, dict):
        return {key: _filled(inner, fill) for key, inner in value.items()}
    return fill.get(value, value) if isinstance(value, str) else value


def place(folder: Path, task: str, name: str, seed: int) -> Path:
    stem = grid.stem(name, seed)
    return folder / task / (stem if METHODS[name].seeded else stem.removesuffix(f"-s{seed}"))


def keep(run: grid.Run) -> None:
    """The run's result file."""
    assert run.result is not None
    state = json.loads((run.out / "run.json").read_text())
    evaluation = json.loads((run.out / "evaluation.json").read_text())
    rows = evaluation["examples"]
    training = state.get("training", {})
    content = {
        "task": run.task,
        "method": run.name,
        "seed": run.seed,
        "recipe": grid.of_recipe(run, run.out.parents[1], ("recipe", "heads", "method", "training")),
        "task_sha256": evaluation["task_sha256"],
        "parameters": 0 if run.name == "base" else state["parameters"],
        "heads": state.get("heads", []),
        "seconds_per_step": training.get("seconds_per_step"),
        "prefix_layers": training.get("prefix_cache", {}).get("layers", 0),
        "after": {k: v["mean"] if isinstance(v, dict) else v for k, v in evaluation["after"].items() if k != "n"},
        "n": evaluation["after"]["n"],
        "subjects": [row["subject"] for row in rows],
        "values": {name: [row["after_values"][name] for row in rows] for name in rows[0]["after_values"]},
        **grid.of_state(state),
    }
    grid.write(run.result, content)


# --- the table --------------------------------------------------------------------------------------------------------


def collect() -> dict[str, dict[str, list[dict[str, Any]]]]:
    """task -> method -> results by seed."""
    results: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for path in sorted((RESULTS / "tuning").glob("*/*.json")):
        result = json.loads(path.read_text())
        results.setdefault(result["task"], {}).setdefault(result["method"], []).append(result)
    return results


def interval(values: np.ndarray, subjects: list[str], n: int = 5000) -> dict[str, Any]:
    names, index = np.unique(np.array(subjects), return_inverse=True)
    draws = np.random.default_rng(0).multinomial(len(names), np.full(len(names), 1 / len(names)), size=n)[:, index]
    means = draws @ values / draws.sum(1)
    return {"mean": float(values.mean()), "ci": [float(x) for x in np.percentile(means, [2.5, 97.5])]}


def summarise(results: dict[str, list[dict[str, Any]]], metrics: Iterable[str]) -> list[dict[str, Any]]:
    """One line a method: metrics with intervals, and paired differences from the base and from random heads."""
    metrics = list(metrics)
    values = {
        name: {m: np.mean([np.array(r["values"][m]) for r in runs], axis=0) for m in metrics}
        for name, runs in results.items()
    }
    subjects = results["base"][0]["subjects"]
    table = []
    for name in METHODS:
        if name not in results:
            continue
        runs = results[name]
        if any(r["subjects"] != subjects for r in runs):
            sys.exit(f"{name}: measured on other prompts than the base; remove its result files and run it again")
        line: dict[str, Any] = {"method": name, "seeds": len(runs) if METHODS[name].seeded else 0}
        line["parameters"] = runs[0]["parameters"]
        seconds = [r["seconds_per_step"] for r in runs if r["seconds_per_step"]]
        line["seconds_per_step"] = float(np.median(seconds)) if seconds else None
        line["prefix_layers"] = [r["prefix_layers"] for r in runs]
        line["peak_memory_gib"] = max(r["peak_memory_gib"] for r in runs)
        line["perplexity_by_seed"] = [r["after"]["neutral_perplexity"] for r in runs]
        line["neutral_perplexity"] = float(np.mean([r["after"]["neutral_perplexity"] for r in runs]))
        for metric in metrics:
            line[metric] = interval(values[name][metric], subjects)
            line[metric]["by_seed"] = [float(np.mean(r["values"][metric])) for r in runs]
            for other, key in (("base", "minus_base"), (METHODS[name].control, "minus_random")):
                if name != "base" and other in values:
                    line[metric][key] = interval(values[name][metric] - values[other][metric], subjects)
        table.append(line)
    return table


NAMES = {
    "exact_match": "exact match, %",
    "mc1": "MC1, %",
    "mc2": "MC2, %",
    "repeat_rate": "repeats, %",
    "correct_new_rate": "correct new, %",
}


def markdown(table: list[dict[str, Any]], metrics: Iterable[str]) -> str:
    """The table of one task; of the relations' two metrics, which hardly differ, the stricter one."""
    shown = [metric for metric in metrics if metric in NAMES]
    columns = ["method", "seeds", "parameters"]
    columns += [text for metric in shown for text in (NAMES[metric], "minus random")]
    columns += ["perplexity, neutral text (by seed)", "s/step", "GiB"]
    lines = []
    for row in table:
        by_seed = row["perplexity_by_seed"]
        several = f" ({', '.join(f'{value:.0f}' for value in by_seed)})" if len(by_seed) > 1 else ""
        line = [row["method"], str(row["seeds"] or ""), f"{row['parameters']:,}"]
        for metric in shown:
            line += [cell(row[metric]), cell(row[metric].get("minus_random"), "+")]
        line += [f"{row['neutral_perplexity']:.1f}{several}"]
        line += ["" if row["seconds_per_step"] is None else f"{row['seconds_per_step']:.1f}"]
        lines.append([*line, f"{row['peak_memory_gib']:.1f}"])
    return rows(columns, lines)


def write_table(settings_of: dict[str, Setting]) -> None:
    results = collect()
    content: dict[str, Any] = {"command": "python benchmarks/tuning.py", "model": "smollm2-135m", "heads": K}
    content |= {"batch": BATCH}
    content |= {"date": datetime.now(UTC).date().isoformat(), "tasks": {}}
    for task, setting in settings_of.items():
        if "base" in results.get(task, {}):
            table = summarise(results[task], setting.metrics)
            content["tasks"][task] = {"steps": setting.steps, "train_examples": setting.task["max_train_examples"]}
            content["tasks"][task] |= {"learning_rates": RATES | setting.rates}
            content["tasks"][task] |= {"n": results[task]["base"][0]["n"], "table": table}
            print(f"\n{task}\n\n{markdown(table, setting.metrics)}")
    (RESULTS / "tuning.json").write_text(json.dumps(content, indent=1) + "\n")
    fill()


def fill(check: bool = False) -> list[str]:
    """Put the tables of tuning.json into the README of recipes/lofit; the names of those that were others."""
    by_task = settings(Path("data"), ROOT / "runs" / "benchmark-tuning")
    tables = json.loads((RESULTS / "tuning.json").read_text())["tasks"]
    texts = {task: markdown(table["table"], by_task[task].metrics) for task, table in tables.items()}
    return [task for task, text in texts.items() if not put("recipes/lofit/README.md", task, text, check)]


def search(setting: Setting, folder: Path, jobs: int, threads: int) -> None:
    """Learning rates on validation subjects, one seed, one task; writes benchmarks/results/tuning_search.json."""
    name = setting.task["train"]
    held_out = Setting(
        setting.task | {"train": f"{name}:train", "eval": f"{name}:validation"},
        setting.objective,
        setting.metrics,
        "relations",
    )
    runs = [grid.Run("search", "base", 0, recipe_of(held_out, "base", 0, folder, folder / "search" / "base"))]
    for method, (_, rates) in SEARCH.items():
        for rate in rates:
            out = place(folder, "search", method, 0)
            out = out.with_name(f"{out.name}-{rate:g}")
            runs.append(grid.Run("search", method, 0, recipe_of(held_out, method, 0, folder, out, rate)))
    grid.run_all(runs, jobs, threads, keep=lambda run: None)
    rows = []
    for run in runs:
        after = json.loads((run.out / "evaluation.json").read_text())["after"]
        rate = run.recipe.get("training", {}).get("learning_rate")
        method_config = yaml.safe_load((run.out / "recipe.yaml").read_text())["method"]
        rows.append({"method": run.name, "learning_rate": rate, "exact_match": after["exact_match"]["mean"]})
        rows[-1] |= {"settings": {key: value for key, value in method_config.items() if not isinstance(value, dict)}}
        rows[-1]["neutral_perplexity"] = after["neutral_perplexity"]
        print(rows[-1])
    (RESULTS / "tuning_search.json").write_text(json.dumps(rows, indent=1) + "\n")


def prior(setting: Setting, seeds: list[int]) -> None:
    """Exact match of the answer that a relation's training prompts give most often; no model."""
    train, held_out = tasks_of(TaskConfig(**setting.task))

    def wording(example: Example) -> str:
        return example.prompt.replace(example.subject, "{}")

    rows = []
    for seed in seeds:
        counts: dict[str, Counter[str]] = {}
        for example in train.limited(setting.task["max_train_examples"], seed).examples:
            counts.setdefault(wording(example), Counter())[example.answers[0]] += 1
        values = [
            (counts[wording(e)].most_common(1)[0][0] if wording(e) in counts else "", e) for e in held_out.examples
        ]
        rows.append(sum(answer in example.answers for answer, example in values) / len(values))
    print({"exact_match": rows, "mean": sum(rows) / len(rows)})
    (RESULTS / "tuning_prior.json").write_text(json.dumps({"seeds": seeds, "exact_match": rows}) + "\n")


def identify(folder: Path, selected: set[str]) -> None:
    """Head sets, on training subjects, where they are not there yet."""
    tasks = {"one_to_many": ("one_to_many:train", 96), "relations": (f"relation:{folder}/data-relations:train", 96)}
    from headtune.cli.main import main

    for name in sorted(selected):
        task, n = tasks[name]
        out = folder / f"heads-{name}"
        if not (out / "heads.json").is_file():
            command = ["identify", "smollm2-135m", "--task", task, "--max-examples", str(n), "--top", str(K)]
            if main([*command, "--out", str(out), "--wandb", "disabled"]):
                sys.exit(f"identify failed on {task}")
        saved = json.loads((out / "heads.json").read_text())
        heads = {role: [[h["layer"], h["head"], h["score"]] for h in ranked] for role, ranked in saved["roles"].items()}
        (RESULTS / "tuning").mkdir(parents=True, exist_ok=True)
        note = {"task": saved["task"], "method": saved["method"]["name"], "heads": heads}
        (RESULTS / "tuning" / f"heads-{name}.json").write_text(json.dumps(note) + "\n")


def main() -> None:
    parser = grid.parser(__doc__, METHODS, "benchmark-tuning")
    parser.add_argument("--tasks", nargs="+", choices=["relations", "one_to_many", "truthfulqa"])
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--prior", action="store_true")
    arguments = parser.parse_args()
    by_task = settings(arguments.data, arguments.folder)
    selected = {name: by_task[name] for name in arguments.tasks or by_task}
    if arguments.table:
        return write_table(by_task)
    link_relations(arguments.data, arguments.folder)
    if arguments.prior:
        return prior(by_task["relations"], arguments.seeds)
    identify(arguments.folder, {setting.heads_from for setting in selected.values()})
    if arguments.search:
        return search(by_task["relations"], arguments.folder, arguments.jobs, arguments.threads)
    runs = []
    for seed in arguments.seeds:  # a whole table after the first seed, then its spread
        for task, setting in selected.items():
            for name, method in METHODS.items():
                later = seed != arguments.seeds[0]
                if (arguments.only and name not in arguments.only) or (later and not method.seeded):
                    continue
                if later and arguments.small and not method.core:
                    continue
                out = place(arguments.folder, task, name, seed)
                recipe = recipe_of(setting, name, seed if method.seeded else 0, arguments.folder, out)
                result = place(RESULTS / "tuning", task, name, seed).with_suffix(".json")
                runs.append(grid.Run(task, name, seed, recipe, result, alone=name == "base"))
    if arguments.missing:
        runs = grid.without_kept(runs)
    grid.run_all(runs, arguments.jobs, arguments.threads, keep)
    write_table(by_task)


if __name__ == "__main__":
    main()
