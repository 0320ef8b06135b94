"""Seconds and memory of one distillation step: rows of chosen heads, against attention matrices of every layer.

    python benchmarks/speed_distillation.py                 SmolLM2-135M, about 6 minutes on two quiet cores
    python benchmarks/speed_distillation.py --quick         a tiny model: does it run, are the losses the same

A step of SEEKR (He et al. 2024) on one row of 1024 tokens, float32, all weights trained, without the optimiser:

    0.5 CE + 0.5 KL(teacher || student) of the logits at label positions + 100 KL(teacher || student) of attention

and its backward pass. Attention: `--heads` heads of `--layers` layers at `--queries` random query positions, mean over
their rows. The teacher is the model, the student the model with noise on its weights.

    plain             the cross-entropy alone, SDPA: fine-tuning without distillation
    headtune          SDPA; RowRecorder makes the chosen rows of the student, TeacherStore gives those of the teacher
    eager             eager attention, `output_attentions=True`, of student and teacher; the rows are cut out of both
    eager, stored     the same student; the teacher's rows and logits come from the TeacherStore, as in headtune

All project only label positions onto the vocabulary. Each route is a process of its own, which reads a copy of the
checkpoint of its own and stops between steps; within a round the routes take turns. The first step is not measured. A
ratio is that of two routes' seconds in the same round; medians, ranges and a bootstrap interval of the median over
rounds are kept, and the same of the processor's seconds, which other jobs on the machine change less. Memory is the
peak resident size during the steps, freed memory handed back to the system before each; extra memory is what a route's
peak has above plain's. `eager` holds the teacher's weights, as it must.

Routes whose losses differ by more than 1e-4 (relative), or whose gradients' norms do, end the benchmark.
Writes benchmarks/results/speed_distillation.json after every round.
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
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from speed_routes import resident, status
from speed_training import spread
from torch import Tensor
from torch.nn import functional

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "speed_distillation.json"
MODEL = "smollm2-135m"
ROUTES = ("plain", "headtune", "eager", "eager, stored")
TARGETS = {"extra_memory": 0.4, "seconds": 0.6}  # of eager's
TOLERANCE = 1e-4
NOISE = 0.02  # of a weight matrix's own spread
KEY = "row"  # of the one row in the store
WEIGHTS = {"cross_entropy": 0.5, "logits": 0.5, "attention": 100.0}

Losses = dict[str, Tensor]


# --- what all routes are given ----------------------------------------------------------------------------------------


def prepare(arguments: argparse.Namespace) -> None:
    """Write the row, the heads and the queries, and the teacher's rows and logits, into the work folder."""
    from headtune.analysis.models.loading import load_model
    from headtune.analysis.tasks.loading import load_task
    from headtune.train.continual.compute_teacher import compute_teacher
    from headtune.train.continual.teacher_store import TeacherStore
    from headtune.train.losses.attention_distillation import query_positions
    from headtune.train.trainer.rows import TrainingRow

    torch.set_num_threads(arguments.threads)
    model = load_model(arguments.model, device="cpu")
    if arguments.quick:
        sys.path.insert(0, str(ROOT / "tests"))
        from helpers.tiny import tiny_task

        task = tiny_task((1, 2, 3, 4))
    else:
        task = load_task("country_cities:train").limited(200)
    ids = model.tokenizer("\n\n".join(example.prompt for example in task.examples)).input_ids[: arguments.tokens]
    if len(ids) < arguments.tokens:
        sys.exit(f"{task.name!r} gives {len(ids)} tokens; {arguments.tokens} are needed")
    generator = random.Random(0)
    layers = generator.sample(range(model.n_layers), arguments.layers)
    pairs = generator.sample([(layer, head) for layer in layers for head in range(model.n_heads)], arguments.heads)
    heads: dict[int, list[int]] = {}
    for layer, head in sorted(pairs):
        heads.setdefault(layer, []).append(head)
    queries = query_positions(arguments.tokens, arguments.queries, torch.Generator().manual_seed(0))
    labels = [-100] * (arguments.tokens - arguments.labels) + ids[-arguments.labels :]
    store = TeacherStore(arguments.work / "teacher")
    compute_teacher(model, [TrainingRow(KEY, tuple(ids), tuple(labels))], heads, {KEY: queries}, store, batch_size=1)
    plan = {"input_ids": ids, "labels": labels, "heads": sorted(heads.items()), "queries": queries}
    (arguments.work / "plan.json").write_text(json.dumps(plan))


