"""The penalties on heads that a recipe can ask for. `headtune.train.losses` takes them as they are."""

from __future__ import annotations

import functools
import typing
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, Union

from pydantic import Field, GetJsonSchemaHandler, TypeAdapter, model_validator
from pydantic_core import core_schema

from headtune import plugins
from headtune.analysis.utils.errors import InputError

from .base import StrictConfig
from .heads import HeadsConfig


class Regulariser(StrictConfig):
    """What all penalties on heads have.

    Attributes:
        weight: of the term in the loss.
        heads: which heads; the recipe's own where it is left out.
        schedule: `constant`, or `linear` growth from 0 over the share `warmup` of the steps.
    """

    if TYPE_CHECKING:
        kind: Any  # a Literal in each

    weight: Annotated[float, Field(ge=0)] = 1.0
    heads: HeadsConfig | None = None
    schedule: Literal["constant", "linear"] = "constant"
    warmup: Annotated[float, Field(ge=0, le=1)] = 0.0

    @model_validator(mode="after")
    def _warmup(self) -> Self:
        if (self.schedule == "linear") != (self.warmup > 0):
            raise ValueError("schedule linear and a warmup above 0 go together")
        return self

    def weight_at(self, progress: float) -> float:
        """The weight when the share `progress` of the steps is done."""
        return self.weight * min(1.0, progress / self.warmup) if self.warmup else self.weight


class AttentionKl(Regulariser):
    """KL divergence of chosen heads' attention from the base model's, at `rows` query positions a sample."""

    kind: Literal["attention_kl"] = "attention_kl"
    rows: Annotated[int, Field(ge=1)] = 32


class OutputDrift(Regulariser):
    """Squared distance of chosen heads' outputs z from the base model's, relative to the base's size."""

    kind: Literal["output_drift"] = "output_drift"
    relative: bool = True


class WeightDrift(Regulariser):
    """Squared distance of chosen heads' weight slices from where they started (L2-SP).

    Attributes:
        fisher: weigh each weight by its Fisher information (EWC) on answers of `task`; that which is trained on where
            it is left out.
        max_examples: prompts of that task, one backward pass each.
        parts: which slices.
    """

    kind: Literal["weight_drift"] = "weight_drift"
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

    kind: Literal["attribution_hinge"] = "attribution_hinge"
    role: Literal["suppression", "recall"] = "suppression"
    margin: Annotated[float, Field(ge=0)] = 0.0


class NegativeAttention(Regulariser):
    """Align what chosen heads attend to between two options that the prompt names (NASA)."""

    kind: Literal["negative_attention"] = "negative_attention"
    positive: str = " Yes"
    negative: str = " No"


class PruneGates(Regulariser):
    """A HardConcrete gate on each chosen head and a penalty on the share that is open: prune while training.

    `learning_rate` is that of the gates' log alpha, which travels 4.8 from open to closed: at least 24 steps of 0.2
    before the learning-rate schedule lowers it; the rest has the run's. With `sparsity`, the share of heads to be
    closed, what costs is the distance from it; it grows over `warmup`.
    """

    kind: Literal["prune"] = "prune"
    sparsity: Annotated[float, Field(ge=0, le=1)] | None = None
    learning_rate: Annotated[float, Field(gt=0)] = 0.2


# By kind. Packages add theirs with `headtune.train.losses.registry.register_regulariser`.
REGULARISERS: dict[str, type[Regulariser]] = {
    "attention_kl": AttentionKl,
    "output_drift": OutputDrift,
    "weight_drift": WeightDrift,
    "attribution_hinge": AttributionHinge,
    "negative_attention": NegativeAttention,
    "prune": PruneGates,
}


def register_config(kind: str, config: type[Regulariser]) -> None:
    """Let recipes name a regulariser by its kind; a built-in one is there already.

    Raises:
        InputError: the kind is another configuration's, or not that of the configuration's field `kind`.
    """
    if REGULARISERS.get(kind, config) is not config:
        raise InputError(f"regulariser {kind!r} is {REGULARISERS[kind].__qualname__}'s kind already; choose another")
    field = config.model_fields.get("kind")
    if field is None or typing.get_args(field.annotation) != (kind,) or field.default != kind:
        raise InputError(f"{config.__qualname__} needs a field `kind: Literal[{kind!r}] = {kind!r}`")
    REGULARISERS[kind] = config
    _any_kind.cache_clear()


@functools.cache
def _any_kind() -> TypeAdapter[Any]:
    kinds: Any = Annotated[Union[tuple(REGULARISERS.values())], Field(discriminator="kind")]  # noqa: UP007
    return TypeAdapter(kinds)


def _validated(value: Any) -> Any:
    if isinstance(value, Regulariser):
        return value
    kind = value.get("kind") if isinstance(value, dict) else None
    if isinstance(kind, str) and kind not in REGULARISERS:
        plugins.load_installed()
    return _any_kind().validate_python(value)


class _ByKind:
    """Pydantic's view of a regulariser: the union of all that are registered when a recipe is read."""

    @classmethod
    def __get_pydantic_core_schema__(cls, _source: Any, _handler: Any) -> core_schema.CoreSchema:
        return core_schema.no_info_plain_validator_function(_validated)

    @classmethod
    def __get_pydantic_json_schema__(cls, _schema: Any, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        plugins.load_installed()
        return handler(_any_kind().core_schema)


AnyRegulariser = Annotated[Regulariser, _ByKind]
