"""What everything that works on one run is given."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from headtune.analysis.models.head_model import HeadModel
from headtune.analysis.utils.progress import Notify, Progress, silent
from headtune.train.config.schema import Recipe
from headtune.train.tracking.tracker import Tracker

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunContext:
    """One run: its recipe and model, and whom to tell how it goes.

    Attributes:
        progress: wraps lists of examples that take long.
        notify: told what happens, a line at a time.
        resume: go on from what a broken run left.
    """

    recipe: Recipe
    model: HeadModel
    tracker: Tracker
    progress: Progress = silent
    notify: Notify = log.info
    resume: bool = False

    @property
    def folder(self) -> Path:
        return self.recipe.folder

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that measures and writes."""
        return self.tracker.is_main
