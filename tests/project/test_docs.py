"""What the documents say is so: commands parse, recipes load, code runs, links and anchors lead somewhere."""

from __future__ import annotations

import argparse
import functools
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from headtune.analysis.methods import registry
from headtune.analysis.studies import base
from headtune.analysis.tasks.task import to_jsonl
from headtune.cli import main
from headtune.train.config import recipe
from helpers import documents, tiny
from helpers.documents import ROOT
from helpers.small_runs import head_set

PAGES = documents.pages()
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
# Other programs' commands. Nothing here starts them.
OTHERS = {
    "python3 -m venv .venv",
    "source .venv/bin/activate",
    "vllm serve cities-model --dtype float32",
    "vllm serve BASE --enable-lora --max-lora-rank 16 --lora-modules heads=heads-lora",
}
PLACEHOLDERS = {"FAMILY", "query_lora"}  # the second is the plugin of docs/howto/plugins.md
# Recipes that a reader writes; all others have to load, with their overrides.
THEIRS = {"RECIPE", "RECIPE.yaml", "FILE", "recipe.yaml", "my_recipe.yaml"}


# --- commands ---------------------------------------------------------------------------------------------------------


parser_of_all = functools.cache(main._parser)


@functools.cache
def require_recipe(name: str, *overrides: str) -> None:
    """Commands of many pages are the same."""
    recipe.load_recipe(name, overrides)


def parse(words: Sequence[str]) -> argparse.Namespace:
    """As `headtune` reads its command line; a line that only prints something returns the words' command."""
    try:
        arguments, rest = parser_of_all().parse_known_args(words)
    except SystemExit as stop:
        assert stop.code == 0, f"headtune {' '.join(words)}: not a command line (the message is on stderr)"
        return argparse.Namespace(command=None)
    assert not rest or ("overrides" in arguments and not any(word.startswith("-") for word in rest)), rest
    if rest:
        arguments.overrides = [*arguments.overrides, *rest]
    return arguments


def check_headtune(words: Sequence[str]) -> None:
    arguments = parse(words)
    config = getattr(arguments, "config_file", None)
    assert config is None or (ROOT / config).is_file(), config
    if arguments.command in ("train", "plan", "sweep", "validate"):
        grid = [axis.split(",")[0] for axis in getattr(arguments, "grid", [])]
        words = [arguments.recipe] if hasattr(arguments, "recipe") else list(arguments.files)
        given = [word for word in words if "=" not in word]
        for name in given:
            if name not in THEIRS:
                require_recipe(name, *getattr(arguments, "overrides", []), *grid)
    elif arguments.command == "identify":
        builtin = [name for name in arguments.method.split(",") if name not in (arguments.plugins or ())]
        registry.parse_method_names(",".join(builtin))
    elif arguments.command == "analyse":
        assert arguments.name in {"list", *base.STUDIES}
        if arguments.name != "list":
            base.check_options(arguments.name, dict(text.split("=", 1) for text in arguments.option))
    elif arguments.command == "recipes" and arguments.action == "show":
        require_recipe(arguments.name)


def check_command(words: Sequence[str]) -> None:
    """One command of a block, with everything that can be said without running it."""
    match words:
        case ["headtune", *rest]:
            check_headtune(rest)
        case ["accelerate", "launch", *rest]:
            module = rest.index("-m")
            configs = [Path(rest[i + 1]) for i in range(module) if rest[i] == "--config_file"]
            assert all((ROOT / path).is_file() for path in configs), configs
            assert rest[module + 1] in ("headtune.train", "headtune.analysis"), rest
            check_headtune([*(["train"] if rest[module + 1] == "headtune.train" else []), *rest[module + 2 :]])
        case ["make", target, *_]:
            assert re.search(rf"^{re.escape(target)}:", (ROOT / "Makefile").read_text(), re.M), target
        case ["python", script, *rest] if script.endswith(".py"):
            # Some take their options from the module of the grid.
            source = "".join((ROOT / path).read_text() for path in (script, "benchmarks/grid.py"))
            missing = [word for word in rest if word.startswith("--") and f'"{word.split("=")[0]}"' not in source]
            assert not missing, f"{script} has no {missing}"
        case ["pip", "install", *packages]:
            for package in (name for name in packages if name.startswith("headtune[")):
                extras = package.removeprefix("headtune[").removesuffix("]").split(",")
                assert set(extras) <= set(EXTRAS), package
        case _:
            assert " ".join(words) in OTHERS, f"{' '.join(words)}: a command that nobody checks; see OTHERS"


