"""Tune, protect, evaluate, track and export identified attention heads.

`import headtune.train` is all that PEFT needs to load adapters of this package's types, before or after `import peft`.
PEFT looks types up in dictionaries of its own, so whoever wants to be found has to import it. That takes seconds, and
this package also holds the command line, which answers `--help` in less than a tenth of one. So as long as PEFT is not
imported, nothing happens here; when somebody does import it, the types make themselves known right after.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def _register() -> None:
    # Either may be what imports PEFT and be half imported now. So what they import from here must not import PEFT.
    from . import adapter, slices  # noqa: F401  they register themselves


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


if "peft" in sys.modules:
    _register()
else:
    sys.meta_path.insert(0, _AfterPeft())
