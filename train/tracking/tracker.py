"""Numbers of a run: `metrics.jsonl` is the record of truth, Weights & Biases gets the same.

Every call writes to the run's own folder first. W&B comes second and may fail at any point, at the start or in the
middle: that costs one warning, never a number and never more than a few seconds. wandb is imported when a run with it
starts.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol, Self

from headtune.analysis.utils.errors import InputError
from headtune.analysis.utils.processes import is_main
from headtune.analysis.utils.secrets import is_secret_name, redact

from .lineage import artifact_name, digests, tree_sha256
from .other_trackers import OtherTrackers
from .wandb_run import METRICS as METRICS
from .wandb_run import MODES as MODES
from .wandb_run import SECONDS, finish, first_line, requested_mode, staging, start

if TYPE_CHECKING:
    import wandb
    from transformers import TrainerCallback

log = logging.getLogger(__name__)


class Logs(Protocol):
    """What takes a trainer's numbers: a `Tracker`, or a `Stage` of one."""

    def log(self, values: Mapping[str, float], step: int | None = None) -> None: ...


class Tracker:
    """Writes a run's numbers to `metrics.jsonl` and to W&B; a context manager that notes a failed run.

    Only rank 0 writes (`RANK` unset or 0); on other ranks every method does nothing.

    Attributes:
        is_main: whether this process writes.
    """

    def __init__(
        self,
        run_dir: Path,
        name: str,
        config: Mapping[str, Any],
        project: str = "headtune",
        group: str | None = None,
        job_type: str = "train",
        tags: Sequence[str] = (),
        wandb_mode: str | None = None,
        resume_id: str | None = None,
        report_to: Sequence[str] = (),
    ) -> None:
        """Start a W&B run in `run_dir/wandb`; `run_dir/metrics.jsonl` is opened for appending by the first line.

        Args:
            config: what W&B shows as the run's configuration. Entries named like a secret are left out; the names are
                logged. Secrets in values, here and in names and tags, are struck out.
            wandb_mode: `online`, `offline` or `disabled`; `None` follows WANDB_MODE, else is `online` where W&B finds
                a key and `offline` where it does not.
            resume_id: `wandb_id` of the run that this one continues.
            report_to: trackers that get the numbers as well, see `other_trackers`.

        Raises:
            InputError: an unknown mode, or an id that is none.
        """
        if resume_id is not None and not re.fullmatch(r"[\w-]{1,128}", resume_id):
            raise InputError(f"wandb_id {resume_id!r} of the run to continue is no id; remove it from run.json")
        # All processes have a tracker; the first one alone writes.
        self.is_main = is_main()
        self._dir = run_dir
        self._file: IO[str] | None = None
        self._ended = False
        self._run: wandb.Run | None = None
        self._id: str | None = None
        self._step: int | None = None
        self._axes: set[str] = set()
        self._not_finite: set[str] = set()
        self._others: OtherTrackers | None = None
        mode = requested_mode(wandb_mode)
        if not self.is_main:
            return
        run_dir.mkdir(parents=True, exist_ok=True)
        if mode != "disabled":
            options = {"project": project, "name": name, "group": group, "job_type": job_type, "tags": list(tags)}
            options = {key: _redacted(value) for key, value in options.items()}
            self._run = start(mode, run_dir, options | {"config": without_secrets(config)}, resume_id)
            self._id = self._run.id if self._run else None
        if report_to:
            filed = {"project": project, "name": name, "group": group, "job_type": job_type}
            filed = {key: _redacted(value) for key, value in filed.items()}
            self._others = OtherTrackers(report_to, run_dir, without_secrets(config), **filed)

    @property
    def wandb_id(self) -> str | None:
        """Id of the W&B run, to continue it later; `None` where none was started."""
        return self._id

    def log(self, values: Mapping[str, float], step: int | None = None) -> None:
        """Append one line `{"step", "time" (ISO, UTC), **values}` and flush it.

        NaN and infinities become null, so that every line is JSON and a loss that was lost leaves a trace; the first
        of each key is logged as a warning.

        Raises:
            TypeError: a value that is not a number.
            ValueError: a key called step or time, which the line has already.
        """
        if not self.is_main:
            return
        line: dict[str, Any] = {"step": step, "time": datetime.now(UTC).isoformat(timespec="milliseconds")}
        numbers = {}
        for key, value in values.items():
            number = _number(value)
            if number is None:
                raise TypeError(f"metric {key!r} is {value!r}, which is not a number")
            if key in line:
                raise ValueError(f"metric {key!r} is a name that every line of {METRICS} has already; rename it")
            numbers[key] = number
            if not math.isfinite(number) and key not in self._not_finite:
                self._not_finite.add(key)
                log.warning("%s is %s at step %s; %s holds null for it", key, number, step, METRICS)
        line |= {key: number if math.isfinite(number) else None for key, number in numbers.items()}
        if self._file is None:
            self._file = (self._dir / METRICS).open("a", encoding="utf-8")
        # One write a line: a process killed between two of them leaves whole lines.
        self._file.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
        self._file.flush()
        if step is not None:
            self._step = step
        self._send(lambda run: run.log(self._stepped(numbers)))
        if self._others is not None:
            self._others.log(numbers, step)

    def image(self, key: str, path: Path) -> None:
        """Show an image file in W&B, at the last step logged."""

        def send(run: wandb.Run) -> None:
            from wandb import Image

            run.log(self._stepped({key: Image(str(path))}))

        self._send(send)

    def table(self, key: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Show a table in W&B, at the last step logged. Columns may mix types."""

        def send(run: wandb.Run) -> None:
            from wandb import Table

            table = Table(columns=list(columns), data=[list(row) for row in rows], allow_mixed_types=True)
            run.log(self._stepped({key: table}))

        self._send(send)

    def stage(self, name: str) -> Stage:
        """A part of the run that counts steps of its own; see `Stage`."""
        return Stage(self, name)

    def axis(self, key: str, over: str) -> None:
        """Let W&B draw `key` over the values of `over`, where that is not `step`."""
        if key not in self._axes:
            self._axes.add(key)
            self._send(lambda run: run.define_metric(key, step_metric=over))

    def config(self, values: Mapping[str, Any]) -> None:
        """Set keys of the W&B configuration that were not known at the start."""
        clean = without_secrets(values)
        self._send(lambda run: run.config.update(clean, allow_val_change=True))

    def uses(self, inputs: Mapping[str, Mapping[str, str]], paths: Mapping[str, Path]) -> None:
        """Say what the run is made from: digests in the configuration (see `lineage.digests`), and lineage in W&B.

        Args:
            inputs: kind -> `{"name", "sha256"}`.
            paths: kind -> file or folder; with it, an online run says `use_artifact` of that content, which is the
                same version that its maker logged. W&B has no such thing offline.
        """
        self.config(digests(inputs))

        def send(run: wandb.Run) -> None:
            if run.offline:
                return
            for kind, entry in inputs.items():
                if kind in paths:
                    artifact = _artifact(paths[kind], entry["name"], kind, entry["sha256"])
                    # W&B waits here for the server's answer without an end; what it was told is sent all the same.
                    thread = threading.Thread(target=_quietly, args=(run.use_artifact, artifact), daemon=True)
                    thread.start()
                    thread.join(SECONDS)

        self._send(send)

    def artifact(self, path: Path, name: str, type: str, copy: bool = False) -> str:
        """Hand a file or folder to W&B by reference; it must be final, and stay until it is synced.

        Its digest goes to the summary as `outputs/<type>/sha256`. What W&B does not take in a name becomes `_`.

        Args:
            copy: keep a copy with the W&B run, for small files that may be moved.

        Returns:
            The SHA-256 of the file, or of the folder's `<sha256>  <relative path>` lines in order of path; empty where
            this process does not write.

        Raises:
            InputError: nothing at `path`, or a link in it that leads out of it.
        """
        if not self.is_main:
            return ""
        digest = tree_sha256(path)

        def send(run: wandb.Run) -> None:
            run.log_artifact(_artifact(path, artifact_name(name), type, digest, copy))
            run.summary[f"outputs/{type}/sha256"] = digest

        self._send(send)
        return digest

    def summary(self, values: Mapping[str, Any]) -> None:
        """Set values of the W&B summary. They are the run's results, which its own files hold already."""
        self._send(lambda run: run.summary.update(dict(values)))

    def finish(self, failed: bool = False) -> None:
        """Close the file and end the W&B run; further calls do nothing. Waits a few seconds for an upload at most."""
        if not self.is_main or self._ended:
            return
        self._ended = True
        if self._others is not None:
            self._others.finish()
        if self._file is not None:
            self._file.close()
        if self._run is None:
            return
        run, folder = self._run, Path(self._run.settings.sync_dir)
        try:
            finish(run, int(failed))
        except TimeoutError:
            log.warning("W&B did not take everything in time; nothing is lost: wandb sync %s", folder)
        except Exception as error:
            log.warning("W&B run did not end well (%s); what it has is in %s", first_line(error), folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        self.finish(failed=error_type is not None)

    def _stepped(self, values: Mapping[str, Any]) -> dict[str, Any]:
        # Not W&B's own step, which drops whatever comes with a lower one, as a resumed run's first lines do.
        return dict(values) if self._step is None else {**values, "step": self._step}

    def _send(self, what: Callable[[wandb.Run], Any]) -> None:
        if self._run is None:
            return
        try:
            with staging(self._dir / "wandb"):
                what(self._run)
        except Exception as error:
            log.warning("W&B failed (%s); going on with %s alone", first_line(error), self._dir / METRICS)
            run, self._run = self._run, None
            with contextlib.suppress(Exception):
                run.finish(exit_code=1)


class Stage:
    """A part of a run with steps of its own, such as LoFiT's first: `train/x` becomes `<name>/x` over `<name>/step`."""

    def __init__(self, tracker: Tracker, name: str) -> None:
        self._tracker, self._name = tracker, name
        tracker.axis(f"{name}/step", f"{name}/step")

    def log(self, values: Mapping[str, float], step: int | None = None) -> None:
        """As `Tracker.log`; the line's own step is null, for it counts the training proper."""
        numbers = {f"{self._name}/{key.removeprefix('train/')}": value for key, value in values.items()}
        for key in numbers:
            self._tracker.axis(key, f"{self._name}/step")
        self._tracker.log(numbers | ({} if step is None else {f"{self._name}/step": step}))


def trainer_callback(tracker: Logs, done: int = 0) -> TrainerCallback:
    """A callback for transformers' Trainer that hands every number it logs to `tracker`.

    Keys become `train/loss`, `eval/loss` (from `eval_loss`); a key that has a slash stays as it is.

    Args:
        done: steps of earlier trainings in the same run; the trainer's own are counted on from there.
    """
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

    class TrackerCallback(TrainerCallback):
        def on_log(
            self,
            args: TrainingArguments,
            state: TrainerState,
            control: TrainerControl,
            logs: dict[str, Any] | None = None,
            **_: Any,
        ) -> None:
            numbers = {_prefixed(key): value for key, value in (logs or {}).items() if _number(value) is not None}
            if numbers:
                tracker.log(numbers, done + state.global_step)

    return TrackerCallback()


def without_secrets(config: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `config` that JSON can hold: no entries named like a secret at any depth, no secrets seen in values."""
    dropped: list[str] = []

    def clean(value: Any, prefix: str) -> Any:
        if isinstance(value, Mapping):
            result = {}
            for key, entry in value.items():
                if is_secret_name(str(key)):
                    dropped.append(f"{prefix}{key}")
                else:
                    result[redact(str(key))] = clean(entry, f"{prefix}{key}.")
            return result
        if isinstance(value, list | tuple | set | frozenset):
            return [clean(entry, prefix) for entry in value]
        return value if value is None or isinstance(value, bool | int | float) else redact(str(value))

    result: dict[str, Any] = clean(config, "")
    if dropped:
        log.info("not sent to W&B, because of their names: %s", ", ".join(dropped))
    return result


# --- values -----------------------------------------------------------------------------------------------------------


def _number(value: Any) -> int | float | None:
    """A Python number, also from a scalar of torch or numpy; `None` for anything else."""
    if hasattr(value, "item"):
        try:
            value = value.item()
        except (ValueError, RuntimeError):  # an array of several
            return None
    if isinstance(value, bool):
        return int(value)
    return value if isinstance(value, int | float) else None


def _prefixed(key: str) -> str:
    if "/" in key:
        return key
    for split in ("eval", "test"):
        if key.startswith(f"{split}_"):
            return f"{split}/{key.removeprefix(f'{split}_')}"
    return f"train/{key}"


def _redacted(value: Any) -> Any:
    if isinstance(value, list):
        return [redact(entry) for entry in value]
    return redact(value) if isinstance(value, str) else value


def _artifact(path: Path, name: str, type: str, digest: str, copy: bool = False) -> wandb.Artifact:
    from wandb import Artifact

    artifact = Artifact(name, type, metadata={"sha256": digest})
    # Else every file is copied to a staging folder, a second checkpoint's worth of disk.
    policy: Any = "mutable" if copy else "immutable"
    if path.is_dir():
        artifact.add_dir(str(path), policy=policy)
    else:
        artifact.add_file(str(path), policy=policy)
    return artifact


def _quietly(what: Callable[[Any], Any], value: Any) -> None:
    try:
        what(value)
    except Exception as error:
        log.warning("W&B does not note where the run comes from (%s); its configuration does", first_line(error))
