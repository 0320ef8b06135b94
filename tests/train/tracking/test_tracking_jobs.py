"""What each job type leaves in W&B: keys, axes, tables, images, artifacts, and the way from an export to the heads."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from headtune.analysis.synthetic.planted import Planting, plant
from headtune.analysis.tasks.task import to_jsonl
from headtune.analysis.utils.files import sha256_of
from headtune.cli.main import main
from headtune.train.config.recipe import load_recipe
from headtune.train.tracking import lineage
from headtune.train.tracking.wandb_offline import offline_runs, records
from helpers.small_runs import STEPS, train, write_recipe

pytestmark = pytest.mark.slow  # a run of each job type, which all tests here look at
JOBS = ("identify", "train", "evaluate", "export")
SFT = {"objective": "sft"}
LOFIT = {"lofit": {"max_steps": 2}, "top": 2, "role": "selected"}


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One run of every job type on a planted model, whose heads are found: folders heads, run, cities, out."""
    folder = tmp_path_factory.mktemp("study")
    planted = plant(Planting("gqa"))
    planted.model.save_pretrained(folder / "model")
    planted.tokenizer.save_pretrained(folder / "model")
    (folder / "cities.jsonl").write_text(to_jsonl(planted.task.examples), encoding="utf-8")
    filed = {"project": "p", "group": "study", "tags": ["quick"], "wandb": "offline"}
    with pytest.MonkeyPatch.context() as patch:
        for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL", "RANK"):
            patch.delenv(name, raising=False)
        patch.setenv("WANDB_CACHE_DIR", str(folder / ".cache"))
        patch.setenv("WANDB_CONFIG_DIR", str(folder / ".config"))
        task, heads, model = str(folder / "cities.jsonl"), str(folder / "heads"), folder / "model"
        words = ["--task", task, "--method", "dla", "--top", "2", "--max-examples", "12", "--out", heads]
        assert main(["identify", str(model), *words, "--project", "p", "--group", "study"]) == 0
        chosen = {"from": heads, "top": 2}
        run, out = str(folder / "run"), str(folder / "out")
        data = {"train": task, "max_eval_examples": 4, "kind": "exact_match"}
        assert (
            train(write_recipe(folder, model, heads=chosen, task=data, method=SFT, tracking=filed, name="first")) == 0
        )
        words = ["--task", task, "--items", "1", "--max-examples", "4", "--out", str(folder / "cities")]
        assert main(["evaluate", run, *words]) == 0
        assert main(["export", run, out, "--prompts", "2"]) == 0
    yield folder


def told(file: Path) -> dict[str, Any]:
    """A run as its records tell it: `run`, `config`, `history` (items), `summary`, `metrics`, `artifacts`, `exit`."""
    found: dict[str, Any] = {"config": {}, "history": [], "summary": {}, "metrics": {}, "artifacts": {}}
    for record in records(file):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found["run"] = record.run
            found["config"] |= {entry.key: json.loads(entry.value_json) for entry in record.run.config.update}
        elif kind == "config":
            found["config"] |= {key_of(entry): json.loads(entry.value_json) for entry in record.config.update}
        elif kind == "history":
            found["history"].append({key_of(item): json.loads(item.value_json) for item in record.history.item})
        elif kind == "summary":
            found["summary"] |= {key_of(item): json.loads(item.value_json) for item in record.summary.update}
        elif kind == "metric":
            found["metrics"][record.metric.name or record.metric.glob_name] = record.metric.step_metric
        elif kind == "artifact":
            found["artifacts"][record.artifact.type] = record.artifact
        elif kind == "exit":
            found["exit"] = record.exit.exit_code
    return found


def key_of(item: Any) -> str:
    return item.key or ".".join(item.nested_key)


@pytest.fixture(scope="module")
def jobs(study: Path) -> dict[str, dict[str, Any]]:
    found = [told(file) for file in study.rglob("offline-run-*/run-*.wandb")]
    assert len(found) == len(JOBS)
    return {one["run"].job_type: one for one in found}


def test_every_job_is_filed_alike_and_ends_well(jobs: dict[str, dict[str, Any]], study: Path) -> None:
    assert set(jobs) == set(JOBS)
    for job, found in jobs.items():
        run = found["run"]
        assert (run.project, run.run_group, found["exit"]) == ("p", "study", 0), job
        assert set(lineage.PINNED) <= found["config"].keys(), job
    assert all(list(jobs[job]["run"].tags) == ["lofit", "quick"] for job in ("train", "evaluate", "export"))
    names = {job: found["run"].display_name for job, found in jobs.items()}
    assert names == {"identify": "heads", "train": "first", "evaluate": "first-cities", "export": "first-export"}


