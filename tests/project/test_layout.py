"""How the code is laid out: size of rooms and modules, names, and where a stranger looks for something."""

from __future__ import annotations

import ast
import re
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.paths import ROOT

CODE = ("headtune/cli", "analysis", "train")
MODULES = sorted(path for folder in CODE for path in (ROOT / folder).rglob("*.py")) + sorted(ROOT.glob("headtune/*.py"))
# Words of a private language: as a name, each says nothing about what the thing is.
PRIVATE = frozenset(["found", "own", "where", "of", "given", "kept", "wanted", "say", "known", "said", "made", "told"])


def place(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_no_folder_is_a_crowd() -> None:
    sizes = Counter(path.parent for path in MODULES if not path.name.startswith("__"))
    assert {place(folder): size for folder, size in sizes.items() if size > 15} == {}


def test_no_module_is_long() -> None:
    lengths = {place(path): len(path.read_text(encoding="utf-8").splitlines()) for path in MODULES}
    assert {path: length for path, length in lengths.items() if length > 400} == {}


def names(scope: ast.AST) -> Iterator[str]:
    """Variables, parameters, attributes that are set, functions; a name once for each function that it stands in."""
    nodes, here = list(ast.iter_child_nodes(scope)), set()
    while nodes:
        node = nodes.pop()
        match node:
            case ast.FunctionDef(name=name):
                yield from [name, *names(node)]
                continue
            case ast.ClassDef():
                yield from names(node)
                continue
            case ast.Name(id=name, ctx=ast.Store()) | ast.arg(arg=name):
                here.add(name)
            case ast.Attribute(attr=name, ctx=ast.Store()):
                yield name
        nodes += ast.iter_child_nodes(node)
    yield from here


def test_names_are_the_field_s() -> None:
    private = Counter(
        place(path)
        for path in MODULES
        for name in names(ast.parse(path.read_text(encoding="utf-8")))
        if name.strip("_") in PRIVATE
    )
    assert private.total() < 40, private.most_common(20)


# What an engineer asks for, and where it is.
QUESTIONS = {
    "the LoFiT and JoLA adapter": "train/tuners/head_tuning/layer.py",
    "LoFiT's first stage, which chooses heads": "train/runs/first_stage.py",
    "how `heads:` of a recipe is resolved": "train/config/resolve_heads.py",
    "EWC, L2-SP": "train/losses/weight_penalties.py",
    "SEEKR's loss": "train/losses/attention_distillation.py",
    "SEEKR's run over the tasks": "train/continual/sequence.py",
    "where regularisers meet the trainer": "train/trainer/attach_regularisers.py",
    "attention sinks turned down, the MLP's intercept": "analysis/interventions/last_layer.py",
    "the logit lens": "analysis/interventions/logit_lens.py",
    "causal tracing": "analysis/interventions/causal_tracing.py",
    "exact ablation, many at a time": "analysis/interventions/last_token.py",
    "attribution patching": "analysis/methods/attribution_patching.py",
    "causal head gating": "analysis/methods/head_gating.py",
    "the model card": "train/export/model_card.py",
    "evaluation.json is written": "train/evaluation/evaluation_file.py",
    "runs are read back": "train/evaluation/run_reader.py",
    "messages for out of memory and a full disk": "train/trainer/failures.py",
    "exit codes": "headtune/cli/exits.py",
}


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_stranger_finds_it_by_its_name(question: str) -> None:
    path = ROOT / QUESTIONS[question]
    assert path.is_file() and ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


# --- docs/architecture.md ---------------------------------------------------------------------------------------------

PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


def test_every_room_has_a_line() -> None:
    rooms = {place(path.parent) + "/" for path in MODULES} | {
        "recipes/",
        "benchmarks/",
        "tests/",
        "accelerate_configs/",
    }
    assert set(re.findall(r"^\| `([\w/]+/)` \|", PAGE, re.M)) == rooms


def test_the_order_is_the_one_that_is_checked() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    for contract in contracts:
        assert " > ".join(layer.removeprefix("headtune.") for layer in contract["layers"]) in PAGE


def test_the_road_leads_past_what_is_there() -> None:
    """`module.py` `function`, in this order."""
    pairs = re.findall(r"`([\w/]+\.py)`(?: `(\w+)`)?", PAGE.replace("\n", " ").replace("   ", " "))
    assert len([name for _, name in pairs if name]) > 10
    for path, name in pairs:
        if "/" in path:
            tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
            defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
            assert not name or name in defined, f"{path} has no {name}"
