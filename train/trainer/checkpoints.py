"""Which checkpoint of a training can be trusted: the newest that is whole, to the byte.

A process that is killed while it writes a checkpoint leaves a folder that looks like one, and a disk may give back
other bytes than it was given. So `complete.json` is written into a checkpoint last, once every process has written its
part, and lists what is in it:

    {"step": 50, "files": {"adapter_model.safetensors": {"bytes": 12345, "sha256": "..."}, ...}}

A checkpoint without it, or whose files do not match it, is passed over for an older one. Only then is a checkpoint
opened; what transformers keeps in torch's own format it loads with `weights_only=True`.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from accelerate import PartialState
from torch import distributed
from transformers import TrainerCallback, TrainerState

from headtune.analysis.utils.errors import InputError
from headtune.analysis.utils.files import sha256_of, share_weights, write_json
from headtune.analysis.utils.paths import check_links_stay_inside, safe_join
from headtune.analysis.utils.progress import Notify
from headtune.train.tuners.weights_io import remove_card

MARK = "complete.json"


def newest(folder: Path, notify: Notify) -> Path | None:
    """The whole `checkpoint-N` with the highest N, or None; rank 0 looks, and all ranks get what it found.

    Args:
        notify: told which it is, and of each newer one that is passed over, with the reason.
    """
    result: list[Path | None] = [None]
    alone = not (distributed.is_available() and distributed.is_initialized())
    if alone or distributed.get_rank() == 0:
        result = [_newest(folder, notify)]
    if not alone:
        distributed.broadcast_object_list(result)
    if result[0] is not None:
        notify(f"going on from {result[0]}")
    return result[0]


def _newest(folder: Path, notify: Notify) -> Path | None:
    steps = by_step(folder)
    for step in sorted(steps, reverse=True):
        reason = damage(steps[step], notify)
        if reason is None:
            return steps[step]
        notify(f"{steps[step]} is passed over: {reason}")
    return None


def by_step(folder: Path) -> dict[int, Path]:
    """The folders called `checkpoint-N`, whole or not, by N."""
    named = ((re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in folder.glob("checkpoint-*"))
    return {int(match.group(1)): path for match, path in named if match and path.is_dir()}


def damage(checkpoint: Path, notify: Notify) -> str | None:
    """Why a checkpoint cannot be trusted, or None; `notify` is told of one that nothing can be said about."""
    mark = checkpoint / MARK
    if not mark.is_file():
        return f"its writing did not come to its end (no {MARK})"
    try:
        content = json.loads(mark.read_text(encoding="utf-8"))
        files = content.get("files")
        if files is None:
            notify(f"{checkpoint} was written by an earlier version, without check sums; it is not verified")
            return None
        check_links_stay_inside(checkpoint, "checkpoint")
        for name, expected in files.items():
            if (
                reason := _difference(safe_join(checkpoint, name, MARK), expected["bytes"], expected["sha256"])
            ) is not None:
                return f"{name} {reason}"
    except InputError as error:
        return str(error)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MARK} is damaged ({type(error).__name__})"
    return None


def _difference(path: Path, size: int, sha256: str) -> str | None:
    try:
        if path.stat().st_size != size:
            return f"has {path.stat().st_size} bytes, not {size}"
        return None if sha256_of(path) == sha256 else "has other bytes than were written (SHA-256)"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def mark(checkpoint: Path, step: int) -> None:
    """Bring every file of a checkpoint to the disk, and write down what it holds."""
    files = {}
    for path in sorted(checkpoint.rglob("*")):
        if path.is_file() and path.name != MARK:
            with path.open("rb") as file:
                os.fsync(file.fileno())
            files[path.relative_to(checkpoint).as_posix()] = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
    write_json(checkpoint / MARK, {"step": step, "files": files})


def finished(checkpoint: Path) -> bool:
    """Whether a checkpoint is that of the last step."""
    state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    return state.global_step >= state.max_steps


class Mark(TrainerCallback):
    """Marks every checkpoint once all processes have written their parts, and only then removes older ones.

    Args:
        arguments: the trainer's. Their `save_total_limit` is taken over: transformers would remove older checkpoints
            while the new one is not marked yet, and one that was passed over would count for as much as a whole one.
    """

    def __init__(self, arguments: Any) -> None:
        self.limit: int | None = arguments.save_total_limit
        arguments.save_total_limit = None

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if control.should_save:
            control.should_log = True  # a loss that is no number ends the training before it is kept

    on_epoch_end = on_step_end

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        PartialState().wait_for_everyone()
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            remove_card(folder)
            share_weights(folder)
            mark(folder, state.global_step)
            self._remove_older(folder.parent, state)

    def _remove_older(self, folder: Path, state: Any) -> None:
        if not self.limit or self.limit < 0:
            return
        older = {step: path for step, path in by_step(folder).items() if step < state.global_step}
        complete: set[Path] = set()
        for step in sorted(older, reverse=True):  # of the newest ones that are whole
            marked = (older[step] / MARK).is_file()
            if len(complete) < self.limit - 1 and marked and damage(older[step], lambda _line: None) is None:
                complete.add(older[step])
        if state.best_model_checkpoint:
            complete.add(Path(state.best_model_checkpoint))
        for path in older.values():
            if path not in complete:
                (path / MARK).unlink(missing_ok=True)  # first: what is half removed is not resumed from
                shutil.rmtree(path, ignore_errors=True)