@torch.no_grad()
def disturb(model: Any) -> None:
    """Make the student of the teacher: the same in every process."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter += NOISE * parameter.std() * torch.randn(parameter.shape, generator=generator)


# --- the routes -------------------------------------------------------------------------------------------------------


def make_route(name: str, folder: str, work: Path) -> tuple[Any, Callable[[], Losses]]:
    """The model to train and the losses of a step, with their graph."""
    plan = json.loads((work / "plan.json").read_text())
    ids, labels = torch.tensor([plan["input_ids"]]), torch.tensor(plan["labels"])
    heads = {int(layer): chosen for layer, chosen in plan["heads"]}
    queries = torch.tensor(plan["queries"])
    positions = (labels[1:] != -100).nonzero()[:, 0]
    targets = labels[1:][positions]

    def run(model: Any, **options: Any) -> tuple[Tensor, Any]:
        output = model(ids, use_cache=False, logits_to_keep=positions, **options)
        return output.logits[0], output

    if name in ("plain", "headtune"):
        return headtune_route(name, folder, work, heads, run, targets, len(plan["input_ids"]))
    return eager_route(name, folder, work, heads, queries, run, targets, len(plan["input_ids"]))


def headtune_route(
    name: str,
    folder: str,
    work: Path,
    heads: Mapping[int, list[int]],
    run: Callable[..., tuple[Tensor, Any]],
    targets: Tensor,
    tokens: int,
) -> tuple[Any, Callable[[], Losses]]:
    from headtune.analysis.models.loading import load_model
    from headtune.train.continual.teacher_store import TeacherStore
    from headtune.train.losses.attention_distillation import RowRecorder, attention_distillation, logit_kl

    viewed = load_model(folder, device="cpu")
    model = viewed.hf.train()
    disturb(model)
    store, recorder = TeacherStore(work / "teacher"), RowRecorder(heads)

    def plain() -> Losses:
        return {"cross_entropy": functional.cross_entropy(run(model)[0], targets)}

    def distil() -> Losses:
        teacher = store.batch([KEY], tokens)
        with recorder.record(teacher.positions) as rows:
            logits, _ = run(model)
        return {
            "cross_entropy": functional.cross_entropy(logits, targets),
            "logits": logit_kl(logits, teacher.logits),  # type: ignore[arg-type]  # there is a teacher
            "attention": attention_distillation(rows, teacher.attention, teacher.present),
        }

    viewed.record_attention(name == "headtune")
    return model, plain if name == "plain" else distil


def eager_route(
    name: str,
    folder: str,
    work: Path,
    heads: Mapping[int, list[int]],
    queries: Tensor,
    run: Callable[..., tuple[Tensor, Any]],
    targets: Tensor,
    tokens: int,
) -> tuple[Any, Callable[[], Losses]]:
    from transformers import AutoModelForCausalLM

    from headtune.train.continual.teacher_store import TeacherStore

    def load() -> Any:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")

    model = load().train()
    disturb(model)
    stored = TeacherStore(work / "teacher") if name == "eager, stored" else None
    teacher = None if stored else load().eval()

    def rows_of(output: Any) -> dict[int, Tensor]:
        return {layer: output.attentions[layer][:, chosen][:, :, queries] for layer, chosen in heads.items()}

    @torch.no_grad()
    def teach() -> tuple[Tensor, dict[int, Tensor]]:
        if stored:
            batch = stored.batch([KEY], tokens)
            return batch.logits, batch.attention  # type: ignore[return-value]  # all logits are stored
        logits, output = run(teacher, output_attentions=True)
        return logits, rows_of(output)

    def distil() -> Losses:
        taught_logits, taught_rows = teach()
        logits, output = run(model, output_attentions=True)
        by_layer = [kl(taught_rows[layer], rows).sum((0, 1, 2)) for layer, rows in rows_of(output).items()]
        n_rows = sum(map(len, heads.values())) * len(queries)
        return {
            "cross_entropy": functional.cross_entropy(logits, targets),
            "logits": kl(taught_logits.softmax(-1), logits.softmax(-1)).mean(),
            "attention": torch.stack(by_layer).sum() / n_rows,
        }

    return model, distil


def kl(teacher: Tensor, student: Tensor) -> Tensor:
    """`sum over the last dimension of t log(t / s)`; a masked key is 0 in both and adds nothing."""
    tiny = torch.finfo(torch.float32).tiny
    return (teacher * (teacher.clamp(min=tiny).log() - student.clamp(min=tiny).log())).sum(-1)


def work(arguments: argparse.Namespace) -> None:
    """Take a step for each line on stdin, and answer with what it took, a line each."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not mix with the replies
    torch.set_num_threads(arguments.threads)
    model, losses = make_route(arguments.route, arguments.model, arguments.work)
    print(json.dumps({"ready": True}), file=replies, flush=True)
    for _ in sys.stdin:
        model.zero_grad()
        before = resident()
        start, start_cpu = time.perf_counter(), time.process_time()
        terms = losses()
        torch.stack([WEIGHTS[name] * term for name, term in terms.items()]).sum().backward()
        seconds = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - start_cpu}
        norm = torch.stack([one.grad.norm() for one in model.parameters() if one.grad is not None]).norm()
        values = {name: term.item() for name, term in terms.items()} | {"gradient_norm": norm.item()}
        del terms
        reply = seconds | {"peak_mib": status("VmHWM"), "before_mib": before, "values": values}
        print(json.dumps(reply), file=replies, flush=True)


