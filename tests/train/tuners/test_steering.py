"""Steering without training: each value against a slow reference, each adapter against the edit it stands for."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from headtune.analysis.heads import at_test_time
from headtune.analysis.interventions import last_layer, mlp_regression
from headtune.analysis.models import hooks
from headtune.analysis.models.head_model import HeadModel
from headtune.analysis.tasks.loading import load_task
from headtune.analysis.tasks.task import to_jsonl
from headtune.analysis.tasks.tokenized import encode
from headtune.analysis.utils.errors import CheckError, InputError
from headtune.analysis.utils.files import write_text
from headtune.train.config.methods import InterceptConfig, ItiConfig, ScaleConfig, SinkConfig
from headtune.train.tuners import steering
from headtune.train.tuners.iti_probes import (
    mass_mean,
    probe_heads,
    statements,
)
from headtune.train.tuners.steering import Steered, apply, steer
from helpers.statements import FAMILIES, LAST, family_model, listed_task, z_one_by_one
from helpers.tiny import N_HEADS, quick_among, tiny_task


@torch.no_grad()
def _logits(hf: Any, model: HeadModel, prompt: str = "List five cities in Italy.\n1. Rome\n2.") -> Tensor:
    tokens = torch.tensor([model.tokenizer(prompt).input_ids])
    logits: Tensor = hf(tokens, use_cache=False).logits[0]
    return logits


# --- adapters ---------------------------------------------------------------------------------------------------------


def test_what_probes_have_read_is_not_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    heads, task, pairs = family_model("llama"), listed_task(), [(1, 0), (1, 3)]
    probed = probe_heads(heads, task, seed=3, folds=2)
    anew = steer(heads, ItiConfig(kind="iti"), pairs, task, seed=3)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the model was run again")

    with monkeypatch.context() as patch:
        patch.setattr("headtune.train.tuners.iti_probes.read_ends", refuse)
        taken_over = steer(heads, ItiConfig(kind="iti"), pairs, task, seed=3, probed=probed)
        for other in ({"seed": 4}, {"task": task.limited(4, 0)}):
            with pytest.raises(AssertionError, match="run again"):
                steer(heads, ItiConfig(kind="iti"), pairs, **({"task": task, "seed": 3} | other), probed=probed)  # type: ignore[arg-type]
    assert taken_over.values.keys() == anew.values.keys()
    for name, value in taken_over.values.items():
        torch.testing.assert_close(value, anew.values[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gpt_neox"])
def test_an_offset_reaches_the_residual_stream_through_w_o(family: str) -> None:
    heads, task, pairs = family_model(family), listed_task(), [(1, 3), (1, 0)]
    found = steer(heads, ItiConfig(kind="iti", alpha=15.0), pairs, task)
    assert found.pairs == [(1, 0), (1, 3)]
    rows = [heads.tokenizer(s.text).input_ids for s in statements(task)[0]]
    theta, sigma = mass_mean(z_one_by_one(heads, rows, 1), torch.tensor([s.true for s in statements(task)[0]]))
    expected = sum(15.0 * sigma[head] * theta[head] @ heads.output_weight(1)[head] for _, head in pairs)
    attention = heads.attention(1)
    tokens = torch.tensor([rows[0]])
    with torch.no_grad(), hooks.watch([attention]) as before:
        heads.hf(tokens, use_cache=False)
    model = apply(heads.hf, found)
    with torch.no_grad(), hooks.watch([attention]) as after:
        model(tokens, use_cache=False)
    moved = after[attention][1] - before[attention][1]  # [1, seq, d_model], the same everywhere
    torch.testing.assert_close(moved, expected.expand_as(moved), atol=1e-4, rtol=1e-4)  # type: ignore[union-attr]
    assert moved.abs().max() > 0.1


def _settings(tmp_path: Path) -> dict[str, Callable[[HeadModel], Steered]]:
    write_text(tmp_path / "fit.jsonl", to_jsonl(tiny_task((1, 2)).examples))
    task = tiny_task()
    return {
        "scale": lambda heads: steer(heads, ScaleConfig(factor=0.3), [(0, 1), (2, 2), (0, 0)], task),
        "iti": lambda heads: steer(heads, ItiConfig(kind="iti", alpha=3.0, per_prompt=2), [(0, 1), (2, 2)], task),
        "sink": lambda heads: steer(heads, SinkConfig(kind="sink", tau=0.0, gamma=0.3), None, task),
        "intercept": lambda heads: steer(
            heads, InterceptConfig(kind="intercept", beta=0.7, fit=str(tmp_path / "fit.jsonl")), None, task
        ),
    }


@pytest.mark.parametrize("kind", ["scale", "iti", "sink", "intercept"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_every_adapter_merges_saves_and_says_what_it_is(kind: str, family: str, tmp_path: Path) -> None:
    heads = family_model(family)
    plain = _logits(heads.hf, heads)
    base = copy.deepcopy(heads.hf)
    found = _settings(tmp_path)[kind](heads)
    assert json.loads(json.dumps(found.note))["kind"] == kind
    assert all(value.dtype == torch.float32 for value in found.values.values())
    torch.testing.assert_close(_logits(heads.hf, heads), plain)  # finding changes nothing
    model = apply(heads.hf, found)
    steered = _logits(model, heads)
    assert (steered - plain).abs().max() > 1e-3
    model.save_pretrained(str(tmp_path / "adapter"), save_embedding_layers=False)
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    torch.testing.assert_close(_logits(loaded, heads), steered, atol=1e-5, rtol=1e-5)
    merged: Any = model.merge_and_unload()
    torch.testing.assert_close(_logits(merged, heads), steered, atol=1e-4, rtol=1e-4)


def test_scaling_is_the_edit_of_the_same_name() -> None:
    heads, pairs = family_model(), [(2, 1), (0, 3)]
    with hooks.scale(heads, dict.fromkeys(pairs, -0.5)):
        expected = _logits(heads.hf, heads)
    model = apply(heads.hf, steer(heads, ScaleConfig(factor=-0.5), pairs, tiny_task()))
    torch.testing.assert_close(_logits(model, heads), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", quick_among(FAMILIES, ["gpt2"]))
def test_sink_heads_are_those_of_whole_attention_matrices(family: str) -> None:
    heads, task = family_model(family), tiny_task((1, 4))
    eager = copy.deepcopy(heads.hf)
    eager.set_attn_implementation("eager")
    mean = torch.zeros(N_HEADS)
    with torch.no_grad():
        for example in task.examples:
            tokens = torch.tensor([heads.tokenizer(example.prompt).input_ids])
            attention = eager(tokens, output_attentions=True, use_cache=False).attentions[LAST]
            mean += attention[0, :, -1, 0] / len(task.examples)
    torch.testing.assert_close(steering.sink_attention(heads, task).float(), mean, atol=1e-5, rtol=1e-4)
    if family == "qwen2":  # the window is shorter than every prompt: nobody sees the first position
        with pytest.raises(
            InputError, match=r"layer 2 attends to the first position with more than tau=0.1 .*lower tau"
        ):
            steer(heads, SinkConfig(kind="sink", tau=0.1, gamma=0.5), None, task)
        return
    tau = float(mean.sort().values[1:3].mean())
    pairs = [(LAST, head) for head in range(N_HEADS) if mean[head] > tau]
    assert len(pairs) == 2
    found = steer(heads, SinkConfig(kind="sink", tau=tau, gamma=0.25), None, task)
    assert found.pairs == pairs and found.note["prompts"] == len(task.examples)
    with hooks.scale(heads, dict.fromkeys(pairs, 0.25)):
        expected = _logits(heads.hf, heads)
    torch.testing.assert_close(_logits(apply(heads.hf, found), heads), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "family", quick_among(["llama", "gpt2", "opt", "gpt_neox", "phi", "phi3", "qwen3"], ["llama", "opt"])
)
def test_an_intercept_is_the_knob(family: str, tmp_path: Path) -> None:
    model = family_model(family)
    write_text(tmp_path / "fit.jsonl", to_jsonl(tiny_task((1, 2)).examples))
    fit = load_task(str(tmp_path / "fit.jsonl"))
    b = mlp_regression.decompose(model, encode(fit, model.tokenizer).examples)[0].intercept[-1]
    with last_layer.subtract_mlp_intercept(model, b, beta=0.7):
        expected = _logits(model.hf, model)
    found = steer(
        model, InterceptConfig(kind="intercept", beta=0.7, fit=str(tmp_path / "fit.jsonl")), None, tiny_task()
    )
    assert found.pairs == [] and found.note["fit_examples"] > 10
    torch.testing.assert_close(_logits(apply(model.hf, found), model), expected, atol=1e-5, rtol=1e-5)


def test_an_intercept_is_fitted_on_chats_where_the_task_is_of_chats(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a recipe and at test time; on plain prompts it is another one."""
    model = family_model()
    monkeypatch.setattr(
        model.tokenizer, "chat_template", "{% for m in messages %}<eos>{{ m.content }}<eos>{% endfor %}"
    )
    write_text(tmp_path / "fit.jsonl", to_jsonl(tiny_task((1, 2)).examples))
    settings = InterceptConfig(kind="intercept", beta=1.0, fit=str(tmp_path / "fit.jsonl"))
    chats = replace(tiny_task(), chat_template=True)
    found, plain = (steer(model, settings, None, task) for task in (chats, tiny_task()))
    assert found.note["fit_data"]["chat_template"] is True and "chat_template" not in plain.note["fit_data"]
    (name,) = found.values
    assert not torch.equal(found.values[name], plain.values[name])
    knob = at_test_time.parse([f"intercept:beta=1.0,fit={tmp_path / 'fit.jsonl'}"])
    for chat, same in ((True, True), (False, False)):
        with at_test_time.applied(model, knob, chat=chat) as notes:
            logits = _logits(model.hf, model)
        assert notes[0]["fit_examples"] > 10
        adapted = _logits(apply(copy.deepcopy(model.hf), found), model)
        assert torch.allclose(logits, adapted, atol=1e-5) is same


