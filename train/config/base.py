"""What every part of a recipe is, and types that several share."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


class StrictConfig(BaseModel):
    """A part of a recipe: no unknown keys, no conversion between types, no NaN or infinity, immutable."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, populate_by_name=True, allow_inf_nan=False)


def _count_or_all(value: Any) -> Any:
    if value != "all" and (type(value) is not int or value < 1):
        raise ValueError("expected a whole number from 1 up, or 'all'")
    return value


# A word and not null, which the recipe that a run writes leaves out.
CountOrAll = Annotated[Annotated[int, Field(ge=1)] | Literal["all"], BeforeValidator(_count_or_all)]


class LoraSizes(StrictConfig):
    """The shape of a LoRA.

    Attributes:
        layers: the layers that have one; null: all.
    """

    r: Annotated[int, Field(ge=1)] = 8
    alpha: Annotated[int, Field(ge=1)] = 16
    target_modules: str | list[str] = "all-linear"
    layers: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] | None = None
