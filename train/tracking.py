"""Numbers of a run: `metrics.jsonl` is the record of truth, Weights & Biases gets the same.

Every call writes to the run's own folder first. W&B comes second and may fail at any point, at the start or in the
middle: that costs one warning, never a number and never more than a few seconds. wandb is imported when a run with it
starts.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import re
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from ..analysis.errors import InputError
from ..analysis.files import sha256_of
from ..analysis.inside import require_no_way_out
from ..analysis.redaction import is_secret_name, redact

if TYPE_CHECKING:
    import wandb
    from transformers import TrainerCallback

log = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
MODES = ("offline", "online", "disabled")
SECONDS = 5.0  # that W&B may take to start and to finish; WANDB_INIT_TIMEOUT and WANDB_FINISH_TIMEOUT change it


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
    ) -> None:
        """Open `run_dir/metrics.jsonl` for appending and start a W&B run in `run_dir/wandb`.

        Args:
            config: what W&B shows as the run's configuration. Entries named like a secret are left out; the names are
                logged. Secrets in values, here and in names and tags, are struck out.
            wandb_mode: `online`, `offline` or `disabled`; `None` follows WANDB_MODE, else is `online` where W&B finds
                a key and `offline` where it does not.
            resume_id: `wandb_id` of the run that this one continues.

        Raises:
            InputError: an unknown mode, or an id that is none.
        """
        if resume_id is not None and not re.fullmatch(r"[\w-]{1,128}", resume_id):
            raise InputError(f"wandb_id {resume_id!r} of the run to continue is no id; remove it from run.json")
        self.is_main = os.environ.get("RANK", "0") == "0"
        self._dir = run_dir
        self._run: wandb.Run | None = None
        self._id: str | None = None
        self._step: int | None = None
        self._not_finite: set[str] = set()
        mode = _requested_mode(wandb_mode)
        if not self.is_main:
            return
        run_dir.mkdir(parents=True, exist_ok=True)
        self._file = (run_dir / METRICS).open("a", encoding="utf-8")
        if mode != "disabled":
            options = {"project": project, "name": name, "group": group, "job_type": job_type, "tags": list(tags)}
            options = {key: _redacted(value) for key, value in options.items()}
            self._run = _start(mode, run_dir, options | {"config": without_secrets(config)}, resume_id)
            self._id = self._run.id if self._run else None

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
        # One write a line: a process killed between two of them leaves whole lines.
        self._file.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
        self._file.flush()
        if step is not None:
            self._step = step
        self._send(lambda run: run.log(self._stepped(numbers)))

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

    def artifact(self, path: Path, name: str, type: str) -> str:
        """Hand a file or folder to W&B by reference; it must be final, and stay until it is synced.

        Its digest goes to the summary as `artifact/<name>/sha256`. What W&B does not take in a name becomes `_`.

        Returns:
            The SHA-256 of the file, or of the folder's `<sha256>  <relative path>` lines in order of path; empty where
            this process does not write.

        Raises:
            InputError: nothing at `path`, or a link in it that leads out of it.
        """
        if not self.is_main:
            return ""
        digest = tree_sha256(path)
        name = re.sub(r"[^a-zA-Z0-9_.-]", "_", name)[:128]

        def send(run: wandb.Run) -> None:
            from wandb import Artifact

            artifact = Artifact(name, type, metadata={"sha256": digest})
            # The default would copy every file to a staging folder, a second checkpoint's worth of disk.
            if path.is_dir():
                artifact.add_dir(str(path), policy="immutable")
            else:
                artifact.add_file(str(path), policy="immutable")
            run.log_artifact(artifact)
            run.summary[f"artifact/{name}/sha256"] = digest

        self._send(send)
        return digest

    def summary(self, values: Mapping[str, Any]) -> None:
        """Set values of the W&B summary. They are the run's results, which its own files hold already."""
        self._send(lambda run: run.summary.update(dict(values)))

    def finish(self, failed: bool = False) -> None:
        """Close the file and end the W&B run; further calls do nothing. Waits a few seconds for an upload at most."""
        if not self.is_main or self._file.closed:
            return
        self._file.close()
        if self._run is None:
            return
        run, folder = self._run, Path(self._run.settings.sync_dir)
        try:
            run.finish(exit_code=int(failed))
        except TimeoutError:
            log.warning("W&B did not take everything in time; nothing is lost: wandb sync %s", folder)
        except Exception as error:
            log.warning("W&B run did not end well (%s); what it has is in %s", _first_line(error), folder)

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
            with _staging(self._dir / "wandb"):
                what(self._run)
        except Exception as error:
            log.warning("W&B failed (%s); going on with %s alone", _first_line(error), self._dir / METRICS)
            run, self._run = self._run, None
            with contextlib.suppress(Exception):
                run.finish(exit_code=1)


