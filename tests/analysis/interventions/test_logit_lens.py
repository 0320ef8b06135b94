"""Decoded parts add up to the logits, Token Lenses to the heads' output, and strings to what full passes say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from headtune.analysis.interventions.intervention import CLEAN, Intervention
from headtune.analysis.interventions.last_token import LastTokenRunner
from headtune.analysis.interventions.logit_lens import PARTS, answer_tokens, decode, string_logprobs, token_lens
from headtune.analysis.methods.logit_attribution import attribute
from headtune.analysis.models import hooks
from headtune.analysis.models.attention import attend_with, record_rows
from headtune.analysis.models.head_model import HeadModel
from headtune.analysis.tasks.tokenized import Encoded, encode
from headtune.analysis.utils.errors import InputError
from helpers.lens_models import SIZES, model_of, slow_attention
from helpers.tiny import tiny_task, tiny_tokenizer


@pytest.fixture(scope="module", params=SIZES)
def model(request: pytest.FixtureRequest) -> HeadModel:
    return model_of(request.param)


@pytest.fixture(scope="module")
def llama() -> HeadModel:
    return model_of("llama")


@pytest.fixture(scope="module")
def example() -> Encoded:
    return encode(tiny_task(), tiny_tokenizer()).examples[3]


def some_rows(encoded: Encoded) -> list[Intervention]:
    return [CLEAN, Intervention(knocked_out=encoded.subject), Intervention(factors={(1, 2): 0.0, (0, 1): 3.0})]


def test_decoded_parts_add_up_to_the_logits_of_every_row(model: HeadModel, example: Encoded) -> None:
    tokens = torch.tensor([5, 17, 300])
    result = LastTokenRunner(model, example.tokens).run(some_rows(example), record=PARTS)
    decoded = decode(model, result, tokens)
    assert decoded.attention.shape == decoded.mlp.shape == (3, model.n_layers, 3)
    torch.testing.assert_close(decoded.logits, result.logits[:, tokens], atol=1e-4, rtol=1e-4)
    assert (decoded.logits[0] - decoded.logits[1:]).abs().amax() > 1e-3  # rows really differ


@torch.no_grad()
def test_decoded_start_is_the_embedding(model: HeadModel, example: Encoded) -> None:
    entered: list[Tensor] = []
    hook = model.layers[0].register_forward_pre_hook(
        lambda _m, args, kwargs: entered.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    with hooks.watch([model.final_norm]) as seen:
        model.hf(example.tokens[None], use_cache=False)
    hook.remove()
    residual = seen[model.final_norm][0]
    assert residual is not None
    tokens = torch.tensor([5, 17])
    expected = model.unembedding_directions(residual[0, -1], tokens) @ entered[0][0, -1]
    result = LastTokenRunner(model, example.tokens).run([CLEAN], record=PARTS)
    torch.testing.assert_close(decode(model, result, tokens).start[0], expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_token_lens_is_the_value_weighted_sum_through_the_output_projection(model: HeadModel, example: Encoded) -> None:
    sources = example.sources() | {"nothing": [], "all but one": list(range(1, len(example.tokens)))}
    tokens = torch.tensor([5, 17, 300])
    found = token_lens(LastTokenRunner(model, example.tokens), sources, tokens)
    end = torch.tensor([example.end])
    norms = [norm for layer in range(model.n_layers) if (norm := model.post_attention_norm(layer)) is not None]
    with record_rows(end) as rows, hooks.watch([model.final_norm, *norms]) as seen:
        model.hf(example.tokens[None], use_cache=False)
    residual = seen[model.final_norm][0]
    assert residual is not None
    directions = model.unembedding_directions(residual[0, -1], tokens)
    for layer in range(model.n_layers):
        weight, norm = model.projection(layer).weight, model.post_attention_norm(layer)
        for head in range(model.n_heads):
            columns = slice(head * model.head_dim, (head + 1) * model.head_dim)
            slab = weight[columns] if model.architecture.in_out_weight else weight[:, columns].T  # [head_dim, d_model]
            for index, positions in enumerate(sources.values()):
                written = torch.zeros(model.d_model)
                for t in positions:
                    written += rows.pattern[layer][0, head, t] * (rows.values[layer][0, head, t] @ slab)
                through = directions if norm is None else model.norm_directions(norm, seen[norm][0][0, -1], directions)  # type: ignore[index]
                expected = through @ written
                torch.testing.assert_close(found[index, layer, head], expected, atol=1e-4, rtol=1e-4)


def test_lenses_of_all_sources_and_heads_are_the_decoded_attention(llama: HeadModel, example: Encoded) -> None:
    tokens = torch.tensor([5, 17, 300])
    runner = LastTokenRunner(llama, example.tokens)
    lens = token_lens(runner, example.sources(), tokens)
    attention = decode(llama, runner.run([CLEAN], record=PARTS), tokens).attention[0]
    torch.testing.assert_close(lens.sum((0, 2)), attention, atol=1e-4, rtol=1e-4)


def test_token_lens_agrees_with_attribution(llama: HeadModel, example: Encoded) -> None:
    lens = token_lens(
        LastTokenRunner(llama, example.tokens), {"subject": example.subject}, torch.tensor(example.target_tokens)
    )
    expected = torch.from_numpy(attribute(llama, example)["lens.subject.target"])
    torch.testing.assert_close(lens[0].mean(-1), expected, atol=1e-5, rtol=1e-4)


def test_token_lens_refuses_positions_outside(llama: HeadModel, example: Encoded) -> None:
    with pytest.raises(InputError, match="source 'x' has position 99"):
        token_lens(LastTokenRunner(llama, example.tokens), {"x": [99]}, torch.tensor([5]))


# --- whole strings ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def slow_logprob(model: HeadModel, tokens: Tensor, answer: Sequence[int], row: Intervention) -> float:
    """One full pass over prompt and answer."""
    end = len(tokens) - 1

    def change(layer: int) -> Any:
        def hook(_module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            z = args[0].unflatten(-1, (model.n_heads, model.head_dim)).clone()
            for (of, head), factor in row.factors.items():
                if of == layer:
                    z[:, end:, head] *= factor
            for (of, head), value in row.outputs.items():
                if of == layer:
                    z[:, end:, head] = value
            return (z.flatten(-2), *args[1:])

        return hook

    handles = [model.projection(layer).register_forward_pre_hook(change(layer)) for layer in range(model.n_layers)]
    with attend_with(slow_attention(row, end)):
        logits = model.hf(torch.cat([tokens, torch.tensor(list(answer))])[None], use_cache=False).logits[0]
    for handle in handles:
        handle.remove()
    logp = logits.log_softmax(-1)
    return sum(float(logp[end + i, token]) for i, token in enumerate(answer))


ANSWERS = [(5,), (17, 300, 42), (8, 9), (300, 5, 6, 7, 11)]


def test_strings_are_what_full_passes_say(model: HeadModel, example: Encoded) -> None:
    rows = [
        CLEAN,
        Intervention(factors={(0, 1): 0.0, (2, 3): 2.0}, outputs={(1, 0): torch.ones(model.head_dim)}),
        Intervention(knocked_out=(*example.subject, *example.previous[0])),
        Intervention(knocked_out=(*example.previous[-1], example.end), renormalise=True, layers=(1, 2)),
    ]
    found = string_logprobs(model, example.tokens, ANSWERS, rows)
    expected = [[slow_logprob(model, example.tokens, answer, row) for answer in ANSWERS] for row in rows]
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-4, rtol=1e-5)


def test_strings_do_not_depend_on_how_they_are_batched(llama: HeadModel, example: Encoded) -> None:
    whole = string_logprobs(llama, example.tokens, ANSWERS, some_rows(example))
    parts = string_logprobs(replace(llama, max_memory=1), example.tokens, ANSWERS, some_rows(example))
    torch.testing.assert_close(whole, parts, atol=1e-5, rtol=1e-5)
    assert string_logprobs(llama, example.tokens, []).shape == (1, 0)


def test_answers_in_tokens(llama: HeadModel, example: Encoded) -> None:
    tokenizer = llama.tokenizer
    ids = answer_tokens(tokenizer, example, "New York City")
    assert ids is not None and len(ids) == 3 and tokenizer.decode(ids) == " New York City"
    with_bos = tiny_tokenizer(bos=True)
    encoded = encode(tiny_task(), with_bos).examples[3]
    assert answer_tokens(with_bos, encoded, "New York City") == ids
    bare = replace(encoded, tokens=encoded.tokens[1:])  # a chat template that writes no <bos>
    assert answer_tokens(with_bos, bare, "New York City") == ids
    assert answer_tokens(with_bos, replace(encoded, tokens=encoded.tokens + 1), "New York City") is None


@pytest.mark.parametrize(
    ("tokens", "answers", "row", "message"),
    [
        ([5, 6], [()], CLEAN, "no tokens"),
        ([5], [(6,)], CLEAN, "has 1 token"),
        ([5, 6], [(6,)], Intervention(queries={(0, 0): torch.zeros(12)}), "not with queries"),
        ([5, 6], [(6,)], Intervention(factors={(0, 9): 0.0}), "L0H9 is out of range"),
    ],
)
def test_strings_refuse(llama: HeadModel, tokens: list[int], answers: Any, row: Intervention, message: str) -> None:
    with pytest.raises(InputError, match=message):
        string_logprobs(llama, torch.tensor(tokens), answers, [row])
