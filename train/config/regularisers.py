"""The penalties on heads that a recipe can ask for (see `headtune.train.losses.regularisers`)."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from .base import StrictConfig
from .heads import HeadsConfig


class Regulariser(StrictConfig):
    """What all penalties on heads have.

    Attributes:
        weight: of the term in the loss.
        heads: which heads; the recipe's own where it is left out.
        schedule: `constant`, or `linear` growth from 0 over the share `warmup` of the steps.
    """

    weight: Annotated[float, Field(ge=0)] = 1.0
    heads: HeadsConfig | None = None
    schedule: Literal["constant", "linear"] = "constant"
    warmup: Annotated[float, Field(ge=0, le=1)] = 0.0

    @model_validator(mode="after")
    def _warmup(self) -> Self:
        if (self.schedule == "linear") != (self.warmup > 0):
            raise ValueError("schedule linear and a warmup above 0 go together")
        return self


class AttentionKl(Regulariser):
    """KL divergence of chosen heads' attention from the base model's, at `rows` query positions a sample."""

    kind: Literal["attention_kl"]
    rows: Annotated[int, Field(ge=1)] = 32


class OutputDrift(Regulariser):
    """Squared distance of chosen heads' outputs z from the base model's, relative to the base's size."""

    kind: Literal["output_drift"]
    relative: bool = True


class WeightDrift(Regulariser):
    """Squared distance of chosen heads' weight slices from where they started (L2-SP).

    Attributes:
        fisher: weigh each weight by its Fisher information (EWC) on answers of `task`; that which is trained on where
            it is left out.
        max_examples: prompts of that task, one backward pass each.
        parts: which slices.
    """

    kind: Literal["weight_drift"]
    fisher: bool = False
    task: str | None = None
    max_examples: Annotated[int, Field(ge=1)] = 64
    parts: Annotated[list[Literal["q", "k", "v", "o"]], Field(min_length=1)] = Field(default=["q", "k", "v", "o"])

    @model_validator(mode="after")
    def _task(self) -> Self:
        if self.task is not None and not self.fisher:
            raise ValueError("task is what Fisher information is taken from, and fisher is false")
        return self


class AttributionHinge(Regulariser):
    """Suppression heads may not lower a right answer's logit by more than `margin`; recall heads keep their part."""

    kind: Literal["attribution_hinge"]
    role: Literal["suppression", "recall"] = "suppression"
    margin: Annotated[float, Field(ge=0)] = 0.0


class NegativeAttention(Regulariser):
    """Align what chosen heads attend to between two options that the prompt names (NASA)."""

    kind: Literal["negative_attention"]
    positive: str = " Yes"
    negative: str = " No"


class PruneGates(Regulariser):
    """A HardConcrete gate on each chosen head and a penalty on the share that is open: prune while training.

    `learning_rate` is that of the gates' log alpha, which travels 4.8 from open to closed: at least 24 steps of 0.2
    before the learning-rate schedule lowers it; the rest has the run's. With `sparsity`, the share of heads to be
    closed, what costs is the distance from it; it grows over `warmup`.
    """

    kind: Literal["prune"]
    sparsity: Annotated[float, Field(ge=0, le=1)] | None = None
    learning_rate: Annotated[float, Field(gt=0)] = 0.2


AnyRegulariser = Annotated[
    AttentionKl | OutputDrift | WeightDrift | AttributionHinge | NegativeAttention | PruneGates,
    Field(discriminator="kind"),
]
