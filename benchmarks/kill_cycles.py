"""A training that is killed over and over: what is kept is whole each time, and each run ends as one left alone.

    python benchmarks/kill_cycles.py                    200 times kill -9, benchmarks/results/kill_cycles.json
    python benchmarks/kill_cycles.py --cycles 5         a look at it

A tiny llama is trained with recipe lofit, a checkpoint every second step. In a cycle a process starts or takes up the
run (`headtune train --resume`) and is killed with SIGKILL after a time drawn evenly from nothing to a little more than
a run takes. Then

    the newest whole checkpoint is opened: its weights, its optimiser's state, its place in the training
    it is never older than the newest one before the kill

A run that comes to its end before it is killed is compared with one that was left alone: adapter, evaluation and the
loss of every step, to the last bit. Then the next run begins, in another folder, until that many kills are done.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}

import torch
import trl  # noqa: F401  here, not in every process that is killed
from safetensors.torch import load_file
from transformers import TrainerState
from transformers.models.llama import modeling_llama  # noqa: F401

from headtune.analysis.heads import head_set
from headtune.analysis.utils.files import write_json
from headtune.cli import main as cli
from headtune.train.runs import run  # noqa: F401
from headtune.train.trainer import checkpoints

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "benchmarks" / "results" / "kill_cycles.json"
STEPS, SAVED_EVERY = 20, 2


def new_run(folder: Path, model: Path) -> Path:
    from helpers.small_runs import write_recipe

    folder.mkdir()
    training = {
        "max_steps": STEPS,
        "save_steps": SAVED_EVERY,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.01,
        "logging_steps": 1,
        "use_cpu": True,
    }
    write_recipe(folder, model, training=training)
    return folder


def start(folder: Path) -> int:
    """`headtune train` in a process forked from this one, resuming where there is something to resume."""
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        words = ["--resume"] if (folder / "run" / "recipe.yaml").is_file() else []
        if not words and (folder / "run").is_dir():
            shutil.rmtree(folder / "run")  # killed before it wrote a recipe, it left an empty folder or half a file
        code = cli.main(["train", str(folder / "recipe.yaml"), *words])
    finally:
        os._exit(code)


def ended(child: int) -> int | None:
    """A process's exit code, None while it runs."""
    pid, status = os.waitpid(child, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if pid else None


def cycle(folder: Path, seconds: float) -> int | None:
    """Let the run go on for that long at most; None where it was killed, else its exit code."""
    child, end = start(folder), time.monotonic() + seconds
    while time.monotonic() < end:
        if (code := ended(child)) is not None:
            return code
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    return None if code == -signal.SIGKILL else code


def opened(folder: Path) -> tuple[int, int]:
    """Step of the newest whole checkpoint, which can be read (0: there is none yet); how many newer are not whole."""
    passed: list[str] = []
    newest = checkpoints.newest(folder / "run", passed.append)
    if newest is None:
        return 0, len(passed)
    assert all(torch.isfinite(value).all() for value in load_file(newest / "adapter_model.safetensors").values())
    torch.load(newest / "optimizer.pt", weights_only=True)
    step = TrainerState.load_from_json(str(newest / "trainer_state.json")).global_step
    assert newest.name == f"checkpoint-{step}"
    return step, len(passed)


def result_of(folder: Path) -> tuple[Any, ...]:
    """Adapter, evaluation and the loss of every step."""
    place = folder / "run"
    weights = load_file(place / "adapter" / "adapter_model.safetensors")
    lines = [json.loads(line) for line in (place / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}
    evaluation = json.loads((place / "evaluation.json").read_text(encoding="utf-8"))
    assert sorted(losses) == list(range(1, STEPS + 1))
    return {name: tensor.numpy().tobytes() for name, tensor in weights.items()}, evaluation, losses


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cycles", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop earlier, after this long")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT / "tests"))
    from helpers.tiny import save_tiny

    draw, stop = random.Random(options.seed), time.monotonic() + 60 * options.minutes
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        model = save_tiny(root / "model", "llama")
        begin = time.monotonic()
        whole = new_run(root / "whole", model)
        assert cycle(whole, 3600) == 0, (whole / "log").read_text()
        length = time.monotonic() - begin
        expected = result_of(whole)
        kills = finished = half_written = in_training = 0
        counts: dict[str, int] = {}
        folder, last = new_run(root / "run-0", model), 0
        while kills < options.cycles and time.monotonic() < stop:
            code = cycle(folder, draw.uniform(0, 1.2 * length))
            if code is not None:
                assert code == 0, (folder / "log").read_text()
                assert result_of(folder) == expected, f"{folder} ended otherwise"
                finished, last = finished + 1, 0
                shutil.rmtree(folder)
                folder = new_run(root / f"run-{finished}", model)
                continue
            kills += 1
            step, passed = opened(folder)
            assert step >= last, f"a checkpoint of step {last} was there, and now the newest is of step {step}"
            half_written, in_training = half_written + bool(passed), in_training + (step > last)
            counts[f"{10 * (step // 10)}-"] = counts.get(f"{10 * (step // 10)}-", 0) + 1
            last = step
            print(f"kill {kills}: step {step}{', half a checkpoint passed over' if passed else ''}", flush=True)
        assert cycle(folder, 3600) == 0, (folder / "log").read_text()
        assert result_of(folder) == expected, f"{folder} ended otherwise"
        result = {
            "made": datetime.now(UTC).date().isoformat(),
            **head_set.provenance(),
            "recipe": "lofit",
            "model": "tiny llama",
            "steps": STEPS,
            "saved_every": SAVED_EVERY,
            "seed": options.seed,
            "kills": kills,
            "kills_after_progress": in_training,
            "kills_with_half_a_checkpoint": half_written,
            "kills_by_newest_step": dict(sorted(counts.items())),
            "runs_finished": finished + 1,
            "runs_equal_to_the_unbroken_one": finished + 1,  # anything else has ended this script
            "checkpoints_lost": 0,
        }
        write_json(RESULT, result)
        print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
