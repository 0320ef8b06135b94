"""Recipe steer with a few-shot prompt as offsets, its random control, and LoFiT from the same offsets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from headtune.analysis.heads.head_set import HeadSet
from headtune.analysis.tasks.task import to_jsonl
from headtune.analysis.utils.files import write_text
from headtune.train.runs.load_run import load_run
from headtune.train.tracking.lineage import tree_sha256
from headtune.train.tuners.head_tuning.start import read_offsets
from helpers.copying import copying_model, copying_task
from helpers.small_runs import train, write_recipe

SHOTS = {"shots": 2, "prompts": 5}
HEADS = {"in_context": SHOTS | {"scored": 3}, "top": 3}
METHOD = {"kind": "in_context", "factor": 0.5, **SHOTS}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and a task of 8 subjects, of which 5 are trained on."""
    path = tmp_path_factory.mktemp("copies")
    model = copying_model("llama", 14.0, num_key_value_heads=2)
    model.hf.save_pretrained(path / "model")
    model.tokenizer.save_pretrained(path / "model")
    write_text(path / "copies.jsonl", to_jsonl(copying_task().examples))
    return path


def recipe(folder: Path, out: Path, **changes: Any) -> Path:
    out.mkdir(exist_ok=True)
    task = {"train": str(folder / "copies.jsonl"), "kind": "exact_match"}
    return write_recipe(out, folder / "model", task=task, **changes)


def steer(folder: Path, out: Path, heads: dict[str, Any]) -> Path:
    return recipe(folder, out, recipe="steer", heads=heads, method=METHOD, training=None)


def test_a_few_shot_prompt_becomes_a_run_and_a_training_starts_there(folder: Path, tmp_path: Path) -> None:
    assert train(steer(folder, tmp_path / "a", HEADS)) == 0
    run = tmp_path / "a" / "run"
    state = json.loads((run / "run.json").read_text())
    chosen = HeadSet.load(run)
    assert chosen.method["name"] == "in_context" and chosen.method["parameters"]["prompts"] == 5
    effects = load_file(run / "scores.safetensors")["in_context.cie"]
    best = effects.flatten().argsort(descending=True, stable=True)[:3].tolist()
    assert chosen.top("selected") == [divmod(index, 4) for index in best]
    assert state["heads"] == sorted(list(pair) for pair in chosen.top("selected"))
    assert state["steering"]["kind"] == "in_context" and state["steering"]["prompts"] == 5  # training subjects alone
    assert state["steering"]["few_shot_accuracy"] > state["steering"]["chance"]
    offsets = read_offsets(run)
    assert [list(pair) for pair in offsets] == state["heads"] and all(value.any() for value in offsets.values())
    load_run(run)

    # The same on as many random heads of the same layers.
    assert train(steer(folder, tmp_path / "b", {"random": {"like": str(run)}, "top": 3})) == 0
    other = json.loads((tmp_path / "b" / "run" / "run.json").read_text())["heads"]
    assert sorted(layer for layer, _ in other) == sorted(layer for layer, _ in state["heads"])

    # LoFiT from these offsets, on two of the heads: a step of next to nothing leaves them where they are.
    method = {"objective": "sft", "scale": "none", "init_std": 1.0, "init": {"from": str(run)}}
    changes = {"recipe": "lofit", "heads": {"from": str(run), "top": 2}, "method": method}
    assert train(recipe(folder, tmp_path / "c", **changes), "training.learning_rate=1e-9") == 0
    inputs = json.loads((tmp_path / "c" / "run" / "run.json").read_text())["inputs"]
    assert inputs["start"]["sha256"] == tree_sha256(run / "adapter")
    started = read_offsets(tmp_path / "c" / "run")
    assert sorted(started) == sorted(chosen.top("selected")[:2])
    for head, value in started.items():
        torch.testing.assert_close(value, offsets[head], atol=1e-6, rtol=0)


def test_what_does_not_fit_is_refused_before_anything_is_written(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = steer(folder, tmp_path / "a", {"list": [[0, 1]]})
    assert train(shown, "method.shots=7") == 2
    assert "has 5 subjects, and 7 examples before a question need 8" in capsys.readouterr().err
    assert train(steer(folder, tmp_path / "d", HEADS | {"in_context": {"shots": 6}})) == 2
    assert "has 5 subjects, and 6 examples before a question need 7" in capsys.readouterr().err
    assert not any((tmp_path / name / "run").exists() for name in "ad")
    assert train(recipe(folder, tmp_path / "b", method={"init": {"from": str(tmp_path)}})) == 2
    assert "holds no adapter to start from" in capsys.readouterr().err
    assert not (tmp_path / "b" / "run").exists()
    assert train(recipe(folder, tmp_path / "c", method={"offset": False, "init": {"from": "runs/x"}})) == 2
    assert "method.init starts offsets" in capsys.readouterr().err
