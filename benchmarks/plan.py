"""Peak memory of short runs against what `headtune plan` says of them beforehand.

    python benchmarks/plan.py                 SmolLM2-135M, about 10 minutes; writes benchmarks/results/plan.json
    python benchmarks/plan.py --only full     some of them, by name
    python benchmarks/plan.py --table         write the tables of docs/scale.md

Measured is the same as planned: the most bytes of tensors alive at once while `Trainer.train` (or identify) runs, in a
process of its own each.

    CPU     bytes of the model's parameters and buffers, and the peak of what torch's allocator gave out and took back
            from then on, as its profiler records it
    CUDA    torch.cuda.max_memory_allocated

Neither holds what the interpreter and libraries take: the resident size after imports is in the result file.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.metadata
import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from readme import put, rows

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "plan.json"
DOCUMENT = "docs/scale.md"
MODEL = "smollm2-135m"
HEADS = [[29, 1], [23, 4], [28, 5], [28, 8], [23, 3], [29, 0], [24, 4], [29, 6]]
LOW = [[0, 1], [7, 2], [14, 3], [21, 4], [29, 1]]
N_ROWS, LABELS = 16, 16

# name -> (recipe, keys that change it, rows of a batch, tokens of a row)
CASES: dict[str, tuple[str, dict[str, Any], int, int]] = {
    "lofit, layer 23 up, cache": ("lofit", {"heads": {"list": HEADS}}, 8, 64),
    "lofit, layer 0 up": ("lofit", {"heads": {"list": LOW}}, 8, 64),
    "lofit, layer 0 up, 1024 tokens": ("lofit", {"heads": {"list": LOW}}, 2, 1024),
    "masked, layer 0 up": ("masked", {"heads": {"list": LOW}}, 8, 64),
    "lora": ("lora", {}, 8, 64),
    "lora, checkpointing": ("lora", {"checkpointing": True}, 8, 64),
    "full": ("full", {}, 8, 64),
    "full, 256 tokens": ("full", {}, 4, 256),
    "seekr": ("seekr", {}, 4, 64),
    "identify": ("identify", {}, 1, 64),
}


# --- one measurement --------------------------------------------------------------------------------------------------


def write_task(path: Path, tokenizer: Any, length: int, n_rows: int) -> None:
    """Rows of `length` tokens or a few less, about `LABELS` of them an answer."""
    from headtune.analysis.tasks.loading import load_task
    from headtune.analysis.utils.files import write_text

    text = "\n\n".join(example.prompt for example in load_task("country_cities:train").limited(4000).examples)
    tokens = tokenizer(text).input_ids
    tokens = tokens * (1 + n_rows * length // len(tokens))
    lines = []
    for index in range(n_rows):
        n_words = length - LABELS - 6 - 3 * (index % 3)
        text = tokenizer.decode(tokens[index * length : index * length + n_words])
        prompt = f"Row {index:03d}. {text.rstrip()}"
        answer = " ".join(["Rome", "Milan", "Naples", "Turin", "Genoa"] * LABELS).split()[: LABELS - 4]
        lines.append(json.dumps({"prompt": prompt, "subject": f"Row {index:03d}", "answers": [" ".join(answer)]}))
    write_text(path, "\n".join(lines) + "\n")


def recipe_of(name: str, folder: Path, tokenizer: Any) -> dict[str, Any]:
    family, changes, batch, length = CASES[name]
    sequence = []
    for part in ("a", "b") if family == "seekr" else ("a",):
        names = {"train": str(folder / f"{part}.jsonl"), "eval": str(folder / f"{part}-eval.jsonl")}
        write_task(Path(names["train"]), tokenizer, length, N_ROWS)
        write_task(Path(names["eval"]), tokenizer, length, 1)
        sequence.append(names | {"name": part})
    limits = {"max_train_examples": N_ROWS, "max_eval_examples": 1}
    common = {"kind": "exact_match", "split": {"by": "file"}, **limits}
    task = {"train": sequence[0]["train"], "eval": sequence[0]["eval"]}
    method: dict[str, Any] = {"objective": "sft"}
    if family == "seekr":
        task = {"sequence": sequence}
        method = {"replay": {"ratio": 0.25}, "distil": {"layers": 22, "heads": 34, "queries": 100}}
    return {
        "recipe": family,
        "model": {"name": MODEL, "dtype": "float32"},
        **({"heads": changes["heads"]} if "heads" in changes else {}),
        "task": common | task,
        "method": method,
        "training": {
            "max_steps": 2,  # in the second, the optimiser has its state
            "per_device_train_batch_size": batch,
            "gradient_checkpointing": changes.get("checkpointing", False),
            "save_strategy": "no",
            "learning_rate": 1e-5,
        },
        "evaluation": {"n_items": 1, "batch_size": 1},
        "tracking": {"wandb": "disabled"},
        "output_dir": str(folder / "run"),
    }


@contextlib.contextmanager
def measured(model: Any, peaks: list[int]) -> Iterator[None]:
    """Append the most bytes of tensors alive at once inside the block, `model`'s own included."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        yield
        peaks.append(torch.cuda.max_memory_allocated())
        return
    originals = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in [*model.parameters(), *model.buffers()]
    }
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        yield
    now = peak = 0
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    peaks.append(sum(originals.values()) + peak)


