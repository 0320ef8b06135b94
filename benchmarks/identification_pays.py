"""Does the choice of heads pay: few heads, used for what they do, against controls that share no head with them.

    python benchmarks/identification_pays.py                      every part on SmolLM2; resumable, one result a run
    python benchmarks/identification_pays.py --part gain --k 3    one part
    python benchmarks/identification_pays.py --model gemma3-270m  another model
    python benchmarks/identification_pays.py --table              write the tables and figures of docs/heads-that-pay.md

Lists of cities are trained on, in two wordings; heads are identified on the same prompts. What is held out: (a) cities
of other subjects in these wordings, (b) transfer: books by authors, a relation and wordings that nothing was chosen or
trained on. Parts:

search    rates and retention of the gains, on subjects of neither training nor test, identified and random heads
factor    no training: a factor on the heads; 20 draws of random heads
gain      one trained number a head
prompts   the same from 4, 16 and 64 training prompts; identified and random heads
steps     the same after 100 steps
put_back  the same, then each learnt number put back to 1 by itself
vector    a trained scale vector a head
offset    a trained offset a head
slices    rank-1 updates of the heads' slices of W_O

Heads: identified; random of the same layers, of any layer, with scores nearest to zero, the largest others (none shared
with any role, see `headtune sweep --controls`), and the recall heads. Runs are under --work; what is needed of each is
written to benchmarks/results/identification_pays/MODEL/PART-ARM.json.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from readme import cell, put
from readme import rows as rows_of_table

from headtune import evaluate, identify, load_model, load_recipe, load_run, load_task, run_recipe
from headtune.analysis.heads.head_set import provenance
from headtune.analysis.tasks.task import Example, Task, to_jsonl
from headtune.analysis.utils.files import write_json, write_text
from headtune.analysis.utils.stats import percentile_interval, subject_shares
from headtune.train.evaluation.run_reader import RunRecord, read_runs

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "identification_pays"
DOCUMENT = "docs/heads-that-pay.md"
TRAINED = ("List five cities in", "Here is a list of well-known cities in")
HELD_OUT = ("Question: Which books by", "Some books by")
PROMPTS, SEARCHED, IDENTIFIED_ON = 100, 48, 96  # of each held-out half; of validation; that heads are identified on
FEW_PROMPTS = 48  # cities alone, where 20 draws are compared
RATE, RETENTION, STEPS = 0.1, 4.0, 24  # by part search: least repeats with perplexity within 2%
DRAWS = 3
CONTROLS = ("random", "anywhere", "nearest_zero", "largest")
TRAINING_PROMPTS = (4, 16, 64)
MORE_STEPS = 100
PARTS = ["search", "gain", "factor", "prompts", "steps", "put_back", "vector", "offset", "slices"]
METHODS: dict[str, dict[str, Any]] = {
    "gain": {"scale": "head", "offset": False},
    "vector": {"scale": "vector", "offset": False},
    "offset": {"scale": "none", "offset": True},
}


@dataclass(frozen=True)
class Arm:
    """One run: a part, heads, and what is set in the recipe."""

    part: str
    name: str
    recipe: str
    overrides: tuple[str, ...]

    @property
    def file(self) -> str:
        return f"{self.part}-{self.name}.json"


# --- data and heads ---------------------------------------------------------------------------------------------------


def wordings(part: str, beginnings: Sequence[str]) -> list[Example]:
    return [each for each in load_task(f"one_to_many:{part}").examples if each.prompt.startswith(tuple(beginnings))]


def write_tasks(work: Path) -> None:
    """train.jsonl, validation.jsonl and test.jsonl (cities, then books), no subject in two of them."""
    books = [each for part in ("train", "validation", "test") for each in wordings(part, HELD_OUT)]
    tasks = {
        "train": wordings("train", TRAINED),
        "validation": Task("v", tuple(wordings("validation", TRAINED))).limited(SEARCHED, 0).examples,
        "test": (
            *Task("t", tuple(wordings("test", TRAINED))).limited(PROMPTS, 0).examples,
            *Task("b", tuple(books)).limited(PROMPTS, 0).examples,
        ),
    }
    tasks["cities"] = tasks["test"][:FEW_PROMPTS]
    for name, examples in tasks.items():
        write_text(work / f"{name}.jsonl", to_jsonl(examples))


def find_heads(model: str, work: Path) -> Path:
    folder = work / "heads"
    if not (folder / "heads.json").is_file():
        task = load_task(str(work / "train.jsonl")).limited(IDENTIFIED_ON, 0)
        identify(load_model(model), task, top=16).save(folder)
    return folder


# --- arms -------------------------------------------------------------------------------------------------------------


def sources(heads: Path, k: int, draws: int = DRAWS) -> Iterator[tuple[str, str, int]]:
    """Name of an arm's heads, its `heads` block, and its seed."""
    chosen = {"role": "suppression", "top": k}
    for seed in range(DRAWS):
        yield f"identified-s{seed}", json.dumps({"from": str(heads), **chosen}), seed
    for kind in CONTROLS:
        for draw in range({"random": draws, "anywhere": DRAWS}.get(kind, 1)):
            block = {"control": {"like": str(heads), "kind": kind, "seed": draw}, **chosen}
            yield f"{kind}-s{draw}", json.dumps(block), draw % DRAWS
    yield "recall-s0", json.dumps({"from": str(heads), "role": "recall", "top": k}), 0


