"""Which checkpoint of a training can be trusted: the newest whose writing came to its end.

A process that is killed while it writes a checkpoint leaves a folder that looks like one. A mark is written into it
last; a folder without the mark is not resumed from.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerState

from ..analysis.files import write_json

MARK = "complete.json"


def newest(folder: Path) -> Path | None:
    """The complete `checkpoint-N` with the highest N, or None."""
    complete = [path for path in folder.glob("checkpoint-*") if (path / MARK).is_file()]
    steps = {int(found.group(1)): path for path in complete if (found := re.fullmatch(r"checkpoint-(\d+)", path.name))}
    return steps[max(steps)] if steps else None


def finished(checkpoint: Path) -> bool:
    """Whether a checkpoint is that of the last step."""
    state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    return state.global_step >= state.max_steps


class Mark(TrainerCallback):
    """Marks every checkpoint once it has been written."""

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            write_json(folder / MARK, {"step": state.global_step})
