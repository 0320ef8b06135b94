"""Offsets that a training starts from, and a few-shot prompt as offsets."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor

from headtune.analysis.methods.in_context import few_shot_prompts, in_context_means
from headtune.analysis.models import hooks
from headtune.analysis.models.head_model import HeadModel
from headtune.analysis.utils.errors import InputError
from headtune.train.config.methods import InContextConfig, ScaleConfig
from headtune.train.tuners import weights_io
from headtune.train.tuners.convert import fold
from headtune.train.tuners.head_tuning import HeadTuningConfig, HeadTuningLayer
from headtune.train.tuners.head_tuning.start import read_offsets, require_offsets, start_offsets
from headtune.train.tuners.steering import Steered, apply, steer
from helpers.copying import copying_model, copying_task
from helpers.tiny import quick_among

PAIRS = [(0, 3), (2, 1), (0, 1)]


def compiled(model: HeadModel, **changes: Any) -> Steered:
    settings = InContextConfig(kind="in_context", shots=2, prompts=6, **({"factor": 0.5} | changes))
    return steer(model, settings, PAIRS, copying_task(), seed=1)


@pytest.mark.parametrize("family", quick_among(["llama", "gpt2", "opt", "qwen2"], ["llama", "opt"]))
def test_a_few_shot_prompt_folds_into_biases(family: str) -> None:
    model = copying_model(family)
    steered = compiled(model)
    assert steered.pairs == sorted(PAIRS)
    note = json.loads(json.dumps(steered.note))
    assert note["kind"] == "in_context" and note["solved"] <= note["prompts"] == 6
    means = in_context_means(model, few_shot_prompts(model, copying_task(), 2, 6, seed=1))
    tokens = torch.tensor([model.tokenizer("List five cities in Italy. I know Japan").input_ids])

    def edit(layer: int) -> Any:
        def add(z: Tensor) -> Tensor:
            z = z.clone()
            for at, head in PAIRS:
                if at == layer:
                    z[:, :, head] += 0.5 * (means.few - means.zero)[layer, head]
            return z

        return add

    with torch.no_grad():
        plain = model.hf(tokens).logits
        with hooks.at_projections(model, {0: edit(0), 2: edit(2)}):
            expected = model.hf(tokens).logits
        adapted = apply(model.hf, steered)
        torch.testing.assert_close(adapted(tokens).logits, expected, atol=1e-4, rtol=1e-4)
        folded = fold(adapted)
        torch.testing.assert_close(folded(tokens).logits, expected, atol=1e-4, rtol=1e-4)
    assert (expected - plain).abs().max() > 1e-2


def test_a_family_without_a_place_for_offsets_is_refused_in_one_line() -> None:
    model = copying_model("mistral", num_key_value_heads=2, sliding_window=8)
    with pytest.raises(InputError, match=r"sliding window of 8.*write the adapter alone") as caught:
        fold(apply(model.hf, compiled(model)))
    assert "\n" not in str(caught.value)


def test_a_training_starts_at_a_runs_offsets(tmp_path: Path) -> None:
    model = copying_model()
    steered = compiled(model)
    base = copy.deepcopy(model.hf)
    weights_io.save(apply(model.hf, steered), tmp_path / "run" / "adapter")
    offsets = read_offsets(tmp_path / "run")
    assert sorted(offsets) == steered.pairs
    means = in_context_means(copying_model(), few_shot_prompts(copying_model(), copying_task(), 2, 6, seed=1))
    for head, offset in means.offsets(PAIRS, 0.5).items():
        torch.testing.assert_close(offsets[head], offset)
    config = HeadTuningConfig(heads=[[2, 1], [0, 3]], scale="none", init_std=1e-3, task_type="CAUSAL_LM")
    adapted = get_peft_model(base, config)
    start_offsets(adapted, offsets)
    tuned = {module.layer: module for module in adapted.modules() if isinstance(module, HeadTuningLayer)}
    assert torch.equal(tuned[2].head_tuning_offset["default"], offsets[2, 1][None])
    assert torch.equal(tuned[0].head_tuning_offset["default"], offsets[0, 3][None])
    assert tuned[0].head_tuning_offset["default"].requires_grad


def test_a_start_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    model = copying_model()
    offsets = {(0, 1): torch.zeros(8)}
    require_offsets(offsets, [(0, 1)], 8, "run")
    with pytest.raises(InputError, match=r"'run' has no offset for L1H2 \(1 of the heads\).*from: run"):
        require_offsets(offsets, [(0, 1), (1, 2)], 8, "run")
    with pytest.raises(InputError, match="offsets of 8 numbers, and this model's heads have 16"):
        require_offsets(offsets, [], 16, "run")
    with pytest.raises(InputError, match="holds no adapter to start from"):
        read_offsets(tmp_path / "nothing")
    scaled = steer(model, ScaleConfig(factor=2.0), [(0, 1)], copying_task())
    weights_io.save(apply(model.hf, scaled), tmp_path / "scaled" / "adapter")
    with pytest.raises(InputError, match="not of offsets on heads alone"):
        read_offsets(tmp_path / "scaled")
