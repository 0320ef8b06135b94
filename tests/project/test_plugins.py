"""The plugins of docs/howto/plugins.md work from outside, by the command line and from Python; what is refused."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from headtune import plugins
from headtune.analysis.methods import registry
from headtune.analysis.methods.scores import load_means
from headtune.analysis.utils.errors import InputError
from headtune.cli.main import main
from headtune.train.config import method_registry, objective_registry
from headtune.train.config.methods import LofitConfig
from headtune.train.config.recipe import load_recipe, parse
from headtune.train.methods.base import TuningMethod
from headtune.train.runs.run import run_recipe
from helpers import documents
from helpers.paths import ROOT
from helpers.small_runs import write_recipe, write_task

PAGE = ROOT / "docs" / "howto" / "plugins.md"
CHANGES: dict[str, Any] = {"recipe": "query_lora", "method": {"objective": "hard_batches", "r": 2}}


@pytest.fixture(autouse=True)
def unregistered(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What a test registers is gone after it."""
    monkeypatch.setenv("HEADTUNE_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr(method_registry, "_registered", dict(method_registry._registered))
    monkeypatch.setattr(objective_registry, "_registered", dict(objective_registry._registered))
    monkeypatch.setattr(registry, "METHODS", dict(registry.METHODS))
    monkeypatch.setattr(plugins, "_named", [])
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield
    for name in ("query_lora", "hard_batches", "write_norm", "broken"):
        if name not in before:
            sys.modules.pop(name, None)


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The page's modules in the current folder, which is no part of headtune."""
    names = []
    for block in documents.blocks(PAGE):
        if block.language == "python":
            name = block.text.splitlines()[0].removeprefix("# ")
            (tmp_path / name).write_text(block.text, encoding="utf-8")
            names.append(name.removesuffix(".py"))
    monkeypatch.chdir(tmp_path)
    importlib.invalidate_caches()
    return names


@pytest.mark.slow
def test_heads_are_scored_by_a_method_from_outside(modules: list[str], tiny_llama: Path, tmp_path: Path) -> None:
    words = ["--task", str(write_task(tmp_path)), "--method", "dla,ablation,write_norm", "--out", "heads"]
    assert main(["identify", str(tiny_llama), *words]) == 2
    assert main(["identify", str(tiny_llama), *words, "--plugin", "write_norm"]) == 0
    assert "write_norm.target" in load_means(tmp_path / "heads" / "scores.safetensors")


def test_by_the_command_line(
    modules: list[str], tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = str(write_recipe(tmp_path, tiny_llama, **CHANGES))
    used = ["query_lora", "hard_batches"]
    words = [word for name in used for word in ("--plugin", name)]
    assert main(["recipes", "validate", recipe]) == 2
    assert "recipe 'query_lora' is unknown" in capsys.readouterr().err
    assert main(["recipes", "validate", recipe, *words]) == 0
    assert main(["plan", recipe, *words]) == 0
    assert main(["train", recipe, *words]) == 0
    run = tmp_path / "run"
    assert yaml.safe_load((run / "recipe.yaml").read_text())["plugins"] == used
    adapter = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert adapter["layers_to_transform"] == [0, 2] and adapter["r"] == 2
    assert main(["export", str(run), str(tmp_path / "exported"), "--prompts", "2", *words]) == 0
    assert plugins.arguments_for() == words


def test_from_python(modules: list[str], tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in modules:
        importlib.import_module(name)
    recipe = load_recipe(str(write_recipe(tmp_path, tiny_llama, **CHANGES)))
    assert recipe.plugins == ["query_lora", "hard_batches"]
    assert run_recipe(recipe)["after"]
    assert load_recipe(str(tmp_path / "run" / "recipe.yaml")) == recipe


def test_a_recipe_alone_loads_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken.py").write_text("raise SystemError('imported')", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(InputError, match=r"plugins names 'broken', .* load code by itself; .* --plugin broken"):
        parse({"recipe": "lora", "plugins": ["broken"]})
    assert "broken" not in sys.modules


@pytest.mark.parametrize("name", ["nowhere_at_all", "../x", "a b", "/etc/x", "broken"])
def test_a_module_that_cannot_be_imported_is_refused_in_one_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken.py").write_text("raise SystemError('two\\nlines')", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert main(["recipes", "validate", "lora/relations", "--plugin", name]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert repr(name) in line


def test_a_name_is_taken_once() -> None:
    class Second(TuningMethod):
        name, config = "lofit", LofitConfig

    with pytest.raises(InputError, match=r"lofit.* is in headtune.train.methods.lofit already"):
        method_registry.register_tuning_method(Second)
