"""A run of a sequence that is killed, whenever that is, ends as the one that was left alone."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from headtune.analysis.utils.errors import CheckError
from headtune.train.continual import learner, sequence
from headtune.train.trainer import checkpoints
from headtune.train.tuners import weights_io
from helpers import machine as machines
from helpers.machine import Child, Machine
from helpers.small_runs import train, write_sequence_recipe
from helpers.tiny import tiny_model


def require_same(run: Path, whole: Path) -> None:
    """Matrix, heads, metrics and every weight of two runs are equal."""
    ours, theirs = machines.read(run / "sequence.json"), machines.read(whole / "sequence.json")
    for key in ("before", "after", "heads", "n_steps"):
        assert ours[key] == theirs[key], key
    assert machines.read(run / "evaluation.json") == machines.read(whole / "evaluation.json")
    first, second = (load_file(folder / "model" / "model.safetensors") for folder in (run, whole))
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())


# --- kill -9 ----------------------------------------------------------------------------------------------------------


# (what the run says that it begins, what is half written then): once in each phase of a sequence, in its order.
MOMENTS = (
    ("measuring the base model", None),
    ("step 2/", "tasks/*/checkpoints/checkpoint-*"),
    ("step 20/", "tasks/*/.model.*"),
    ("importance of heads", "teachers/**/.*"),
    ("step 6/", None),
    ("measuring ", None),
    ("step 15/", "tasks/*/checkpoints/checkpoint-*"),
    ("measuring 3 tasks", ".model.*"),
)


def half_written(run: Path, pattern: str) -> set[Path]:
    """Checkpoints without their mark, folders and files without their name."""
    return {path for path in run.glob(pattern) if not (path / checkpoints.MARK).is_file()}


def wait_for(child: Child, words: str, run: Path, pattern: str | None) -> bool:
    """Until the run has said `words`, and then has something new half written for up to 2,000 looks."""
    before = half_written(run, pattern) if pattern else set()
    while words not in child.said():
        if child.ended():
            return False
        time.sleep(0.002)
    for _ in range(2000 if pattern else 0):
        if child.ended() or half_written(run, pattern or "") - before:
            break
        time.sleep(0.0002)
    return not child.ended()


@pytest.mark.slow
def test_killed_over_and_over_it_ends_as_the_unbroken_run(machine: Machine, tiny_llama: Path, tmp_path: Path) -> None:
    """SIGKILL once in every phase, in the middle of writing where that is met; then on from what is whole."""
    whole, run = (
        machines.write("seekr", tmp_path / name, tiny_llama, max_steps=20, save_steps=2) / "run"
        for name in ("whole", "killed")
    )
    code, said = machine.run(whole.parent)
    assert code == 0, said
    kills = 0
    for words, pattern in MOMENTS:
        child = machine.start(run.parent, *(["--resume"] if (run / "recipe.yaml").is_file() else []))
        if wait_for(child, words, run, pattern):
            child.signal(signal.SIGKILL)
            kills += 1
        if child.wait() == 0:
            break
    assert kills >= 6, f"only {kills} came before the end: {(run.parent / 'log').read_text()}"
    if machines.state(run.parent) != "done":
        code, said = machine.run(run.parent, "--resume")
        assert code == 0, said
    require_same(run, whole)
    for pattern in ("teachers", ".model.*", "tasks/*/model", "tasks/*/checkpoints", "tasks/*/.model.*"):
        assert not list(run.glob(pattern)), pattern


# --- what is left half done -------------------------------------------------------------------------------------------


def test_a_checkpoint_without_its_mark_is_passed_over(tmp_path: Path) -> None:
    said: list[str] = []
    assert checkpoints.newest(tmp_path, said.append) is None
    for step, marked in ((2, True), (4, True), (10, False)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"weights")
        if marked:
            checkpoints.mark(folder, step)
    assert checkpoints.newest(tmp_path, said.append) == tmp_path / "checkpoint-4"
    passed_over, taken = said
    assert "checkpoint-10 is passed over" in passed_over and checkpoints.MARK in passed_over
    assert taken == f"going on from {tmp_path / 'checkpoint-4'}"
    checkpoints.mark(tmp_path / "checkpoint-10", 10)
    assert checkpoints.newest(tmp_path, said.append) == tmp_path / "checkpoint-10"
    assert said[2:] == [f"going on from {tmp_path / 'checkpoint-10'}"]


class Broken(BaseException):
    """The process dies."""


def break_in(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, times: int = 1) -> None:
    """From its `times`-th call on, a function does not come back."""
    real, calls = getattr(owner, name), iter(range(1, 10_000))

    def call(*args: Any, **kwargs: Any) -> Any:
        if next(calls) >= times:
            raise Broken
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, call)


@pytest.mark.slow
def test_broken_while_tidying_up_the_run_is_done(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a resumed run needs is there until nothing is left to resume."""
    recipe, run = write_sequence_recipe(tmp_path, tiny_llama, {}), tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(Broken):
        break_in(patch, sequence, "clear")
        train(recipe)
    assert machines.read(run / "run.json")["state"] == "done" and len(list(run.glob("tasks/*/model"))) == 3
    assert train(recipe, "--resume") == 0
    assert not list(run.glob("tasks/*/model")) and not (run / "teachers").exists()


@pytest.mark.slow
@pytest.mark.parametrize("tune", ["full", "lora"])
def test_a_damaged_model_of_an_earlier_task_is_one_clear_line(
    tune: str, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_sequence_recipe(tmp_path, tiny_llama, {"tune": tune, "lora": {"r": 2, "alpha": 4}})
    with monkeypatch.context() as patch, pytest.raises(Broken):
        break_in(patch, learner.SequenceTrainer, "training_step", times=22)  # in the second task
        train(recipe)
    (path,) = (tmp_path / "run" / "tasks").glob("01-*/*/*.safetensors")
    path.write_bytes(path.read_bytes()[:-100])
    capsys.readouterr()
    assert train(recipe, "--resume") == 1
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("headtune: ")]
    assert len(error) == 1 and f"{path} cannot be read" in error[0]


@pytest.mark.parametrize("tune", ["full", "lora"])
def test_weights_of_another_model_are_refused(tune: str, tmp_path: Path) -> None:
    def made(**shape: Any) -> Any:
        model = tiny_model("llama", **({} if tune == "lora" else shape))
        if tune == "full":
            return model
        targets = ["q_proj"] if shape else ["q_proj", "v_proj"]
        return get_peft_model(model, LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM"))

    weights_io.save(made(num_hidden_layers=2), tmp_path / "weights")
    with pytest.raises(CheckError, match=r"lacks \d+ weights|are there or in the adapter"):
        weights_io.restore(made(), tmp_path / "weights")
    with pytest.raises(CheckError):
        weights_io.restore(made(), tmp_path / "nothing")
