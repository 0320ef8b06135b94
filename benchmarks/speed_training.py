"""Seconds and memory of one optimiser step: head adapters with and without the prefix cache, LoRA, full fine-tuning.

    python benchmarks/speed_training.py                 SmolLM2-135M, about 20 minutes on two quiet cores
    python benchmarks/speed_training.py --only "LoRA all-linear" --only "adapter, layer 20 up, cache"
    python benchmarks/speed_training.py --quick         a tiny model: does it run, are the losses the same

All routes train with TRL's SFTTrainer, AdamW, float32, no checkpointing, on the same rows in the same order: 64 tokens
each, 8 a step, pieces of the `country_cities` prompts whose last `--completion` tokens carry the loss.

    full                          every weight
    LoRA all-linear, LoRA q,v     rank 8
    adapter, identified heads     offsets on the 8 heads that the project identified, layers 23-29
    adapter, layer 20 up          offsets on 8 heads, the lowest in layer 20
    ..., cache                    the same with headtune.train.trainer.prefix_cache
    ..., TRL's head               the same without headtune.train.losses.label_logits

On a CPU, TRL projects every position onto the vocabulary, whether it carries loss or not. All routes but those marked
train with `labelled_positions`, which leaves out the others: LoRA and full fine-tuning have that advantage too.

Each route is a process of its own that stops between measurements; within a round the routes take turns, so that all
see the same machine. A measurement is `--steps` steps; the first epoch, in which the cache fills, and the nine steps
after it, in which it comes to rest, are not measured. A ratio is that of two routes' seconds in the same round;
medians, ranges and a bootstrap interval of the median over rounds are kept. Memory is the peak resident size: of the
whole process, imports and first epoch included, and from the first measurement on, freed memory handed back to the
system first. The allocator's settings are the system's for all.
Every process reads a copy of the checkpoint of its own: pages that processes share are never given back.

A route with the cache whose losses differ from the same route's without it ends the benchmark.
Writes benchmarks/results/speed_training.json.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from speed_routes import resident, status

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "speed_training.json"
MODEL = "smollm2-135m"
BATCH, TOKENS = 8, 64
REST = 9  # steps without an unknown row, after which the cache has given back what it can
TOLERANCE = 1e-4  # relative, of a loss

IDENTIFIED = [[29, 1], [23, 4], [28, 5], [28, 8], [23, 3], [29, 0], [24, 4], [29, 6]]
FROM_20 = [[20, 1], [21, 4], [23, 4], [24, 4], [25, 7], [27, 2], [28, 5], [29, 1]]
TINY_HEADS = [[1, 1], [2, 0], [2, 3]]
TRL_HEAD = ", TRL's head"


@dataclass(frozen=True)
class Route:
    """What is trained, and whether what lies below is kept."""

    name: str
    kind: str
    heads: tuple[tuple[int, int], ...] = ()
    cache: bool = False
    labelled: bool = True


def routes(quick: bool) -> list[Route]:
    sets = {"identified heads": IDENTIFIED, "layer 20 up": FROM_20} if not quick else {"layer 1 up": TINY_HEADS}
    adapters = [
        Route(f"adapter, {name}{', cache' if cache else ''}", "adapter", tuple((a, b) for a, b in heads), cache)
        for name, heads in sets.items()
        for cache in (False, True)
    ]
    ours = [Route("full", "full"), Route("LoRA all-linear", "all-linear"), Route("LoRA q,v", "q,v"), *adapters]
    compared = [ours[1], *adapters[-2:]]
    return ours + [replace(route, name=route.name + TRL_HEAD, labelled=False) for route in compared]


# --- one route's process ----------------------------------------------------------------------------------------------


def make_rows(tokenizer: Any, n: int, completion: int, quick: bool) -> list[dict[str, list[int]]]:
    """`n` different rows of `TOKENS` tokens from list prompts; the last `completion` carry the loss."""
    from headtune.analysis.tasks.loading import load_task

    if quick:
        sys.path.insert(0, str(ROOT / "tests"))
        from helpers.tiny import tiny_task

        task = tiny_task((1, 2, 3, 4))
    else:
        task = load_task("country_cities:train").limited(8 * n)
    ids = tokenizer("\n\n".join(example.prompt for example in task.examples)).input_ids
    if len(ids) < n * TOKENS:
        sys.exit(f"{task.name!r} gives {len(ids)} tokens; {n * TOKENS} are needed")
    pieces = [ids[start : start + TOKENS] for start in range(0, n * TOKENS, TOKENS)]
    hidden = TOKENS - completion
    return [{"input_ids": piece, "labels": [-100] * hidden + piece[hidden:]} for piece in pieces]


def work(name: str, arguments: argparse.Namespace) -> None:
    """Train by one route; between measurements wait for a line on stdin. Answers go to stdout, a line each."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not mix with the replies
    import datasets
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from headtune.analysis.models.loading import load_plain
    from headtune.train.losses.label_logits import labelled_positions
    from headtune.train.trainer.prefix_cache import PrefixCache
    from headtune.train.tuners.head_tuning import HeadTuningConfig

    torch.set_num_threads(arguments.threads)
    route = next(route for route in routes(arguments.quick) if route.name == name)
    model, tokenizer = load_plain(arguments.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    config: Any = None
    if route.kind == "adapter":
        config = HeadTuningConfig(heads=[list(head) for head in route.heads], scale="none", task_type="CAUSAL_LM")
    elif route.kind != "full":
        targets = "all-linear" if route.kind == "all-linear" else ["q_proj", "v_proj"]
        config = LoraConfig(r=8, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM")
    rows = make_rows(tokenizer, arguments.rows, arguments.completion, arguments.quick)
    warm_up = arguments.rows // BATCH + REST

    class Measure(TrainerCallback):
        def __init__(self) -> None:
            self.seconds: list[float] = []
            self.whole = 0.0

        def on_step_begin(self, _args: Any, state: Any, *_: Any, **__: Any) -> None:
            done = state.global_step - warm_up
            if done >= 0 and done % arguments.steps == 0:
                self.whole = max(self.whole, status("VmHWM"))
                before = resident()
                if done == 0:
                    print(json.dumps({"ready": True, "resident": before}), file=replies, flush=True)
                if not sys.stdin.readline():
                    os._exit(0)
                self.seconds = []
            self.start = time.perf_counter()

        def on_step_end(self, _args: Any, state: Any, *_: Any, **__: Any) -> None:
            self.seconds.append(time.perf_counter() - self.start)
            done = state.global_step - warm_up
            if done > 0 and done % arguments.steps == 0:
                peak = status("VmHWM")
                self.whole = max(self.whole, peak)
                sizes = {"peak_mib": peak, "whole_peak_mib": self.whole}
                print(json.dumps({"seconds": self.seconds, **sizes}), file=replies, flush=True)

    steps = warm_up + arguments.rounds * arguments.steps
    with tempfile.TemporaryDirectory() as folder:
        settings = SFTConfig(
            folder,
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            learning_rate=1e-3,
            lr_scheduler_type="constant",
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=True,
            dataloader_pin_memory=False,
            logging_strategy="steps",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=0,
        )
        trainer = SFTTrainer(
            model,
            args=settings,
            train_dataset=datasets.Dataset.from_list(rows),
            processing_class=tokenizer,
            peft_config=config,
            callbacks=[Measure()],
        )
        cache = PrefixCache(trainer.model) if route.cache else None
        with contextlib.ExitStack() as stack:
            if cache:
                stack.enter_context(cache.installed())
            if route.labelled:
                stack.enter_context(labelled_positions(trainer.model))
            trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    end = {"losses": losses, "trained": trained, "cache": cache.stats.summary() if cache else None}
    print(json.dumps(end), file=replies, flush=True)


class Side:
    """A route's process, seen from the benchmark."""

    def __init__(self, route: Route, folder: str, arguments: argparse.Namespace) -> None:
        self.route = route
        command = [sys.executable, "-W", "ignore", __file__, "--route", route.name, "--model", folder]
        for name in ("rows", "steps", "rounds", "threads", "completion"):
            command += [f"--{name}", str(getattr(arguments, name))]
        environment = os.environ | {
            "OMP_NUM_THREADS": str(arguments.threads),
            "HF_HUB_OFFLINE": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "WANDB_MODE": "disabled",
        }
        self.process = subprocess.Popen(
            command + ["--quick"] * arguments.quick,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL if not arguments.verbose else None,
            text=True,
            env=environment,
        )

    def read(self) -> dict[str, Any]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"{self.route.name} ended with {self.process.wait()}; see why with --verbose")
        reply: dict[str, Any] = json.loads(line)
        return reply

    def measure(self) -> dict[str, Any]:
        assert self.process.stdin
        print("go", file=self.process.stdin, flush=True)
        return self.read()


# --- the result -------------------------------------------------------------------------------------------------------


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, range and a 95% bootstrap interval of the median."""
    generator = random.Random(0)
    medians = sorted(statistics.median(generator.choices(values, k=len(values))) for _ in range(2000))
    interval = [medians[49], medians[1949]]
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "interval": interval}


def require_same_losses(ends: dict[str, dict[str, Any]]) -> dict[str, float]:
    """The largest relative difference between the losses of a route and of the same trained in full."""
    gaps = {}
    for name, end in ends.items():
        plain = name.replace(", cache", "")
        reference = plain if plain + TRL_HEAD not in ends else plain + TRL_HEAD
        if reference != name and reference in ends:
            pairs = zip(end["losses"], ends[reference]["losses"], strict=True)
            gaps[f"{name} / {reference}"] = gap = max(abs(a - b) / abs(b) for a, b in pairs)
            if not gap <= TOLERANCE:
                sys.exit(f"{name}: losses differ by {gap:.2g} from those of {reference}; nothing is compared")
    return gaps


def main(arguments: argparse.Namespace) -> None:
    from headtune.analysis.models.loading import resolve

    chosen = [route for route in routes(arguments.quick) if not arguments.only or route.name in arguments.only]
    with contextlib.ExitStack() as stack:
        copies = stack.enter_context(tempfile.TemporaryDirectory())
        if arguments.quick:
            sys.path.insert(0, str(ROOT / "tests"))
            from helpers.tiny import save_tiny

            folder = str(save_tiny(Path(stack.enter_context(tempfile.TemporaryDirectory())), "llama"))
        else:
            folder = resolve(MODEL)
        sides = []
        for index, route in enumerate(chosen):  # one after the other, so that first epochs do not compete either
            copy = shutil.copytree(folder, Path(copies) / str(index))
            side = Side(route, str(copy), arguments)
            side.read()
            sides.append(side)
            print(f"ready: {route.name}", flush=True)
        measured: dict[str, list[dict[str, Any]]] = {route.name: [] for route in chosen}
        for round_ in range(arguments.rounds):
            for side in sides if round_ % 2 == 0 else sides[::-1]:
                measured[side.route.name].append(side.measure())
            print(f"round {round_ + 1}/{arguments.rounds}", flush=True)
        ends = {side.route.name: side.read() for side in sides}
    seconds = {name: [statistics.median(one["seconds"]) for one in rounds] for name, rounds in measured.items()}
    result = {
        name: {
            "seconds_per_step": spread(seconds[name]) | {"by_round": seconds[name]},
            "peak_mib": max(one["peak_mib"] for one in measured[name]),
            "whole_peak_mib": max(one["whole_peak_mib"] for one in measured[name]),
            "trained_parameters": ends[name]["trained"],
            "cache": ends[name]["cache"],
        }
        for name in measured
    }
    ratios = {}
    for name in measured:
        if ", cache" in name:
            head = TRL_HEAD if name.endswith(TRL_HEAD) else ""
            others = ["LoRA all-linear", "LoRA all-linear" + TRL_HEAD, "LoRA q,v", "full"]
            others = [name.replace(", cache", ""), *(["LoRA all-linear" + head] if head else others)]
            for other in [other for other in others if other in measured]:
                by_round = [theirs / ours for theirs, ours in zip(seconds[other], seconds[name], strict=True)]
                row = {"times_faster": spread(by_round) | {"by_round": by_round}}
                for size in ("peak_mib", "whole_peak_mib"):
                    row[size.replace("_mib", "_share")] = result[name][size] / result[other][size]
                ratios[f"{name} / {other}"] = row
    content = {
        "command": "python benchmarks/speed_training.py " + " ".join(sys.argv[1:]),
        "date": datetime.now(UTC).date().isoformat(),
        "model": "tiny llama" if arguments.quick else MODEL,
        "batch": BATCH,
        "tokens": TOKENS,
        "share_with_loss": arguments.completion / TOKENS,
        "threads": arguments.threads,
        "steps": arguments.steps,
        "rounds": arguments.rounds,
        "allocator": {name: os.environ.get(name) for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_")},
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft", "trl")},
        "processor": platform.processor() or platform.machine(),
        "largest_loss_difference": require_same_losses(ends),
        "routes": result,
        "ratios": ratios,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(content, indent=1) + "\n")
    print(markdown(content))


def markdown(content: dict[str, Any]) -> str:
    lines = [
        "| route | s a step | peak MiB, after warm-up | peak MiB, whole process | trained |",
        "|---|---|---|---|---|",
    ]
    for name, row in content["routes"].items():
        time_ = row["seconds_per_step"]
        lines.append(
            f"| {name} | {time_['median']:.3f} [{time_['min']:.3f}, {time_['max']:.3f}] | {row['peak_mib']:.0f} "
            f"| {row['whole_peak_mib']:.0f} | {row['trained_parameters']} |"
        )
    lines += ["", "| ratio | times faster | share of peak, after warm-up | whole process |", "|---|---|---|---|"]
    for name, row in content["ratios"].items():
        faster = row["times_faster"]
        lines.append(
            f"| {name} | {faster['median']:.2f} [{faster['min']:.2f}, {faster['max']:.2f}] | {row['peak_share']:.2f} "
            f"| {row['whole_peak_share']:.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int, default=7, help="measurements of each route")
    parser.add_argument("--steps", type=int, default=4, help="optimiser steps of a measurement")
    parser.add_argument("--rows", type=int, default=16, help="rows of an epoch")
    parser.add_argument("--completion", type=int, default=16, help="tokens of a row that carry the loss")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", action="append", metavar="ROUTE", help="measure this route; may be given again")
    parser.add_argument("--verbose", action="store_true", help="show what the routes' processes print")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--route", help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    parsed = parser.parse_args()
    if parsed.route:
        work(parsed.route, parsed)
    else:
        main(parsed)