def arms(part: str, heads: Path, ks: Sequence[int], work: Path) -> Iterator[Arm]:
    data = [f"task.train={work / 'train.jsonl'}", f"task.eval={work / 'test.jsonl'}"]
    if part == "search":
        data[1] = f"task.eval={work / 'validation.jsonl'}"
        for k in ks:
            for name, block, seed in sources(heads, k, draws=1):
                if name in ("identified-s0", "random-s0"):
                    for rate in (0.1, 0.2):
                        for retention in (1.0, 4.0, 16.0):
                            label = f"k{k}-{name}-rate{rate}-retention{retention}"
                            yield Arm(
                                part, label, "gain/one_to_many", trained("gain", block, seed, data, rate, retention)
                            )
        return
    for k in ks:
        if part == "factor":
            data[1] = f"task.eval={work / 'cities.jsonl'}"
            for name, block, seed in sources(heads, k, draws=20):
                if seed and name.startswith("identified"):
                    continue  # nothing is drawn
                yield Arm(part, f"k{k}-{name}", "steer/one_to_many", (f"heads={block}", "method.factor=2.0", *data))
            continue
        if part in ("prompts", "steps", "put_back"):
            yield from variants(part, heads, k, data)
            continue
        for name, block, seed in sources(heads, k):
            recipe = "masked/rank" if part == "slices" else "gain/one_to_many"
            yield Arm(part, f"k{k}-{name}", recipe, trained(part, block, seed, data))


def variants(part: str, heads: Path, k: int, data: Sequence[str]) -> Iterator[Arm]:
    """The gains on identified and random heads: with fewer prompts, after more steps, or (identified alone) as is."""
    settings = {
        "prompts": {f"n{n}": f"task.max_train_examples={n}" for n in TRAINING_PROMPTS},
        "steps": {f"steps{MORE_STEPS}": f"training.max_steps={MORE_STEPS}"},
        "put_back": {"trained": ""},
    }[part]
    for name, block, seed in sources(heads, k, draws=1):
        if name in ("identified-s0", "random-s0") and not (part == "put_back" and name == "random-s0"):
            for label, override in settings.items():
                overrides = (*trained("gain", block, seed, data), *([override] if override else []))
                yield Arm(part, f"k{k}-{name.removesuffix('-s0')}-{label}", "gain/one_to_many", overrides)


