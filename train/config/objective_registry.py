"""Which objectives there are, by the names that `method.objective` takes, and what reading a recipe needs of them.

An objective is a subclass of `headtune.train.trainer.objectives.TrainingObjective`, whose first part is here.
"""

from __future__ import annotations

import importlib
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import AfterValidator, Field

from headtune import plugins
from headtune.analysis.utils.errors import InputError


class ObjectiveRules:
    """What a recipe of one objective may say.

    Attributes:
        name: what `method.objective` says.
        trl_config: TRL's class of the keys of `training`.
    """

    name: ClassVar[str]
    trl_config: ClassVar[str] = "SFTConfig"


Rules = TypeVar("Rules", bound=ObjectiveRules)
_registered: dict[str, ObjectiveRules] = {}


def register_objective(objective: type[Rules]) -> type[Rules]:
    """Make an objective known under its name: a decorator of a subclass of `TrainingObjective`.

    Raises:
        InputError: it has no name, or another has it.
    """
    name = getattr(objective, "name", None)
    if not isinstance(name, str) or not name.isidentifier():
        raise InputError(f"objective {objective.__qualname__} has no name that method.objective could say; set name")
    there = type(_registered[name]).__module__ if name in _registered else plugins.OBJECTIVES.get(name)
    if there not in (None, objective.__module__):
        raise InputError(f"objective {name!r} of {objective.__module__} is in {there} already; give it another name")
    _registered[name] = objective()
    return objective


def objective_names() -> list[str]:
    """All names, headtune's own first."""
    plugins.load_installed()
    return [*plugins.OBJECTIVES, *(name for name in _registered if name not in plugins.OBJECTIVES)]


def objective_rules(name: str) -> ObjectiveRules:
    """An objective by its name."""
    if name not in _registered and name in plugins.OBJECTIVES:
        importlib.import_module(plugins.OBJECTIVES[name])
    return _registered[name]


def trl_config_of(name: Any) -> str:
    """TRL's class of the keys of `training`; that of `sft` where there is no such objective."""
    builtin = {"answer_set": "SFTConfig", "sft": "SFTConfig", "dpo": "DPOConfig"}  # loading them would load PyTorch
    if name in builtin or name not in objective_names():
        return builtin.get(name, "SFTConfig")
    return objective_rules(name).trl_config


def _registered_name(value: str) -> str:
    if value not in (names := objective_names()):
        *first, last = map(repr, names)
        raise ValueError(f"input should be {', '.join(first)} or {last}")
    return value


def _names_in_schema(schema: dict[str, Any]) -> None:
    schema["enum"] = objective_names()


ObjectiveName = Annotated[str, AfterValidator(_registered_name), Field(json_schema_extra=_names_in_schema)]
