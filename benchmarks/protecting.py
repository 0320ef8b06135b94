"""Learning new facts while heads are protected: what is learnt, and what is kept of facts the model knew.

    python benchmarks/protecting.py --data DATA                    every row, three seeds; resumable
    python benchmarks/protecting.py --data DATA --missing          runs without a result file alone
    python benchmarks/protecting.py --data DATA --only none "recall heads" --seeds 0
    python benchmarks/protecting.py --data DATA --search           weights and rates, with other facts and another seed
    python benchmarks/protecting.py --table                        the table from the result files alone

DATA holds `relations/` (LRE, Hernandez et al. 2024). New facts: fathers of `person_father`, dealt out anew among the
persons, so that the model cannot know them; learnt is the share that it writes after training on these very prompts.
Kept is the share of facts of other relations that it still writes, among those that it wrote before; each prompt stands
behind two facts of its relation, without which this model answers 7% of them. Recall heads are those of `identify` on
facts of the same relations that it wrote before, of subjects that are not measured. Everything that is not random is
made once in FOLDER/data, and the prompts are part of every result file.

Each run is a `headtune train` in a process of its own; a finished one is not repeated, a broken one goes on. One result
file a run in benchmarks/results/protecting/, the table of them all in benchmarks/results/protecting.json. Intervals are
95% percentile bootstraps over prompts of the mean over seeds; differences are paired over prompts and seeds.
"""

from __future__ import annotations

import json
import random
import sys
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grid
import numpy as np
import yaml
from grid import RESULTS
from readme import cell, put, rows

from headtune.analysis.tasks.loading import load_task
from headtune.analysis.tasks.task import Example, Task, to_jsonl

NEW = "person_father"
KNOWN = {  # how many of each are tried
    "country_capital_city": 24,
    "country_language": 24,
    "country_largest_city": 24,
    "country_currency": 30,
    "city_in_country": 27,
    "food_from_country": 30,
    "landmark_in_country": 90,
    "landmark_on_continent": 30,
    "person_native_language": 40,
    "person_plays_pro_sport": 30,
    "product_by_company": 80,
}
N_NEW, N_KEPT, N_IDENTIFY = 40, 60, 64
STEPS, BATCH, HEADS = 60, 8, 16
RATES = {"full": 1e-4, "regularise": 1e-4, "lora": 2e-3}  # see --search
WEIGHT = 1.0  # of the relative drifts; see --search


@dataclass(frozen=True)
class Method:
    """A row: the recipe family, its heads and method block, and the rows it is compared with."""

    recipe: str
    heads: dict[str, Any] | None = None
    method: Mapping[str, Any] | None = None
    controls: tuple[str, ...] = ("none",)


def drifts(weight: float = WEIGHT) -> dict[str, Any]:
    """What the heads attend to and what they put out may not drift."""
    return {"regularisers": [{"kind": kind, "weight": weight} for kind in ("attention_kl", "output_drift")]}


RECALL = {"from": "{heads}", "role": "recall", "top": HEADS}
RANDOM = {"random": {"like": "{heads}", "seed": "{seed}"}, "role": "recall", "top": HEADS}
WEIGHTS = {"regularisers": [{"kind": "weight_drift", "weight": 10.0}]}
METHODS: dict[str, Method] = {
    "none": Method("full", controls=()),
    "random heads": Method("regularise", RANDOM, drifts()),
    "recall heads": Method("regularise", RECALL, drifts(), ("none", "random heads")),
    "all heads": Method("regularise", {"all": True}, drifts(), ("none", "random heads")),
    "LoRA r=8": Method("lora"),
    "weights of random heads": Method("regularise", RANDOM, WEIGHTS),
    "weights of recall heads": Method("regularise", RECALL, WEIGHTS, ("none", "weights of random heads")),
}
SEARCH = ("recall heads", (1.0, 10.0))
LORA_RATES = (5e-4, 1e-3, 2e-3)


