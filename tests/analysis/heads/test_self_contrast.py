"""Pairs of a model and itself: the planted head makes all the difference, the others none."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from headtune.analysis.heads import self_contrast as contrast_module
from headtune.analysis.heads.self_contrast import self_contrast
from headtune.analysis.models.head_model import HeadModel
from headtune.analysis.tasks.generators.make import write_task
from headtune.analysis.tasks.loading import load_task
from headtune.analysis.utils.errors import InputError
from helpers.planted_needle import N_HEADS, needle_model, needle_task


@pytest.fixture(scope="module")
def model() -> HeadModel:
    return needle_model()


def test_every_needle_makes_a_pair(model: HeadModel, tmp_path: Path) -> None:
    task = needle_task(6)
    pairs = self_contrast(model, task, [(0, 0)])
    assert [pair.answers for pair in pairs.examples] == [example.answers for example in task.examples]
    assert all(pair.incorrect and pair.incorrect[0] != pair.answers[0] for pair in pairs.examples)
    assert [pair.spans for pair in pairs.examples] == [example.spans for example in task.examples]
    assert pairs.about == {"generator": "pairs", "task": "needles", "silenced": [[0, 0]]}
    write_task(pairs, tmp_path / "pairs.jsonl")
    assert load_task(str(tmp_path / "pairs.jsonl")).examples == pairs.examples
    assert json.loads((tmp_path / "pairs.jsonl").read_text().split("\n")[0])["about"]["kind"] == "exact_match"


def test_pairs_of_chats(model: HeadModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written follows the template; a conversation is one again in the file of pairs."""
    monkeypatch.setattr(model.tokenizer, "chat_template", "{% for m in messages %}{{ m.content }}{% endfor %}")
    task = needle_task(3)
    talks = replace(
        task,
        examples=tuple(replace(e, messages=(("user", e.prompt),)) for e in task.examples),
        chat_template=True,
    )
    plain = self_contrast(model, task, [(0, 0)])
    pairs = self_contrast(model, talks, [(0, 0)])
    assert [e.messages for e in pairs.examples] == [e.messages for e in talks.examples]
    assert [(e.answers, e.incorrect) for e in pairs.examples] == [(e.answers, e.incorrect) for e in plain.examples]
    write_task(pairs, tmp_path / "pairs.jsonl")
    read = load_task(str(tmp_path / "pairs.jsonl"))
    assert read.examples == pairs.examples and read.chat_template is True


def test_heads_that_do_nothing_leave_no_pair(model: HeadModel) -> None:
    with pytest.raises(InputError, match=r"no pair is left of 6 prompts: both write the same \(6\)") as error:
        self_contrast(model, needle_task(6), [(0, head) for head in range(1, N_HEADS)])
    assert "\n" not in str(error.value)


def test_texts_that_differ_in_case_alone_are_no_pair(model: HeadModel, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = iter(["Rome", "rome.", "Rome", "Milan"])
    monkeypatch.setattr(contrast_module, "_write", lambda *_: next(texts))
    pairs = self_contrast(model, needle_task(2), [(0, 0)])
    assert [(pair.answers, pair.incorrect) for pair in pairs.examples] == [(("Rome",), ("Milan",))]
    assert pairs.about["dropped"] == {"both write the same": 1}


def test_one_token_and_refusals(model: HeadModel) -> None:
    pairs = self_contrast(model, needle_task(2), [(0, 0)], max_tokens=1)
    assert all(len(pair.answers[0].split()) == 1 for pair in pairs.examples)
    with pytest.raises(InputError, match="without heads to silence"):
        self_contrast(model, needle_task(2), [])
    with pytest.raises(InputError, match="L1H0 is out of range"):
        self_contrast(model, needle_task(2), [(1, 0)])
    with pytest.raises(InputError, match="and the model takes 128"):
        self_contrast(model, needle_task(2), [(0, 0)], max_tokens=100)
