"""The MLP decomposition recovers what is known, equals least squares written out, and parts of a run add up."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from headtune.analysis.interventions import mlp_regression
from headtune.analysis.interventions.intervention import CLEAN
from headtune.analysis.interventions.last_token import LastTokenRunner
from headtune.analysis.models import hooks
from headtune.analysis.models.head_model import HeadModel
from headtune.analysis.models.loading import wrap_model
from headtune.analysis.tasks.tokenized import encode
from headtune.analysis.utils.errors import InputError
from helpers.tiny import N_HEADS, N_LAYERS, tiny_model, tiny_task, tiny_tokenizer

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-gqa": ("llama", {"num_key_value_heads": 2}),
    "gpt2": ("gpt2", {}),
    "opt": ("opt", {}),
    "gpt_neox": ("gpt_neox", {}),
    "phi": ("phi", {}),
    "gemma2": (
        "gemma2",
        {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": N_LAYERS,
            "num_attention_heads": N_HEADS,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "max_position_embeddings": 256,
            "attn_implementation": "eager",
        },
    ),
}


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest) -> HeadModel:
    family, config = FAMILIES[request.param]
    return wrap_model(tiny_model(family, **config), tiny_tokenizer(), request.param)


@pytest.fixture(scope="module")
def prompts(model: HeadModel) -> list[Tensor]:
    return [example.tokens for example in encode(tiny_task(), model.tokenizer).examples]


# --- parts of a run ---------------------------------------------------------------------------------------------------


def test_parts_are_those_of_the_end_step(model: HeadModel, prompts: list[Tensor]) -> None:
    for tokens in prompts[:3]:
        parts = mlp_regression.last_token_parts(model, tokens)
        result = LastTokenRunner(model, tokens).run([CLEAN], record=["attention", "mlp", "residual", "pattern"])
        torch.testing.assert_close(parts.mlps, result.activations["mlp"][0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(parts.final, result.activations["residual"][0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(parts.pattern, result.activations["pattern"][0], atol=1e-5, rtol=1e-5)
        biases = []
        for layer in range(model.n_layers):
            # What attention adds without any head: its projection's bias, through the norm where there is one.
            end = torch.tensor([len(tokens) - 1])
            block, norm = model.attention(layer), model.post_attention_norm(layer)
            watched = [module for module in (block, norm) if module is not None]
            with torch.no_grad(), hooks.watch(watched) as seen:
                model.hf(tokens[None], use_cache=False)
            bias: Any = model.projection(layer).bias
            bias = torch.zeros(model.d_model) if bias is None else bias
            if norm is not None:
                bias = mlp_regression.through_norm(model, norm, seen[norm][0][0, end.item()], bias[None])[0]  # type: ignore[index]
            biases.append(bias)
        torch.testing.assert_close(
            parts.heads.sum(1) + torch.stack(biases).detach(), result.activations["attention"][0], atol=1e-4, rtol=1e-4
        )


def test_what_comes_from_the_first_position_is_all_of_a_one_token_prompt(model: HeadModel) -> None:
    parts = mlp_regression.last_token_parts(model, torch.tensor([7]))
    torch.testing.assert_close(parts.first, parts.heads[-1])


def test_what_comes_from_the_first_position(model: HeadModel, prompts: list[Tensor]) -> None:
    """The last layer's contribution falls by it when the first position's value is silenced in that layer."""
    tokens, last = prompts[0], model.n_layers - 1
    parts = mlp_regression.last_token_parts(model, tokens)
    runner = LastTokenRunner(model, tokens)
    runner.values[last][:, 0] = 0
    z = runner.run([CLEAN], record=["z"]).activations["z"][0, last]
    if model.post_attention_norm(last) is None:  # else the norm's scale differs too
        rest = torch.einsum("hd,hdm->hm", z, model.output_weight(last))
        torch.testing.assert_close(parts.heads[last] - parts.first, rest.detach(), atol=1e-4, rtol=1e-4)


def test_parts_through_a_norm_add_up_to_its_output(model: HeadModel) -> None:
    parts = torch.randn(5, model.d_model, generator=torch.Generator().manual_seed(0))
    norm: Any = model.final_norm
    x = parts.sum(0)
    bias = getattr(norm, "bias", None)
    expected = norm(x).detach() - (0 if bias is None else bias.detach())
    torch.testing.assert_close(
        mlp_regression.through_norm(model, norm, x, parts).sum(0), expected, atol=1e-5, rtol=1e-4
    )


def test_decoded_is_the_dot_product_with_unembedding_directions(model: HeadModel) -> None:
    generator = torch.Generator().manual_seed(1)
    residual, parts = (
        torch.randn(model.d_model, generator=generator),
        torch.randn(3, model.d_model, generator=generator),
    )
    tokens = torch.arange(20)
    expected = parts @ model.unembedding_directions(residual, tokens).T
    torch.testing.assert_close(
        mlp_regression.decoded(model, residual, parts)[:, :20], expected.detach(), atol=1e-4, rtol=1e-4
    )


# --- the regression ---------------------------------------------------------------------------------------------------


def _synthetic(n: int, noise: float = 0.0, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs `[n, 2 layers, 4, 16]` with means, MLP outputs made of them, and the c and b they were made with."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.Generator().manual_seed(99)
    c = torch.tensor([[0.5, -1.0, 0.0, 0.2], [2.0, 0.1, -0.3, -0.7]])
    b = torch.randn(2, 16, generator=truth)
    means = 3 * torch.randn(2, 4, 16, generator=truth)
    scales = torch.tensor([1.0, 0.1, 5.0, 100.0])[:, None]
    x = means + scales * torch.randn(n, 2, 4, 16, generator=generator)
    m = torch.einsum("lk,nlkd->nld", c, x) + b + noise * torch.randn(n, 2, 16, generator=generator)
    return x, m, c, b


def _moments(x: Tensor, m: Tensor) -> mlp_regression.Moments:
    total = mlp_regression.Moments.of_example(x[0], m[0])
    for inputs, outputs in zip(x[1:], m[1:], strict=True):
        total.add(mlp_regression.Moments.of_example(inputs, outputs))
    return total


def test_known_coefficients_and_intercept_are_recovered() -> None:
    x, m, c, b = _synthetic(40)
    found = mlp_regression.regress(_moments(x, m))
    torch.testing.assert_close(torch.cat([found.heads, found.residual[:, None]], 1), c, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(found.intercept, b, atol=2e-2, rtol=1e-2)
    other_x, other_m, *_ = _synthetic(10, seed=1)
    assert all(value is not None and value > 0.999999 for value in found.r2(_moments(other_x, other_m)))


def test_it_is_least_squares_written_out() -> None:
    x, m, *_ = _synthetic(12, noise=2.0)
    test_x, test_m, *_ = _synthetic(7, noise=2.0, seed=3)
    found = mlp_regression.regress(_moments(x, m), ridge=0.0)
    held_out = found.r2(_moments(test_x, test_m))
    n, d = 12, 16
    for layer in range(2):
        # Rows (example, coordinate); columns: the inputs, then one indicator per coordinate, which is the intercept.
        design = np.concatenate(
            [x[:, layer].numpy().transpose(0, 2, 1).reshape(n * d, 4), np.tile(np.eye(d), (n, 1))], axis=1
        ).astype(np.float64)
        target = m[:, layer].numpy().reshape(-1).astype(np.float64)
        solution = np.linalg.lstsq(design, target, rcond=None)[0]
        np.testing.assert_allclose(found.heads[layer], solution[:3], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found.residual[layer], solution[3], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found.intercept[layer], solution[4:], rtol=1e-3, atol=1e-4)
        inputs, outputs = test_x[:, layer].double().numpy(), test_m[:, layer].double().numpy()
        fitted = np.einsum("k,nkd->nd", solution[:4], inputs) + solution[4:]
        mean = m[:, layer].double().numpy().mean(0)
        expected = 1 - ((outputs - fitted) ** 2).sum() / ((outputs - mean) ** 2).sum()
        assert held_out[layer] == pytest.approx(expected, abs=1e-5)


def test_an_input_that_does_not_vary_has_coefficient_zero() -> None:
    x, m, c, _ = _synthetic(30)
    x[:, 0, 1] = x[0, 0, 1]
    m[:, 0] = torch.einsum("k,nkd->nd", c[0], x[:, 0])
    found = mlp_regression.regress(_moments(x, m))
    assert found.heads[0, 1] == 0
    torch.testing.assert_close(found.heads[0, [0, 2]], c[0, [0, 2]], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(found.intercept[0], c[0, 1] * x[0, 0, 1], atol=2e-2, rtol=1e-2)


def test_an_output_that_does_not_vary_has_no_r2() -> None:
    x, m, *_ = _synthetic(10)
    m[:, 0] = m[0, 0]
    moments = _moments(x, m)
    held_out = mlp_regression.regress(moments).r2(moments)
    assert held_out[0] is None and held_out[1] is not None


def test_subjects_held_out() -> None:
    subjects = [name for name in "abcdefghij" for _ in range(3)]
    held_out = mlp_regression.split_subjects(subjects, 0.3)
    assert len(held_out) == 3 and held_out == mlp_regression.split_subjects(subjects, 0.3)
    assert held_out != mlp_regression.split_subjects(subjects, 0.3, seed=1)
    assert (
        len(mlp_regression.split_subjects(["a", "b"], 0.9)) == 1 == len(mlp_regression.split_subjects(["a", "b"], 0.01))
    )


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: mlp_regression.split_subjects(["a", "b"], 1.5), ["1.5", "between 0 and 1"]),
        (lambda: mlp_regression.split_subjects(["a", "a"], 0.5), ["1 subject", "at least two"]),
        (
            lambda: mlp_regression.regress(mlp_regression.Moments.of_example(torch.ones(1, 2, 3), torch.ones(1, 3))),
            ["1 is too few"],
        ),
    ],
)
def test_refused(call: Any, words: list[str]) -> None:
    with pytest.raises(InputError) as error:
        call()
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)
