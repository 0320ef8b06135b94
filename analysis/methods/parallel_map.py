"""Examples shared among processes, and finished ones kept on disk, so that a broken run goes on where it stopped.

Each example is computed by one process, alone, exactly as it would be in a run of one process; results are then
gathered in the examples' order. So the number of processes changes nothing but the time.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch

from headtune.analysis.utils.errors import CheckError, InputError
from headtune.analysis.utils.processes import world_size
from headtune.analysis.utils.progress import Progress
from headtune.analysis.utils.tensor_store import DamagedFile, load_tensors, save_tensors

from .scores import Array

ScoresOfExample = dict[str, Array]
Refusal = InputError | CheckError

PATIENCE = timedelta(days=7)  # of a process that waits for the others; the library's own is ten minutes


class ParallelMap:
    """How the examples of one job are worked through.

    Args:
        folder: where finished examples are kept until `finish`; None keeps nothing.
        key: what the results depend on (model, task, method, options, seed), JSON-able; finished examples of another
            key are not used.
        share: divide the examples among the processes of `accelerate launch`. Every process must make the same calls.
    """

    def __init__(self, folder: Path | None = None, key: dict[str, Any] | None = None, share: bool = False) -> None:
        digest = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()[:16]
        self._top = folder
        self.folder = None if folder is None else folder / digest
        self.rank, self.world = rank_and_world() if share else (0, 1)

    def map(
        self,
        n: int,
        work: Callable[[int], ScoresOfExample],
        progress: Progress,
        what: str,
    ) -> list[ScoresOfExample]:
        """`[work(0), ..., work(n - 1)]`, each computed by one process, or read where it was finished before.

        Args:
            what: names the step, for the progress line and the files.
        """
        name = what.replace(" ", "-")
        done: dict[int, ScoresOfExample] = {}
        indices = list(range(self.rank, n, self.world))
        for index in indices:
            if (row := self._read(f"{name}-{index:06d}")) is not None:
                done[index] = row
        refusal: Refusal | None = None
        try:
            for index in progress([index for index in indices if index not in done], what):
                done[index] = work(index)
                self._write(f"{name}-{index:06d}", done[index])
        except (InputError, CheckError) as error:
            refusal = error
        return [row for _, row in sorted(self._gather(list(done.items()), refusal))]

    def once(self, name: str, work: Callable[[], ScoresOfExample]) -> ScoresOfExample:
        """`work()`, computed by the first process for all, or read where it was finished before."""
        rows: list[tuple[int, ScoresOfExample]] = []
        refusal: Refusal | None = None
        if self.rank == 0:
            try:
                row = self._read(name)
                if row is None:
                    row = work()
                    self._write(name, row)
                rows.append((0, row))
            except (InputError, CheckError) as error:
                refusal = error
        return self._gather(rows, refusal)[0][1]

    def finish(self) -> None:
        """Drop what was kept, once the results are where they belong."""
        if self._top is not None and self.rank == 0:
            shutil.rmtree(self._top, ignore_errors=True)

    def _gather(
        self, results: list[tuple[int, ScoresOfExample]], refusal: Refusal | None
    ) -> list[tuple[int, ScoresOfExample]]:
        """All processes' results. What one process refuses is raised in every one: the first alone speaks to the user,
        and none may wait for a process that has gone."""
        parts: list[Any] = [(results, refusal)]
        if self.world > 1:
            import torch.distributed as distributed

            parts *= self.world
            distributed.all_gather_object(parts, (results, refusal))
        for _, of_process in parts:
            if of_process is not None:
                raise of_process
        return [pair for rows, _ in parts for pair in rows]

    def _read(self, name: str) -> ScoresOfExample | None:
        if self.folder is None or not (self.folder / f"{name}.safetensors").is_file():
            return None
        try:
            tensors = load_tensors(self.folder / f"{name}.safetensors")
        except DamagedFile:
            return None  # damaged after it was written: computed again
        return {key: tensor.numpy() for key, tensor in tensors.items()}

    def _write(self, name: str, row: ScoresOfExample) -> None:
        if self.folder is not None:
            tensors = {key: torch.from_numpy(np.array(value, order="C")) for key, value in row.items()}
            save_tensors(self.folder / f"{name}.safetensors", tensors)


def rank_and_world() -> tuple[int, int]:
    """This process's rank and the number of processes, as the launcher set them; starts the process group if needed."""
    world = world_size()
    if world == 1:
        return 0, 1
    from accelerate import PartialState

    state = PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)
    if state.num_processes != world:
        raise CheckError(f"{world} processes were launched but {state.num_processes} joined the group")
    return state.process_index, state.num_processes
