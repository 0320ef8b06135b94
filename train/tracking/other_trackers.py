"""TensorBoard, trackio and MLflow beside W&B, through accelerate's own trackers: the same numbers, nothing else.

They get what `metrics.jsonl` gets, and the configuration flattened to `a.b: value` without what is named like a secret.
Like W&B they may fail at any point: that costs one warning, never a number.

    tensorboard   event files in the run's folder, `tensorboard/`
    trackio       trackio's own local store, a project as W&B's; its dashboard: trackio show
    mlflow        MLFLOW_TRACKING_URI, else MLflow's local store; an experiment as W&B's project
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from headtune.analysis.utils.errors import InputError

from .wandb_run import first_line

log = logging.getLogger(__name__)


def require_installed(names: Iterable[str]) -> None:
    """Refuse trackers whose package is missing, before a run begins (InputError)."""
    for name in names:
        if not _installed(name):
            raise InputError(
                f"tracking.report_to names {name}, whose package is not installed; pip install {name}, or leave it out"
            )


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


class OtherTrackers:
    """The trackers of a run that are not W&B's."""

    def __init__(self, names: Sequence[str], run_dir: Path, config: Mapping[str, Any], **filed: Any) -> None:
        """Start them; one that does not start is a warning.

        Args:
            config: without secrets.
            filed: project, name, group and job_type, as W&B takes them.
        """
        self._running: dict[str, Any] = {}
        for name in names:
            self._attempt(name, functools.partial(self._start, name, run_dir, config, filed))

    def log(self, values: Mapping[str, float], step: int | None) -> None:
        """Hand on the finite numbers."""
        finite = {key: value for key, value in values.items() if math.isfinite(value)}
        for name in list(self._running):
            self._attempt(name, functools.partial(self._running[name].log, finite, step=step))

    def finish(self) -> None:
        for name in list(self._running):
            self._attempt(name, self._running.pop(name).finish)

    def _start(self, name: str, run_dir: Path, config: Mapping[str, Any], filed: Mapping[str, Any]) -> None:
        from accelerate import PartialState
        from accelerate.tracking import MLflowTracker, TensorBoardTracker, TrackioTracker

        PartialState()  # which they ask for the main process
        tracker: Any
        if name == "tensorboard":
            tracker = TensorBoardTracker("tensorboard", run_dir)
        elif name == "trackio":
            tracker = TrackioTracker(filed["project"], name=filed["name"], group=filed["group"])
        else:
            tags = {key: str(filed[key]) for key in ("group", "job_type") if filed[key]}
            tracker = MLflowTracker(filed["project"], run_name=filed["name"], tags=tags)
        tracker.start()
        self._running[name] = tracker
        tracker.store_init_configuration(flat(config))

    def _attempt(self, name: str, action: Callable[[], Any]) -> None:
        try:
            action()
        except Exception as error:
            log.warning("%s failed (%s); going on without it", name, first_line(error))
            self._running.pop(name, None)


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, bool | int | float | str]:
    """Nested blocks as `a.b`; lists and None as text, for none of the three takes them."""
    result: dict[str, bool | int | float | str] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            result |= flat(value, f"{prefix}{key}.")
        else:
            result[f"{prefix}{key}"] = value if isinstance(value, bool | int | float | str) else str(value)
    return result