def recipe_of(folder: Path, name: str, seed: int, out: Path, facts: str = "new") -> dict[str, Any]:
    """The whole recipe of one run."""
    row = METHODS[name]
    recipe: dict[str, Any] = {
        "recipe": row.recipe,
        "model": {"name": "smollm2-135m"},
        "task": {
            "train": str(folder / "data" / f"{facts}.jsonl"),
            "eval": str(folder / "data" / f"{facts}-and-kept.jsonl"),
            "kind": "exact_match",
            "split": {"by": "file"},  # the new facts are to be memorised: trained on and measured
        },
        "method": {"objective": "sft", **({} if row.recipe == "lora" else {"keep": False}), **(row.method or {})},
        "training": {
            "max_steps": STEPS,
            "per_device_train_batch_size": BATCH,
            "learning_rate": RATES[row.recipe],
            "lr_scheduler_type": "linear",
            "warmup_steps": 4,
            "weight_decay": 0.0,
            "save_strategy": "no",
            "logging_steps": 10,
        },
        "evaluation": {"batch_size": 50},
        "tracking": {"wandb": "disabled", "group": "protecting"},
        "name": out.name,
        "output_dir": str(out),
        "seed": seed,
    }
    if row.heads is not None:
        fill = {"{heads}": str(folder / "heads"), "{seed}": seed}
        recipe["heads"] = {
            key: {inner: fill.get(str(v), v) for inner, v in value.items()}
            if isinstance(value, dict)
            else fill.get(str(value), value)
            for key, value in row.heads.items()
        }
    return recipe


# --- facts and heads --------------------------------------------------------------------------------------------------


def dealt_anew(task: Task, n: int, seed: int) -> list[Example]:
    """`n` subjects of a relation, each with the object of another one and with none of its own."""
    chosen = random.Random(seed).sample(task.examples, n)
    answers = [example.answers[0] for example in chosen]
    order, generator = list(range(n)), random.Random(seed)
    while any(answers[place] in example.answers for place, example in zip(order, chosen, strict=True)):
        generator.shuffle(order)
    return [replace(example, answers=(answers[place],)) for place, example in zip(order, chosen, strict=True)]


def after_others(examples: Sequence[Example]) -> list[Example]:
    """Facts of a relation, each prompt behind two others of it, with which the model writes answers and nothing else.

    Those whose answer the two give away are left out.
    """
    first = examples[0]
    second = next(example for example in examples if not set(example.answers) & set(first.answers))
    shown = "".join(f"{one.prompt} {one.answers[0]}\n" for one in (first, second))
    answers = {*first.answers, *second.answers}
    return [replace(e, prompt=shown + e.prompt) for e in examples if not answers & set(e.answers)]


def is_measured(example: Example) -> bool:
    """A subject is either measured or what heads are found with, in all relations alike."""
    return zlib.crc32(example.subject.encode()) % 2 == 0


def prepare(data: Path, folder: Path) -> None:
    """The facts, and the recall heads, where they are not there yet."""
    from headtune.analysis.models.loading import load_plain
    from headtune.cli.main import main
    from headtune.train.evaluation.evaluate import evaluate

    target = folder / "data"
    target.mkdir(parents=True, exist_ok=True)
    new, other = (dealt_anew(load_task(f"relation:{data}/relations/{NEW}.json"), N_NEW, seed) for seed in (0, 100))
    if not (target / "known.json").is_file():
        pool = [
            example
            for name, n in KNOWN.items()
            for example in after_others(load_task(f"relation:{data}/relations/{name}.json").limited(n, 0).examples)
        ]
        model, tokenizer = load_plain("smollm2-135m", "float32")
        _, scored = evaluate(model, tokenizer, Task("known", tuple(pool), kind="exact_match"), batch_size=50)
        right = [pool.index(one.example) for one in scored if one.values["exact_match"] == 1]
        print(f"the model writes {len(right)} of {len(pool)} facts", flush=True)
        chosen = [pool[index] for index in random.Random(0).sample(sorted(right), len(right))]
        measured = [example for example in chosen if is_measured(example)][:N_KEPT]
        (target / "identify.jsonl").write_text(to_jsonl([e for e in chosen if not is_measured(e)][:N_IDENTIFY]))
        for name, facts in {"new": new, "other": other}.items():
            (target / f"{name}.jsonl").write_text(to_jsonl(facts))
            (target / f"{name}-and-kept.jsonl").write_text(to_jsonl([*facts, *measured]))
        (target / "known.json").write_text(json.dumps({"tried": len(pool), "right": len(right), "kept": len(measured)}))
    if not (folder / "heads" / "heads.json").is_file():
        command = ["identify", "smollm2-135m", "--task", str(target / "identify.jsonl"), "--top", str(HEADS)]
        if main([*command, "--out", str(folder / "heads"), "--wandb", "disabled"]):
            sys.exit("identify failed on the facts that the model knows")


# --- results ----------------------------------------------------------------------------------------------------------


