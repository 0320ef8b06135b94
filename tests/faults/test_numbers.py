"""Numbers that are none, and memory that does not suffice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from headtune.analysis.utils.errors import CheckError
from headtune.train.trainer import answer_set_trainer, callbacks, failures
from headtune.train.trainer.callbacks import progress_logger
from helpers import machine as machines
from helpers.machine import Machine
from helpers.small_runs import train, write_recipe


@pytest.mark.parametrize("family", ["lofit", *(pytest.param(f, marks=pytest.mark.slow) for f in ("full", "seekr"))])
def test_no_checkpoint_is_kept_of_a_training_that_diverged(
    family: str, machine: Machine, tiny_llama: Path, tmp_path: Path
) -> None:
    """The loss would be logged, and looked at, much later than the checkpoint is written."""
    settings = {"learning_rate": 3e38, "logging_steps": 1000, "save_steps": 2, "lr_scheduler_type": "constant"}
    folder = machines.write(family, tmp_path / "here", tiny_llama, **settings)
    code, said = machine.run(folder)
    line = machines.complaint(said)
    assert (
        code == 1
        and (" is nan at step " in line or " is inf at step " in line)
        and "lower training.learning_rate" in line
    )
    assert machines.state(folder) == "failed"
    for path in (folder / "run").rglob("*.safetensors"):
        assert all(torch.isfinite(value).all() for value in load_file(path).values()), path


def test_memory_that_runs_out_in_a_step_is_one_line_and_the_run_goes_on(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, run = write_recipe(tmp_path, tiny_llama), tmp_path / "run"
    real: Callable[..., Any] = answer_set_trainer.AnswerSetTrainer.training_step

    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 2:
            torch.empty(1 << 50)  # which no machine has
        return real(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(answer_set_trainer.AnswerSetTrainer, "training_step", step)
        assert train(recipe) == 1
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("headtune: "))
    assert "out of memory (" in line and "per_device_train_batch_size" in line and "--resume" in line
    assert machines.state(tmp_path) == "failed"
    assert [path.name for path in machines.checkpoints_in(tmp_path)] == ["checkpoint-2"]
    assert train(recipe, "--resume") == 0
    assert sorted(machines.losses(run)) == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has"), MemoryError()],
    ids=["gpu", "python"],
)
def test_the_ways_in_which_memory_runs_out(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(CheckError) as caught, failures.explained_failures(tmp_path):
        raise error
    line = str(caught.value)
    assert line.startswith("out of memory (") and "; free some and start it again, or" in line and "\n" not in line


def test_gradients_beyond_fp16_are_the_scalers_business() -> None:
    class State:
        global_step, max_steps = 1, 2

    class Arguments:
        fp16 = True

    said: list[str] = []
    callback: Any = progress_logger(said.append)
    callback.on_log(Arguments, State, None, logs={"loss": 1.0, "grad_norm": float("inf")})
    assert said
    Arguments.fp16 = False
    with pytest.raises(CheckError, match="norm of the gradient is inf at step 1"):
        callback.on_log(Arguments, State, None, logs={"loss": 1.0, "grad_norm": float("inf")})


def test_steps_tell_the_time_left_and_which_numbers_are_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    class State:
        global_step, max_steps = 10, 110

    class Arguments:
        fp16 = False

    lines: list[str] = []
    callback: Any = progress_logger(lines.append)
    monkeypatch.setattr(callbacks.time, "monotonic", lambda: 100.0)
    callback.on_train_begin(Arguments, State, None)  # resumed at step 10
    State.global_step = 20
    monkeypatch.setattr(callbacks.time, "monotonic", lambda: 160.0)
    callback.on_log(Arguments, State, None, logs={"loss": 1.5, "recall": 1.0, "suppression": 0.5, "epoch": 1.0})
    State.global_step = 110
    callback.on_log(Arguments, State, None, logs={"loss": 1.5})
    assert lines == [
        "step 20/110: loss 1.5, recall loss 1, suppression loss 0.5, about 9 min left",
        "step 110/110: loss 1.5",
    ]
    assert [callbacks.in_words(seconds) for seconds in (1.2, 89, 5000, 11100)] == [
        "1 s",
        "89 s",
        "83 min",
        "3 h 05 min",
    ]
    with pytest.raises(CheckError, match=r"nan at step 1; lower .* or use bfloat16 or float32: no weight has changed"):
        State.global_step = 1
        callback.on_log(Arguments, State, None, logs={"loss": float("nan")})
