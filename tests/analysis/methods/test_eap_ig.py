"""EAP-IG's two estimates are gradients of the slow kind, one pass a step (and a head)."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from headtune.analysis.interventions.counterfactuals import Counterfactuals, outputs
from headtune.analysis.methods import eap_ig
from headtune.analysis.methods.eap_ig import eap_ig_activations, eap_ig_inputs
from headtune.analysis.methods.patching import every_head, everywhere_effects
from headtune.analysis.models.head_model import HeadModel
from headtune.analysis.models.loading import wrap_model
from headtune.analysis.tasks.task import Task
from headtune.analysis.tasks.tokenized import Encoded, encode
from headtune.analysis.utils.errors import InputError
from helpers.tiny import KINDS, N_HEADS, N_LAYERS, tiny_model, tiny_task, tiny_tokenizer

FAMILIES = ("llama-gqa", "gpt2", "opt", "gpt_neox", "gemma2-caps", "gemma3-sliding")


def pair(model: HeadModel) -> tuple[Encoded, Tensor]:
    """A prompt with an answer in it, and a counterpart as long."""
    examples = encode(Task("cities", tiny_task(previous=(1,), subjects=4).examples), model.tokenizer).examples
    counterpart = Counterfactuals(model, examples).corrupt_tokens(0, same_length=True)
    assert counterpart is not None and not torch.equal(counterpart, examples[0].tokens)
    return examples[0], counterpart


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> HeadModel:
    kind = KINDS[request.param]
    return wrap_model(tiny_model(kind.family, **kind.config), tiny_tokenizer(), request.param)


def slow_gradient(
    model: HeadModel,
    encoded: Encoded,
    head: tuple[int, int],
    *,
    embedded: Tensor | None = None,
    put: Tensor | None = None,
) -> dict[str, Tensor]:
    """dm/dz of one head, `[seq, head_dim]`, in one whole pass, with embeddings or with the head's own z replaced."""
    layer, index = head
    leaf = torch.zeros(len(encoded.tokens), model.head_dim) if put is None else put.clone()
    leaf.requires_grad_()

    def hook(_module: torch.nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        z = args[0].view(1, -1, N_HEADS, model.head_dim)
        changed = leaf[None] if put is not None else z[:, :, index] + leaf
        return (torch.cat([z[:, :, :index], changed[:, :, None], z[:, :, index + 1 :]], 2).view_as(args[0]),)

    handle = model.projection(layer).register_forward_pre_hook(hook)
    inputs = {"input_ids": encoded.tokens[None]} if embedded is None else {"inputs_embeds": embedded[None]}
    logits = model.hf(**inputs, use_cache=False).logits[0, -1]
    handle.remove()
    chosen = {"target": encoded.target_tokens, "previous": encoded.previous_tokens}
    metrics = {name: logits[list(set(tokens))].mean() for name, tokens in chosen.items()}
    others = sum(weight * logits[token] for token, weight in encoded.others) if encoded.others else logits.mean()
    metrics |= {f"{name}_contrast": metric - others for name, metric in metrics.items()}
    return {name: torch.autograd.grad(metric, leaf, retain_graph=True)[0] for name, metric in metrics.items()}


def z_of_all(model: HeadModel, encoded: Encoded, counterpart: Tensor) -> tuple[Tensor, Tensor]:
    return outputs(model, encoded.tokens, last_only=False), outputs(model, counterpart, last_only=False)


def test_inputs_are_gradients_on_the_way_between_the_embeddings(model: HeadModel) -> None:
    (encoded, counterpart), steps = pair(model), 3
    (clean, corrupt), word = z_of_all(model, encoded, counterpart), model.hf.get_input_embeddings()
    start, end = word(counterpart).detach(), word(encoded.tokens).detach()
    result = eap_ig_inputs(model, encoded, counterpart, "x", steps)
    for head in every_head(model):
        runs = [slow_gradient(model, encoded, head, embedded=start + k / steps * (end - start)) for k in (1, 2, 3)]
        for name in ("target", "previous", "target_contrast", "previous_contrast"):
            gradient = torch.stack([run[name] for run in runs]).mean(0)
            expected = ((clean - corrupt)[head] * gradient).sum().item()
            assert result[f"x.{name}"][head] == pytest.approx(expected, abs=1e-5)
    assert all(np.abs(values).max() > 1e-3 for values in result.values())


def test_activations_are_gradients_on_the_way_of_one_head(model: HeadModel) -> None:
    (encoded, counterpart), steps = pair(model), 3
    clean, corrupt = z_of_all(model, encoded, counterpart)
    result = eap_ig_activations(model, encoded, counterpart, "x", steps)
    for head in every_head(model):
        away = (clean - corrupt)[head]
        runs = [slow_gradient(model, encoded, head, put=corrupt[head] + k / steps * away) for k in (1, 2, 3)]
        for name in ("target", "previous", "target_contrast", "previous_contrast"):
            expected = (away * torch.stack([run[name] for run in runs]).mean(0)).sum().item()
            assert result[f"x.{name}"][head] == pytest.approx(expected, abs=1e-5)
    assert all(np.abs(values).max() > 1e-3 for values in result.values())


def test_one_step_of_either_is_the_gradient_of_the_prompt_itself(llama: HeadModel) -> None:
    encoded, counterpart = pair(llama)
    inputs, activations = (f(llama, encoded, counterpart, "x", 1) for f in (eap_ig_inputs, eap_ig_activations))
    for name, values in inputs.items():
        np.testing.assert_allclose(values, activations[name], atol=1e-5)
    # ... and more steps are not.
    far = eap_ig_inputs(llama, encoded, counterpart, "x"), eap_ig_activations(llama, encoded, counterpart, "x")
    assert np.abs(far[0]["x.target"] - far[1]["x.target"]).max() > 1e-3


def test_activations_tend_to_the_effect_of_putting_the_counterpart_in(llama: HeadModel) -> None:
    encoded, counterpart = pair(llama)
    _, corrupt = z_of_all(llama, encoded, counterpart)
    exact = everywhere_effects("x", llama, encoded, corrupt)
    errors = []
    for steps in (8, 64):
        result = eap_ig_activations(llama, encoded, counterpart, "x", steps)
        errors.append(max(np.abs(values - exact[name]).max() for name, values in result.items()))
    assert errors[1] < errors[0] / 6 and errors[1] < 0.05 * np.abs(exact["x.target"]).max()


def test_little_memory_means_more_passes_and_the_same_numbers(
    llama: HeadModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded, counterpart = pair(llama)
    expected = [f(llama, encoded, counterpart) for f in (eap_ig_inputs, eap_ig_activations)]
    monkeypatch.setattr(eap_ig, "rows_in_memory", lambda *_args, **_options: 2 * N_LAYERS)
    passes: list[int] = []
    plain = llama.hf.forward
    monkeypatch.setattr(llama.hf, "forward", lambda *args, **kwargs: passes.append(1) or plain(*args, **kwargs))
    for function, before in zip((eap_ig_inputs, eap_ig_activations), expected, strict=True):
        passes.clear()
        for name, values in function(llama, encoded, counterpart).items():
            np.testing.assert_allclose(values, before[name], atol=1e-6)
        assert len(passes) == 2 + (3 if function is eap_ig_inputs else N_LAYERS * N_HEADS * 5 // 2)


def test_nothing_is_left_behind(llama: HeadModel) -> None:
    encoded, counterpart = pair(llama)
    with torch.no_grad():
        for function in (eap_ig_inputs, eap_ig_activations):
            for values in function(llama, encoded, counterpart).values():
                assert values.dtype == np.float32 and values.shape == (N_LAYERS, N_HEADS)
        assert not torch.is_grad_enabled()
    assert all(parameter.grad is None for parameter in llama.hf.parameters())
    assert not any(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in llama.hf.modules())


@pytest.mark.parametrize("function", [eap_ig_inputs, eap_ig_activations])
def test_what_cannot_be_interpolated_is_refused(llama: HeadModel, function: object) -> None:
    encoded, counterpart = pair(llama)
    with pytest.raises(InputError, match="steps=0; expected at least 1"):
        function(llama, encoded, counterpart, steps=0)  # type: ignore[operator]
    with pytest.raises(InputError, match="they must be as long"):
        function(llama, encoded, counterpart[:-1])  # type: ignore[operator]
