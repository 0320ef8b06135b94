"""Two processes, of which one dies, or is told to stop; that numbers stay the same: tests/train/test_distributed.py."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest

from headtune.train.trainer import checkpoints
from helpers import machine as machines
from helpers.paths import ROOT

STEPS = 200


CONFIG = str(ROOT / "accelerate_configs" / "ddp_cpu_2.yaml")
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", CONFIG, "-m", "headtune.train"]
HEADTUNE = [sys.executable, "-m", "headtune", "train", "--config_file", CONFIG]


def launch(folder: Path, *words: str, by: Sequence[str] = ACCELERATE) -> subprocess.Popen[bytes]:
    """The recipe in `folder` on two processes, launched by `accelerate` or by headtune itself."""
    command = [*by, "recipe.yaml", *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    with (folder / "log").open("ab") as log:
        return subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, env=environment)


def ranks(launcher: subprocess.Popen[bytes]) -> Sequence[psutil.Process]:
    """The processes that train, by rank."""
    children = psutil.Process(launcher.pid).children(recursive=True)
    own = {child.environ()["RANK"]: child for child in children if "RANK" in child.environ()}
    return [own[rank] for rank in sorted(own)]


def wait_for(folder: Path, words: str, launcher: subprocess.Popen[bytes]) -> None:
    while words not in (said := (folder / "log").read_text()):
        assert launcher.poll() is None, said
        time.sleep(0.01)


@pytest.mark.slow
def test_all_end_when_one_has_died_and_stop_with_one_that_is_told_to(tiny_llama: Path, tmp_path: Path) -> None:
    folder = machines.write("lofit", tmp_path / "here", tiny_llama, max_steps=STEPS, save_steps=50)
    launcher = launch(folder, by=HEADTUNE)
    wait_for(folder, "step 60/", launcher)
    other, killed = ranks(launcher)
    killed.send_signal(signal.SIGKILL)
    assert launcher.wait() == 128 + signal.SIGKILL
    said = (folder / "log").read_text()
    assert "rank 1 was ended by SIGKILL" in machines.complaint(said) and not other.is_running()
    assert "interrupted" not in said and machines.state(folder) in ("failed", "running")
    newest = machines.checkpoints_in(folder)[-1]
    reached = int(newest.name.partition("-")[2])
    files = set(machines.read(newest / checkpoints.MARK)["files"])
    assert 50 <= reached < STEPS and {"rng_state_0.pth", "rng_state_1.pth"} <= files

    (folder / "log").unlink()
    launcher = launch(folder, "--resume")
    wait_for(folder, f"step {reached + 5}/", launcher)
    ranks(launcher)[1].send_signal(signal.SIGTERM)  # rank 0 hears of it from rank 1
    assert launcher.wait() == 0, (folder / "log").read_text()
    line = machines.complaint((folder / "log").read_text())
    assert "interrupted by SIGTERM after step " in line and "(launched as before)" in line
    step = int(line.partition("after step ")[2].split()[0])
    assert machines.checkpoints_in(folder)[-1].name == f"checkpoint-{step}"
    assert machines.state(folder) == "interrupted"