def subparsers(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """A parser's commands by name."""
    found = (action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return dict(next(found, {}))


def check_mention(words: Sequence[str]) -> None:
    """A command in a sentence may be short of arguments: what is there has to exist."""
    if words[0] != "headtune":
        return check_command(words)
    if len(words) == 1 or words[1].isupper():
        return None
    parser = parser_of_all()
    for word in words[1:]:
        parser = subparsers(parser).get(word, parser)
    options = set(parser._option_string_actions)
    assert words[1] in subparsers(parser_of_all()) or words[1] in options, words
    unknown = [word for word in words[2:] if re.match(r"--?[a-z]", word) and word.split("=")[0] not in options]
    assert not unknown, f"headtune {words[1]} has no {unknown}"
    if words[1] in ("train", "plan", "sweep") and len(words) > 2 and words[2] in recipe.recipe_names():
        require_recipe(words[2], *(word for word in words[3:] if re.match(r"[a-z_.]+=", word)))
    return None


def test_commands_of_pages() -> None:
    for page in PAGES:
        for words in documents.commands(page):
            check_command(words)
        for words in documents.mentions(page):
            check_mention(words)


@pytest.mark.parametrize("folder", ["recipes", "accelerate_configs"])
def test_commands_in_the_heads_of_recipes_and_launch_files(folder: str) -> None:
    found = 0
    for path in sorted((ROOT / folder).rglob("*.yaml")):
        for line in re.findall(r"^# {2,}((?:headtune|accelerate) .*)$", path.read_text(encoding="utf-8"), re.M):
            words = documents.words(line)
            if "ACCELERATE_USE_CPU=true" not in line and not any("machine" in word for word in words):
                check_command(words)
                found += 1
    assert found > 10


def test_every_recipe_is_on_the_page_of_recipes() -> None:
    names = recipe.recipe_names()
    assert len(names) == RECIPES
    front = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    for name in names:
        family, own = name.split("/")
        assert f"`{own}`" in front and f"{family}/README.md" in front, f"{name} is not in docs/recipes.md"


RECIPES = 40


def test_recipes_and_data_shown_on_pages() -> None:
    """YAML and JSON are such, and what is a recipe is one that loads."""
    for page, block in [(each, block) for each in PAGES for block in documents.blocks(each)]:
        if block.language == "yaml" or block.text.startswith("recipe: "):
            data = recipe.read_yaml(block.text)
            if isinstance(data, dict) and data.get("recipe", "FAMILY") not in PLACEHOLDERS:
                recipe.parse(data, documents.name(page))
        elif block.language == "json":
            json.loads(block.text)
        elif block.language in ("jsonl",):
            assert all(json.loads(line) for line in block.text.splitlines() if line)


# --- links ------------------------------------------------------------------------------------------------------------


def test_links_of_pages() -> None:
    for page, link in [(each, link) for each in PAGES for link in documents.links(each)]:
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        name = f"{documents.name(page)}: {link}"
        assert target.exists(), f"{name}: nothing is there"
        assert target.is_relative_to(ROOT), f"{name} leads out of the repository"
        text = target.read_text(encoding="utf-8") if anchor else ""
        assert not anchor or anchor in documents.anchors(text), f"{name}: no such heading"


def test_every_page_of_the_site_is_in_its_navigation() -> None:
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))

    def leaves(node: Any) -> list[str]:
        if isinstance(node, str):
            return [node]
        return [leaf for child in (node.values() if isinstance(node, dict) else node) for leaf in leaves(child)]

    docs = ROOT / "docs"
    written = {path.relative_to(docs).as_posix() for path in docs.rglob("*.md")}
    assert sorted(leaves(config["nav"])) == sorted(written | set(documents.site_pages().pages()))


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="argparse of Python 3.13 prints options another way")
def test_the_reference_pages_are_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    for place, text in documents.site_pages().reference().items():
        assert (ROOT / "docs" / place).read_text(encoding="utf-8") == text, f"docs/{place}: run make reference"


