"""Recipes in two CPU processes, under each engine.

    outcomes = run_recipes("zero3_cpu_2", [first, second], folder)      # one launch, the recipes one after the other

This file is also what `accelerate launch` starts. It changes two things, for machines without a GPU: accelerate turns
FSDP into DDP there, which is undone, and DeepSpeed compiles a kernel at its first use (about a minute), which is left
out: gloo sums the same.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from helpers import tiny
from helpers.paths import ROOT

CONFIGS = ROOT / "accelerate_configs"
ENGINES = ("ddp_cpu_2", "zero1_cpu_2", "zero2_cpu_2", "zero3_cpu_2", "fsdp2_cpu_2")


RESUMED = "--resume"
BROKEN = "--broken"
AT_SAVE = 3


def run_recipes(engine: str, commands: Sequence[Sequence[str]], folder: Path) -> list[str]:
    """Train each recipe in two processes; of each the traceback, empty where all is well.

    Args:
        engine: a configuration in accelerate_configs/.
        commands: a recipe and what overrides it each, such as `["recipe.yaml", "seed=1"]`. With `BROKEN`, a run breaks
            off after its third checkpoint. With `RESUMED`, it is taken up; if it was finished, as one that was killed
            before its adapter was written.
        folder: for scratch.
    """
    jobs, answers = folder / f"{engine}.jobs.json", folder / f"{engine}.answers.json"
    jobs.write_text(json.dumps([list(command) for command in commands]), encoding="utf-8")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / f"{engine}.yaml")]
    if (settings := CONFIGS / f"{engine}.json").is_file():
        launch += ["--deepspeed_config_file", str(settings)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    environment.pop("ACCELERATE_USE_CPU", None)
    if engine.startswith("ddp"):
        environment["ACCELERATE_USE_CPU"] = "true"
    words = [str(Path(__file__)), str(jobs), str(answers)]
    log = folder / f"{engine}.log"
    with log.open("w", encoding="utf-8") as file:
        subprocess.run(
            [*launch, *words], stdout=file, stderr=subprocess.STDOUT, cwd=folder, env=environment, check=False
        )
    ranks = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob(f"{answers.name}.*"))]
    if not ranks:
        raise AssertionError(f"{engine} did not come to its end:\n{log.read_text(encoding='utf-8')[-4000:]}")
    last = ["not come to"] * len(commands)
    each = [[*found, *last][: len(commands)] for found in ranks]
    return [next((error for error in errors if error), "") for errors in zip(*each, strict=True)]


def _keep_fsdp() -> None:
    """accelerate asks for a GPU before it keeps FSDP; on a CPU the same code works over gloo."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    made = AcceleratorState.__init__

    def init(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        made(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type != DistributedType.FSDP:
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = init  # type: ignore[method-assign]


def _forget() -> None:
    """What one training leaves behind in this process; the process group stays."""
    from accelerate.state import AcceleratorState, GradientState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    gc.collect()


class _BrokenOffError(Exception):
    pass


@contextmanager
def _broken_off(really: bool) -> Iterator[None]:
    """Within it, every process stops right after a checkpoint has been marked."""
    from headtune.train.trainer.checkpoints import Mark

    whole, saves = Mark.on_save, 0

    def on_save(self: Mark, *args: Any, **kwargs: Any) -> None:
        nonlocal saves
        whole(self, *args, **kwargs)
        torch.distributed.barrier()  # the mark is there before any process leaves
        saves += 1
        if saves == AT_SAVE:
            raise _BrokenOffError

    if really:
        Mark.on_save = on_save  # type: ignore[method-assign]
    try:
        yield
        assert not really, "the run came to its end"
    except _BrokenOffError:
        pass
    finally:
        Mark.on_save = whole  # type: ignore[method-assign]


def _kill_late(run: Path) -> None:
    """What is left of a finished run is what there was between its last checkpoint and its adapter."""
    if os.environ["RANK"] == "0" and (run / "evaluation.json").is_file():
        for name in ("adapter", "model"):
            shutil.rmtree(run / name, ignore_errors=True)
        state = json.loads((run / "run.json").read_text(encoding="utf-8"))
        (run / "run.json").write_text(json.dumps(state | {"state": "running"}), encoding="utf-8")
    torch.distributed.barrier()


def _work(jobs: Path, answers: Path) -> None:
    from headtune.train.config import recipe
    from headtune.train.runs.run import run_recipe

    tiny.shorten_neutral_text()
    gc.freeze()  # what is imported is not looked through after every training
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        _keep_fsdp()
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    found = []
    for command in json.loads(jobs.read_text(encoding="utf-8")):
        error = ""
        try:
            resume = RESUMED in command
            loaded = recipe.load_recipe(command[0], [word for word in command[1:] if word not in (RESUMED, BROKEN)])
            if resume:
                _kill_late(loaded.folder)
            with _broken_off(BROKEN in command):
                run_recipe(loaded, resume, notify=lambda line: print(line, flush=True))
        except Exception:
            error = traceback.format_exc()
            print(error, flush=True)
        found.append(error)
        answers.with_name(f"{answers.name}.{os.environ['RANK']}").write_text(json.dumps(found), encoding="utf-8")
        if error:  # the other process may wait for this one
            time.sleep(5)
            os._exit(1)
        _forget()


if __name__ == "__main__":
    _work(Path(sys.argv[1]), Path(sys.argv[2]))
