"""Memory of each GPU and time of a recipe before it runs, and the nearest launch that fits: `headtune plan`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from headtune.train.config.schema import Recipe
from headtune.train.memory.estimate import GIB
from headtune.train.memory.model_shape import shape_of

from . import memory_of_recipe
from .memory_of_recipe import Stage


@dataclass(frozen=True)
class MemoryPlan:
    """What a recipe needs on a number of GPUs.

    Attributes:
        model, parameters: of which model, and its size.
        gpu_memory: bytes of each GPU.
        stages: in the order in which they run.
        change: what to change for the recipe to fit, in words; None where it fits or nothing that was tried helps.
    """

    model: str
    parameters: int
    engine: str
    gpus: int
    gpu_memory: int
    stages: Sequence[Stage]
    change: str | None

    @property
    def peak(self) -> int:
        """Bytes of a GPU in the stage that needs most."""
        return max(stage.memory.peak for stage in self.stages)

    @property
    def fits(self) -> bool:
        return self.peak <= self.gpu_memory

    def as_json(self, peak_rate: float | None = None) -> dict[str, Any]:
        """Plain data; sizes in bytes, times as the fast and the slow end in seconds.

        Args:
            peak_rate: floating-point operations of a GPU in a second; default: an H100's.
        """
        return {
            "model": self.model,
            "parameters": self.parameters,
            "engine": self.engine,
            "gpus": self.gpus,
            "gpu_memory": self.gpu_memory,
            "fits": self.fits,
            "change": self.change,
            "stages": [_stage_as_json(stage, peak_rate) for stage in self.stages],
        }


def _stage_as_json(stage: Stage, peak_rate: float | None) -> dict[str, Any]:
    return {
        "name": stage.name,
        "parts": dict(stage.memory.parts),
        "peak": stage.memory.peak,
        "host": stage.memory.host,
        "disk": stage.memory.disk,
        "unit": stage.unit,
        "units": stage.units,
        "seconds": list(stage.seconds(peak_rate)),
    }


def plan_recipe(
    recipe: Recipe,
    gpus: int = 1,
    engine: str | None = None,
    length: int = 1024,
    gpu_memory: int = 80 * GIB,
    labels: int = 16,
    prompts: int | None = None,
    model: str | None = None,
) -> MemoryPlan:
    """Estimate a recipe's memory and time, and look for what to change where it does not fit.

    Args:
        gpus: processes, one GPU each.
        engine: how they share the model; default: `single`, or `ddp` on several GPUs.
        length, labels: tokens of the longest row, and how many of them carry loss.
        gpu_memory: bytes of each GPU.
        prompts: of the training data; default: `task.max_train_examples`.
        model: sizes of another model than the recipe's.

    Raises:
        InputError: an engine that does not go with the number of GPUs or the recipe, or a model of unknown sizes.
    """
    engine = engine or ("single" if gpus == 1 else "ddp")
    setup = memory_of_recipe.setup_of(recipe, engine, gpus, length, labels)
    shape = shape_of(model or recipe.model.name, recipe.model.revision)
    stages = memory_of_recipe.stages(recipe, shape, setup, prompts)
    change = None
    if any(stage.memory.peak > gpu_memory for stage in stages):
        nearest = memory_of_recipe.cheapest(recipe, shape, setup, gpu_memory)
        change = None if nearest is None else memory_of_recipe.change(setup, nearest)
    return MemoryPlan(shape.name, shape.parameters, engine, gpus, gpu_memory, stages, change)