def watch_training(peaks: list[int], sizes: dict[str, int]) -> None:
    """Measure every training of this process, and note how long its rows are."""
    from transformers import Trainer

    original: Callable[..., Any] = Trainer.train

    def train(trainer: Any, *args: Any, **kwargs: Any) -> Any:
        lengths, labels = [], []
        for row in trainer.train_dataset:
            lengths.append(len(row["input_ids"]))
            labels.append(
                sum(row["completion_mask"]) if "completion_mask" in row else sum(t != -100 for t in row["labels"])
            )
        sizes.update(length=max(lengths), labels=round(sum(labels) / len(labels)))
        with measured(trainer.model, peaks):
            return original(trainer, *args, **kwargs)

    Trainer.train = train  # type: ignore[method-assign]


def work(name: str) -> dict[str, Any]:
    """Run one case in this process; what was measured and what was planned."""
    import torch

    from headtune.analysis.models.loading import load_model
    from headtune.train.config import recipe
    from headtune.train.memory import estimate as plan
    from headtune.train.memory import model_shape
    from headtune.train.runs import memory_of_recipe

    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = model_shape.shape_of(MODEL)
    heads = load_model(MODEL)
    if device == "cuda":
        heads.hf.to(device)
    peaks: list[int] = []
    if CASES[name][0] == "identify":
        length = _identify(heads, peaks)
        sizes = {"length": length, "labels": 0}
        setup = plan.Setup(length=length, device=device)
        memory = plan.identify(shape, setup)
    else:
        with tempfile.TemporaryDirectory() as place:
            parsed = recipe.parse(recipe_of(name, Path(place), heads.tokenizer))
            sizes = _train(parsed, heads, peaks)
        setup = memory_of_recipe.setup_of(parsed, "single", 1, sizes["length"], sizes["labels"], device)
        memory = memory_of_recipe.stages(parsed, shape, setup)[-1].memory
    planned = memory.peak - plan.OVERHEAD[device]
    return {
        "name": name,
        "device": device,
        "batch": setup.batch,
        **sizes,
        "measured": max(peaks),
        "planned": planned,
        "error": planned / max(peaks) - 1,
        "parts": {key: value for key, value in memory.parts.items() if key != "overhead"},
    }


def _identify(heads: Any, peaks: list[int]) -> int:
    """Identify heads on three prompts; the longest one's tokens."""
    from headtune.analysis.identify.pipeline import identify
    from headtune.analysis.tasks.loading import load_task

    task = load_task("country_cities:train").limited(3)
    with measured(heads.hf, peaks):
        identify(heads, task, verify_top=1, n_random=1)
    return max(len(heads.tokenizer(example.prompt).input_ids) for example in task.examples)