def test_pinned_keys_say_what_was_tuned(jobs: dict[str, dict[str, Any]], study: Path) -> None:
    state = json.loads((study / "run" / "run.json").read_text())
    names = " ".join(f"L{layer}H{head}" for layer, head in state["heads"])
    for job in ("train", "evaluate", "export"):
        config = jobs[job]["config"]
        assert [config[key] for key in lineage.PINNED] == [
            "lofit",
            names,
            len(state["heads"]),
            "both",
            state["parameters"],
        ]
        assert config["heads_block"] == {"from": str(study / "heads"), "role": "both", "top": 2}
        assert config["training"]["max_steps"] == STEPS and config["seed"] == 0
    assert jobs["evaluate"]["config"]["run"] == jobs["export"]["config"]["run"] == jobs["train"]["run"].run_id
    assert jobs["identify"]["config"]["role"] == "recall suppression"


def test_media_of_every_job(jobs: dict[str, dict[str, Any]], study: Path) -> None:
    kinds = {
        job: {
            key.removesuffix("._type"): value
            for item in found["history"]
            for key, value in item.items()
            if key.endswith("._type")
        }
        for job, found in jobs.items()
    }
    tables = {job: {key for key, kind in of.items() if kind == "table-file"} for job, of in kinds.items()}
    images = {job: {key for key, kind in of.items() if kind == "image-file"} for job, of in kinds.items()}
    assert tables["identify"] == {"heads/scores", "heads/ranked"}
    assert tables["train"] == {"heads/scores", "heads/ranked", "heads/chosen", "before_after", "generations"}
    assert tables["evaluate"] == {"metrics", "generations"} and tables["export"] == {"files"}
    assert images["identify"] == images["train"] and {"heads/dla.target", "heads/dla.previous"} <= images["train"]

    (file,) = (study / "run" / "wandb").glob("offline-run-*/files/media/table/before_after_*")
    shown = json.loads(file.read_text())
    evaluation = json.loads((study / "run" / "evaluation.json").read_text())
    assert shown["columns"][:3] == ["metric", "before", "after"]
    assert {row[0] for row in shown["data"]} == evaluation["after"].keys() - {"n"}
    rate = next(row for row in shown["data"] if row[0] == "exact_match")
    assert rate[2] == evaluation["after"]["exact_match"]["mean"] and rate[3] == pytest.approx(rate[2] - rate[1])


def test_axes(jobs: dict[str, dict[str, Any]]) -> None:
    metrics = jobs["train"]["metrics"]
    assert metrics["*"] == "step" and metrics["train/epoch"] == "step" and "step" in metrics
    losses = {item["step"]: item["train/loss"] for item in jobs["train"]["history"] if "train/loss" in item}
    assert sorted(losses) == list(range(1, STEPS + 1))


def test_from_an_export_back_to_the_head_set_by_digests(jobs: dict[str, dict[str, Any]], study: Path) -> None:
    made = json.loads((study / "out" / "export.json").read_text())
    heads, adapter = made["inputs"]["heads"], made["inputs"]["adapter"]
    assert adapter["sha256"] == lineage.tree_sha256(study / "run" / "adapter")
    assert heads["sha256"] == sha256_of(study / "heads" / "heads.json")
    assert jobs["export"]["summary"]["outputs/export/sha256"] == sha256_of(study / "out" / "export.json")
    for job in ("export", "evaluate"):
        assert jobs[job]["config"]["inputs/adapter/sha256"] == adapter["sha256"]
        assert jobs[job]["config"]["inputs/heads/sha256"] == heads["sha256"]
    assert jobs["train"]["summary"]["outputs/adapter/sha256"] == adapter["sha256"]
    assert jobs["train"]["config"]["inputs/heads/sha256"] == heads["sha256"]
    assert jobs["identify"]["summary"]["outputs/heads/sha256"] == heads["sha256"]
    state = json.loads((study / "run" / "run.json").read_text())
    assert state["inputs"]["heads"] == heads == {"name": "heads-heads", "sha256": heads["sha256"]}

    artifacts = {job: found["artifacts"] for job, found in jobs.items()}
    assert artifacts["identify"]["heads"].name == heads["name"]
    assert artifacts["train"]["adapter"].name == adapter["name"] == "first-adapter"
    assert {"evaluation"} <= artifacts["evaluate"].keys() and {"export"} <= artifacts["export"].keys()
    kept = [Path(entry.local_path) for entry in artifacts["export"]["export"].manifest.contents]
    assert [path.is_relative_to(study / "run") and path.is_file() for path in kept] == [True]
    assert not (study / "out" / "wandb").exists() and not (study / "out" / "metrics.jsonl").exists()


