"""The dry run and what it shows of the first batch: what the loss is taken on, and nothing else marked."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from headtune.analysis.models import loading
from headtune.analysis.tasks.task import Example, to_jsonl
from headtune.cli import tables
from headtune.train.config.recipe import load_recipe
from headtune.train.runs import batch_preview
from headtune.train.runs.run import run_recipe
from headtune.train.trainer import penalised_trainers
from helpers.small_runs import head_set, train, write_recipe, write_sequence_recipe, write_task
from helpers.tiny import save_tiny


@pytest.fixture(autouse=True)
def own_place(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADTUNE_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.chdir(tmp_path)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def dry(recipe: Path, capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    """What `--dry-run --json` says; nothing may have been written."""
    before = files(recipe.parent)
    capsys.readouterr()
    assert train(recipe, "--dry-run", "--json", *words) == 0
    assert files(recipe.parent) == before
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def write_preferences(folder: Path) -> Path:
    rows = [
        Example(f"Cities in {name}:\n-", name, (right,), incorrect=(wrong,))
        for name, right, wrong in (("Italy", "Rome", "Paris"), ("France", "Paris", "Rome"), ("Spain", "Madrid", "Rome"))
        for _ in range(2)
    ]
    path = folder / "preferences.jsonl"
    path.write_text(to_jsonl(rows), encoding="utf-8")
    return path


def test_an_answer_set(tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = dry(write_recipe(tmp_path, tiny_llama), capsys)
    assert found["steps"] == 4 and found["batch"] == 4 and found["heads"] == "3: L0H1 L2H0 L2H3"
    assert sum(found["parameters"].values()) == 3 * 2 * 8 and "train" in found["memory"]
    task = {example.prompt: example for example in load_examples(tmp_path)}
    for row in found["batch_rows"]:
        assert not any(learnt for _, learnt in row["parts"]), "the prompt itself is not learnt"
        example = task["".join(part for part, _ in row["parts"])]
        assert len(row["right"]) > 0 and all(
            any(a.startswith(t.strip()) for a in example.remaining) for t in row["right"]
        )
        assert all(any(a.startswith(t.strip()) for a in example.previous) for t in row["given"])


def load_examples(folder: Path) -> list[Example]:
    from headtune.analysis.tasks.loading import load_task

    return list(load_task(str(folder / "cities.jsonl")).examples)


@pytest.mark.parametrize(("kind", "end"), [("lists", "\n"), ("exact_match", "\n<eos>")])
def test_completions(kind: str, end: str, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = {"train": str(write_task(tmp_path)), "kind": kind}
    recipe = write_recipe(tmp_path, tiny_llama, task=task, method={"objective": "sft"}, training={"use_cpu": True})
    found = dry(recipe, capsys)
    examples = load_examples(tmp_path)
    for row in found["batch_rows"]:
        (prompt, learnt_before), (answer, learnt) = row["parts"]
        assert not learnt_before and learnt
        example = next(example for example in examples if example.prompt == prompt)
        assert answer.endswith(end) and answer.removesuffix(end).strip() in example.remaining
    # Three epochs of the training subjects' prompts, sixteen a step.
    assert found["steps"] == 3 * -(-found["train_examples"] // 16)


def test_both_sides_of_preferences(tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = {"train": str(write_preferences(tmp_path)), "kind": "exact_match"}
    recipe = write_recipe(tmp_path, tiny_llama, method={"objective": "dpo"}, task=task)
    found = dry(recipe, capsys)
    rows = found["batch_rows"]
    assert [row["side"] for row in rows] == ["chosen"] * (len(rows) // 2) + ["rejected"] * (len(rows) // 2)
    right = {"Italy": "Rome", "France": "Paris", "Spain": "Madrid"}
    for row in rows:
        (prompt, _), (answer, learnt) = row["parts"]
        subject = next(name for name in right if name in prompt)
        assert learnt and (answer.strip().removesuffix("<eos>").strip() == right[subject]) == (row["side"] == "chosen")
    capsys.readouterr()
    assert train(recipe, "--dry-run") == 0
    printed = capsys.readouterr().out
    assert "1 chosen: Cities in" in printed and "1 rejected: Cities in" in printed and "[[" in printed


def test_a_sequence_and_steering(tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_sequence_recipe(tmp_path, tiny_llama, {})
    found = dry(recipe, capsys)
    assert found["steps"] == 3 * 20 and found["train_examples"] == 3 * 8
    assert all([learnt for _, learnt in row["parts"]] == [False, True] for row in found["batch_rows"])
    steer = write_recipe(tmp_path, tiny_llama, recipe="steer", method={}, training=None)
    found = dry(steer, capsys)
    assert found["parameters"] == {} and any("trains nothing" in note for note in found["notes"])


def test_heads_that_are_yet_to_be_found(tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(tmp_path, tiny_llama, heads={"identify": {"max_examples": 4}, "top": 2, "role": "both"})
    found = dry(recipe, capsys)
    assert found["heads"] == "up to 4, to be found by identify"
    assert sum(found["parameters"].values()) == 4 * 2 * 8


def test_the_batch_is_the_one_that_is_trained_on_first(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write_recipe(tmp_path, tiny_llama, method={"objective": "sft"})
    found = dry(recipe, capsys)
    seen: list[Any] = []
    right = penalised_trainers.SFT.compute_loss

    def spy(self: Any, model: Any, inputs: dict[str, torch.Tensor], *more: Any, **options: Any) -> Any:
        seen.append(batch_preview.rows_of(inputs, self.processing_class))
        return right(self, model, inputs, *more, **options)

    monkeypatch.setattr(penalised_trainers.SFT, "compute_loss", spy)
    run_recipe(load_recipe(str(recipe)))
    assert [[list(part) for part in row.parts] for row in seen[0]] == [row["parts"] for row in found["batch_rows"]]


def test_the_parts_of_the_data_and_the_score_are_named(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path, tiny_llama)
    words = dry(recipe, capsys)["tasks"]
    assert words.endswith(
        "cities.jsonl split by subject (seed 0): cities:train is learnt, cities:test held out, "
        "validation (1 subject) in neither, scored as lists of 1"
    )
    other = ["task.eval=country_cities:test", "task.kind=exact_match", "task.max_eval_examples=4"]
    two = dry(recipe, capsys, "task.split.by=file", *other)
    assert two["tasks"] == ("cities and country_cities:test as they are, scored by exact match of one answer")


def test_more_heads_than_identify_kept_are_refused(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = head_set(loading.load_model(str(tiny_llama)).identity())
    kept = replace(found, method=found.method | {"parameters": {"top": 2}})
    kept.save(tmp_path / "heads" / "heads.json")
    heads = f"heads={{from: {tmp_path / 'heads'}, role: both, top: %d}}"
    recipe = write_recipe(tmp_path, tiny_llama)
    for words in (["--dry-run"], []):
        assert train(recipe, heads % 500, *words) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert f"only 2 recall heads in {tmp_path / 'heads'}, top=500 asked" in error and "--top 500" in error
    assert not (tmp_path / "run").exists()
    notes = dry(recipe, capsys, heads % 2)["notes"]
    assert f"suppression heads confirmed in {tmp_path / 'heads'}: 1, fewer than top=2" in notes


@pytest.mark.parametrize(
    ("result", "stated"),
    [
        ({"verdict": "does not hold", "held": False}, "suppression does not hold"),
        ({"verdict": "cannot be told", "held": False}, "suppression cannot be told"),
        ({"held": False}, "suppression does not hold"),  # as version 0.1.0 wrote it
    ],
)
def test_heads_whose_own_check_failed_are_named(
    result: dict[str, Any], stated: str, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    heads_of_model = head_set(loading.load_model(str(tiny_llama)).identity())
    verdicts = {"recall": {"held": True, "reason": ""}, "suppression": result | {"reason": "no confirmed heads"}}
    replace(heads_of_model, verification={"dissociation": verdicts}).save(tmp_path / "heads" / "heads.json")
    recipe = write_recipe(tmp_path, tiny_llama)
    heads = f"heads={{from: {tmp_path / 'heads'}, role: %s, top: 1}}"
    [note] = [line for line in dry(recipe, capsys, heads % "both")["notes"] if "own check" in line]
    assert note.startswith(f"the head set's own check: {stated}, and these heads are trained. For suppression: ")
    assert "recall holds" not in note and "heads.role: recall" in note
    assert not any("own check" in line for line in dry(recipe, capsys, heads % "recall")["notes"])


def test_one_part_of_a_task_holds_nothing_out(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = write_recipe(tmp_path, tiny_llama, task={"train": "country_cities:train"})
    assert train(recipe, "--dry-run") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "it is task.train where it is not given" in error
    assert "give task.train=country_cities, which is split by subject, or task.eval=country_cities:test" in error


def test_refusals(tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(tmp_path, tiny_llama)
    for words, expected in (
        (["--config_file", "ddp.yaml"], "for one process"),
        (["heads={list: [[0, 9]]}"], "L0H9"),
        (["training.lr_scheduler_kwargs={x: 1}", "training.optim=adamw_8bit", "task.train=none.jsonl"], "'none.jsonl'"),
    ):
        assert train(recipe, "--dry-run", *words) == 2
        lines = capsys.readouterr().err.splitlines()
        assert expected in lines[-1], lines
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("mine")
    assert train(recipe, "--dry-run") == 2
    error = capsys.readouterr().err
    assert "exists and is not empty" in error and "or continue it with --resume" in error
    with pytest.raises(SystemExit):
        train(recipe, "--dry-run", "--resume")


# --- how a row is shown -----------------------------------------------------------------------------------------------

ROW = batch_preview.PreviewRow((("Cities:\n-", False), (" Rome\n", True)))


def test_brackets_and_colours() -> None:
    assert tables.batch_row(ROW, colour=False).plain == "Cities:↵\n-[[ Rome↵]]"
    coloured = tables.batch_row(ROW, colour=True)
    assert coloured.plain == "Cities:↵\n- Rome↵"
    assert [coloured.plain[span.start : span.end] for span in coloured.spans if span.style == tables.LEARNT] == [
        " Rome↵"
    ]
    sets = tables.batch_row(
        batch_preview.PreviewRow((("Cities:", False),), right=(" Rome", " Milan"), given=(" Pisa",)), colour=False
    )
    assert sets.plain == "Cities:\n  any of [[ Rome]] [[ Milan]]\n  none of [[ Pisa]]"


def test_a_terminal_is_not_obeyed() -> None:
    assert (
        tables.batch_row(batch_preview.PreviewRow((("\x1b[2J\x07", True),)), colour=False).plain == "[[\\x1b[2J\\x07]]"
    )


def test_padding_is_left_out(tokenizer: Any) -> None:
    tokens = tokenizer("Rome").input_ids
    pad = tokenizer.pad_token_id or 0
    batch = {
        "input_ids": torch.tensor([[pad, pad, *tokens]]),
        "attention_mask": torch.tensor([[0, 0] + [1] * len(tokens)]),
        "labels": torch.tensor([[-100, -100, *tokens]]),
    }
    assert batch_preview.rows_of(batch, tokenizer)[0].parts == (("Rome", True),)


@pytest.mark.parametrize(
    ("recipe", "method", "carries"),
    [
        ("lofit", {"answer_set": {"own_lists": 0.0}}, True),
        ("lofit", {"offset": False, "answer_set": {"own_lists": 0.0}}, False),
        ("jola", {"answer_set": {"own_lists": 0.0}}, True),
        ("steer", {"kind": "in_context", "shots": 2}, True),
        ("steer", {"kind": "scale"}, False),
        ("lora", {"answer_set": {"own_lists": 0.0}}, False),
    ],
)
def test_what_cannot_be_exported_is_said_before_it_is_trained(
    recipe: str, method: dict[str, Any], carries: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_tiny(tmp_path / "model", "mistral", sliding_window=8)
    blocks: dict[str, Any] = {"recipe": recipe, "method": method}
    if recipe == "lora":
        blocks["heads"] = None
    if recipe == "steer":
        blocks["training"] = None
    path = write_recipe(tmp_path, model, **blocks)
    line = "headtune export will not write a checkpoint of this run: this mistral attends within a sliding window of 8"
    notes = dry(path, capsys)["notes"]
    assert any(note.startswith(line) for note in notes) == carries, notes
    if recipe == "lofit":
        assert train(path) == 0
        assert (line in capsys.readouterr().err.replace("\n", " ")) == carries


def test_heads_that_slow_a_training_down_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_tiny(tmp_path / "model", "llama", num_hidden_layers=10)
    recipe = write_recipe(tmp_path, model)
    line = "L0H3 alone reaches below layer 9, and steps go through all layers from 0 up: without it they are about"
    for heads, method, faster in (
        ("[[9, 1], [0, 3], [9, 0]]", "prefix_cache: false", "1.8"),
        ("[[9, 1], [0, 3], [9, 0]]", "prefix_cache: true", "10.0"),
        ("[[9, 1], [8, 3]]", "prefix_cache: false", None),
        ("[[0, 0], [0, 1], [9, 0]]", "prefix_cache: false", None),
    ):
        words = [f"heads={{list: {heads}}}", f"method={{{method}, answer_set: {{own_lists: 0}}}}"]
        notes = [note for note in dry(recipe, capsys, *words)["notes"] if "alone reach" in note]
        assert notes == ([f"{line} {faster} times faster"] if faster else []), (heads, method)
    assert train(recipe, "heads={list: [[9, 1], [0, 3]]}", "training.max_steps=1") == 0
    assert f"{line} " in " ".join(capsys.readouterr().err.split())
