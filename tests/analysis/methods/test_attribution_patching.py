"""Gradient estimates are derivatives of the slow kind, and what they promise to sum to."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from torch import Tensor

from headtune.analysis.interventions.intervention import CLEAN, Intervention
from headtune.analysis.interventions.last_token import LastTokenRunner
from headtune.analysis.methods import attribution_patching as gradients
from headtune.analysis.methods.attribution_patching import attribution_patching, integrated_gradients
from headtune.analysis.methods.patching import every_head, patching_effects
from headtune.analysis.models import hooks
from headtune.analysis.models.head_model import HeadModel
from headtune.analysis.models.loading import wrap_model
from headtune.analysis.synthetic.planted import Planting, plant
from headtune.analysis.tasks.tokenized import Encoded, encode
from headtune.analysis.utils.errors import InputError
from helpers.tiny import KINDS, N_HEADS, N_LAYERS, tiny_model, tiny_task, tiny_tokenizer

FAMILIES = ("llama-gqa", "mistral-sliding", "gpt2", "opt", "gpt_neox", "phi", "gemma2-caps", "gemma3-sliding")


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> HeadModel:
    kind = KINDS[request.param]
    return wrap_model(tiny_model(kind.family, **kind.config), tiny_tokenizer(), request.param)


@pytest.fixture(scope="module")
def prompt(model: HeadModel) -> Encoded:
    return encode(tiny_task(subjects=3), model.tokenizer).examples[0]


@pytest.fixture(scope="module")
def example(llama: HeadModel) -> Encoded:
    return encode(tiny_task(subjects=1), llama.tokenizer).examples[0]


def reference_for(model: HeadModel) -> Tensor:
    return torch.randn(N_LAYERS, N_HEADS, model.head_dim, generator=torch.Generator().manual_seed(9))


def metrics(logits: Tensor, encoded: Encoded) -> dict[str, Tensor]:
    """Mean logit of the answers' first tokens, of `[vocabulary]`, and less the other subjects' answers."""
    tokens = {"target": encoded.target_tokens, "previous": encoded.previous_tokens}
    others = (
        sum(weight * logits[token].float() for token, weight in encoded.others) if encoded.others else logits.mean()
    )
    result = {name: logits[list(set(chosen))].float().mean() for name, chosen in tokens.items() if chosen}
    return result | {f"{name}_contrast": value - others for name, value in result.items()}


def slow_gradients(model: HeadModel, encoded: Encoded, reference: Tensor, level: float) -> Mapping[str, Tensor]:
    """`dm/dG[l, h]` at `G = level`: a whole forward pass in which z at END is gated, and autograd through all of it."""
    gates = torch.full((N_LAYERS, N_HEADS), level, requires_grad=True)
    handles = []
    for layer in range(N_LAYERS):

        def hook(_module: torch.nn.Module, args: tuple[Tensor], layer: int = layer) -> tuple[Tensor]:
            z = args[0].view(1, -1, N_HEADS, model.head_dim)
            end = reference[layer] + gates[layer, :, None] * (z[0, -1] - reference[layer])
            return (torch.cat([z[:, :-1], end[None, None]], 1).view_as(args[0]),)

        handles.append(model.projection(layer).register_forward_pre_hook(hook))
    logits = model.hf(encoded.tokens[None], use_cache=False).logits[0, -1]
    for handle in handles:
        handle.remove()
    found = metrics(logits, encoded)
    return {name: torch.autograd.grad(value, gates, retain_graph=True)[0] for name, value in found.items()}


def close(actual: np.ndarray, expected: Tensor) -> None:
    torch.testing.assert_close(torch.from_numpy(actual), expected, atol=2e-5, rtol=2e-5)


# --- against slow references ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("silence", [True, False])
def test_attribution_patching_is_the_gradient_through_the_whole_model(
    model: HeadModel, prompt: Encoded, silence: bool
) -> None:
    reference = torch.zeros_like(reference_for(model)) if silence else reference_for(model)
    found = attribution_patching(model, prompt, None if silence else reference, "own")
    expected = slow_gradients(model, prompt, reference, 1.0)
    assert prompt.others
    assert set(found) == {"own.target", "own.previous", "own.target_contrast", "own.previous_contrast"}
    for name, gradient in expected.items():
        assert gradient.abs().max() > 1e-2
        close(found[f"own.{name}"], gradient)


def test_integrated_gradients_are_gradients_at_midpoints(model: HeadModel, prompt: Encoded) -> None:
    reference = reference_for(model)
    found = integrated_gradients(model, prompt, reference, "own", steps=4)
    parts = [slow_gradients(model, prompt, reference, level) for level in (0.125, 0.375, 0.625, 0.875)]
    for name in ("target", "previous"):
        close(found[f"own.{name}"], torch.stack([part[name] for part in parts]).mean(0))


def test_attribution_patching_is_the_finite_difference(model: HeadModel, prompt: Encoded) -> None:
    """Moving a head a little of the way to its reference, exactly, changes m by that much of its score (float64)."""
    model.hf.double()
    try:
        reference, epsilon = reference_for(model).double(), 1e-3
        found = attribution_patching(model, prompt, reference)
        runner = LastTokenRunner(model, prompt.tokens)
        clean = runner.run([CLEAN], record=["z"]).activations["z"][0]
        for head in every_head(model):
            step = epsilon * (clean[head] - reference[head])
            moved = runner.run(
                [Intervention(outputs={head: clean[head] + step}), Intervention(outputs={head: clean[head] - step})]
            )
            up, down = (metrics(logits, prompt) for logits in moved.logits)
            for name in ("target", "previous"):
                slope = (up[name] - down[name]) / (2 * epsilon)
                assert found[f"attribution_patching.{name}"][head] == pytest.approx(slope.item(), abs=1e-3)
    finally:
        model.hf.float()


def test_a_small_patch_is_exactly_its_estimate(llama: HeadModel, example: Encoded) -> None:
    """The error of the estimate falls with the square of the distance to the reference."""
    clean = LastTokenRunner(llama, example.tokens).run([CLEAN], record=["z"]).activations["z"][0]
    errors = []
    for epsilon in (0.1, 0.025):
        reference = clean + epsilon * (reference_for(llama) - clean)
        exact = patching_effects("x", llama, example, reference)["x.target"]
        estimate = attribution_patching(llama, example, reference, "x")["x.target"]
        errors.append(np.abs(exact - estimate).max())
        assert errors[-1] < 0.3 * np.abs(exact).max()
    assert errors[1] < errors[0] / 8


# --- completeness -----------------------------------------------------------------------------------------------------


def test_integrated_gradients_sum_to_the_effect_of_replacing_all(model: HeadModel, prompt: Encoded) -> None:
    references: list[Tensor | None] = [reference_for(model)]
    if model.post_attention_norm(0) is None:  # which would make g * z as large as z, until all at once it is nothing
        references.append(None)
    for reference in references:
        put = torch.zeros_like(reference_for(model)) if reference is None else reference
        everything = Intervention(outputs={head: put[head] for head in every_head(model)})
        rows = LastTokenRunner(model, prompt.tokens).run([CLEAN, everything]).logits
        clean, replaced = (metrics(row, prompt) for row in rows)
        found = {steps: integrated_gradients(model, prompt, reference, steps=steps) for steps in (8, 128)}
        for name in ("target", "previous"):
            whole = (clean[name] - replaced[name]).item()
            errors = {steps: abs(part[f"integrated_gradients.{name}"].sum() - whole) for steps, part in found.items()}
            assert errors[128] < 5e-3
            assert errors[128] < errors[8] or errors[8] < 1e-4


def test_where_the_rest_is_linear_the_estimate_is_exact() -> None:
    """The last layer's heads, without an MLP and a norm behind them."""
    heads = wrap_model(tiny_model("llama", num_key_value_heads=2), tiny_tokenizer(), "linear at the end")
    example = encode(tiny_task(subjects=1), heads.tokenizer).examples[0]
    heads.layers[-1].mlp.down_proj.weight.data.zero_()
    heads.final_norm.forward = lambda hidden: hidden
    exact = patching_effects("x", heads, example, reference_for(heads))
    found = attribution_patching(heads, example, reference_for(heads), "x")
    for name in ("x.target", "x.previous"):
        np.testing.assert_allclose(found[name][-1], exact[name][-1], atol=1e-4)


