"""The whole road on the embedded model, and its export in an environment that has never seen headtune."""

from __future__ import annotations

import json
import subprocess
import sys
import venv
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from headtune.cli.main import main

LOAD = """
import importlib.util, json, sys
import torch, transformers
tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[1])
model, info = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)
tokens = tokenizer("List five cities in Italy.\\n1. Rome\\n2.", return_tensors="pt")
with torch.no_grad():
    top = model(**tokens).logits[0, -1].topk(5).values.tolist()
problems = {name: sorted(map(str, keys)) for name, keys in info.items() if keys}
there = [name for name in ("headtune", "peft", "trl", "accelerate") if importlib.util.find_spec(name)]
print(json.dumps({"problems": problems, "top": top, "there": there}))
"""


def load_with(python: Path, folder: Path) -> dict[str, Any]:
    """What an interpreter makes of an exported folder."""
    done = subprocess.run([python, "-I", "-c", LOAD, str(folder)], capture_output=True, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "demo"
    assert main(["demo", "--quick", "--out", str(folder)]) == 0
    return folder


@pytest.mark.slow
def test_demo_leaves_what_it_promises(quick: Path) -> None:
    heads = json.loads((quick / "heads" / "heads.json").read_text())
    assert heads["model"]["name"] == "smollm2-135m" and any(heads["roles"].values())
    run = json.loads((quick / "run" / "run.json").read_text())
    assert run["state"] == "done" and 0 < run["parameters_share"] < 1e-3
    evaluation = json.loads((quick / "run" / "evaluation.json").read_text())
    assert evaluation["task"] == "one_to_many:test"
    rates = [evaluation["after"][f"{kind}_rate"]["mean"] for kind in ("repeat", "correct_new", "wrong", "missing")]
    assert sum(rates) == pytest.approx(1)
    assert any(e["before"] != e["after"] for e in evaluation["examples"]) or evaluation["before"] != evaluation["after"]
    assert "<html" in (quick / "run" / "report.html").read_text()
    # One number a head, beside as many random heads of the same layers.
    random = json.loads((quick / "random" / "run.json").read_text())
    assert run["parameters"] == len(run["heads"]) == len(random["heads"]) == random["parameters"]
    roles = {(head["layer"], head["head"]) for entries in heads["roles"].values() for head in entries}
    assert {tuple(head) for head in run["heads"]} <= roles and not {tuple(head) for head in random["heads"]} & roles


@pytest.mark.slow
def test_export_of_the_real_model_is_proven(quick: Path) -> None:
    proof = json.loads((quick / "export" / "export.json").read_text())
    assert proof["passed"] and proof["max_logit_difference"] < 1e-3
    assert proof["prompts"] == proof["identical_generations"] == 20
    config = json.loads((quick / "export" / "config.json").read_text())
    assert config["model_type"] == "llama" and not config["attention_bias"]


def required_by(*packages: str) -> set[str]:
    """These packages and all that they require, however far, without extras."""
    found: set[str] = set()
    waiting = [*packages]
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name in found:
            continue
        found.add(name)
        needs = map(Requirement, metadata.requires(name) or ())
        waiting += [need.name for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
    return found


def environment_of(folder: Path, *packages: str) -> Path:
    """The interpreter of a new environment that has these packages and what they require, as links, and no other."""
    venv.create(folder, with_pip=False)
    (site,) = folder.glob("lib/python*/site-packages")
    for package in required_by(*packages):
        found = metadata.distribution(package)
        own = {file.parts[0] for file in found.files or () if file.parts[0] not in ("..", "__pycache__")}
        assert own, package
        for name in own:
            if not (site / name).exists():  # nvidia and the like are one folder of several packages
                (site / name).symlink_to(found.locate_file(name))
    return folder / "bin" / "python"


@pytest.mark.slow
def test_export_loads_where_headtune_is_not_installed(quick: Path, tmp_path: Path) -> None:
    fresh = load_with(environment_of(tmp_path / "venv", "torch", "transformers"), quick / "export")
    assert not fresh["there"] and not fresh["problems"]
    assert fresh["top"] == pytest.approx(load_with(Path(sys.executable), quick / "export")["top"], abs=1e-3)
