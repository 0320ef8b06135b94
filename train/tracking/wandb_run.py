"""A W&B run that starts within seconds or not at all, asks nothing and says nothing of the machine.

What is logged to it is `tracking`'s matter. wandb is imported when a run is started.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from headtune.analysis.utils.errors import InputError
from headtune.analysis.utils.secrets import redact

from .wandb_offline import has_end

if TYPE_CHECKING:
    import wandb

log = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
MODES = ("offline", "online", "disabled")
# What W&B may take to start and to finish; WANDB_INIT_TIMEOUT and WANDB_FINISH_TIMEOUT change both. Offline there is
# nobody to wait for but a busy machine.
SECONDS = 5.0
OFFLINE_SECONDS = 60.0
AXES = ("train/epoch", "train/num_tokens")  # what a trainer counts besides its steps


def requested_mode(argument: str | None) -> str | None:
    """The mode that was asked for: by `tracking.wandb`, by WANDB_DISABLED as transformers reads it, by WANDB_MODE."""
    switched_off = os.environ.get("WANDB_DISABLED", "").lower() in ("1", "true", "yes", "on")
    for value, source in (
        (argument, "tracking.wandb"),
        ("disabled" if switched_off else None, "WANDB_DISABLED"),
        (os.environ.get("WANDB_MODE"), "WANDB_MODE"),
    ):
        if not value:
            continue
        # W&B's own older names
        mode = {"dryrun": "offline", "run": "online"}.get(value, value)
        if mode not in MODES:
            raise InputError(f"{source} is {value!r}; choose one of {', '.join(MODES)}")
        return mode
    return None


def start(mode: str | None, run_dir: Path, options: dict[str, Any], resume_id: str | None) -> wandb.Run | None:
    """Start a run: online if asked for or possible, else offline, else none, with a warning for each step down."""
    # Else W&B reports its own errors to its makers, also from offline runs.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    try:
        import wandb

        silence()
    except Exception as error:
        log.warning("W&B cannot be used (%s); %s alone is written", first_line(error), METRICS)
        return None
    attempts: tuple[Literal["online", "offline"], ...]
    attempts = ("offline",) if (mode or mode_by_key()) == "offline" else ("online", "offline")
    for attempt in attempts:
        # A new id for each attempt: W&B's service may still hold that of one that did not start.
        options |= {"id": resume_id or secrets.token_hex(4), "resume": "allow" if resume_id else None}
        try:
            run = wandb.init(**options, settings=settings(attempt, run_dir))
            run.define_metric("step", hidden=True)
            for axis in AXES:
                run.define_metric(axis, step_metric="step")
            run.define_metric("*", step_metric="step")
            return run
        except Exception as error:
            then = "going on offline" if attempt != attempts[-1] else f"{METRICS} alone is written"
            log.warning("W&B does not start %s (%s); %s", attempt, first_line(error), then)
            # W&B's service keeps the id of a run that did not start as taken, until it is started anew; that would end
            # a run that the user's own program has open.
            with contextlib.suppress(Exception):
                if wandb.run is None:
                    wandb.teardown()
                    silence()
    return None


def finish(run: wandb.Run, exit_code: int) -> None:
    """End a run. Offline W&B says that it is done while its service still writes: wait until the file has its end.

    Raises:
        TimeoutError: online, W&B's own, after `finish_timeout` seconds.
        OSError: offline, the file has no end after as long.
    """
    run.finish(exit_code=exit_code)
    if not run.offline:
        return
    file, until = Path(run.settings.sync_file), time.monotonic() + run.settings.finish_timeout
    while not has_end(file):
        if time.monotonic() > until:
            raise OSError(f"{file.name} has no end after {run.settings.finish_timeout:g} seconds")
        time.sleep(0.05)


def silence() -> None:
    import wandb

    # What comes before a run (finding a key) is otherwise printed, whatever the run's own settings say.
    wandb.setup(wandb.Settings(silent=True))


def mode_by_key() -> str:
    import wandb

    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return "online"
    try:
        return "online" if wandb.login(prompt=False, verify=False) else "offline"
    except Exception as error:
        log.warning("W&B finds a key that it cannot use (%s); going on offline", first_line(error))
        return "offline"


def settings(mode: Literal["online", "offline"], run_dir: Path) -> wandb.Settings:
    """Quiet, bounded in time, and nothing about the machine, the code or the environment."""
    import wandb

    allowed = OFFLINE_SECONDS if mode == "offline" else SECONDS
    seconds = {what: float(os.environ.get(f"WANDB_{what}_TIMEOUT", allowed)) for what in ("INIT", "FINISH")}
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
def staging(folder: Path) -> Iterator[None]:
    """Let tables wait for their upload in `folder`, not in the user's home. W&B asks only the environment."""
    if "WANDB_DATA_DIR" in os.environ:
        yield
        return
    os.environ["WANDB_DATA_DIR"] = str(folder)
    try:
        yield
    finally:
        del os.environ["WANDB_DATA_DIR"]


def first_line(error: Exception) -> str:
    return redact((str(error).strip() or type(error).__name__).splitlines()[0])