# --- the comparison ---------------------------------------------------------------------------------------------------


def command(route: str, folder: str, arguments: argparse.Namespace) -> list[str]:
    parts = [sys.executable, "-W", "ignore", __file__, "--route", route, "--model", folder]
    for name in ("tokens", "labels", "layers", "heads", "queries", "threads", "work"):
        parts += [f"--{name}", str(getattr(arguments, name))]
    return parts + ["--quick"] * arguments.quick


class Side:
    """A route's process, seen from the benchmark."""

    def __init__(self, name: str, folder: str, arguments: argparse.Namespace) -> None:
        self.name = name
        self.process = subprocess.Popen(
            command(name, folder, arguments),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if arguments.verbose else subprocess.DEVNULL,
            text=True,
            env=environment(arguments.threads),
        )
        self.read()

    def read(self) -> dict[str, Any]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"{self.name} ended with {self.process.wait()}; see why with --verbose")
        reply: dict[str, Any] = json.loads(line)
        return reply

    def step(self) -> dict[str, Any]:
        assert self.process.stdin
        print("go", file=self.process.stdin, flush=True)
        return self.read()


def environment(threads: int) -> dict[str, str]:
    return os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TQDM_DISABLE": "1",
    }


def require_same_values(values: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The largest relative difference between headtune and each eager route, over losses and the gradient's norm."""
    gaps = {}
    for name in ROUTES[2:]:
        pairs = [(values["headtune"][term], values[name][term]) for term in (*WEIGHTS, "gradient_norm")]
        gaps[name] = gap = max(abs(ours - theirs) / abs(theirs) for ours, theirs in pairs)
        if not gap <= TOLERANCE:
            sys.exit(f"headtune's losses differ by {gap:.2g} from those of {name}; nothing is compared: {values}")
    return gaps


def main(arguments: argparse.Namespace) -> None:
    from headtune.analysis.models.loading import resolve

    with contextlib.ExitStack() as stack:
        arguments.work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if arguments.quick:
            sys.path.insert(0, str(ROOT / "tests"))
            from helpers.tiny import save_tiny

            folder = str(save_tiny(arguments.work / "tiny", "llama", num_key_value_heads=2))
        else:
            folder = resolve(MODEL)
        subprocess.run(command("prepare", folder, arguments), check=True, env=environment(arguments.threads))
        sides = []
        for index, name in enumerate(ROUTES):
            copy = shutil.copytree(folder, arguments.work / f"model-{index}")
            side = Side(name, str(copy), arguments)
            sides.append(side)
            stack.callback(side.process.kill)
            side.step()
            print(f"ready: {name}", flush=True)
        measured: dict[str, list[dict[str, Any]]] = {name: [] for name in ROUTES}
        for round_ in range(arguments.rounds):
            for side in sides if round_ % 2 == 0 else sides[::-1]:
                measured[side.name].append(side.step())
            content = summary(measured, arguments)
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text(json.dumps(content, indent=1) + "\n")
            print(f"round {round_ + 1}/{arguments.rounds}", flush=True)
    print(markdown(content))


def summary(measured: Mapping[str, list[dict[str, Any]]], arguments: argparse.Namespace) -> dict[str, Any]:
    times = {
        kind: {name: [one[kind] for one in rounds] for name, rounds in measured.items()}
        for kind in ("seconds", "cpu_seconds")
    }
    peaks = {name: [one["peak_mib"] for one in rounds] for name, rounds in measured.items()}
    extra = {name: max(rounds) - max(peaks["plain"]) for name, rounds in peaks.items()}
    terms = {name: rounds[0]["values"] for name, rounds in measured.items()}
    ratios = {}
    for name in ROUTES[2:]:
        by_round = {
            kind: [ours / theirs for ours, theirs in zip(rounds["headtune"], rounds[name], strict=True)]
            for kind, rounds in times.items()
        }
        ratios[f"headtune / {name}"] = {
            **{kind: spread(values) | {"by_round": values} for kind, values in by_round.items()},
            "extra_memory": extra["headtune"] / extra[name],
            "peak": max(peaks["headtune"]) / max(peaks[name]),
        }
    against = ratios["headtune / eager"]
    met = {
        "extra_memory": against["extra_memory"] <= TARGETS["extra_memory"],
        "seconds": against["seconds"]["median"] <= TARGETS["seconds"],
    }
    sizes = ("tokens", "labels", "layers", "heads", "queries", "threads")
    return {
        "command": "python benchmarks/speed_distillation.py " + " ".join(sys.argv[1:]),
        "date": datetime.now(UTC).date().isoformat(),
        "model": "tiny llama" if arguments.quick else MODEL,
        **{name: getattr(arguments, name) for name in sizes},
        "rounds": len(measured["plain"]),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers")},
        "processor": platform.processor() or platform.machine(),
        "values": terms,
        "largest_difference": require_same_values(terms),
        "routes": {
            name: {
                **{kind: spread(rounds[name]) | {"by_round": rounds[name]} for kind, rounds in times.items()},
                "peak_mib": spread(peaks[name]) | {"by_round": peaks[name]},
                "resident_before_mib": max(one["before_mib"] for one in measured[name]),
                "extra_mib": extra[name],
            }
            for name in ROUTES
        },
        "ratios": ratios,
        "targets": TARGETS,
        "met": met,
    }


def markdown(content: Mapping[str, Any]) -> str:
    def show(times: Mapping[str, float]) -> str:
        return f"{times['median']:.2f} [{times['min']:.2f}, {times['max']:.2f}]"

    lines = ["| route | s a step | CPU s a step | peak MiB | extra MiB |", "|---|---|---|---|---|"]
    for name, row in content["routes"].items():
        lines.append(
            f"| {name} | {show(row['seconds'])} | {show(row['cpu_seconds'])} | {row['peak_mib']['max']:.0f} "
            f"| {row['extra_mib']:.0f} |"
        )
    lines += ["", "| ratio | seconds | CPU seconds | extra memory | peak |", "|---|---|---|---|---|"]
    for name, row in content["ratios"].items():
        lines.append(
            f"| {name} | {show(row['seconds'])} | {show(row['cpu_seconds'])} | {row['extra_memory']:.2f} "
            f"| {row['peak']:.2f} |"
        )
    return "\n".join([*lines, "", f"targets of headtune / eager: {content['targets']}; met: {content['met']}"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int, default=5, help="measured steps of each route")
    parser.add_argument("--tokens", type=int, help="of the row; default 1024")
    parser.add_argument("--labels", type=int, help="tokens at its end that carry the loss; default 128")
    parser.add_argument("--layers", type=int, help="budget of layers; default 24")
    parser.add_argument("--heads", type=int, help="budget of heads; default 64")
    parser.add_argument("--queries", type=int, help="budget of query rows; default 100")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--verbose", action="store_true", help="show what the routes' processes print")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--route", help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parsed = parser.parse_args()
    defaults = {"tokens": 1024, "labels": 128, "layers": 24, "heads": 64, "queries": 100}
    tiny = {"tokens": 240, "labels": 16, "layers": 2, "heads": 5, "queries": 20}
    for name, value in (tiny if parsed.quick else defaults).items():
        if getattr(parsed, name) is None:
            setattr(parsed, name, value)
    if parsed.route == "prepare":
        prepare(parsed)
    elif parsed.route:
        work(parsed)
    else:
        main(parsed)