# --- errors -----------------------------------------------------------------------------------------------------------


def test_what_cannot_be_steered_is_refused_before_the_model_runs(tmp_path: Path) -> None:
    heads, gemma, task = family_model(), family_model("gemma2"), tiny_task()
    write_text(tmp_path / "fit.jsonl", to_jsonl(task.examples))
    fit = InterceptConfig(kind="intercept", beta=1.0, fit=str(tmp_path / "fit.jsonl"))
    cases: list[tuple[HeadModel, Any, list[tuple[int, int]] | None, str]] = [
        (heads, ScaleConfig(factor=2.0), None, "no heads are given"),
        (heads, ItiConfig(kind="iti"), [], "no heads are given"),
        (heads, ScaleConfig(factor=2.0), [(0, 9)], "L0H9 is out of range"),
        (heads, ScaleConfig(factor=2.0), [(0, 1), (0, 1)], "name a head twice"),
        (heads, SinkConfig(kind="sink"), [(2, 0)], "'sink' finds what it changes itself; leave out the 1 heads"),
        (heads, fit, [(2, 0)], "'intercept' finds what it changes itself"),
        (gemma, fit, None, "family 'gemma2' has a norm after its MLP"),
    ]

    def stop(*_: Any, **__: Any) -> None:
        raise AssertionError("the model ran")

    for model, settings, pairs, words in cases:
        handle = model.hf.register_forward_pre_hook(stop)
        with pytest.raises(InputError, match=words) as caught:
            steer(model, settings, pairs, task)
        handle.remove()
        assert "\n" not in str(caught.value)


def test_values_of_another_adapter_are_refused() -> None:
    model = family_model()
    found = steer(model, ScaleConfig(factor=2.0), [(0, 1), (1, 1)], tiny_task())
    less = dict(list(found.values.items())[:1])
    with pytest.raises(CheckError, match="does not hold what was computed"):
        apply(model.hf, replace(found, values=less))