def trainer_callback(tracker: Tracker, done: int = 0) -> TrainerCallback:
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

    def clean(value: Any, where: str) -> Any:
        if isinstance(value, Mapping):
            kept = {}
            for key, entry in value.items():
                if is_secret_name(str(key)):
                    dropped.append(f"{where}{key}")
                else:
                    kept[redact(str(key))] = clean(entry, f"{where}{key}.")
            return kept
        if isinstance(value, list | tuple | set | frozenset):
            return [clean(entry, where) for entry in value]
        return value if value is None or isinstance(value, bool | int | float) else redact(str(value))

    result: dict[str, Any] = clean(config, "")
    if dropped:
        log.info("not sent to W&B, because of their names: %s", ", ".join(dropped))
    return result


def tree_sha256(path: Path) -> str:
    """SHA-256 of a file, or of a folder's `<sha256>  <relative path>` lines in order of path.

    Raises:
        InputError: nothing at `path`, or a link in it that leads out of it.
    """
    if path.is_file():
        return sha256_of(path)
    if not path.is_dir():
        raise InputError(f"artifact {str(path)!r} does not exist; name a file or a folder")
    require_no_way_out(path, "artifact")
    files = sorted((file.relative_to(path).as_posix(), file) for file in path.rglob("*") if file.is_file())
    lines = "".join(f"{sha256_of(file)}  {name}\n" for name, file in files)
    return hashlib.sha256(lines.encode()).hexdigest()


# --- starting W&B -----------------------------------------------------------------------------------------------------


def _requested_mode(argument: str | None) -> str | None:
    for value, source in ((argument, "tracking.wandb"), (os.environ.get("WANDB_MODE"), "WANDB_MODE")):
        if not value:
            continue
        # W&B's own older names
        mode = {"dryrun": "offline", "run": "online"}.get(value, value)
        if mode not in MODES:
            raise InputError(f"{source} is {value!r}; choose one of {', '.join(MODES)}")
        return mode
    return None


def _start(mode: str | None, run_dir: Path, options: dict[str, Any], resume_id: str | None) -> wandb.Run | None:
    """Start a run: online if asked for or possible, else offline, else none, with a warning for each step down."""
    # Else W&B reports its own errors to its makers, also from offline runs.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    try:
        import wandb

        _silence()
    except Exception as error:
        log.warning("W&B cannot be used (%s); %s alone is written", _first_line(error), METRICS)
        return None
    attempts: tuple[Literal["online", "offline"], ...]
    attempts = ("offline",) if (mode or _mode_by_key()) == "offline" else ("online", "offline")
    for attempt in attempts:
        # A new id for each attempt: W&B's service may still hold that of one that did not start.
        options |= {"id": resume_id or secrets.token_hex(4), "resume": "allow" if resume_id else None}
        try:
            run = wandb.init(**options, settings=_settings(attempt, run_dir))
            run.define_metric("step", hidden=True)
            run.define_metric("*", step_metric="step")
            return run
        except Exception as error:
            then = "going on offline" if attempt != attempts[-1] else f"{METRICS} alone is written"
            log.warning("W&B does not start %s (%s); %s", attempt, _first_line(error), then)
            # W&B's service keeps the id of a run that did not start as taken, until it is started anew; that would end
            # a run that the user's own program has open.
            with contextlib.suppress(Exception):
                if wandb.run is None:
                    wandb.teardown()
                    _silence()
    return None


def _silence() -> None:
    import wandb

    # What comes before a run (finding a key) is otherwise printed, whatever the run's own settings say.
    wandb.setup(wandb.Settings(silent=True))


def _mode_by_key() -> str:
    import wandb

    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return "online"
    try:
        return "online" if wandb.login(prompt=False, verify=False) else "offline"
    except Exception as error:
        log.warning("W&B finds a key that it cannot use (%s); going on offline", _first_line(error))
        return "offline"


def _settings(mode: Literal["online", "offline"], run_dir: Path) -> wandb.Settings:
    """Quiet, bounded in time, and nothing about the machine, the code or the environment."""
    import wandb

    seconds = {what: float(os.environ.get(f"WANDB_{what}_TIMEOUT", SECONDS)) for what in ("INIT", "FINISH")}
    return wandb.Settings(
        mode=mode,
        root_dir=str(run_dir),
        use_dot_wandb=False,
        silent=True,
        console="off",
        # A run that the user's own program has open stays theirs.
        reinit="create_new",
        init_timeout=seconds["INIT"],
        finish_timeout=seconds["FINISH"],
        finish_timeout_raises=True,
        host="",
        save_code=False,
        disable_code=True,
        disable_git=True,
        disable_job_creation=True,
        x_disable_machine_info=True,
        x_disable_meta=True,
        x_disable_stats=True,
        x_save_requirements=False,
    )


@contextlib.contextmanager
def _staging(folder: Path) -> Iterator[None]:
    """Let tables wait for their upload in `folder`, not in the user's home. W&B asks only the environment."""
    if "WANDB_DATA_DIR" in os.environ:
        yield
        return
    os.environ["WANDB_DATA_DIR"] = str(folder)
    try:
        yield
    finally:
        del os.environ["WANDB_DATA_DIR"]


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


def _first_line(error: Exception) -> str:
    return redact((str(error).strip() or type(error).__name__).splitlines()[0])