def _train(parsed: Any, heads: Any, peaks: list[int]) -> dict[str, int]:
    """Train by a recipe, without the evaluations around it; the sizes of its rows."""
    from headtune.train.config.resolve_tasks import tasks_of
    from headtune.train.continual import sequence
    from headtune.train.continual.learner import Learner, Stage
    from headtune.train.tracking.tracker import Tracker
    from headtune.train.trainer import training
    from headtune.train.trainer.objectives import objective_of
    from headtune.train.trainer.run_context import RunContext

    sizes: dict[str, int] = {}
    watch_training(peaks, sizes)
    heads.tokenizer.pad_token = heads.tokenizer.pad_token or heads.tokenizer.eos_token
    notify = functools.partial(print, file=sys.stderr)
    with Tracker(parsed.folder, parsed.name, {}, wandb_mode="disabled") as tracker:
        context = RunContext(parsed, heads, tracker, notify=notify)
        if parsed.recipe == "seekr":
            steps = sequence.steps_of(parsed.task)
            rows_of = sequence.rows_of(parsed, heads, steps)
            stages = [Stage(step.name, step.train, rows) for step, rows in zip(steps, rows_of, strict=True)]
            learner = Learner(context, stages)
            learner.start()
            for index in range(len(stages)):
                learner.learn(index)
        else:
            heads.record_attention(False)
            pairs = parsed.heads.pairs if parsed.heads else []
            task = tasks_of(parsed.task)[0]
            rows = objective_of(parsed.method).prepare(parsed, heads, task)
            training.train(context, pairs, task, rows)
    return sizes


def _answer(name: str, quiet: bool, answers: Any) -> None:
    if quiet:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    os.dup2(2, 1)  # what libraries print
    answers.send(work(name))


def main(arguments: argparse.Namespace) -> None:
    # Imported once; each case is a fork of this process, with nothing of another's in memory.
    import headtune.train.runs.run  # noqa: F401

    names = [name for name in CASES if not arguments.only or name in arguments.only]
    old = json.loads(RESULT.read_text(encoding="utf-8")) if arguments.only and RESULT.exists() else {"cases": []}
    cases = {case["name"]: case for case in old["cases"]}
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    fork = multiprocessing.get_context("fork")
    for name in names:
        ours, theirs = fork.Pipe()
        process = fork.Process(target=_answer, args=(name, not arguments.verbose, theirs))
        process.start()
        theirs.close()
        try:
            cases[name] = case = ours.recv()
        except EOFError:
            sys.exit(f"{name} failed; see why with --only {name!r} --verbose")
        process.join()
        print(f"{name}: {_mib(case['measured'])} measured, {_mib(case['planned'])} planned, {case['error']:+.0%}")
        content = {
            "command": "python benchmarks/plan.py",
            "date": datetime.now(UTC).date().isoformat(),
            "model": MODEL,
            "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft", "trl")},
            "resident_after_imports": resident,
            "cases": [cases[name] for name in CASES if name in cases],
        }
        RESULT.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(measured_table())


# --- tables -----------------------------------------------------------------------------------------------------------


def _mib(size: float) -> str:
    return f"{size / 2**20:,.0f} MiB"


def measured_table() -> str:
    content = json.loads(RESULT.read_text(encoding="utf-8"))
    lines = [
        [
            case["name"],
            f"{case['batch']} x {case['length']}",
            _mib(case["measured"]),
            _mib(case["planned"]),
            f"{case['error']:+.0%}",
        ]
        for case in content["cases"]
    ]
    return rows(["run", "rows x tokens", "measured", "planned", "off by"], lines)


GPUS, GPU_GIB = (1, 8, 64), 80


