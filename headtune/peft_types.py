"""PEFT knows this package's adapter types as soon as both are imported, in either order.

PEFT looks types up in dictionaries of its own, so whoever wants to be found has to import it. That takes seconds, and
the command line answers `--help` in less than a tenth of one. So as long as PEFT is not imported, nothing happens
here; when somebody does import it, the types register themselves right after.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def _register() -> None:
    # headtune.train.tuners imports PEFT before any module of its own, so that none of them is half imported now.
    from headtune.train.tuners import head_slices, head_tuning  # noqa: F401  they register themselves


class _AfterPeft:
    """An import finder that adds one step to `import peft`; every other import passes it by."""

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "peft":
            return None
        others = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((spec for spec in others if spec is not None), None)
        if spec is None or spec.loader is None:
            return None
        loader: Any = spec.loader
        run = loader.exec_module

        def run_and_register(module: ModuleType) -> None:
            run(module)
            sys.meta_path.remove(self)
            _register()

        loader.exec_module = run_and_register
        return spec


def register() -> None:
    """Register the types now if PEFT is imported, and otherwise right after it will be."""
    if "peft" in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _AfterPeft())