def trained(
    part: str, block: str, seed: int, data: Sequence[str], rate: float | None = None, retention: float = RETENTION
) -> tuple[str, ...]:
    settings = [f"heads={block}", f"seed={seed}", *data, "task.max_train_examples=256"]
    settings += [f"training.max_steps={STEPS}", "training.per_device_train_batch_size=8"]
    if part == "slices":
        rate = rate or 0.003
        settings += [
            "method.rank=1",
            "method.parts=[o]",
            "training.warmup_steps=4",
            "training.lr_scheduler_type=linear",
        ]
        settings += ["method.answer_set={unlikelihood: 4.0, own_lists: 0.7, own_items: 4, retention: 1.0}"]
        settings += ["method.objective=answer_set", "evaluation.n_items=3", "evaluation.batch_size=32"]
    else:
        settings += [f"method.{key}={json.dumps(value)}" for key, value in METHODS[part].items()]
        settings += [f"method.answer_set.retention={retention}"]
        rate = rate or {"gain": RATE, "vector": RATE, "offset": 0.03}[part]
    return (*settings, f"training.learning_rate={rate}")


def carry_out(arm: Arm, model: str, work: Path) -> None:
    """Run it where its result is not there yet."""
    target = RESULTS / model / arm.file
    if target.is_file():
        return
    folder = work / "runs" / arm.file.removesuffix(".json")
    if folder.is_dir():
        shutil.rmtree(folder)
    # The base model is measured once on each task.
    kinds = {"search": "search", "factor": "factor"}  # the others share a test set
    before = [
        path
        for path in sorted((work / "runs").glob("*/evaluation.json"))
        if kinds.get(path.parent.name.split("-")[0]) == kinds.get(arm.part)
    ]
    settings = [f"model.name={model}", f"name={folder.name}", f"output_dir={folder}", "tracking.wandb=disabled"]
    settings += [f"evaluation.before={before[0]}"] if before else []
    print(f"{datetime.now(UTC):%H:%M:%S} {arm.part} {arm.name}", flush=True)
    run_recipe(load_recipe(arm.recipe, (*arm.overrides, *settings)))
    (run,) = [run for run in read_runs(folder.parent) if run.folder == folder]
    target.parent.mkdir(parents=True, exist_ok=True)
    write_json(target, compact(run))
    if arm.part == "put_back":
        put_back(arm, compact(run), folder, work, model)
    for heavy in ("adapter", "checkpoint-*", "wandb", "model"):
        for path in folder.glob(heavy):
            shutil.rmtree(path)


def put_back(arm: Arm, result: dict[str, Any], folder: Path, work: Path, model: str) -> None:
    """Measure the trained model again with each head's factor at 1: what is lost is that head's share."""
    adapted, tokenizer, _ = load_run(folder)
    task = load_task(str(work / "test.jsonl"))
    scales = [each for name, each in adapted.named_parameters() if "scale" in name and each.numel()]
    places = [(parameter, index) for parameter in scales for index in range(parameter.numel())]
    if len(places) != len(result["heads"]):
        raise SystemExit(f"{len(places)} factors on {len(result['heads'])} heads; expected one a head")
    for number, ((parameter, index), head) in enumerate(zip(places, result["heads"], strict=True)):
        flat = parameter.data.view(-1)
        learnt, flat[index] = float(flat[index]), 0.0  # the parameter is `a` of the factor `1 + a`
        metrics, scored = evaluate(adapted, tokenizer, task, n_items=3, batch_size=32)
        flat[index] = learnt
        learnt += 1.0
        values = {name: [round(float(each.values[name]), 5) for each in scored] for name in METRICS}
        path = RESULTS / model / arm.file.replace("-trained", f"-without{number}")
        perplexity = [result["perplexity"][0], metrics["neutral_perplexity"]]
        changed = {"put_back": list(head), "learnt": learnt, "values": values, "perplexity": perplexity}
        write_json(path, result | changed)