def test_links_to_the_notebook_lead_to_its_page_on_the_site() -> None:
    turned = documents.site_pages().turned
    assert turned("[q](quickstart.ipynb)", "index.md") == "[q](quickstart.md)"
    assert turned("[q](../quickstart.ipynb)", "howto/own-data.md") == "[q](../quickstart.md)"


@pytest.mark.slow
def test_the_site_builds_strictly(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="pip install headtune[docs]")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    assert (tmp_path / "site" / "recipes" / "lofit" / "index.html").is_file()
    assert "method.select_only" in (tmp_path / "site" / "reference" / "recipe" / "index.html").read_text()


# --- code -------------------------------------------------------------------------------------------------------------

SMALL = ["training.max_steps=2", "task.max_train_examples=8", "task.max_eval_examples=4", "evaluation.n_items=1"]
TINY = [*SMALL, "training.use_cpu=true", "heads={list: [[0, 1], [2, 3]]}", "method.answer_set={own_lists: 0.0}"]
# Python that is shown and not run here, with the reason.
SHOWN = {
    "docs/howto/serving.md": "loads what the commands above it wrote",
    "recipes/steer/README.md": "needs a model that learns from examples, which a tiny one does not",
    "docs/howto/your-trainer.md": "test_trl_page.py runs it, with its data and its commands",
    "docs/howto/plugins.md": "modules of their own, which test_plugins.py runs",
    "docs/howto/other-libraries.md": "other libraries, which test_other_libraries.py runs",
}


