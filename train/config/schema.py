"""The whole recipe, typed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field

from .methods import (
    EvaluationConfig,
    HeadsConfig,
    ModelConfig,
    SeekrConfig,
    SteerMethod,
    StrictConfig,
    TaskConfig,
    TrackingConfig,
    TrainedMethod,
)

# Which strategies of recipe seekr read a key. A recipe may hold others, so that one file serves all strategies; the
# resolved recipe of a run holds what it read.
_READ_BY = {
    "distil": ("seekr", "der", "lwf"),
    "replay": ("seekr", "replay", "der"),
    "der_weight": ("der",),
    "ewc_weight": ("ewc",),
    "ewc_rows": ("ewc",),
    "lwf_weight": ("lwf",),
}


_CHOOSING = ("choice", "heads", "layers", "selection")  # of method.distil, where the recipe names no heads


def _unread(method: SeekrConfig) -> list[str]:
    return sorted(key for key, strategies in _READ_BY.items() if method.strategy not in strategies)


class Recipe(StrictConfig):
    """A whole recipe. `method` is the block of the family named by `recipe`."""

    recipe: Literal["lofit", "jola", "masked", "steer", "lora", "full", "ln", "regularise", "seekr"]
    model: ModelConfig = ModelConfig()
    heads: HeadsConfig | None = None
    task: TaskConfig = TaskConfig()
    method: TrainedMethod | SteerMethod | SeekrConfig
    training: dict[str, Any] = Field(default_factory=dict)
    evaluation: EvaluationConfig = EvaluationConfig()
    tracking: TrackingConfig = TrackingConfig()
    name: str = ""
    output_dir: str = ""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0  # what numpy takes

    @property
    def folder(self) -> Path:
        return Path(self.output_dir)

    def dump(self) -> dict[str, Any]:
        """As written to the run: every default spelt out."""
        data = self.model_dump(mode="json", by_alias=True, exclude_none=True)
        if self.task.sequence is not None:
            del data["task"]["train"]  # the sequence stands in its place
        if isinstance(self.method, SeekrConfig):
            for key in _unread(self.method):
                data["method"].pop(key)
            if self.heads is not None and "distil" in data["method"]:
                for key in _CHOOSING:
                    data["method"]["distil"].pop(key, None)
        return data

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.dump(), sort_keys=False, allow_unicode=True)
