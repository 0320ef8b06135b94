"""What every part of a recipe is, and types that several share."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from headtune.analysis.tasks.messages import ChatTemplate


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


class ChatConfig(StrictConfig):
    """How prompts are given as chats, in the tokenizer's own template: `true`, `false`, or a block.

    Attributes:
        enabled: false gives them as they are.
        system: text of a system turn before each conversation; null: what the template does without one.
        enable_thinking: what the template is told by this name. Answers are read right after the prompt, so a thought
            that the template opens is closed in either case.
    """

    enabled: bool = True
    system: str | None = None
    enable_thinking: bool = False

    @model_validator(mode="after")
    def _off(self) -> Self:
        if not self.enabled and (self.system is not None or self.enable_thinking):
            raise ValueError("enabled is false, and system or enable_thinking is given; remove one of them")
        if self.system is not None and not self.system.strip():
            raise ValueError("system is empty; give the text of the system turn, or remove it")
        return self

    @property
    def setting(self) -> bool | ChatTemplate:
        """As `Task.chat_template` has it."""
        return ChatTemplate(self.system, self.enable_thinking) if self.enabled else False


def chat_block(value: Any) -> Any:
    if value is not None and not isinstance(value, bool | dict | ChatConfig):
        raise ValueError("expected true, false, or a block of system and enable_thinking")
    return {"enabled": value} if isinstance(value, bool) else value
