"""Which tuning methods there are, by the names that `recipe:` takes, and what a recipe asks of them.

A method is a subclass of `headtune.train.methods.base.TuningMethod`, whose first part is here: what must be known of a
method to read a recipe. Modules register methods when they are imported (see `headtune.plugins`).
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, TypeVar

from headtune import plugins
from headtune.analysis.utils.errors import InputError, nearest

from .base import StrictConfig
from .errors import Problem


class MethodRules:
    """What a recipe of one tuning method may say.

    Attributes:
        name: what `recipe:` says.
        config: the type of the recipe's `method:`.
        trains: weights are learnt by gradient descent; without it, they are computed.
        requires_heads: `heads:` must be there.
        learns_sequence: it learns the tasks of `task.sequence` one after the other.
        prunes: its regularisers may prune heads.
    """

    name: ClassVar[str]
    config: ClassVar[type[StrictConfig]]
    trains: ClassVar[bool] = True
    requires_heads: ClassVar[bool] = True
    learns_sequence: ClassVar[bool] = False
    prunes: ClassVar[bool] = False

    @property
    def kinds(self) -> Mapping[str, type[StrictConfig]]:
        """The configs that `method.kind` chooses from; empty where there is one config."""
        return {}

    def needs_heads(self, config: Any) -> bool:
        """Whether the recipe has to name heads."""
        return self.requires_heads

    def takes_heads(self, config: Any) -> bool:
        """Whether the recipe may name heads."""
        return True

    def tunes_everything(self, config: Any) -> bool:
        """Whether all weights of the model are trained."""
        return False

    def stops_after_heads(self, config: Any) -> bool:
        """Whether the run ends when its heads are chosen."""
        return False

    def issues(self, recipe: Any) -> Iterator[Problem]:
        """What is wrong with a recipe of this method besides what the config's types and every recipe's rules say."""
        yield from ()

    def drop_unread(self, config: Any, names_heads: bool, data: dict[str, Any]) -> None:
        """Take out of a recipe's `method`, as it is written to the run, what this method does not read.

        Args:
            names_heads: the recipe has `heads`.
            data: the config as JSON; changed in place.
        """


Rules = TypeVar("Rules", bound=MethodRules)
_registered: dict[str, MethodRules] = {}


def register_tuning_method(method: type[Rules]) -> type[Rules]:
    """Make a tuning method known under its name: a decorator of a subclass of `TuningMethod`.

    Raises:
        InputError: it has no name or no config, or another has the name.
    """
    name, config = getattr(method, "name", None), getattr(method, "config", None)
    if not isinstance(name, str) or not name.isidentifier():
        raise InputError(f"tuning method {method.__qualname__} has no name that `recipe:` could say; set name")
    if not (isinstance(config, type) and issubclass(config, StrictConfig)):
        raise InputError(f"tuning method {name!r} has no config; set config to a subclass of StrictConfig")
    there = type(_registered[name]).__module__ if name in _registered else plugins.TUNING_METHODS.get(name)
    if there not in (None, method.__module__):
        raise InputError(f"tuning method {name!r} of {method.__module__} is in {there} already; give it another name")
    _registered[name] = method()
    return method


def tuning_method_names() -> list[str]:
    """All names, headtune's own first."""
    plugins.load_installed()
    return [*plugins.TUNING_METHODS, *(name for name in _registered if name not in plugins.TUNING_METHODS)]


def method_rules(name: str) -> MethodRules:
    """A tuning method by its name.

    Raises:
        InputError: there is none.
    """
    if name not in _registered and name in plugins.TUNING_METHODS:
        importlib.import_module(plugins.TUNING_METHODS[name])
    if name not in _registered and name not in (names := tuning_method_names()):
        raise InputError(f"recipe {name!r} is unknown; {nearest(name, names)}")
    return _registered[name]
