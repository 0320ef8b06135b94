"""What extends headtune: its own tuning methods, and modules from outside that register more.

A plugin is a module that registers something when it is imported (`register_tuning_method`, `register_objective`,
`register_regulariser`, `register_scoring_method`). It is found by an entry point of the group `headtune.plugins`, named
by `--plugin MODULE`, or imported by the program that uses headtune. headtune's own methods go through the same door,
each module when its name is first asked for.
"""

from __future__ import annotations

import functools
import importlib
import logging
import sys
from collections.abc import Iterable
from typing import Any

GROUP = "headtune.plugins"
# Names, and the modules of headtune that register them.
TUNING_METHODS = {
    name: f"headtune.train.methods.{name}"
    for name in ("lofit", "jola", "masked", "steer", "lora", "full", "ln", "regularise", "seekr")
}
OBJECTIVES = dict.fromkeys(("answer_set", "sft", "dpo"), "headtune.train.trainer.objectives")

log = logging.getLogger(__name__)
_named: list[str] = []  # by --plugin


def load_plugin(name: str) -> None:
    """Import a module that registers something; also one in the current folder.

    Raises:
        InputError: it cannot be imported.
    """
    from headtune.analysis.utils.errors import InputError

    if not all(part.isidentifier() for part in name.split(".")):
        raise InputError(f"plugin {name!r} is no module's name; write it as in an import: my_package.method")
    if "" not in sys.path:  # an installed command has the folder of its script there, and not the current one
        sys.path.append("")
    try:
        importlib.import_module(name)
    except InputError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"plugin {name!r} cannot be imported: {reason}") from error
    if name not in _named:
        _named.append(name)


def arguments_for(recipe_plugins: Iterable[str] = ()) -> list[str]:
    """`--plugin MODULE ...` for a process that carries out a recipe with the plugins of this one."""
    return [word for name in dict.fromkeys([*_named, *recipe_plugins]) for word in ("--plugin", name)]


@functools.cache
def load_installed() -> None:
    """Load what installed packages name in the entry-point group, once; one that fails is left out with a warning."""
    from importlib.metadata import entry_points

    for entry in entry_points(group=GROUP):
        try:
            register = entry.load()
            if callable(register):
                register()
        except Exception as error:
            log.warning("plugin %s (%s) cannot be loaded: %s", entry.name, entry.value, " ".join(str(error).split()))


def module_of(registered: Any) -> str | None:
    """The plugin that something registered is from; None for headtune's own and for what a script itself defines."""
    kind = registered if isinstance(registered, type) or callable(registered) else type(registered)
    name = str(getattr(kind, "__module__", ""))
    return None if name == "__main__" or name.split(".")[0] == "headtune" else name


def not_loaded(names: Iterable[str]) -> list[str]:
    """Those of these modules that nobody has imported."""
    load_installed()
    return [name for name in names if name not in sys.modules]