def compact(run: RunRecord) -> dict[str, Any]:
    values = {name: [round(float(x), 5) for x in each] for name, each in sorted(run.values.items())}
    before = {name: [round(float(x), 5) for x in each] for name, each in sorted(run.values_before.items())}
    return {
        "name": run.name,
        "date": datetime.now(UTC).date().isoformat(),
        "versions": provenance()["versions"],
        "heads": sorted(run.heads),
        "parameters": run.state.get("parameters"),
        "seed": run.seed,
        "measured": run.measured,
        "perplexity": [run.before.get("neutral_perplexity"), run.after.get("neutral_perplexity")],
        "subjects": list(run.subjects),
        "before": before,
        "values": values,
    }


# --- tables -----------------------------------------------------------------------------------------------------------

KINDS = ("identified", *CONTROLS, "recall")
METRICS = {"repeat_rate": "repeats", "correct_new_rate": "correct new", "missing_rate": "missing"}


def read(model: str, part: str, k: int) -> dict[str, list[dict[str, Any]]]:
    """kind of heads -> its runs."""
    runs: dict[str, list[dict[str, Any]]] = {}
    for path in sorted((RESULTS / model).glob(f"{part}-k{k}-*.json")):
        kind = path.stem.split("-")[2]
        runs.setdefault(kind, []).append(json.loads(path.read_text(encoding="utf-8")))
    return {kind: runs[kind] for kind in KINDS if kind in runs}


def halves(run: dict[str, Any]) -> dict[str, np.ndarray]:
    """Where the held-out cities are, and the books."""
    n = len(run["subjects"])
    if n == FEW_PROMPTS:
        return {"same": np.arange(n)}
    return {"same": np.arange(PROMPTS), "transfer": np.arange(PROMPTS, n)}


def draws_of(runs: Sequence[dict[str, Any]], metric: str, rows: np.ndarray, seed: int) -> tuple[float, np.ndarray]:
    """The mean, and that of 2,000 resamplings of subjects and runs, each drawn independently."""
    each = np.array([run["values"][metric] for run in runs])[:, rows]
    shares = subject_shares([runs[0]["subjects"][i] for i in rows], 2000, seed=0)
    weights = np.random.default_rng(seed).multinomial(len(each), np.full(len(each), 1 / len(each)), size=2000)
    return float(each.mean()), ((shares @ each.T) * weights / len(each)).sum(1)


def compared(
    ours: Sequence[dict[str, Any]], theirs: Sequence[dict[str, Any]], metric: str, rows: np.ndarray
) -> dict[str, Any]:
    """Identified heads less a control: `{"mean", "ci"}`."""
    (mean, first), (other, second) = draws_of(ours, metric, rows, 1), draws_of(theirs, metric, rows, 2)
    return {"mean": mean - other, "ci": list(percentile_interval(first - second))}


def table(model: str, part: str, k: int) -> str:
    """Rows: base, identified heads, each control; repeats, correct new items, on both halves, and perplexity."""
    runs = read(model, part, k)
    first = runs["identified"][0]
    parts = halves(first)
    columns = ["heads", "runs", *(f"{name}, {half}" for half in parts for name in METRICS.values())]
    columns += ["perplexity", *(f"repeats less control's, {half}" for half in parts)]
    base = [f"{100 * np.mean(np.array(first['before'][m])[rows]):.1f}" for rows in parts.values() for m in METRICS]
    lines = [["none (base)", "", *base, f"{first['perplexity'][0]:.2f}", *[""] * len(parts)]]
    for kind, group in runs.items():
        cells = [f"{100 * draws_of(group, m, rows, 1)[0]:.1f}" for rows in parts.values() for m in METRICS]
        gaps = [""] * len(parts)
        if kind != "identified":
            gaps = [cell(compared(runs["identified"], group, "repeat_rate", rows), "+") for rows in parts.values()]
        perplexity = np.mean([run["perplexity"][1] for run in group])
        lines.append([kind, str(len(group)), *cells, f"{perplexity:.2f}", *gaps])
    return rows_of_table(columns, lines)


