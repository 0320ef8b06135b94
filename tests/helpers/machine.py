"""A process in which a run goes wrong for real: forked from one that has done the imports, in a folder of its own.

    child = machine.start(folder)                        # headtune train recipe.yaml, in `folder`
    child.wait_for("step 3/")                            # what it says on stderr
    child.signal(SIGTERM); assert child.wait() == 0

Recipes name everything by paths relative to their folder, so that a broken run can be copied and broken once more.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from headtune.train.trainer import checkpoints
from helpers.small_runs import write_recipe, write_sequence_recipe

FAMILIES = ("lofit", "full", "seekr")
STEPS = 24  # of lofit and full, and of each of the three tasks of seekr
PACE = 0.02

_PARENT = """
import gc, json, os, resource, signal, sys, time
import trl, datasets, peft, torch, transformers.models.llama.modeling_llama
from headtune.cli import main as cli
from headtune.train.runs import run
gc.collect(); gc.freeze()  # what is imported is not looked through after every training
print("ready", flush=True)
for line in sys.stdin:
    order = json.loads(line)
    if "wait" in order:
        _, status = os.waitpid(order["wait"], 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
        continue
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.chdir(order["folder"])
        if order["file_limit"]:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (order["file_limit"], order["file_limit"]))
        model, pace = transformers.models.llama.modeling_llama.LlamaModel, order["pace"]
        at_once = model.forward
        if pace:
            model.forward = lambda *args, **words: time.sleep(pace) or at_once(*args, **words)
        code = 70
        try:
            code = cli.main(["train", "recipe.yaml", *order["words"]])
        except BaseException:
            import traceback
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    print(child, flush=True)
"""


class Machine:
    """Starts runs in processes of their own."""

    def __init__(self) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
        environment = {key: value for key, value in environment.items() if key not in ("RANK", "WORLD_SIZE")}
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        command = [sys.executable, "-c", _PARENT]  # in a session of its own: Ctrl-C on the tests is not for the runs
        self._parent = subprocess.Popen(command, env=environment, start_new_session=True, **pipes)
        assert self._read() == "ready"

    def _read(self) -> str:
        assert self._parent.stdout is not None
        return self._parent.stdout.readline().strip()

    def ask(self, **order: Any) -> int:
        assert self._parent.stdin is not None
        self._parent.stdin.write(json.dumps(order) + "\n")
        self._parent.stdin.flush()
        return int(self._read())

    def start(
        self, folder: Path, *words: str, log: Path | None = None, file_limit: int = 0, pace: float = PACE
    ) -> Child:
        """Start `headtune train recipe.yaml WORDS` in `folder`.

        Args:
            file_limit: bytes that a file of the run may have; 0: any number.
            pace: seconds that a forward pass takes at least, so that a busy machine still meets it in the middle.
        """
        log = log or folder / "log"
        begin = log.stat().st_size if log.is_file() else 0
        pid = self.ask(folder=str(folder), log=str(log), words=list(words), file_limit=file_limit, pace=pace)
        return Child(self, pid, log, begin)

    def run(self, folder: Path, *words: str) -> tuple[int, str]:
        """The exit code of a run left alone, and what it said."""
        child = self.start(folder, *words, pace=0)
        return child.wait(), child.said()

    def close(self) -> None:
        assert self._parent.stdin is not None
        self._parent.stdin.close()
        self._parent.wait()


class Child:
    """A run in its own process."""

    def __init__(self, machine: Machine, pid: int, log: Path, begin: int) -> None:
        self.machine, self.pid, self.log, self.begin = machine, pid, log, begin
        self._heard = 0

    def said(self) -> str:
        return self.log.read_bytes()[self.begin :].decode() if self.log.is_file() else ""

    def wait_for(self, words: str) -> None:
        """Until the run says this, after what was waited for before."""
        while words not in self.said()[self._heard :]:
            assert not self.ended(), f"it ended without saying {words!r}: {self.said()}"
            time.sleep(0.002)
        self._heard += self.said()[self._heard :].index(words) + len(words)

    def ended(self) -> bool:
        return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"

    def signal(self, signum: int) -> None:
        os.kill(self.pid, signum)

    def wait(self) -> int:
        return self.machine.ask(wait=self.pid)


# --- recipes ----------------------------------------------------------------------------------------------------------


def write(family: str, folder: Path, model: Path, **training: Any) -> Path:
    """A recipe of this family in `folder`, whose run goes to `folder/run`; returns `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.01,
        "lr_scheduler_type": "linear",
        "logging_steps": 1,
        "save_steps": 4,
        "use_cpu": True,
    } | training
    if family == "seekr":
        path = write_sequence_recipe(folder, model, {}, training=settings)
    elif family == "full":
        method = {"answer_set": {"own_lists": 0.0, "retention": 0.0}, "keep": True}
        path = write_recipe(folder, model, recipe="full", heads=None, method=method, training=settings)
    else:
        path = write_recipe(folder, model, recipe=family, training=settings)
    path.write_text(path.read_text(encoding="utf-8").replace(f"{folder}/", ""), encoding="utf-8")
    return folder


def checkpoints_in(folder: Path) -> list[Path]:
    """The run's whole checkpoints, oldest first; of seekr those of the task that it is in."""
    places = sorted((folder / "run").glob("tasks/*/checkpoints")) or [folder / "run"]
    steps = checkpoints.by_step(places[-1])
    return [steps[step] for step in sorted(steps) if checkpoints.damage(steps[step], lambda _line: None) is None]


def state(folder: Path) -> str:
    found: str = read(folder / "run" / "run.json")["state"]
    return found


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def complaint(said: str) -> str:
    """The one line in which a run complains."""
    lines = [line for line in said.splitlines() if line.startswith("headtune: ")]
    assert len(lines) == 1 and "Traceback" not in said, said
    return lines[0]


def require_same(folder: Path, unbroken: Path) -> None:
    """Two finished runs have the same weights, metrics and, of each step, the same loss; nothing is half written."""
    run, other = folder / "run", unbroken / "run"
    assert state(folder) == state(unbroken) == "done"
    assert read(run / "evaluation.json") == read(other / "evaluation.json")
    (path,) = (
        (other / "adapter").glob("*.safetensors")
        if (other / "adapter").is_dir()
        else (other / "model").glob("*.safetensors")
    )
    first, second = load_file(run / path.relative_to(other)), load_file(path)
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    assert losses(run) == losses(other)
    assert not [path for path in run.rglob(".*") if path.name.startswith((".adapter", ".model", ".run"))]


def losses(run: Path) -> dict[int, float]:
    """The loss of every step, as it was last logged."""
    lines = (json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}
