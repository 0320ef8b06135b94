"""Data whose columns have other names, as a task: in Python, on the command line, in a recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from headtune.analysis.tasks.loading import load_task
from headtune.analysis.utils.errors import InputError
from headtune.cli.main import main
from headtune.train.config.recipe import load_recipe, parse
from headtune.train.config.resolve_tasks import tasks_of

COLUMNS = {"prompt": "Q: {question}\nA:", "subject": "about.name", "answers": "answer", "incorrect": "wrong"}
ROWS = [
    {"question": f"Where is item {n}?", "about": {"name": f"item {n}"}, "answer": " Rome ", "wrong": ["Paris"], "id": n}
    for n in range(8)
]


@pytest.fixture
def qa(tmp_path: Path) -> Path:
    path = tmp_path / "qa.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def test_columns_of_a_file(qa: Path, tmp_path: Path) -> None:
    task = load_task(str(qa), columns=COLUMNS)
    assert len(task.examples) == 8 and task.kind == "exact_match"
    first = task.examples[0]
    assert (first.prompt, first.subject) == ("Q: Where is item 0?\nA:", "item 0")
    assert (first.answers, first.incorrect) == (("Rome",), ("Paris",))
    assert load_task(f"{qa}:train", columns=COLUMNS).split == "train"
    (tmp_path / "qa.csv").write_text("question,answer\nWhere is it?,Rome\nWhere was it?,Paris\n")
    table = load_task(str(tmp_path / "qa.csv"), columns={"prompt": "question", "answers": "answer"})
    assert [example.subject for example in table.examples] == ["Where is it?", "Where was it?"], "each of its own"
    lists = tmp_path / "lists.jsonl"
    lists.write_text(
        json.dumps({"text": "Cities in X: Rome,", "subject": "X", "all": ["Rome", "Bonn"], "done": ["Rome"]})
    )
    given = load_task(str(lists), columns={"prompt": "text", "answers": "all", "previous": "done"})
    assert given.kind == "lists" and given.examples[0].remaining == ("Bonn",)


def test_columns_of_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: ROWS)
    assert len(load_task("someone/qa", columns=COLUMNS).examples) == 8


def test_columns_on_the_command_line(qa: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "task.jsonl"
    words = ["task", "convert", str(qa), "--out", str(out)]
    for key, column in COLUMNS.items():
        words += ["--column", f"{key}={column}".replace("\n", "\\n")]
    assert main(words) == 0
    assert "8 examples, 8 subjects" in capsys.readouterr().out
    assert load_task(str(out)).examples == load_task(str(qa), columns=COLUMNS).examples
    assert main(words) == 2 and "exists" in capsys.readouterr().err
    for bad, message in (("answers", "must read KEY=COLUMN"), ("prompt=x", "is given twice")):
        assert main([*words[:4], str(tmp_path / "new.jsonl"), *words[5:], "--column", bad]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "new.jsonl").exists()


def test_columns_in_a_recipe(qa: Path, tmp_path: Path) -> None:
    recipe = parse({"recipe": "lora", "task": {"train": str(qa), "columns": COLUMNS}})
    train, held_out = tasks_of(recipe.task)
    assert {*train.subjects, *held_out.subjects} < {f"item {n}" for n in range(8)}
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    assert load_recipe(str(tmp_path / "recipe.yaml")).task.columns == COLUMNS


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({}, "columns names none"),
    (COLUMNS | {"anwers": "answer"}, "an example has no key 'anwers'; did you mean 'answers'"),
    (COLUMNS | {"answers": "answr"}, "qa.jsonl:1: no column 'answr'; did you mean 'answer'"),
    (COLUMNS | {"prompt": "Q: {qestion}"}, "no column 'qestion'; did you mean 'question'"),
    (COLUMNS | {"subject": "about"}, "column 'about' must hold text for 'subject'"),
    (COLUMNS | {"prompt": "Q: {id}"}, "column 'id' must hold text, found 0"),
    (COLUMNS | {"answers": "id"}, "must hold text, or a list of texts, for 'answers', found 0"),
    (COLUMNS | {"answers": "{answer}"}, "is no column; text with {column} is for prompt and subject"),
    ({"prompt": "question"}, "no column 'answers'; name the one that holds it: columns.answers"),
]


@pytest.mark.parametrize("columns, message", REFUSED)
def test_columns_that_are_refused(columns: dict[str, Any], message: str, qa: Path) -> None:
    with pytest.raises(InputError) as refused:
        load_task(str(qa), columns=columns)
    assert message in str(refused.value)


def test_sources_that_have_no_columns(tmp_path: Path) -> None:
    for name in ("country_cities", "truthfulqa:x.csv"):
        with pytest.raises(InputError, match="columns are for files and hub data"):
            load_task(name, columns=COLUMNS)
    with pytest.raises(InputError, match="does not exist"):
        load_task(str(tmp_path / "none.jsonl"), columns=COLUMNS)