def frontier(model: str, k: int) -> str:
    """What rate and retention give on validation prompts."""
    lines = []
    for path in sorted((RESULTS / model).glob(f"search-k{k}-*.json")):
        heads, _, rate, retention = path.stem.removeprefix(f"search-k{k}-").split("-")
        run = json.loads(path.read_text(encoding="utf-8"))
        if not lines:
            first = [f"{100 * np.mean(run['before'][name]):.1f}" for name in METRICS]
            lines.append(["none (base)", "", "", *first, f"{run['perplexity'][0]:.2f}"])
        rates = [f"{100 * np.mean(run['values'][name]):.1f}" for name in METRICS]
        settings = [heads, rate.removeprefix("rate"), retention.removeprefix("retention")]
        lines.append([*settings, *rates, f"{run['perplexity'][1]:.2f}"])
    return rows_of_table(["heads", "rate", "retention", *METRICS.values(), "perplexity"], lines)


def lines_of_variants(model: str, part: str, k: int) -> str:
    """What fewer prompts, more steps, or a factor put back to 1 give; the gains of part gain beside them."""
    lines = []
    for path in sorted((RESULTS / model).glob(f"{part}-k{k}-*.json")):
        run = json.loads(path.read_text(encoding="utf-8"))
        _, _, kind, label = path.stem.split("-")
        if "put_back" in run:
            label = f"{run['learnt']:.2f} of L{run['put_back'][0]}H{run['put_back'][1]} put back to 1"
        same, other = halves(run)["same"], halves(run)["transfer"]
        cells = [f"{100 * np.mean(np.array(run['values'][m])[rows]):.1f}" for rows in (same, other) for m in METRICS]
        lines.append((path.stem, [label, kind, *cells, f"{run['perplexity'][1]:.2f}"]))
    columns = ["", "heads", *(f"{name}, {half}" for half in ("same", "transfer") for name in METRICS.values())]
    return rows_of_table(
        [*columns, "perplexity"], [line for _, line in sorted(lines, key=lambda each: _natural(each[0]))]
    )


def _natural(text: str) -> list[Any]:
    return [int(each) if each.isdigit() else each for each in re.split(r"(\d+)", text)]


def draws_table(model: str, k: int) -> str:
    """A factor of 2 without training: the identified heads among every draw of the others."""
    runs = read(model, "factor", k)
    mine = runs["identified"][0]
    rows = halves(mine)["same"]
    repeats = {
        kind: [np.array(run["values"]["repeat_rate"])[rows].mean() for run in group] for kind, group in runs.items()
    }
    base = np.array(mine["before"]["repeat_rate"])[rows].mean()
    lines = [["none (base)", "", f"{100 * base:.1f}", "", f"{mine['perplexity'][0]:.2f}", ""]]
    for kind, group in runs.items():
        values = 100 * np.array(repeats[kind])
        spread = f"{values.min():.1f} to {values.max():.1f}" if len(values) > 1 else ""
        below = (1 + int((values <= values.dtype.type(100 * repeats["identified"][0])).sum())) / (1 + len(values))
        perplexity = np.mean([run["perplexity"][1] for run in group])
        p = f"{below:.3f}" if kind in ("random", "anywhere") else ""
        lines.append([kind, str(len(group)), f"{values.mean():.1f}", spread, f"{perplexity:.2f}", p])
    return rows_of_table(["heads", "sets", "repeats", "lowest to highest", "perplexity", "p"], lines)