def test_the_kept_evaluation_is_what_is_printed(jobs: dict[str, dict[str, Any]], study: Path) -> None:
    kept = json.loads((study / "cities" / "evaluation.json").read_text())
    (line,) = [json.loads(line) for line in (study / "cities" / "metrics.jsonl").read_text().splitlines()]
    rate = kept["metrics"]["exact_match"]["mean"]
    assert line["evaluate/exact_match"] == rate == jobs["evaluate"]["summary"]["evaluate/exact_match"]
    assert kept["task"]["n_examples"] == len(kept["generations"]) > 0


def test_an_evaluation_is_not_written_over(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["evaluate", str(study / "run"), "--task", "country_cities", "--out", str(study / "cities")]
    assert main(words) == 2
    assert "not empty; choose another --out" in capsys.readouterr().err


@pytest.mark.slow
def test_wandbs_own_reader_finds_the_same(jobs: dict[str, dict[str, Any]], study: Path) -> None:
    for folder in study.rglob("offline-run-*"):
        command = [str(Path(sys.executable).parent / "wandb"), "leet", "inspect", "--json", str(folder)]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        read = [json.loads(line) for line in output.splitlines()]
        run = next(record["run"] for record in read if record["type"] == "run")
        mine = jobs[run["job_type"]]
        assert (run["run_id"], run["run_group"]) == (mine["run"].run_id, "study")
        history = [record["history"]["item"] for record in read if record["type"] == "history"]
        assert [item.keys() for item in history] == [item.keys() for item in mine["history"]]
        artifacts = {record["artifact"]["type"] for record in read if record["type"] == "artifact"}
        assert artifacts == mine["artifacts"].keys()


def test_the_first_stage_of_lofit_has_an_axis_of_its_own(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    recipe = write_recipe(tmp_path, tiny_llama, heads=LOFIT, tracking={"wandb": "offline"})
    assert train(recipe, "method.select_only=true") == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    stage = [line for line in lines if "select/loss" in line]
    assert [line["select/step"] for line in stage] == [1, 2] and all(line["step"] is None for line in stage)
    assert all(line["select/l1"] > 0 for line in stage) and not any("train/loss" in line for line in lines)
    (file,) = tmp_path.rglob("offline-run-*/run-*.wandb")
    found = told(file)
    assert found["metrics"]["select/loss"] == "select/step" and found["metrics"]["select/step"] == "select/step"
    assert found["config"]["K"] == 2 and found["config"]["role"] == "selected"


def test_seeds_of_a_recipe_share_a_group_and_other_recipes_do_not(tmp_path: Path, tiny_llama: Path) -> None:
    path = str(write_recipe(tmp_path, tiny_llama, tracking=None))
    groups = [
        lineage.group_of(load_recipe(path, words))
        for words in (["seed=0"], ["seed=1", "name=x", "output_dir=y", "tracking.tags=[a]"], ["training.max_steps=5"])
    ]
    assert groups[0] == groups[1] != groups[2] and groups[0].startswith("lofit-")
    assert lineage.group_of(load_recipe(path, ["tracking.group=study"])) == "study"


def test_a_resumed_run_keeps_its_id_and_its_inputs(study: Path, tmp_path: Path) -> None:
    heads = {"from": str(study / "heads"), "top": 2}
    data = {"train": str(study / "cities.jsonl"), "max_eval_examples": 2, "kind": "exact_match"}
    path = write_recipe(tmp_path, study / "model", heads=heads, task=data, method=SFT, tracking={"wandb": "offline"})
    assert train(path) == 0
    file = tmp_path / "run" / "run.json"
    state = json.loads(file.read_text())
    file.write_text(json.dumps(state | {"state": "failed", "inputs": {"heads": {"name": "n", "sha256": "0"}}}))
    assert train(path, "--resume") == 0
    again = json.loads(file.read_text())
    assert again["wandb_id"] == state["wandb_id"] and again["inputs"]["heads"]["sha256"] == "0"
    first, second = offline_runs(tmp_path / "run")
    assert first.id == second.id == state["wandb_id"]
    recipe = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    assert first.group == second.group and first.group.startswith(f"{recipe['recipe']}-")