# --- what they are worth ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1])
def test_planted_heads_come_out(seed: int) -> None:
    model = plant(Planting(seed=seed))
    heads = model.view()
    examples = encode(model.task.limited(12), heads.tokenizer).examples
    for method in (attribution_patching, integrated_gradients):
        rows = [method(heads, example, name="x") for example in examples]
        mean = {name: np.mean([row[name] for row in rows], axis=0) for name in ("x.target", "x.previous")}
        for role, name in (("recall", "x.target"), ("suppression", "x.previous")):
            grade = model.grade(role, mean[name])
            assert grade["auroc"] >= 0.95 and grade["sign_accuracy"] == 1.0


# --- good manners -----------------------------------------------------------------------------------------------------


def test_results_are_float32_by_layer_and_head(llama: HeadModel, example: Encoded) -> None:
    for found in (attribution_patching(llama, example), integrated_gradients(llama, example)):
        for value in found.values():
            assert value.dtype == np.float32 and value.shape == (N_LAYERS, N_HEADS) and np.isfinite(value).all()


def test_without_previous_answers_there_is_no_such_score(llama: HeadModel) -> None:
    example = encode(tiny_task(previous=(0,), subjects=1), llama.tokenizer).examples[0]
    found = attribution_patching(llama, example, name="ap")
    assert set(found) == {"ap.target", "ap.target_contrast"}
    close(
        found["ap.target_contrast"],
        slow_gradients(llama, example, torch.zeros(N_LAYERS, N_HEADS, 1), 1.0)["target_contrast"],
    )
    assert set(integrated_gradients(llama, example, name="ig")) == {"ig.target", "ig.target_contrast"}