def figures(model: str) -> None:
    """docs/images: repeats against K, and the price of it: identified heads and every control."""
    from matplotlib import pyplot as plt

    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained", sharey=True)
    ks = [k for k in (1, 2, 3) if read(model, "gain", k)]
    for axis, half in zip(axes, ("same", "transfer"), strict=True):
        for kind, color in (("random", "0.55"), ("identified", "tab:blue")):
            centre, low, high = [], [], []
            for k in ks:
                group = read(model, "gain", k)[kind]
                mean, draws = draws_of(group, "repeat_rate", halves(group[0])[half], 1)
                ends = percentile_interval(draws)
                centre, low, high = [*centre, 100 * mean], [*low, 100 * ends[0]], [*high, 100 * ends[1]]
            axis.fill_between(ks, low, high, color=color, alpha=0.2, linewidth=0)
            axis.plot(ks, centre, "o-", color=color, label=f"{kind} heads")
        base = 100 * np.array(group[0]["before"]["repeat_rate"])[halves(group[0])[half]].mean()
        axis.axhline(base, color="0.2", linewidth=0.8, linestyle=":")
        axis.annotate("base", (ks[0], base), xytext=(0, 3), textcoords="offset points")
        axis.set(
            xticks=ks, xlabel="heads, one trained number each", title={"same": "other countries"}.get(half, "books")
        )
    axes[0].set(ylabel="repeated items, %, 95%", ylim=(0, None))
    axes[0].legend(frameon=False)
    figure.savefig(ROOT / "docs" / "images" / "gain_against_k.png", dpi=110)
    figure, axis = plt.subplots(figsize=(5, 3.4), layout="constrained")
    for path in sorted((RESULTS / model).glob("*-k*.json")):
        part, _, kind, *_ = path.stem.split("-")
        run = json.loads(path.read_text(encoding="utf-8"))
        if part not in ("gain", "vector", "offset", "slices", "steps"):
            continue
        change = 100 * (np.mean(run["values"]["repeat_rate"]) - np.mean(run["before"]["repeat_rate"]))
        cost = 100 * (run["perplexity"][1] / run["perplexity"][0] - 1)
        mine = kind == "identified"
        axis.plot(cost, change, "o" if mine else "x", color="tab:blue" if mine else "0.55", markersize=5)
    axis.axhline(0, color="0.2", linewidth=0.8, linestyle=":")
    for marker, color, label in (("o", "tab:blue", "identified heads"), ("x", "0.55", "controls")):
        axis.plot([], [], marker, color=color, label=label)
    axis.set(xlabel="neutral perplexity, change in %", ylabel="repeated items, change in points")
    axis.legend(frameon=False)
    figure.savefig(ROOT / "docs" / "images" / "gain_damage.png", dpi=110)


def fill(check: bool = False) -> list[str]:
    """Write the tables of the document, or (`check`) only say which are not what they should be."""
    stale = []
    for name in re.findall(r"<!-- table (\S+ \w+ \d+) -->", (ROOT / DOCUMENT).read_text(encoding="utf-8")):
        model, part, k = name.split()
        if part in ("prompts", "steps", "put_back"):
            text = lines_of_variants(model, part, int(k))
        elif part == "factor":
            text = draws_table(model, int(k))
        else:
            text = frontier(model, int(k)) if part == "search" else table(model, part, int(k))
        if not put(DOCUMENT, name, text, check):
            stale.append(name)
    return stale


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", default=PARTS)
    parser.add_argument("--k", nargs="+", type=int, default=[3])
    parser.add_argument("--only", nargs="+", help="arms whose names begin so")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--work", type=Path, default=Path("runs/identification_pays"))
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    if arguments.table:
        fill()
        figures(arguments.model)
        return
    work = (arguments.work / arguments.model).resolve()
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "test.jsonl").is_file():
        write_tasks(work)
    heads = find_heads(arguments.model, work)
    for part in arguments.part:
        for arm in arms(part, heads, arguments.k, work):
            if arguments.only and not arm.name.split("-", 1)[1].startswith(tuple(arguments.only)):
                continue
            carry_out(arm, arguments.model, work)


if __name__ == "__main__":
    main()
