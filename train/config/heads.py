"""Which heads a recipe is about, and how it finds them."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from headtune.analysis.heads.roles import RESERVED, ROLES_BY_NAME
from headtune.analysis.utils.errors import nearest

from .base import StrictConfig


class IdentifyConfig(StrictConfig):
    """Find the heads first, on the training task."""

    method: str = "all"
    max_examples: Annotated[int, Field(ge=1)] | None = None

    @field_validator("method")
    @classmethod
    def _known(cls, value: str) -> str:
        from headtune.analysis.methods.registry import parse_method_names

        parse_method_names(value)
        return value


class FirstStageConfig(StrictConfig):
    """LoFiT's first stage (Yin et al. 2024, section 3): train a scale on *every* head, rank heads by its size.

        z <- (1 + A) * z,  A ~ N(0, init_std),  minimise  loss + l1 * sum |A|;  score of a head = ||A_h||_2

    The rest of `training` (batch, epochs, schedule) and the objective are the recipe's own. A is thrown away.
    """

    learning_rate: Annotated[float, Field(gt=0)] = 5e-3
    l1: Annotated[float, Field(ge=0)] = 5e-4
    init_std: Annotated[float, Field(ge=0)] = 1e-3
    max_steps: Annotated[int, Field(ge=1)] | None = None


class ProbeConfig(StrictConfig):
    """Rank heads by how well a linear probe on their output tells right answers from wrong ones (ITI).

    `per_prompt` draws so many right and so many wrong answers a prompt; null takes all.
    """

    folds: Annotated[int, Field(ge=2)] = 5
    per_prompt: Annotated[int, Field(ge=1)] | None = None
    max_examples: Annotated[int, Field(ge=1)] | None = None


class FewShotConfig(StrictConfig):
    """Prompts of the task with examples before the question.

    Attributes:
        shots: examples before each question, of other subjects than it.
        prompts: questions, drawn from the training examples.
        separator: the text between two examples.
    """

    shots: Annotated[int, Field(ge=2)] = 5
    prompts: Annotated[int, Field(ge=2)] = 100
    separator: str = "\n\n"


class InContextHeadsConfig(FewShotConfig):
    """Rank heads by average indirect effect: how much the mean output of a head in few-shot prompts restores the right
    answer where the examples' answers are shuffled (Todd et al. 2024).

    Attributes:
        scored: solved prompts whose shuffled forms are scored.
    """

    scored: Annotated[int, Field(ge=2)] = 25


class RandomConfig(StrictConfig):
    """Random heads, as many in each layer as the heads chosen from `like` with this block's role and top."""

    like: str
    seed: int = 0


ControlKind = Literal["random", "anywhere", "nearest_zero", "largest"]


class ControlConfig(StrictConfig):
    """Heads to compare chosen ones with: as many as those chosen from `like` with this block's role and top.

    None of them is among the chosen ones, nor among the heads of any role of the set. In the chosen ones' layers, or
    where those have too few others, in the nearest layers (which is said).

    Attributes:
        like: the head set.
        kind: `random` heads of the same layers; random heads `anywhere`; heads of the same layers with scores
            `nearest_zero`; the `largest` others of the same layers, by the mean norm of what they write at the last
            token of training prompts.
        seed: of what is drawn.
    """

    like: str
    kind: ControlKind = "random"
    seed: int = 0


class HeadsConfig(StrictConfig):
    """Which heads: exactly one of `from`, `identify`, `lofit`, `probe`, `in_context`, `random`, `control`, `all`,
    `list`.

    `role` and `top` choose from a head set: any role that it holds; `both` takes the top recall and the top suppression
    heads. `identify` takes `recall`, `suppression`, `memory`, `context` or `retrieval`. What `lofit`, `probe`,
    `in_context` and JoLA's gates choose has the role `selected`.
    """

    source: str | None = Field(None, alias="from")
    identify: IdentifyConfig | None = None
    lofit: FirstStageConfig | None = None
    probe: ProbeConfig | None = None
    in_context: InContextHeadsConfig | None = None
    random: RandomConfig | None = None
    control: ControlConfig | None = None
    every: Literal[True] | None = Field(None, alias="all")
    pairs: Annotated[list[tuple[int, int]], Field(min_length=1)] | None = Field(None, alias="list")
    role: str = "both"
    top: Annotated[int, Field(ge=1)] = 8

    @model_validator(mode="before")
    @classmethod
    def _pairs(cls, data: Any) -> Any:
        # YAML and JSON have no tuples; strict mode would refuse their lists.
        if isinstance(data, dict) and isinstance(data.get("list"), list):
            data = data | {"list": [tuple(pair) if isinstance(pair, list) else pair for pair in data["list"]]}
        return data

    @field_validator("role")
    @classmethod
    def _known_role(cls, value: str, info: ValidationInfo) -> str:
        if not re.fullmatch(r"\w+", value):  # it is part of the run's name
            raise ValueError(f"role {value!r} is not a name of letters, digits and underscores")
        # A head set names its roles itself: those of `from`, `random` and `control` are checked where it is read.
        if all(info.data.get(name) is None for name in ("source", "random", "control")):
            roles = (*RESERVED, *ROLES_BY_NAME)
            if value not in roles:
                raise ValueError(f"no role {value!r}; {nearest(value, roles, listed=True)}")
        return value

    @model_validator(mode="after")
    def _one_source(self) -> HeadsConfig:
        sources = {
            "from": self.source,
            "identify": self.identify,
            "lofit": self.lofit,
            "probe": self.probe,
            "in_context": self.in_context,
            "random": self.random,
            "control": self.control,
            "all": self.every,
            "list": self.pairs,
        }
        named = [name for name, value in sources.items() if value is not None]
        if len(named) != 1:
            names = ", ".join(named) or "none"
            fix = "; heads='{from: ...}' replaces the block" if named else ""
            raise ValueError(f"give exactly one of {', '.join(sources)} (found: {names}{fix})")
        return self

    @property
    def learnt(self) -> bool:
        """The heads come out of this run's own first stage."""
        return self.first_stage is not None

    @property
    def first_stage(self) -> str | None:
        """Which of this run's own first stages chooses the heads."""
        stages = {"lofit": self.lofit, "probe": self.probe, "in_context": self.in_context}
        return next((name for name, block in stages.items() if block is not None), None)