@pytest.fixture
def stand_in(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What is put in the place of the real model, its tasks and the sizes of a run."""
    task = tmp_path_factory.mktemp("stand_in") / "cities.jsonl"
    task.write_text(to_jsonl(tiny.tiny_task().examples))
    return {
        '"smollm2-135m"': repr(str(tiny_llama)),
        '"country_cities"': repr(str(task)),
        '"country_cities:train"': repr(f"{task}:train"),
        ".limited(40)": ".limited(4)",
        # No head of a random model is confirmed in a role.
        'from_head_set(result.heads, role="both", top=4)': "from_head_set(confirmed, role='both', top=1)",
        '"training.max_steps=20"': ", ".join(map(repr, [*TINY, f"model.name={tiny_llama}", f"task.train={task}"])),
    }


def run(
    page: Path, swapped: dict[str, str], monkeypatch: pytest.MonkeyPatch, folder: Path, sources: Sequence[str] = ()
) -> dict[str, Any]:
    """The Python blocks of a page, or these, in order, as a reader would run them."""
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {"confirmed": head_set({"n_layers": 3, "n_heads": 4})}
    texts = sources or [block.text for block in documents.blocks(page) if block.language == "python"]
    for number, source in enumerate(texts, start=1):
        for old, new in swapped.items():
            source = source.replace(old, new)
        exec(compile(source, f"{documents.name(page)}, block {number}", "exec"), names)
    return names


# They train and export, or identify and study.
LONG = {"docs/howto/python.md", "analysis/README.md"}


def with_python() -> list[Any]:
    return [
        pytest.param(page, id=documents.name(page), marks=[pytest.mark.slow] * (documents.name(page) in LONG))
        for page in PAGES
        if any(block.language == "python" for block in documents.blocks(page))
    ]


@pytest.mark.parametrize("page", with_python())
def test_python_of_a_page_on_a_tiny_model(
    page: Path, stand_in: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if documents.name(page) in SHOWN:
        for block in documents.blocks(page):
            assert block.language != "python" or compile(block.text, documents.name(page), "exec")
        return
    monkeypatch.setenv("WANDB_MODE", "disabled")
    if page.parent.name == "analysis":  # names heads of layers 23 and 29
        shape = {"num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 9, "hidden_size": 36}
        stand_in['"smollm2-135m"'] = repr(str(tiny.save_tiny(tmp_path / "model", "llama", **shape)))
    names = run(page, stand_in, monkeypatch, tmp_path)
    if page.parent.name == "analysis":
        assert names["logits"].shape[0] == 4
        assert (tmp_path / "runs/example-heads/heads.json").is_file()
        assert (tmp_path / "runs/example-paths/report.html").is_file()


# --- walks: a page's commands in order --------------------------------------------------------------------------------

OWN_DATA = ROOT / "docs" / "howto" / "own-data.md"


SHORT = {"identify": ["--max-examples", "8"], "export": ["--prompts", "2"]}


def walk(folder: Path, model: str, small: Sequence[str], last: str) -> None:
    """The commands of the page on one's own model and data, in `folder`, up to the command `last`."""
    for block in documents.blocks(OWN_DATA):
        for name in ("facts.json", "templates.json"):
            if block.language == "json" and f'title="{name}"' in block.head:
                (folder / name).write_text(block.text, encoding="utf-8")
    done = []
    for words in documents.commands(OWN_DATA):
        if words[0] != "headtune":
            continue
        words = [word.replace("MODEL", model) for word in words[1:]]
        added = [*small] if words[0] == "train" else SHORT.get(words[0], [])
        assert main.main([*words, *added]) == 0, words
        done.append(words[0])
        if words[0] == last:
            break
    assert done[:4] == ["task", "task", "identify", "train"] and done[-1] == last


@pytest.mark.slow
def test_own_model_and_data_on_a_tiny_model(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.chdir(tmp_path)
    walk(tmp_path, str(tiny_llama), TINY, "export")
    assert (tmp_path / "runs/cities/evaluation.json").is_file()
    assert json.loads((tmp_path / "cities-model/export.json").read_text())["identical_generations"] >= 1


# --- the notebook -----------------------------------------------------------------------------------------------------

NOTEBOOK = ROOT / "docs" / "quickstart.ipynb"


def test_the_notebook_was_run_from_top_to_bottom() -> None:
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert not any(output["output_type"] == "error" for cell in cells for output in cell["outputs"])
    assert str(ROOT) not in NOTEBOOK.read_text()


@pytest.mark.slow
def test_the_cells_of_the_notebook_on_a_tiny_model(
    stand_in: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its numbers are the real model's (`make notebook`); that every line still runs is checked here."""
    pytest.importorskip("IPython", reason="pip install headtune[docs]")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    (settings,) = (key for key in stand_in if "max_steps" in key)
    swapped = {key: value for key, value in stand_in.items() if key != settings}
    swapped |= {'["training.learning_rate=0.2"]': f'["training.learning_rate=0.2", {stand_in[settings]}]'}
    swapped |= {
        "heads={from: runs/heads, role: suppression, top: 2}": "heads={list: [[0, 1], [2, 3]]}",
        "heads={control: {like: runs/heads, kind: random}, role: suppression, top: 2}": "heads={list: [[0, 2]]}",
    }
    swapped |= {'"recall", 3': '"recall"', '"suppression", 2': '"suppression"'}  # its heads may be none
    run(NOTEBOOK, swapped, monkeypatch, tmp_path, ["".join(cell["source"]) for cell in cells])
    assert (tmp_path / "cities-model" / "export.json").is_file()
