"""A run that is told to stop: it finishes its step, keeps a checkpoint and says how to go on.

SIGTERM is what a scheduler sends before it takes a machine away: the run ends well (exit code 0), as it is to be taken
up again. SIGINT is Ctrl-C (exit code 130); a second one ends the run at once. Where nothing is trained there is no step
to finish, and what is written is written whole or not at all: either signal ends the run at once.

With several processes a signal may reach one of them first, so that all agree on it after every step. Where another
process is gone, SIGTERM is its launcher's, which ends what is left: no interruption, and nothing is said of it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import distributed
from transformers import TrainerCallback

from headtune.analysis.utils.processes import is_lost_peer, is_main, world_size

from .failures import advice

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupted(KeyboardInterrupt):
    """A run was stopped on request. The message is one line: by what, and how to go on."""

    def __init__(self, signum: int, line: str) -> None:
        super().__init__(line)
        self.exit_code = 0 if signum == signal.SIGTERM else 130


class _Watch:
    """What came while one run is watched."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.process = os.getpid()
        self.signum = 0
        self.training = False
        self.ending = False
        self.alone = False  # another process is gone

    def handle(self, signum: int, _frame: FrameType | None) -> None:
        if os.getpid() != self.process:  # a worker that was forked from the run ends as workers do
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
        elif self.ending:
            return  # a launcher that ends what is left; what is being written is written to its end
        elif self.alone:
            self.signum = signum
        elif not self.training:
            self.ending = True
            raise self.interrupted(signum)
        elif signum == self.signum == signal.SIGINT:
            raise KeyboardInterrupt
        else:
            self.signum = signum

    def interrupted(self, signum: int, folder: str = "") -> Interrupted:
        return Interrupted(signum, f"interrupted by {signal.Signals(signum).name}{folder}; {advice(self.folder)}")

    def agree(self, device: torch.device) -> int:
        """The signal that any process has seen; 0 where none has."""
        if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
            seen = torch.tensor(self.signum, device=device)
            distributed.all_reduce(seen, op=distributed.ReduceOp.MAX)
            self.signum = int(seen)
        return self.signum


_watch: _Watch | None = None  # signals are the process's, and so is this


@contextlib.contextmanager
def watched(folder: Path) -> Iterator[None]:
    """Inside the block SIGTERM and SIGINT end the run in `folder` with `Interrupted`; see `between_steps`.

    Outside the main thread, where Python takes no signals, nothing changes.
    """
    global _watch
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    outer, _watch = _watch, _Watch(folder)
    watch = _watch
    try:
        # While rank 0 measures, the others wait in a collective, where no handler of Python's is run: they just end.
        with _handled(watch) if is_main() else contextlib.nullcontext():
            try:
                yield
            finally:
                _watch = outer
    finally:
        if watch.alone and watch.signum:  # put off until what the run knows of itself was written
            signal.signal(watch.signum, signal.SIG_DFL)
            os.kill(os.getpid(), watch.signum)


@contextlib.contextmanager
def _handled(watch: _Watch) -> Iterator[None]:
    before = {signum: signal.signal(signum, watch.handle) for signum in _SIGNALS}
    try:
        yield
    finally:
        several = world_size() > 1
        for signum, handler in before.items():
            if watch.ending and several:  # it said why; the launcher, which ends the others, is not to end it twice
                handler = signal.SIG_IGN
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)  # None: not from Python


@contextlib.contextmanager
def between_steps(trainer: Any) -> Iterator[None]:
    """Around a training: a signal ends it after the step that it came in, with a checkpoint.

    Raises:
        Interrupted: at the end of the block.
    """
    watch = _watch
    if watch is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    trainer.add_callback(_Stop(watch, trainer.accelerator.device))
    watch.training = True
    with _handled(watch):
        try:
            yield
        except RuntimeError as error:
            watch.alone = is_lost_peer(error)
            raise
        finally:
            watch.training = False
    if watch.signum:
        raise watch.interrupted(watch.signum, f" after step {trainer.state.global_step} of {trainer.state.max_steps}")


class _Stop(TrainerCallback):
    def __init__(self, watch: _Watch, device: torch.device) -> None:
        self.watch, self.device = watch, device

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.watch.agree(self.device):
            control.should_training_stop = True
            if args.save_strategy != "no":  # a training whose checkpoints nobody reads, such as a choice of heads
                control.should_log = control.should_save = True
