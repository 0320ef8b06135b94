"""Silenced heads are what the definition says, at every position: whole prompts, padded batches, a cache."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from headtune.analysis.interventions import silencing
from headtune.analysis.interventions.silencing import HOWS, mean_outputs, silence
from headtune.analysis.models import hooks
from headtune.analysis.models.attention import attend_with
from headtune.analysis.models.head_model import HeadModel
from headtune.analysis.models.loading import wrap_model
from headtune.analysis.utils.errors import CheckError, InputError
from helpers.tiny import tiny_model, tiny_tokenizer

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-gqa": ("llama", {"num_key_value_heads": 2}),
    "gpt2": ("gpt2", {}),
    "mistral-sliding": ("mistral", {"sliding_window": 6}),
}
HEADS = [(0, 1), (0, 2), (2, 3)]
LENGTH = 12


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> HeadModel:
    family, config = FAMILIES[request.param]
    return wrap_model(tiny_model(family, **config), tiny_tokenizer(), request.param)


def prompt(length: int = LENGTH, seed: int = 0) -> Tensor:
    return torch.randint(5, 60, (length,), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: HeadModel, tokens: Tensor, **options: Any) -> Tensor:
    result: Tensor = model.hf(tokens[None], use_cache=False, **options).logits[0]
    return result


def test_zero_is_ablation_and_zeroed_columns_of_the_output_projection(model: HeadModel) -> None:
    with silence(model, HEADS):
        silenced = logits(model, prompt())
    with hooks.ablate(model, HEADS):
        assert torch.equal(logits(model, prompt()), silenced)
    edited = replace(model, hf=copy.deepcopy(model.hf))
    with torch.no_grad():
        for layer, head in HEADS:
            edited.output_weight(layer)[head].zero_()
    torch.testing.assert_close(logits(edited, prompt()), silenced, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits(model, prompt()), silenced, atol=1e-3)


def test_mean_is_the_mean_over_the_positions_of_a_text(model: HeadModel) -> None:
    text = "Paris is a city in France. " * 4
    means = mean_outputs(model, HEADS, text)
    tokens = model.tokenizer(text, return_tensors="pt").input_ids[0]
    with hooks.capture(model) as z:
        logits(model, tokens)
    for layer, head in HEADS:
        torch.testing.assert_close(means[layer, head], z[layer][0, :, head].mean(0))
    with silence(model, HEADS, "mean"), hooks.capture(model) as z:
        logits(model, prompt())
    neutral = mean_outputs(model, HEADS)
    for layer, head in HEADS:
        torch.testing.assert_close(z[layer][0, :, head], neutral[layer, head].expand(LENGTH, -1))


def test_the_mean_is_over_windows_that_each_begin_with_bos(monkeypatch: pytest.MonkeyPatch) -> None:
    model = wrap_model(tiny_model("llama"), tiny_tokenizer(bos=True), "bos")
    monkeypatch.setattr(silencing, "_WINDOW", 6)
    text = "Paris is a city in France. " * 2
    plain = model.tokenizer(text, add_special_tokens=False).input_ids
    outputs: list[Tensor] = []
    for start in range(0, len(plain), 5):
        with hooks.capture(model) as z:
            logits(model, torch.tensor([1, *plain[start : start + 5]]))
        outputs.append(torch.stack([z[layer][0, 1:, head] for layer, head in HEADS]))
    expected = torch.cat(outputs, 1).mean(1)
    means = mean_outputs(model, HEADS, text)
    torch.testing.assert_close(torch.stack([means[head] for head in HEADS]), expected)


def _weights(model: HeadModel, layer: int, head: int, how: str) -> Tensor:
    """`[seq, seq]` attention weights by the definition, from the model's whole attention matrix."""
    hf = copy.deepcopy(model.hf)
    hf.set_attn_implementation("eager")
    with torch.no_grad():
        rows = hf(prompt()[None], use_cache=False, output_attentions=True).attentions[layer][0, head]
    for query in range(LENGTH):
        keys = range(LENGTH)
        seen = [rows[query, key] > 0 for key in keys]  # causal, and inside a sliding window
        if how == "uniform":
            rows[query] = torch.tensor([float(each) for each in seen])
        else:
            near = [key < silencing.SINK or key > query - silencing.RECENT for key in keys]
            rows[query] *= torch.tensor([float(each) for each in near])
        rows[query] /= rows[query].sum()
    return rows


@pytest.mark.parametrize("how", ["uniform", "streaming"])
def test_attention_is_the_definition_s(model: HeadModel, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(silencing, "SINK", 2)
    monkeypatch.setattr(silencing, "RECENT", 3)
    monkeypatch.setattr(silencing, "_QUERIES", 5)  # several chunks
    for layer, head in ((0, 2), (2, 3)):
        values: dict[int, Tensor] = {}

        def look(call: Any, values: dict[int, Tensor] = values) -> None:
            values[call.layer] = call.value[0]

        with attend_with(look), silence(model, [(layer, head)], how), hooks.capture(model) as z:
            logits(model, prompt())
        value = values[layer][head // (model.n_heads // values[layer].shape[0])]
        expected = _weights(model, layer, head, how) @ value
        torch.testing.assert_close(z[layer][0, :, head], expected, rtol=1e-4, atol=1e-5)
        if how == "uniform" and "sliding" not in model.name:
            running = value.cumsum(0) / torch.arange(1, LENGTH + 1)[:, None]
            torch.testing.assert_close(z[layer][0, :, head], running, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", HOWS)
def test_padded_batches_with_a_cache_are_whole_prompts(
    model: HeadModel, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(silencing, "SINK", 2)
    monkeypatch.setattr(silencing, "RECENT", 3)
    short, long = prompt(7), prompt(11, seed=1)
    ids, mask = torch.stack([torch.cat([torch.zeros(4).long(), short]), long]), torch.ones(2, 11).long()
    mask[0, :4] = 0
    with silence(model, HEADS, how), torch.no_grad():
        whole = [logits(model, tokens)[-1] for tokens in (short, long)]
        written = model.hf.generate(  # type: ignore[operator]
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=3,
            min_new_tokens=3,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            pad_token_id=0,
        )
        for row, tokens in enumerate((short, long)):
            torch.testing.assert_close(written.logits[0][row], whole[row], rtol=1e-4, atol=1e-4)
            so_far = torch.cat([tokens, written.sequences[row, 11:13]])
            torch.testing.assert_close(written.logits[2][row], logits(model, so_far)[-1], rtol=1e-4, atol=1e-4)
    before = logits(model, short)[-1]
    assert not torch.allclose(before, whole[0], atol=1e-4), "the block has ended"


def test_refused_in_one_line(model: HeadModel) -> None:
    for call, words in (
        (lambda: silence(model, HEADS, "unifrom"), "how 'unifrom' is no way to silence a head; did you mean 'uniform'"),
        (lambda: silence(model, [(0, 9)]), "L0H9 is out of range"),
    ):
        with pytest.raises(InputError, match=words):
            call()
    replaced = attend_with(lambda call: torch.zeros_like(call.query.transpose(1, 2)))
    # What stands in for attention is not looked at by the definition, but the weights are changed all the same.
    with replaced, silence(model, HEADS, "uniform"):
        logits(model, prompt())
    model.record_attention(False)
    try:
        with silence(model, HEADS, "uniform"), pytest.raises(CheckError, match="attention was replaced"):
            logits(model, prompt())
    finally:
        model.record_attention(True)