def measured(out: Path) -> dict[str, Any]:
    """Of a finished run: 0 or 1 by prompt, learnt and kept, after and before."""
    evaluation = json.loads((out / "evaluation.json").read_text())
    recipe = yaml.safe_load((out / "recipe.yaml").read_text())
    taught = {json.loads(line)["prompt"] for line in Path(recipe["task"]["train"]).read_text().splitlines()}
    result: dict[str, Any] = {"perplexity": evaluation["after"]["neutral_perplexity"]}
    result["perplexity_before"] = evaluation["before"]["neutral_perplexity"]
    for name, is_learnt in (("learnt", True), ("kept", False)):
        rows = [row for row in evaluation["examples"] if (row["prompt"] in taught) == is_learnt]
        result[name] = [row["after_values"]["exact_match"] for row in rows]
        result[f"{name}_before"] = [row["before_values"]["exact_match"] for row in rows]
        result[f"{name}_begins"] = [row["after_values"]["prefix_match"] for row in rows]
        result[f"{name}_prompts"] = [row["prompt"] for row in rows]
    return result


def last_logged(out: Path) -> dict[str, float]:
    """The terms of the loss at the last step that was logged."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {k: v for row in rows if "train/loss" in row for k, v in row.items() if k in TERMS}


TERMS = ("train/loss", "train/attention_kl", "train/output_drift", "train/weight_drift")


def keep(run: grid.Run) -> None:
    """The run's result file."""
    assert run.result is not None
    state = json.loads((run.out / "run.json").read_text())
    content = {
        "method": run.name,
        "seed": run.seed,
        "recipe": grid.of_recipe(run, run.out.parent, ("recipe", "heads", "method", "training")),
        "known": json.loads((run.out.parent / "data" / "known.json").read_text()),
        **measured(run.out),
        "logged": last_logged(run.out),
        "heads": state["heads"],
        "parameters": state["parameters"],
        "training": state["training"],
        **grid.of_state(state),
    }
    grid.write(run.result, content)


def interval(values: np.ndarray, n: int = 5000) -> dict[str, Any]:
    """Mean and 95% interval over prompts of `[n_seeds, n_prompts]`."""
    each = values.mean(0)
    draws = np.random.default_rng(0).multinomial(len(each), np.full(len(each), 1 / len(each)), size=n)
    low, high = np.percentile(draws @ each / len(each), [2.5, 97.5])
    by_seed = [float(value) for value in values.mean(1)]
    return {"mean": float(each.mean()), "ci": [float(low), float(high)], "by_seed": by_seed}


def summarise(results: dict[str, dict[int, dict[str, Any]]]) -> list[dict[str, Any]]:
    """One line a row of the table; differences over the seeds that both have."""
    table = []
    for name in METHODS:
        runs = results.get(name)
        if not runs:
            continue
        line: dict[str, Any] = {
            "method": name,
            "seeds": sorted(runs),
            "parameters": next(iter(runs.values()))["parameters"],
        }
        for metric in ("learnt", "kept"):
            line[metric] = interval(np.array([runs[seed][metric] for seed in sorted(runs)]))
            line[metric]["before"] = float(np.mean(next(iter(runs.values()))[f"{metric}_before"]))
            for control in METHODS[name].controls:
                other = results.get(control, {})
                shared = sorted(set(runs) & set(other))
                if not shared:
                    continue
                if any(runs[s][f"{metric}_prompts"] != other[s][f"{metric}_prompts"] for s in shared):
                    sys.exit(f"{name} and {control} were measured on different prompts; remove one's result files")
                gaps = np.array([np.subtract(runs[s][metric], other[s][metric]) for s in shared])
                line[metric].setdefault("minus", {})[control] = interval(gaps)
        line["perplexity_by_seed"] = [runs[seed]["perplexity"] for seed in sorted(runs)]
        line["perplexity"] = float(np.mean(line["perplexity_by_seed"]))
        line["perplexity_before"] = next(iter(runs.values()))["perplexity_before"]
        line["logged"] = {
            term: float(np.mean([r["logged"][term] for r in runs.values()]))
            for term in next(iter(runs.values()))["logged"]
        }
        line["seconds_per_step"] = float(np.median([r["training"]["seconds_per_step"] for r in runs.values()]))
        line["peak_memory_gib"] = max(r["peak_memory_gib"] for r in runs.values())
        table.append(line)
    return table


