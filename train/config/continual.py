"""Recipe seekr: tasks one after the other, and what holds the earlier ones."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from .base import CountOrAll, LoraSizes, StrictConfig
from .regularisers import AnyRegulariser


class ReplayConfig(StrictConfig):
    """What of earlier tasks is seen again: a random sample of each task's rows, evenly interleaved.

    Attributes:
        ratio: of a task's training rows, at least one row.
        count: rows of each task, instead of a ratio.
    """

    ratio: Annotated[float, Field(gt=0, le=1)] | None = None
    count: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.ratio is None) == (self.count is None):
            raise ValueError("give one of ratio and count")
        return self


class DistilConfig(StrictConfig):
    """SEEKR's distillation (He et al. 2024): L_task + l1 L_replay + (1 - l1) L_logits + l2 L_attention.

    Attributes:
        replay_weight: l1.
        attention_weight: l2, on the KL divergence of attention, reduced to one number by `reduction`.
        reduction: `mean` over samples, heads and query rows, of all layers alike; `layers`, the mean of the layers'
            means, as the authors' code has it, where a layer with few chosen heads counts as much as one with many.
        choice: how heads are chosen where the recipe names none: by I = S * F, by S or F alone; or, as controls, drawn
            once from all heads (`random`), or after each task from those that I does not choose, as many in each layer
            (`random_matched`).
        layers: budget B_L, layers of the highest summed importance, or `all`.
        heads: budget B_H, heads in those layers.
        queries: budget B_T, random query rows of a sample.
        selection: heads are chosen anew for all tasks after each task (`global`), or for the samples of the task just
            learnt alone (`per_task`, as the reference code does).
        teacher: a sample's teacher is the model after its `own` task, or the `latest` before the task being learnt.
        dtype: of the stored teacher rows.
        logits_top: keep only so many of the teacher's logits and the mass of the rest; null keeps all.
    """

    replay_weight: Annotated[float, Field(ge=0, le=1)] = 0.5
    attention_weight: Annotated[float, Field(ge=0)] = 1000.0
    reduction: Literal["mean", "layers"] = "mean"
    choice: Literal["importance", "sensitivity", "forgetting", "random", "random_matched"] = "importance"
    layers: CountOrAll = 24
    heads: Annotated[int, Field(ge=1)] = 128
    queries: Annotated[int, Field(ge=1)] = 100
    selection: Literal["global", "per_task"] = "global"
    teacher: Literal["own", "latest"] = "own"
    dtype: Literal["float32", "float16"] = "float32"
    logits_top: Annotated[int, Field(ge=1)] | None = None


class SeekrConfig(StrictConfig):
    """A sequence of tasks learnt one after the other, and what is done so that earlier ones are not forgotten.

    Attributes:
        strategy: `seekr`; or a baseline: `sequential` (nothing), `replay`, `der` (DER++, Buzzega et al. 2020), `ewc`
            (Kirkpatrick et al. 2017), `lwf` (Li & Hoiem 2016), `multitask` (all tasks at once, the upper bound).
        tune: the whole model, or one LoRA through all tasks.
        der_weight: of the squared distance to the stored logits.
        ewc_weight: of the Fisher-weighted distance to the weights after the previous task.
        ewc_rows: rows of a task, drawn once, that its Fisher information is taken from, a backward pass each; or `all`.
        lwf_weight: of the KL divergence to the previous model on the new task's rows.
        keep: which models stay in the run: the `last`, `all` (after each task), or `none`.
    """

    strategy: Literal["seekr", "sequential", "replay", "der", "ewc", "lwf", "multitask"] = "seekr"
    tune: Literal["full", "lora"] = "full"
    lora: LoraSizes = LoraSizes()
    replay: ReplayConfig = ReplayConfig(ratio=0.1)
    distil: DistilConfig = DistilConfig()
    der_weight: Annotated[float, Field(ge=0)] = 0.5
    ewc_weight: Annotated[float, Field(ge=0)] = 1000.0
    ewc_rows: CountOrAll = 64
    lwf_weight: Annotated[float, Field(ge=0)] = 1.0
    regularisers: list[AnyRegulariser] = Field(default_factory=list)
    keep: Literal["last", "all", "none"] = "last"

    @property
    def replays(self) -> bool:
        return self.strategy in ("seekr", "replay", "der")