def test_nothing_is_left_behind(llama: HeadModel, example: Encoded) -> None:
    parameters = list(llama.hf.requires_grad_(True).parameters())
    parameters[3].requires_grad_(False)
    asking = [parameter.requires_grad for parameter in parameters]
    with torch.no_grad():
        before = llama.hf(example.tokens[None]).logits
        integrated_gradients(llama, example)
        assert not torch.is_grad_enabled()
    assert all(parameter.grad is None for parameter in parameters)
    assert [parameter.requires_grad for parameter in parameters] == asking
    assert not any(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in llama.hf.modules())
    with torch.no_grad():
        assert torch.equal(llama.hf(example.tokens[None]).logits, before)
    llama.hf.requires_grad_(True)


def test_frozen_parameters_make_no_difference(llama: HeadModel, example: Encoded) -> None:
    expected = attribution_patching(llama, example)
    llama.hf.requires_grad_(False)
    found = attribution_patching(llama, example)
    llama.hf.requires_grad_(True)
    for name, value in expected.items():
        assert np.array_equal(found[name], value)


def test_half_precision_is_close(llama: HeadModel, example: Encoded) -> None:
    half = wrap_model(tiny_model("llama", num_key_value_heads=2).bfloat16(), tiny_tokenizer(), "half")
    for method in (attribution_patching, integrated_gradients):
        for name, value in method(half, example).items():
            assert value.dtype == np.float32
            expected = method(llama, example)[name]
            assert np.abs(value - expected).max() < 0.1 * np.abs(expected).max() + 0.02


def test_little_memory_means_more_passes_and_the_same_numbers(
    llama: HeadModel, example: Encoded, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = integrated_gradients(llama, example, steps=7)
    passes: list[int] = []
    gated = gradients._gated_logits
    monkeypatch.setattr(gradients, "_gated_logits", lambda *args: passes.append(1) or gated(*args))
    monkeypatch.setattr(gradients, "rows_in_memory", lambda *_args, **_options: 3 * N_LAYERS)
    found = integrated_gradients(llama, example, steps=7)
    assert len(passes) == 3
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, atol=1e-6)


def test_no_steps_are_refused(llama: HeadModel, example: Encoded) -> None:
    with pytest.raises(InputError, match="steps=0; expected at least 1"):
        integrated_gradients(llama, example, steps=0)


def test_the_estimates_ignore_hooks_of_others_no_more_than_a_run_does(llama: HeadModel, example: Encoded) -> None:
    """Inside a block that silences a head, its score is that of a silent head."""
    with hooks.ablate(llama, [(1, 2)]):
        inside = attribution_patching(llama, example)["attribution_patching.target"]
    outside = attribution_patching(llama, example)["attribution_patching.target"]
    assert inside[1, 2] == 0 and outside[1, 2] != 0
