"""The public door, `import headtune`: what it names, what it loads, and that PEFT knows the adapters after it."""

from __future__ import annotations

import ast
import re
import subprocess
import sys

import pytest

import headtune
from helpers.paths import ROOT

# Packages that take a noticeable part of a second to import.
HEAVY = (
    "accelerate",
    "datasets",
    "matplotlib",
    "numpy",
    "peft",
    "pydantic",
    "rich",
    "torch",
    "transformers",
    "trl",
    "wandb",
)


def python(source: str) -> str:
    """What an interpreter prints that has not seen headtune."""
    done = subprocess.run([sys.executable, "-I", "-c", source], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.usefixtures("new_interpreters")
def test_importing_loads_nothing_heavy() -> None:
    loaded = python("import sys, headtune; headtune.__all__; print(*sys.modules)").split()
    assert {"headtune", "headtune.peft_types"} <= set(loaded)
    assert [name for name in loaded if name.split(".")[0] in HEAVY] == []
    assert not any(name.startswith(("headtune.analysis", "headtune.train", "headtune.cli")) for name in loaded)


@pytest.mark.parametrize("name", headtune.__all__)
def test_every_name_resolves(name: str) -> None:
    value = getattr(headtune, name)
    assert value.__name__ == name and value.__doc__
    assert getattr(headtune, name) is value and name in dir(headtune)


def test_a_name_that_is_not_there_is_refused_with_those_that_are() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'nothing'.*load_model"):
        headtune.nothing  # noqa: B018


def test_type_checkers_see_the_same_names_in_the_same_modules() -> None:
    """They read the imports under TYPE_CHECKING; at run time the table counts."""
    tree = ast.parse((ROOT / "headtune" / "__init__.py").read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    typed = {}
    for node in block.body:
        assert isinstance(node, ast.ImportFrom) and node.module is not None
        for alias in node.names:
            assert alias.asname == alias.name, (
                f"`{alias.name} as {alias.name}` hands a name on; without it, it is private"
            )
            typed[alias.name] = node.module.removeprefix("headtune.")
    assert typed == headtune._ROOMS


def test_every_name_is_on_the_page_on_python() -> None:
    page = (ROOT / "docs" / "howto" / "python.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| `(\w+)` \|", page, re.M)
    assert sorted(name for name in listed if hasattr(headtune, name)) == sorted(headtune.__all__)


@pytest.mark.parametrize("imports", ["import headtune, peft", "import peft, headtune"])
def test_peft_knows_the_adapters_in_either_order(imports: str) -> None:
    printed = python(f"{imports}; print(*(kind.value for kind in peft.PEFT_TYPE_TO_CONFIG_MAPPING))")
    assert {"HEAD_TUNING", "HEAD_SLICES"} <= set(printed.split())
