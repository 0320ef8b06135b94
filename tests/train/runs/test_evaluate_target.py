"""Measuring a run or a model from Python gives what the command gives."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from headtune.analysis.utils.errors import InputError
from headtune.cli.main import main
from headtune.train.runs.evaluate_target import evaluate_target, target_of
from helpers.small_runs import write_task


def test_it_gives_what_the_command_gives(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    task = str(write_task(tmp_path))
    said: list[str] = []
    target = target_of(tiny_llama, task, max_examples=2, knobs=["sink:tau=0.1,gamma=0.5"])
    result = evaluate_target(target, n_items=2, out=tmp_path / "out", notify=said.append)
    assert said == ["evaluating on 2 prompts, scored as lists of 2"]
    words = ["--task", task, "--max-examples", "2", "--items", "2", "--knob", "sink:tau=0.1,gamma=0.5", "--json"]
    assert main(["evaluate", str(tiny_llama), *words]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["metrics"] == json.loads(json.dumps(result.metrics))
    assert printed["knobs"] == list(result.knobs) and printed["task"] == result.task.name
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text())["metrics"] == printed["metrics"]
    with pytest.raises(InputError, match="choose another --out"):
        evaluate_target(target, out=tmp_path / "out")


def test_the_command_scores_as_iti_where_it_is_asked_to(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whose instruction and questions are more than this model's 256 tokens."""
    task = tmp_path / "choices.jsonl"
    task.write_text(json.dumps({"prompt": "Q: A?\nA:", "subject": "A", "answers": ["B"], "incorrect": ["C"]}))
    words = ["evaluate", str(tiny_llama), "--task", str(task), "--kind", "multiple_choice"]
    assert main([*words, "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)["metrics"]) >= {"mc1", "mc2"}
    assert main([*words, "--scoring", "iti"]) == 2
    assert "tokens, the model takes 256; shorten the preamble" in " ".join(capsys.readouterr().err.split())


def test_a_head_set_is_refused_before_a_model_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "heads.json").write_text("{}")
    with pytest.raises(InputError, match="is a head set, neither a run nor a model"):
        target_of(tmp_path, "country_cities")