def markdown(table: Sequence[Mapping[str, Any]]) -> str:
    columns = ["protected", "seeds", "learnt, %", "kept, %", "kept minus none", "control", "learnt minus control"]
    columns += ["kept minus control", "perplexity", "s/step", "GiB"]
    lines = []
    for row in table:
        learnt, minus = row["learnt"].get("minus", {}), row["kept"].get("minus", {})
        control = next((name for name in reversed(METHODS[row["method"]].controls) if name in minus), "")
        line = [row["method"], str(len(row["seeds"])), cell(row["learnt"]), cell(row["kept"])]
        line += [cell(minus.get("none"), "+"), control, cell(learnt.get(control), "+"), cell(minus.get(control), "+")]
        line += [f"{row['perplexity']:.1f}", f"{row['seconds_per_step']:.2f}", f"{row['peak_memory_gib']:.1f}"]
        lines.append(line)
    return rows(columns, lines)


def write_table() -> None:
    results: dict[str, dict[int, dict[str, Any]]] = {}
    for path in sorted((RESULTS / "protecting").glob("*.json")):
        result = json.loads(path.read_text())
        results.setdefault(result["method"], {})[result["seed"]] = result
    table = summarise(results)
    if not table:
        return
    content = {
        "command": "python benchmarks/protecting.py",
        "model": "smollm2-135m",
        "date": datetime.now(UTC).date().isoformat(),
        "steps": STEPS,
        "batch": BATCH,
        "heads": HEADS,
        "known": next(iter(results[table[0]["method"]].values()))["known"],
        "table": table,
    }
    (RESULTS / "protecting.json").write_text(json.dumps(content, indent=1) + "\n")
    print(f"\nperplexity before: {table[0]['perplexity_before']:.1f}\n\n{markdown(table)}")
    fill()


def fill(check: bool = False) -> list[str]:
    """Put the table of protecting.json into the README of recipes/regularise; its name if it was another."""
    table = json.loads((RESULTS / "protecting.json").read_text())["table"]
    return [] if put("recipes/regularise/README.md", "protecting", markdown(table), check) else ["protecting"]


def search(folder: Path, jobs: int, threads: int) -> None:
    """Weights of the terms, none, and rates of LoRA; other facts to learn, and a seed that the table does not use."""
    name, weights = SEARCH
    first = folder / "search" / grid.stem("none", 100)
    runs = [grid.Run("search", "none", 100, recipe_of(folder, "none", 100, first, "other"), alone=True)]
    for weight in weights:
        out = folder / "search" / grid.stem(f"{name} {weight:g}", 100)
        recipe = recipe_of(folder, name, 100, out, "other")
        recipe["method"] |= drifts(weight)
        recipe["evaluation"]["before"] = str(first / "evaluation.json")
        runs.append(grid.Run("search", f"{name}, weight {weight:g}", 100, recipe))
    for rate in LORA_RATES:
        out = folder / "search" / grid.stem(f"LoRA {rate:g}", 100)
        recipe = recipe_of(folder, "LoRA r=8", 100, out, "other")
        recipe["training"]["learning_rate"] = rate
        recipe["evaluation"]["before"] = str(first / "evaluation.json")
        runs.append(grid.Run("search", f"LoRA r=8, rate {rate:g}", 100, recipe))
    grid.run_all(runs, jobs, threads, lambda _run: None)
    rows = []
    for run in runs:
        result = measured(run.out)
        rows.append({"run": run.name, **{m: float(np.mean(result[m])) for m in ("learnt", "kept")}})
        rows[-1] |= {"perplexity": result["perplexity"], "logged": last_logged(run.out)}
        print(rows[-1])
    (RESULTS / "protecting_search.json").write_text(json.dumps(rows, indent=1) + "\n")


def main() -> None:
    arguments = grid.parser(__doc__, METHODS, "benchmark-protecting").parse_args()
    if arguments.table:
        return write_table()
    prepare(arguments.data, arguments.folder)
    if arguments.search:
        return search(arguments.folder, arguments.jobs, arguments.threads)
    first = arguments.folder / grid.stem("none", 0)
    runs = []
    for seed in arguments.seeds:  # a whole table after the first seed, then its spread
        for name in METHODS:
            if arguments.only and name not in arguments.only:
                continue
            out = arguments.folder / grid.stem(name, seed)
            recipe = recipe_of(arguments.folder, name, seed, out)
            if out != first:  # the base model is measured once
                recipe["evaluation"]["before"] = str(first / "evaluation.json")
            result = RESULTS / "protecting" / f"{grid.stem(name, seed)}.json"
            runs.append(grid.Run("protecting", name, seed, recipe, result, alone=out == first))
    if arguments.missing:
        runs = grid.without_kept(runs)
    grid.run_all(runs, arguments.jobs, arguments.threads, keep)
    write_table()


if __name__ == "__main__":
    main()
