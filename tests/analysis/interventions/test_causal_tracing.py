"""Knockouts and traces are what full passes say, one for each row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from headtune.analysis.interventions.causal_tracing import (
    KINDS,
    causal_trace,
    embedding_deviation,
    knockout,
    noise_of,
    window_of,
)
from headtune.analysis.interventions.intervention import Intervention
from headtune.analysis.interventions.last_token import LastTokenRunner
from headtune.analysis.interventions.logit_lens import string_logprobs
from headtune.analysis.models.attention import attend_with
from headtune.analysis.models.head_model import HeadModel
from headtune.analysis.tasks.tokenized import Encoded, encode
from headtune.analysis.utils.errors import InputError
from helpers.lens_models import SIZES, model_of, slow_attention
from helpers.tiny import tiny_task, tiny_tokenizer

TOKENS = torch.tensor([5, 17, 300])


@pytest.fixture(scope="module", params=SIZES)
def model(request: pytest.FixtureRequest) -> HeadModel:
    return model_of(request.param)


@pytest.fixture(scope="module")
def llama() -> HeadModel:
    return model_of("llama")


@pytest.fixture(scope="module")
def example() -> Encoded:
    return encode(tiny_task(), tiny_tokenizer()).examples[3]


def measure(logits: Tensor) -> Tensor:
    return logits[:, TOKENS]


def first_of(output: Any) -> Tensor:
    tensor: Tensor = output[0] if isinstance(output, tuple) else output
    return tensor


# --- knockout ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def slow_decoded(model: HeadModel, tokens: Tensor, row: Intervention) -> tuple[Tensor, Tensor, Tensor]:
    """Decoded attention and MLP outputs `[n_layers, n]` and logits `[n]` of one full pass."""
    outputs: dict[tuple[str, int], Tensor] = {}
    residual: list[Tensor] = []
    handles = [model.final_norm.register_forward_pre_hook(lambda _m, args: residual.append(args[0][0, -1]))]

    def keep(kind: str, layer: int) -> Any:
        def hook(_module: Any, _args: Any, output: Any) -> None:
            outputs[kind, layer] = first_of(output).reshape(len(tokens), -1)[-1]

        return hook

    for layer in range(model.n_layers):
        handles.append(model.attention_added(layer).register_forward_hook(keep("attention", layer)))
        handles.append(model.mlp(layer).register_forward_hook(keep("mlp", layer)))
    with attend_with(slow_attention(row, len(tokens) - 1)):
        logits = model.hf(tokens[None], use_cache=False).logits[0, -1]
    for handle in handles:
        handle.remove()
    directions = model.unembedding_directions(residual[-1], TOKENS)
    parts = [torch.stack([directions @ outputs[kind, layer] for layer in range(model.n_layers)]) for kind in KINDS]
    return parts[0], parts[1], logits[TOKENS]


@pytest.mark.parametrize("renormalise", [False, True])
def test_knockout_is_the_difference_of_two_full_passes(model: HeadModel, example: Encoded, renormalise: bool) -> None:
    sources = {"subject": example.subject, "previous": example.previous[1], "end": (example.end,), "nothing": ()}
    found = knockout(LastTokenRunner(model, example.tokens), sources, TOKENS, renormalise)
    full = slow_decoded(model, example.tokens, Intervention())
    for index, positions in enumerate(sources.values()):
        cut = slow_decoded(model, example.tokens, Intervention(knocked_out=positions, renormalise=renormalise))
        for part, before, after in zip((found.attention, found.mlp, found.logits), full, cut, strict=True):
            torch.testing.assert_close(part[index], before - after, atol=1e-4, rtol=1e-4)
    assert found.mlp[:3].abs().amax() > 1e-3
    assert not found.mlp[3].any()


def test_knockout_of_everything_leaves_nothing_to_renormalise(llama: HeadModel, example: Encoded) -> None:
    runner, everything = LastTokenRunner(llama, example.tokens), {"all": range(len(example.tokens))}
    plain, renormalised = (knockout(runner, everything, TOKENS, renormalise=choice) for choice in (False, True))
    torch.testing.assert_close(plain.logits, renormalised.logits)
    row = Intervention(knocked_out=everything["all"], renormalise=True)
    assert string_logprobs(llama, example.tokens, [(5,)], [row]).isfinite().all()


# --- causal tracing ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def slow_run(
    model: HeadModel,
    tokens: Tensor,
    noisy: Sequence[int],
    noise: Tensor | None,
    put: dict[tuple[str, int], Tensor],
    at: Sequence[int],
) -> tuple[Tensor, dict[tuple[str, int], Tensor]]:
    """One full pass with noise, and with `put` outputs at positions `at`; next-token logits and all outputs."""
    outputs: dict[tuple[str, int], Tensor] = {}

    def embed(_module: Any, _args: Any, output: Tensor) -> Tensor:
        output = output.clone()
        if noise is not None:
            output[0, list(noisy)] += noise
        return output

    def change(kind: str, layer: int) -> Any:
        def hook(_module: Any, _args: Any, output: Any) -> Any:
            tensor = first_of(output).clone()
            rows = tensor.view(len(tokens), -1)
            if (kind, layer) in put:
                rows[list(at)] = put[kind, layer][list(at)]
            outputs[kind, layer] = rows
            return (tensor, *output[1:]) if isinstance(output, tuple) else tensor

        return hook

    handles = [model.hf.get_input_embeddings().register_forward_hook(embed)]
    for layer in range(model.n_layers):
        handles.append(model.attention_added(layer).register_forward_hook(change("attention", layer)))
        handles.append(model.mlp(layer).register_forward_hook(change("mlp", layer)))
    logits = model.hf(tokens[None], use_cache=False).logits[0, -1]
    for handle in handles:
        handle.remove()
    return logits[TOKENS], outputs


def test_trace_is_one_full_pass_for_each_noise_layer_and_group(model: HeadModel, example: Encoded) -> None:
    groups = {
        "subject": example.subject,
        "previous": example.previous[0],
        "rest": [0, 2, example.previous[1][0], example.end - 1],  # before, within and after
        "end": [example.end],
        "before": [0],
        "nothing": [],
    }
    n_noise, window, noisy = 2, 2, example.subject
    deviation = 3 * embedding_deviation(model, example.tokens)
    options: dict[str, Any] = {"deviation": deviation, "n_noise": n_noise, "window": window, "seed": 4}
    found = causal_trace(model, example.tokens, noisy, groups, measure, **options)
    assert found.restored.shape == (n_noise, 2, len(groups), model.n_layers, len(TOKENS))
    clean, outputs = slow_run(model, example.tokens, noisy, None, {}, [])
    torch.testing.assert_close(found.clean, clean, atol=1e-4, rtol=1e-4)
    for index, noise in enumerate(noise_of(model, deviation, n_noise, len(noisy), seed=4)):
        base, _ = slow_run(model, example.tokens, noisy, noise, {}, [])
        torch.testing.assert_close(found.noisy[index], base, atol=1e-4, rtol=1e-4)
        assert (base - clean).abs().amax() > 0.05
        for kind_index, kind in enumerate(KINDS):
            for group_index, at in enumerate(groups.values()):
                for centre in range(model.n_layers):
                    put = {(kind, layer): outputs[kind, layer] for layer in window_of(centre, window, model.n_layers)}
                    expected, _ = slow_run(model, example.tokens, noisy, noise, put, at)
                    torch.testing.assert_close(
                        found.restored[index, kind_index, group_index, centre], expected, atol=1e-4, rtol=1e-4
                    )


def test_trace_does_not_depend_on_how_it_is_batched(llama: HeadModel, example: Encoded) -> None:
    groups = {"subject": example.subject, "end": [example.end]}
    few: dict[str, Any] = {"deviation": 0.07, "n_noise": 3, "window": 1}
    whole = causal_trace(llama, example.tokens, example.subject, groups, measure, **few, centres=[2, 0])
    small = replace(llama, max_memory=1)
    parts = causal_trace(small, example.tokens, example.subject, groups, measure, **few, centres=[2, 0])
    for one, other in ((whole.clean, parts.clean), (whole.noisy, parts.noisy), (whole.restored, parts.restored)):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    every = causal_trace(llama, example.tokens, example.subject, groups, measure, **few)
    torch.testing.assert_close(every.restored[..., [2, 0], :], whole.restored, atol=1e-5, rtol=1e-5)


def test_windows() -> None:
    assert list(window_of(6, 4, 12)) == [4, 5, 6, 7]
    assert list(window_of(0, 4, 12)) == [0, 1]
    assert list(window_of(11, 5, 12)) == [9, 10, 11]
    assert list(window_of(3, 1, 12)) == [3]


def test_noise_is_as_strong_as_asked(llama: HeadModel) -> None:
    assert noise_of(llama, 0.3, 200, 4).std().item() == pytest.approx(0.3, rel=0.02)
    assert torch.equal(noise_of(llama, 1.0, 2, 4, seed=1), noise_of(llama, 1.0, 2, 4, seed=1))
    assert not torch.equal(noise_of(llama, 1.0, 2, 4, seed=1), noise_of(llama, 1.0, 2, 4, seed=2))


def test_embeddings_deviate_as_their_tokens_do(llama: HeadModel) -> None:
    gemma = model_of("gemma2")  # which multiplies its embeddings
    for model, factor in ((llama, 1.0), (gemma, gemma.d_model**0.5)):
        weight: Any = model.hf.get_input_embeddings().weight
        rows = torch.stack([weight[5], weight[5], weight[9]]).detach()
        slow = ((rows - rows.mean()) ** 2).sum() / (rows.numel() - 1)
        assert embedding_deviation(model, torch.tensor([5, 5, 9])) == pytest.approx(
            factor * slow.sqrt().item(), rel=1e-5
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_noise": 0}, "n_noise=0"),
        ({"window": 0}, "window=0"),
        ({"centres": [3]}, "centre 3 is out of range; expected layers 0 to 2"),
    ],
)
def test_trace_refuses(llama: HeadModel, example: Encoded, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        causal_trace(
            llama, example.tokens, example.subject, {"end": [example.end]}, measure, **{"deviation": 1.0, **options}
        )


def test_trace_refuses_positions(llama: HeadModel, example: Encoded) -> None:
    with pytest.raises(InputError, match="no positions for the noise"):
        causal_trace(llama, example.tokens, [], {"end": [example.end]}, measure, deviation=1.0)
    with pytest.raises(InputError, match="position 99 is out of range"):
        causal_trace(llama, example.tokens, example.subject, {"x": [99]}, measure, deviation=1.0)
