"""Spans: named parts of a prompt, checked when they are read, at the right tokens when they are encoded."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from headtune.analysis.tasks.loading import load_task
from headtune.analysis.tasks.task import Example, Task, parse_example, task_lines, to_jsonl
from headtune.analysis.tasks.tokenized import as_chat, encode
from headtune.analysis.utils.errors import InputError
from helpers.tiny import tiny_tokenizer

PROMPT = "List five cities in Italy.\n1. Rome\n2. New York\n3."
ROW: dict[str, Any] = {
    "prompt": PROMPT,
    "subject": "Italy",
    "answers": ["Milan"],
    "spans": {"cities": ["Rome", [PROMPT.index("New"), PROMPT.index("York") + 4]], "task": ["five cities"]},
}


def task_of(row: dict[str, Any]) -> Task:
    return Task("one", (parse_example(row, "here"),), kind="exact_match")


def texts(prompt: str, positions: tuple[int, ...], **kind: Any) -> str:
    tokenizer = tiny_tokenizer(**kind)
    ids = tokenizer(prompt).input_ids
    return str(tokenizer.decode([ids[i] for i in positions]))


@pytest.mark.parametrize("kind", [{}, {"bos": True}, {"trim_offsets": True}], ids=str)
def test_spans_are_where_the_text_is(kind: dict[str, bool]) -> None:
    (encoded,) = encode(task_of(ROW), tiny_tokenizer(**kind)).examples
    assert {name: texts(PROMPT, positions, **kind) for name, positions in encoded.spans.items()} == {
        "cities": " Rome New York",
        "task": " five cities",
    }


def test_a_file_round_trips_and_digests_of_before_stay(tmp_path: Path) -> None:
    task = task_of(ROW)
    path = tmp_path / "one.jsonl"
    path.write_text(to_jsonl(task.examples), encoding="utf-8")
    assert load_task(str(path)).examples == task.examples
    plain = replace(task, examples=(replace(task.examples[0], spans={}),))
    assert plain.sha256 != task.sha256 and '"spans"' not in to_jsonl(plain.examples)
    assert {task.examples[0]: 1}[parse_example(ROW, "there")] == 1  # examples can be keys


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ({"cities": ["Oslo"]}, "span 'cities': the prompt does not contain 'Oslo'"),
        ({"cities": ["i"]}, r"the prompt contains 'i' more than once; give its characters, \[start, end\]"),
        ({"cities": []}, "span 'cities' must be a list of at least one piece"),
        ({"cities": "Rome"}, "span 'cities' must be a list of at least one piece, found 'Rome'"),
        ({"cities": ["  "]}, "has an empty piece"),
        ({"cities": [[5, 5]]}, r"\[5, 5\] are no characters of the prompt"),
        ({"cities": [[0, 500]]}, r"\[0, 500\] are no characters of the prompt, which has"),
        ({"cities": [[True, 3]]}, r"a piece is a text of the prompt or \[start, end\]"),
        ({"cities": [7]}, r"a piece is a text of the prompt or \[start, end\], found 7"),
        ({"subject": ["Rome"]}, "span 'subject' has a reserved name"),
        ({"previous_2": ["Rome"]}, "span 'previous_2' has a reserved name"),
        ({"two words": ["Rome"]}, "must be a name of letters"),
        (["Rome"], "'spans' must be"),
    ],
)
def test_refused_in_one_line(spans: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as error:
        parse_example(ROW | {"spans": spans}, "tasks.jsonl:3")
    assert str(error.value).startswith("tasks.jsonl:3: ") and "\n" not in str(error.value)


def test_a_null_span_is_none() -> None:
    """As a table of the hub has it, where a row lacks a name that others have."""
    assert parse_example(ROW | {"spans": {"cities": None}}, "here").spans == {}


def test_a_piece_without_tokens() -> None:
    """A special token that the tokenizer puts nowhere in the text leaves characters without a token."""
    tokenizer = tiny_tokenizer(trim_offsets=True)
    row = ROW | {"spans": {"gap": [[PROMPT.index(" Italy"), PROMPT.index(" Italy") + 1]]}}
    with pytest.raises(InputError, match=r"about 'Italy': span 'gap' has a piece without tokens") as error:
        encode(task_of(row), tokenizer)
    assert "\n" not in str(error.value)


# --- chats ------------------------------------------------------------------------------------------------------------

CHAT = (
    "{% for m in messages %}<s>{{ m['role'] }} about Rome and Italy: {{ m['content'] | trim }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant:{% endif %}"
)


@pytest.mark.parametrize("previous", [[], ["Rome", "New York"]], ids=["one turn", "a reply begun"])
def test_in_a_chat(previous: list[str]) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHAT
    task = replace(task_of(ROW | {"previous": previous}), chat_template=True)
    written = as_chat(task, tokenizer).examples[0].prompt
    (encoded,) = encode(task, tokenizer).examples
    ids = tokenizer(written, add_special_tokens=False).input_ids
    found = {name: tokenizer.decode([ids[i] for i in positions]) for name, positions in encoded.spans.items()}
    assert found == {"cities": " Rome New York", "task": " five cities"}
    # Not the template's words of the same name, which come first.
    assert encoded.spans["cities"][0] > ids.index(tokenizer(" Rome").input_ids[0])


def test_a_chat_template_that_changes_the_text() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ messages[0]['content'] | upper }}"
    with pytest.raises(InputError, match="does not keep the user's text 'List five cities in Italy"):
        as_chat(replace(task_of(ROW), chat_template=True), tokenizer)


# --- the first line ---------------------------------------------------------------------------------------------------


def write(path: Path, *rows: Any) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_the_first_line_says_what_the_file_is(tmp_path: Path) -> None:
    about = {"generator": "needle", "seed": 3}
    task = replace(task_of(ROW | {"previous": ["Rome"]}), about=about)
    path = tmp_path / "one.jsonl"
    path.write_text("".join(f"{line}\n" for line in task_lines(task)), encoding="utf-8")
    assert load_task(str(path)) == task  # though a line with `previous` would make it a task of lists
    assert load_task(f"{path}").sha256 == task.sha256
    assert encode(task, tiny_tokenizer()).summary()["about"] == about


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"about": 3}, ROW], ":1: 'about' must be an object"),
        ([{"about": {"kind": "list"}}, ROW], ":1: kind 'list' is unknown; did you mean 'lists'"),
        ([ROW, {"about": {}}], ":2: 'about' stands in the first line of a task file, alone"),
        ([ROW | {"about": {}}], ":1: 'about' stands in the first line"),
        ([{"about": {}}], "holds no examples"),
    ],
)
def test_a_first_line_that_is_wrong(rows: list[Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        load_task(write(tmp_path / "bad.jsonl", *rows))


def test_a_task_made_in_python_is_checked_when_encoded() -> None:
    example = Example(PROMPT, "Italy", ("Milan",), spans={"cities": ("Oslo",)})
    with pytest.raises(InputError, match="span 'cities': the prompt does not contain 'Oslo'"):
        encode(Task("one", (example,)), tiny_tokenizer())