def scale_recipes(shape: Any) -> dict[str, tuple[Any, int]]:
    """What the document plans: recipe, tokens of a row."""
    from headtune.train.config import recipe

    upper = [[layer, head] for head in (0, 1) for layer in range(shape.n_layers // 2, shape.n_layers)][:16]
    lofit = {
        "recipe": "lofit",
        "model": {"name": shape.name, "dtype": "bfloat16"},
        "heads": {"list": upper},
        "task": {"max_train_examples": 10_000},
        "method": {"objective": "sft"},
        "training": {"per_device_train_batch_size": 8, "num_train_epochs": 1},
    }
    seekr = {
        "recipe": "seekr",
        "model": {"name": shape.name},
        "task": {"sequence": [f"task-{index}.jsonl" for index in range(8)], "max_train_examples": 5_000},
        "method": {"replay": {"ratio": 0.01}, "distil": {"layers": 16, "dtype": "float16", "logits_top": 100}},
        "training": {
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 8,
            "num_train_epochs": 1,
            "bf16": True,
        },
    }
    return {"LoFiT": (recipe.parse(lofit), 512), "SEEKR": (recipe.parse(seekr), 512)}


def scale_table(name: str) -> str:
    """A model's stages on 1, 8 and 64 GPUs."""
    from headtune.train.memory import model_shape

    shape = model_shape.shape_of(name)
    lines = [["identify, 100 prompts", *(_identify_cell(shape, gpus) for gpus in GPUS)]]
    for what, (parsed, length) in scale_recipes(shape).items():
        rows_of = "10,000 rows" if what == "LoFiT" else "8 tasks x 5,000 rows"
        lines.append([f"{what}, {rows_of}", *(_cell(parsed, shape, gpus, length) for gpus in GPUS)])
    return rows([name, *(f"{gpus} GPU{'s' * (gpus > 1)}" for gpus in GPUS)], lines)


def _identify_cell(shape: Any, gpus: int) -> str:
    from headtune.cli.commands.plan import gib, span
    from headtune.train.memory import estimate as plan
    from headtune.train.runs import memory_of_recipe

    for spread in (1, memory_of_recipe.MACHINE):
        setup = plan.Setup("ddp" if gpus > 1 else "single", gpus, length=128, half=True)
        stage = memory_of_recipe.identify_stage(shape, setup, 100, spread)
        if spread <= gpus and stage.memory.peak <= GPU_GIB * plan.GIB:
            how = f"spread over {spread}" if spread > 1 else "whole on each" if gpus > 1 else "whole"
            return f"{how}: {gib(stage.memory.peak)} GiB, {span(stage.seconds())}"
    return f"no: {gib(2 * shape.parameters)} GiB of weights"


def _cell(parsed: Any, shape: Any, gpus: int, length: int) -> str:
    from headtune.cli.commands.plan import gib, span
    from headtune.train.memory import estimate as plan
    from headtune.train.runs import memory_of_recipe

    setup = memory_of_recipe.setup_of(parsed, "ddp" if gpus > 1 else "single", gpus, length, 16)
    cheapest = memory_of_recipe.cheapest(parsed, shape, setup, GPU_GIB * plan.GIB, most=gpus)
    if cheapest is None:
        return f"no: {gib(memory_of_recipe.least(parsed, shape, setup))} GiB at least"
    *_, stage = memory_of_recipe.stages(parsed, shape, cheapest)
    how = cheapest.engine
    if cheapest.batch < setup.batch:
        how += f", batch {cheapest.batch} x {cheapest.accumulation}"
    if cheapest.checkpointing:
        how += ", checkpointing"
    return f"{how}: {gib(memory_of_recipe.peak(parsed, shape, cheapest))} GiB, {span(stage.seconds())}"


def fill(check: bool = False) -> list[str]:
    """Write the document's tables, or (`check`) only say which of them are not what they should be."""
    from headtune.train.memory import model_shape

    tables = {"measured": measured_table()} | {name: scale_table(name) for name in model_shape.known()}
    return [name for name, table in tables.items() if not put(DOCUMENT, name, table, check)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", metavar="NAME", help="this one; may be given again")
    parser.add_argument("--table", action="store_true", help=f"write the tables of {DOCUMENT} from the result file")
    parser.add_argument("--verbose", action="store_true", help="show what the runs print")
    parsed = parser.parse_args()
    if parsed.table:
        fill()
    else:
        main(parsed)
