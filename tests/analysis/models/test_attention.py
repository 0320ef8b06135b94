"""Rows of chosen heads at chosen queries, and their gradients, against eager attention."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from headtune.analysis.models.attention import IMPLEMENTATION, AttentionCall, attend_with, head_log_rows, look_with
from helpers.head_rows import HEADS, POSITIONS, padded
from helpers.tiny import KINDS, N_LAYERS, Kind, tiny_model


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_rows_and_gradients_are_those_of_eager_attention(kind: Kind) -> None:
    for side in POSITIONS:
        require_rows_of_eager_attention(kind, side)


def require_rows_of_eager_attention(kind: Kind, side: str) -> None:
    inputs, positions = padded(side), POSITIONS[side]
    present = (positions >= 0)[:, None, :, None]
    weight = torch.randn(N_LAYERS, 3, len(HEADS), 3, 9, generator=torch.Generator().manual_seed(1))
    model = tiny_model(kind.family, attn_implementation=IMPLEMENTATION, **kind.config)
    rows: dict[int, Tensor] = {}

    def look(call: AttentionCall) -> None:
        rows[call.layer] = head_log_rows(call, HEADS, positions)

    with look_with(look):
        model(**inputs)
    for row in rows.values():
        assert row.dtype == torch.float32 and row.shape == (3, len(HEADS), 3, 9)
        filler = row[(~present).expand_as(row)]
        assert torch.isfinite(filler).all() and len(filler)
        torch.testing.assert_close(row.exp().sum(-1), torch.ones(row.shape[:-1]))
    torch.stack([(weight[layer] * row.exp() * present).sum() for layer, row in rows.items()]).sum().backward()

    eager = tiny_model(kind.family, attn_implementation="eager", **kind.config)
    expected = {
        layer: pattern[torch.arange(3)[:, None, None], torch.tensor(HEADS)[:, None], positions.clamp(min=0)[:, None]]
        for layer, pattern in enumerate(eager(**inputs, output_attentions=True).attentions)
    }
    torch.stack([(weight[layer] * row * present).sum() for layer, row in expected.items()]).sum().backward()

    for layer in range(N_LAYERS):
        torch.testing.assert_close(rows[layer].exp() * present, expected[layer] * present, atol=1e-6, rtol=1e-5)
        masked = (expected[layer] == 0) & present
        assert masked.any() and torch.isneginf(rows[layer][masked]).all()
    slow = {name: parameter.grad for name, parameter in eager.named_parameters() if parameter.grad is not None}
    largest = max(gradient.abs().max().item() for gradient in slow.values())
    for name, parameter in model.named_parameters():
        found = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(found, slow.get(name, torch.zeros_like(parameter)), atol=1e-5 * largest, rtol=1e-5)


def test_mixed_precision_rounds_queries_and_keys_and_nothing_after() -> None:
    """Under autocast to bfloat16 the rows are the float32 rows of the queries and keys that it gives, to the bit.

    Against float32 all along: bfloat16 has 8 bits, so a number loses up to 2^-9 of itself whenever it is rounded. What
    goes into a layer, its weights, q and k are: a score of size s is off by up to 4 * 2^-9 s, its log-probability, with
    the row's sum in it, by twice that, 2^-6 s. Each layer below hands on as much again.
    """
    inputs, positions = padded("right"), POSITIONS["right"]
    present = (positions >= 0)[:, None, :, None]
    model = tiny_model("llama", attn_implementation=IMPLEMENTATION, num_key_value_heads=2)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight *= 5.0  # scores of the size that trained models have
    mixed: dict[int, Tensor] = {}
    plain: dict[int, Tensor] = {}
    calls: dict[int, AttentionCall] = {}

    def look_mixed(call: AttentionCall) -> None:
        mixed[call.layer], calls[call.layer] = head_log_rows(call, HEADS, positions), call

    def look_plain(call: AttentionCall) -> None:
        plain[call.layer] = head_log_rows(call, HEADS, positions)

    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16), look_with(look_mixed):
            model(**inputs)
        with look_with(look_plain):
            model(**inputs)
    for layer in range(N_LAYERS):
        call = calls[layer]
        assert mixed[layer].dtype == torch.float32
        exact = AttentionCall(layer, call.query.float(), call.key.float(), call.value, call.mask, call.scaling)
        assert torch.equal(mixed[layer], head_log_rows(exact, HEADS, positions))
        seen = present & torch.isfinite(plain[layer])
        scores = call.query.float() @ call.key.float().repeat_interleave(2, 1).transpose(2, 3) * call.scaling
        size = scores.abs().max().item()
        difference = (mixed[layer] - plain[layer])[seen].abs().max().item()
        assert size > 1 and 0 < difference <= 2**-6 * (layer + 1) * size


@pytest.mark.parametrize("kind", ["additive", "additive by head", "bool", "none"])
def test_masks_of_every_kind(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 4, 5, 8, generator=generator), torch.randn(2, 2, 7, 8, generator=generator)
    causal = torch.ones(5, 7, dtype=torch.bool).tril(2)[None, None]
    bias = torch.randn(1, 4 if "by head" in kind else 1, 5, 7, generator=generator)
    additive = bias.masked_fill(~causal, torch.finfo(torch.float32).min)
    mask = {"bool": causal, "none": None}.get(kind, additive)
    scores = query @ key.repeat_interleave(2, 1).transpose(2, 3) * 0.3
    expected = (scores + additive if "additive" in kind else scores.masked_fill(~causal, float("-inf"))).softmax(-1)
    call = AttentionCall(0, query, key, key, mask, 0.3)
    positions = torch.tensor([[4, 1], [0, -1]])
    rows = head_log_rows(call, [1, 2], positions).exp()
    torch.testing.assert_close(rows[0], expected[0, 1:3][:, [4, 1]])
    torch.testing.assert_close(rows[1, :, 0], expected[1, 1:3, 0])


def test_only_what_is_chosen_enters_the_product() -> None:
    """The largest tensor kept for the backward pass holds rows, or keys, of the chosen heads."""
    query, key = torch.randn(1, 8, 64, 16, requires_grad=True), torch.randn(1, 4, 64, 16, requires_grad=True)
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        rows = head_log_rows(AttentionCall(0, query, key, key, None, 1.0), [5], torch.tensor([[3, 60]]))
    assert rows.requires_grad and max(kept) <= 64 * 16


def test_looks_are_nested_and_end_with_their_block() -> None:
    model = tiny_model("llama", attn_implementation=IMPLEMENTATION)
    tokens, outer, inner = torch.arange(3, 9)[None], [], []  # type: ignore[var-annotated]
    with pytest.raises(RuntimeError, match="boom"), look_with(lambda call: outer.append(call.layer)):
        with look_with(lambda call: inner.append(call.layer)), attend_with(lambda call: None):
            model(tokens)
        model(tokens)
        raise RuntimeError("boom")
    model(tokens)
    assert inner == list(range(N_LAYERS)) and outer == inner * 2
