"""Signals to a run: it stops well, says how to go on, and goes on to where it would have ended."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from headtune.train.trainer import signals
from helpers import machine as machines
from helpers.machine import Machine

pytestmark = pytest.mark.slow  # every fault needs processes of its own

Unbroken = Callable[[str], Path]


@pytest.mark.parametrize(
    ("family", "signum", "code"),
    [("lofit", signal.SIGTERM, 0), ("full", signal.SIGINT, 130), ("seekr", signal.SIGTERM, 0)],
)
def test_a_training_finishes_its_step_and_keeps_it(
    family: str, signum: int, code: int, machine: Machine, unbroken: Unbroken, tiny_llama: Path, tmp_path: Path
) -> None:
    folder = machines.write(family, tmp_path / "here", tiny_llama, save_steps=1000)  # nothing is kept but by signals
    child = machine.start(folder)
    if family == "seekr":
        child.wait_for("task 2 of 3")
    child.wait_for("step 5/")
    child.signal(signum)
    assert child.wait() == code, child.said()
    line = machines.complaint(child.said())
    name = signal.Signals(signum).name
    assert f"interrupted by {name} after step " in line and "--resume" in line and "recipe.yaml" in line
    step = int(line.partition("after step ")[2].split()[0])
    assert [path.name for path in machines.checkpoints_in(folder)] == [f"checkpoint-{step}"]
    assert machines.state(folder) == "interrupted" and not (folder / "run" / "adapter").exists()
    code, said = machine.run(folder, "--resume")
    assert code == 0, said
    first = next(line for line in said.splitlines() if line.startswith("step "))
    assert first.startswith(f"step {step + 1}/"), "nothing is trained twice"
    machines.require_same(folder, unbroken(family))


@pytest.mark.parametrize(
    ("family", "when"), [("lofit", "before"), ("full", "after"), ("seekr", "before"), ("seekr", "after")]
)
def test_where_nothing_is_trained_it_ends_at_once(
    family: str, when: str, machine: Machine, unbroken: Unbroken, tiny_llama: Path, tmp_path: Path
) -> None:
    words = {"before": "evaluating the base model", "after": "evaluating the adapted model"}
    if family == "seekr":
        words = {"before": "measuring the base model", "after": "measuring 1 tasks"}
    folder = machines.write(family, tmp_path / "here", tiny_llama)
    child = machine.start(folder)
    child.wait_for(words[when])
    child.signal(signal.SIGTERM)
    assert child.wait() == 0, child.said()
    line = machines.complaint(child.said())
    assert "interrupted by SIGTERM; go on with: " in line and machines.state(folder) == "interrupted"
    assert not [path for path in (folder / "run").rglob(".*")], "nothing is half written"
    code, said = machine.run(folder, "--resume")
    assert code == 0, said
    machines.require_same(folder, unbroken(family))


def test_what_was_refused_before_it_began_says_to_start_again(tmp_path: Path) -> None:
    with pytest.raises(signals.Interrupted, match="start it again") as stop, signals.watched(tmp_path):
        os.kill(os.getpid(), signal.SIGTERM)
    assert stop.value.exit_code == 0 and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


class Trainer:
    class accelerator:
        device = "cpu"

    def add_callback(self, callback: object) -> None:
        pass


def test_a_second_ctrl_c_does_not_wait_for_the_step(tmp_path: Path) -> None:
    with (
        pytest.raises(KeyboardInterrupt) as stop,
        signals.watched(tmp_path),
        signals.between_steps(Trainer()),
    ):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
    assert not isinstance(stop.value, signals.Interrupted)


@pytest.mark.parametrize(
    ("rank", "when"), [("0", "before it is noticed"), ("1", "before it is noticed"), ("0", "after"), ("1", "after")]
)
def test_a_process_that_has_lost_a_peer_is_not_interrupted(
    rank: str, when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its launcher ends it with SIGTERM: it ends by that, once it has written down that it failed."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", rank)
    note = tmp_path / "note"
    child = os.fork()
    if child == 0:
        try:
            with signals.watched(tmp_path):
                try:
                    with signals.between_steps(Trainer()):
                        if when != "after":
                            os.kill(os.getpid(), signal.SIGTERM)
                        raise RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer")
                except RuntimeError:
                    if when == "after" and rank == "0":
                        os.kill(os.getpid(), signal.SIGTERM)
                    note.write_text("failed")
                    raise
        except signals.Interrupted:
            os._exit(50)
        except BaseException:
            os._exit(51)
        os._exit(52)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code == (51 if (when, rank) == ("after", "1") else -signal.SIGTERM)  # rank 1 has its default back by then
    assert note.read_text() == "failed"


def test_outside_the_main_thread_signals_stay_as_they_were(tmp_path: Path) -> None:
    before, seen = signal.getsignal(signal.SIGTERM), []

    def work() -> None:
        with signals.watched(tmp_path), signals.between_steps(None):
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]
