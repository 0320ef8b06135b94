"""The W&B runs that lie under a folder, read from their own files: what `headtune track sync` lists and uploads.

A run without a network is a folder `wandb/offline-run-<time>-<id>` with one file `run-<id>.wandb`: a header of 7 bytes
and records in blocks of 32 KiB, as in LevelDB's log, each a protobuf message of W&B's. `wandb sync` leaves
`run-<id>.wandb.synced` beside it. wandb is imported when such a file is read.

The file is read here, since W&B's own commands tell less or take longer (0.31): `wandb sync --dry-run` lists names
alone, `wandb leet inspect` starts a program that takes seconds a file, and whether a file has its end is asked after
every run.
"""

from __future__ import annotations

import json
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from headtune.analysis.utils.secrets import redact

_BLOCK, _HEADER, _START = 32768, 7, b":W&B"
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4
LIVE = 120  # seconds: a run without an end whose file is younger is taken for one that still goes on


@dataclass(frozen=True)
class OfflineRun:
    """An offline run, or a part of one that was resumed.

    Attributes:
        folder: `.../wandb/offline-run-<time>-<id>`.
        group, job_type, project, entity: empty where there is none.
        steps: the highest `step` logged; 0 where none was.
        upload_bytes: what a sync has to send: the record, its media, and the files of its artifacts.
        missing: files of its artifacts that are not there any more.
        state: `synced`, `ready`, `going on` (not ended, and written to lately) or `unreadable`.
    """

    folder: Path
    id: str
    name: str = ""
    project: str = ""
    entity: str = ""
    group: str = ""
    job_type: str = ""
    steps: int = 0
    upload_bytes: int = 0
    missing: tuple[str, ...] = ()
    state: str = "ready"


def offline_runs(folder: Path) -> list[OfflineRun]:
    """Every offline run under a folder, in order of their start; links are not followed."""
    # In order of their start, a second being W&B's unit; the id at the end of the name is random.
    files = sorted(
        folder.rglob("offline-run-*/run-*.wandb"), key=lambda file: (file.parent.name.rsplit("-", 1)[0], str(file))
    )
    return [read(file) for file in files]


def read(file: Path) -> OfflineRun:
    """What an offline run's file says of it. One that was cut off in the middle is read up to there."""
    folder, run_fields, steps, ended = file.parent, {}, 0, False
    size = sum(path.stat().st_size for path in (folder / "files").rglob("*") if path.is_file()) + file.stat().st_size
    missing: list[str] = []
    for record in records(file):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            run = record.run
            run_fields = {"name": run.display_name, "project": run.project, "entity": run.entity}
            run_fields |= {"group": run.run_group, "job_type": run.job_type, "id": run.run_id}
        elif kind == "history":
            steps = max([steps, *(int(step) for step in _steps(record.history))])
        elif kind == "artifact":
            for entry in record.artifact.manifest.contents:
                path = Path(entry.local_path)
                if entry.local_path and path.is_file():
                    size += path.stat().st_size
                elif entry.local_path:
                    missing.append(entry.local_path)
        ended = ended or kind == "exit"
    state = "ready"
    if file.with_suffix(".wandb.synced").exists():
        state = "synced"
    elif not run_fields:
        state = "unreadable"
    elif not ended and time.time() - file.stat().st_mtime < LIVE:
        state = "going on"
    fields = {"id": file.stem.removeprefix("run-")} | run_fields
    return OfflineRun(folder, steps=steps, upload_bytes=size, missing=tuple(missing), state=state, **fields)


def has_end(file: Path) -> bool:
    """Whether an offline run's file has been written to its end."""
    return file.is_file() and any(record.WhichOneof("record_type") == "exit" for record in records(file))


def _steps(history: Any) -> Iterator[float]:
    for item in history.item:
        if (item.key or "/".join(item.nested_key)) == "step":
            value = json.loads(item.value_json)
            if isinstance(value, int | float):
                yield value


def records(file: Path) -> Iterator[Any]:
    """W&B's records of a `.wandb` file, in order; ends where the file is cut off, damaged or of another kind."""
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    from wandb.proto import wandb_internal_pb2

    new: Any = wandb_internal_pb2.Record  # type: ignore[attr-defined]

    for data in _messages(file.read_bytes()):
        record = new()
        try:
            record.ParseFromString(data)
        except DecodeError:
            return
        yield record


def _messages(data: bytes) -> Iterator[bytes]:
    if not data.startswith(_START):
        return
    at, parts = _HEADER, b""
    while at + _HEADER <= len(data):
        left = _BLOCK - at % _BLOCK
        if left < _HEADER:  # padding
            at += left
            continue
        checksum, length, kind = struct.unpack_from("<IHB", data, at)
        part = data[at + _HEADER : at + _HEADER + length]
        if kind not in (_FULL, _FIRST, _MIDDLE, _LAST) or len(part) < length:
            return
        if zlib.crc32(bytes([kind]) + part) != checksum:
            return
        at += _HEADER + length
        parts = part if kind in (_FULL, _FIRST) else parts + part
        if kind in (_FULL, _LAST):
            yield parts


def batches(runs: Sequence[OfflineRun]) -> list[list[OfflineRun]]:
    """The runs to be synced; the parts of one that was resumed stay together, in order of their start."""
    ready = [run for run in runs if run.state == "ready"]
    order = {run.id: index for index, run in reversed(list(enumerate(ready)))}
    together = sorted(ready, key=lambda run: order[run.id])  # stable: the parts keep their order
    return [list(parts) for _, parts in groupby(together, key=lambda run: run.id)]


def sync(parts: Sequence[OfflineRun]) -> str:
    """Upload one run, with its parts, by `wandb sync`.

    Returns:
        What went wrong, in a line; empty where W&B has marked all parts as synced.
    """
    command = [sys.executable, "-m", "wandb", "sync", *(str(part.folder) for part in parts)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=parts[0].folder)
    if done.returncode == 0 and all(read_state(part) for part in parts):
        return ""
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    return redact(lines[-1].strip()) if lines else f"wandb sync ended with exit code {done.returncode}"


def read_state(part: OfflineRun) -> bool:
    """Whether W&B has marked a part as synced."""
    return any(part.folder.glob("run-*.wandb.synced"))
