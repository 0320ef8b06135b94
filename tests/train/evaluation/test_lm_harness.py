"""lm-evaluation-harness measures a model with its adapter on; a task with local data needs no network."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from headtune.analysis.utils.errors import InputError
from headtune.cli.main import main
from headtune.train.evaluation import lm_harness
from headtune.train.evaluation.lm_harness import HarnessTasks, metrics_of, parse_tasks
from helpers.small_runs import train, write_recipe
from helpers.tiny import FACTS

needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed: pip install lm_eval"
)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names are checked without the package."""
    monkeypatch.setattr(lm_harness, "_installed", lambda: True)


@pytest.fixture
def task_folder(tmp_path: Path) -> Path:
    """A multiple-choice task of the harness, whose data lie beside it: which city belongs to a country?"""
    folder = tmp_path / "tasks"
    folder.mkdir()
    cities = [next(iter(answers)) for answers in FACTS.values()]
    rows = [{"question": f"Some city in {name}:", "choices": cities, "answer": i} for i, name in enumerate(FACTS)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "cities.yaml").write_text(
        "task: tiny_cities\noutput_type: multiple_choice\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {folder / 'rows.jsonl'}}}\ntest_split: train\n"
        'doc_to_text: "{{question}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: "{{answer}}"\n'
        "metric_list: [{metric: acc}]\nmetadata: {version: 2}\n"
    )
    return folder


@pytest.mark.slow
@needs_harness
def test_a_run_is_measured_with_its_adapter_on(
    tiny_llama: Path, task_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Trained on these very questions, it answers more of them than its base; the command keeps what was measured."""
    assert train(write_recipe(tmp_path, tiny_llama), "training.max_steps=40", "task.kind=exact_match") == 0
    capsys.readouterr()
    out = tmp_path / "measured"
    words = ["--lm-eval", str(task_folder), "--json"]
    assert main(["evaluate", str(tmp_path / "run"), *words, "--out", str(out)]) == 0
    tuned = json.loads(capsys.readouterr().out)
    assert main(["evaluate", str(tiny_llama), *words]) == 0
    base = json.loads(capsys.readouterr().out)
    accuracy = tuned["metrics"]["tiny_cities/acc"]
    assert accuracy["mean"] > base["metrics"]["tiny_cities/acc"]["mean"], "the adapter is off"
    assert accuracy["ci"][0] <= accuracy["mean"] <= accuracy["ci"][1]
    assert tuned["metrics"]["n"] == {"examples": len(FACTS)} and tuned["task"] == "lm_eval cities"
    kept = json.loads((out / "evaluation.json").read_text())
    assert kept["metrics"] == tuned["metrics"] and kept["inputs"]["adapter"]["sha256"]
    facts = kept["task"]["lm_eval"]
    assert facts["tasks"] == {"tiny_cities": {"version": 2, "n_examples": len(FACTS), "num_fewshot": 0}}
    assert list(facts["files"]) == ["cities.yaml"] and facts["version"]
    # Limits, one file, the table.
    assert (
        main(["evaluate", str(tiny_llama), "--lm-eval", str(task_folder / "cities.yaml"), "--max-examples", "2"]) == 0
    )
    assert "tiny_cities: acc" in capsys.readouterr().out


@pytest.mark.slow
@needs_harness
def test_tasks_that_the_harness_cannot_measure_are_refused(
    tiny_llama: Path, task_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = task_folder / "cities.yaml"
    file.write_text(file.read_text().replace("rows.jsonl", "nothing.jsonl"))
    assert main(["evaluate", str(tiny_llama), "--lm-eval", str(task_folder)]) == 2
    message = " ".join(capsys.readouterr().err.split())
    assert "the harness stops with FileNotFoundError" in message and "nothing.jsonl" in message
    assert main(["evaluate", str(tiny_llama), "--lm-eval", f"tiny_citis,{file}"]) == 2
    assert "did you mean 'tiny_cities'?" in " ".join(capsys.readouterr().err.split())


def test_without_the_package_it_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(lm_harness, "_installed", lambda: False)
    assert main(["evaluate", "smollm2-135m", "--lm-eval", "arc_easy"]) == 2
    assert "which is not installed; pip install 'lm_eval>=0.4.13'" in " ".join(capsys.readouterr().err.split())


@pytest.mark.usefixtures("installed")
def test_one_of_task_and_harness(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["--task", "country_cities", "--lm-eval", "arc_easy"]):
        assert main(["evaluate", "smollm2-135m", *words]) == 2
        assert "--task NAME or --lm-eval TASKS, one of them" in " ".join(capsys.readouterr().err.split())
    for words in (["--items", "3"], ["--scoring", "harness"], ["--kind", "lists"], ["--preamble", "truthfulqa"]):
        assert main(["evaluate", "smollm2-135m", "--lm-eval", "arc_easy", *words]) == 2
        assert f"{words[0]} is for --task" in " ".join(capsys.readouterr().err.split())


@pytest.mark.usefixtures("installed")
def test_names_files_and_folders(task_folder: Path, tmp_path: Path) -> None:
    (task_folder / "_shared.yml").write_text("output_type: multiple_choice\n")
    file = task_folder / "cities.yaml"
    assert parse_tasks(f"arc_easy, {task_folder}") == HarnessTasks(("arc_easy",), (file,))
    assert parse_tasks(str(file)).label == "cities"
    (tmp_path / "empty").mkdir()
    refused = {
        "arc_easy,": "has an empty name",
        "arc_easy,arc_easy": "names a task twice",
        str(tmp_path / "empty"): "holds no task",
        str(tmp_path / "no.yaml"): "does not exist",
    }
    for text, message in refused.items():
        with pytest.raises(InputError, match=message):
            parse_tasks(text)


def test_a_task_file_is_read_and_not_run(tmp_path: Path) -> None:
    file = tmp_path / "task.yaml"
    file.write_text("task: mine\nprocess_docs: !function utils.process\n")
    assert lm_harness._task_of(file) == "mine"
    file.write_text("output_type: multiple_choice\n")
    with pytest.raises(InputError, match="no key 'task'"):
        lm_harness._task_of(file)
    file.write_text("task: [a\n")
    with pytest.raises(InputError, match="is not YAML"):
        lm_harness._task_of(file)
    group = tmp_path / "group.yaml"
    group.write_text("group: all_mine\ntask: [mine]\n")
    file.write_text("task: mine\n")
    assert lm_harness._task_of(group) == "all_mine"
    assert not lm_harness._includes([group, file]) and lm_harness._includes([group])


def test_metrics_of_the_harness_become_metrics_of_an_evaluation() -> None:
    results = {
        "arc": {"alias": "arc", "acc,none": 0.5, "acc_stderr,none": 0.1, "sample_len": 4},
        "gsm": {"exact_match,strict-match": 0.25, "exact_match_stderr,strict-match": "N/A", "name": "gsm"},
    }
    metrics = metrics_of(results)
    assert metrics["arc/acc"]["mean"] == 0.5 and metrics["arc/acc"]["ci"] == pytest.approx([0.304, 0.696])
    assert metrics["gsm/exact_match@strict-match"] == 0.25 and len(metrics) == 2
    with pytest.raises(InputError, match="is nan"):
        metrics_of({"arc": {"acc,none": float("nan")}})
