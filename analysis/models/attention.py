"""Attention rows on demand: SDPA for everybody, probabilities only for the query positions asked for.

A function registered with transformers' attention interface runs SDPA unchanged and, while a `record_rows` block is
open, recomputes `A[l, :, q, :]` for one query position per example. The full `[heads, seq, seq]` matrix never exists,
except in models that cap their attention scores (Gemma 2), which SDPA cannot do. `look_with` shows every layer's call
to whoever wants rows of chosen heads with their gradient (`head_log_rows`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

IMPLEMENTATION = "headtune_rows"  # must not contain "sdpa": a substring check in transformers refuses some families


@dataclass(eq=False)  # each block is itself: lists of tensors have no truth value
class AttentionRows:
    """What a `record_rows` block collects, by layer.

    Attributes:
        positions: `[batch]` the query position recorded for each example.
        pattern: layer -> `[batch, n_heads, seq]` float32 attention probabilities of that query.
        values: layer -> `[batch, n_heads, seq, head_dim]` value vectors, KV groups repeated to query heads.
    """

    positions: Tensor
    pattern: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)


_recorders: list[AttentionRows] = []


@dataclass(frozen=True)
class AttentionCall:
    """What one layer hands to its attention function.

    Attributes:
        layer: its index.
        query: `[batch, n_heads, queries, head_dim]`, after the rotary embedding where there is one.
        key, value: `[batch, n_kv_heads, keys, head_dim]`.
        mask: None (causal), bool (True = attend) or additive, `[batch or 1, heads or 1, queries, keys]`.
        scaling: factor on `q . k`.
        softcap: `s <- softcap * tanh(s / softcap)` on the scaled scores, where the family has it.
    """

    layer: int
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    scaling: float
    softcap: float | None = None


# What stands in for attention while an `attend_with` block is open: returns `[batch, queries, n_heads, head_dim]`, or
# None to go on as usual (having looked).
Attend = Callable[[AttentionCall], Tensor | None]
_substitutes: list[Attend] = []

Look = Callable[[AttentionCall], None]
_looks: list[Look] = []


def softcapped(scores: Tensor, cap: float | None) -> Tensor:
    """`cap * tanh(scores / cap)`, or the scores themselves without a cap."""
    return scores if cap is None else cap * torch.tanh(scores / cap)


def attention_rows(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    positions: Tensor,
    softcap: float | None = None,
) -> Tensor:
    """`softmax(cap(q_pos . k^T * scaling) + mask)` in float32, one query position per example: `[batch, heads, keys]`.

    Args:
        query: `[batch, n_heads, queries, head_dim]`.
        key: `[batch, n_heads, keys, head_dim]`, KV groups already repeated.
        mask: None (causal), bool (True = attend) or additive, `[batch or 1, heads or 1, queries, keys]`.
        scaling: the block's own; None means `head_dim ** -0.5`.
        positions: `[batch]` indices into `queries`.
        softcap: see `softcapped`.
    """
    batch = torch.arange(query.shape[0], device=query.device)
    chosen = query[batch, :, positions].float()  # [batch, heads, head_dim]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    logits = softcapped(torch.einsum("bhd,bhkd->bhk", chosen, key.float()) * scale, softcap)
    n_queries, n_keys = query.shape[2], key.shape[2]
    if mask is None:
        visible = torch.arange(n_keys, device=query.device) <= (positions + n_keys - n_queries)[:, None]
        logits = logits.masked_fill(~visible[:, None], float("-inf"))
    else:
        rows = mask.expand(query.shape[0], *mask.shape[1:])[batch, :, positions]  # [batch, heads or 1, keys]
        rows = rows[..., :n_keys]
        logits = logits.masked_fill(~rows, float("-inf")) if rows.dtype == torch.bool else logits + rows.float()
    return logits.softmax(-1)


def head_log_rows(call: AttentionCall, heads: Sequence[int], positions: Tensor) -> Tensor:
    """`log softmax(cap(q . k^T * scaling) + mask)` of chosen heads at chosen queries, with gradient, without dropout.

    Only these queries, and the keys of these heads (key head = head // group size), enter the product.

    Args:
        call: as `look_with` shows it.
        heads: query heads.
        positions: `[batch, T]` indices into the queries; -1 is padding.

    Returns:
        `[batch, len(heads), T, keys]` float32, -inf at masked keys. Rows of padding, and of queries that see no key at
        all (those of padding tokens), are finite filler.
    """
    device, (batch, n_heads, n_queries, _), n_keys = call.query.device, call.query.shape, call.key.shape[2]
    positions = positions.to(device)
    queries = positions.clamp(min=0)
    chosen = torch.as_tensor(heads, dtype=torch.long, device=device)
    examples = torch.arange(batch, device=device)[:, None]
    query = call.query[examples[:, None], chosen[:, None], queries[:, None]].float()  # [batch, heads, T, head_dim]
    key = call.key[:, chosen // (n_heads // call.key.shape[1])].float()
    with torch.autocast(device.type, enabled=False):  # which would round the scores to the training's half precision
        scores = softcapped(query @ key.transpose(2, 3) * call.scaling, call.softcap)
    if call.mask is None:
        visible = (torch.arange(n_keys, device=device) <= queries[..., None] + (n_keys - n_queries))[:, None]
    else:
        mask = call.mask if call.mask.shape[1] == 1 else call.mask[:, chosen]
        mask = mask[..., :n_keys].expand(batch, -1, -1, -1)
        mask = mask[examples, :, queries].transpose(1, 2)  # [batch, heads or 1, T, keys]
        visible = mask
        if mask.dtype != torch.bool:
            visible = mask > torch.finfo(mask.dtype).min / 2
            scores = scores + mask.float().masked_fill(~visible, 0)
    blind = ~visible.any(-1, keepdim=True) | (positions < 0)[:, None, :, None]
    with torch.autocast(device.type, enabled=False):
        return scores.masked_fill(~(visible | blind), float("-inf")).log_softmax(-1)


def _soft_capped_attention(call: AttentionCall, dropout: float) -> Tensor:
    """`[batch, queries, n_heads, head_dim]`, with a cap on the scores.

    In the order of operations, and the precision, of transformers' eager attention: logits are the same bit for bit.
    """
    groups = call.query.shape[1] // call.key.shape[1]
    key, value = repeat_kv(call.key, groups), repeat_kv(call.value, groups)
    scores = softcapped(call.query @ key.transpose(2, 3) * call.scaling, call.softcap)
    n_queries, n_keys = scores.shape[-2:]
    mask = call.mask
    if mask is None:
        mask = torch.ones(n_queries, n_keys, dtype=torch.bool, device=scores.device).tril(n_keys - n_queries)
    mask = mask[..., :n_keys]
    # The lowest finite number and not -inf: a padding query that sees nothing must not become NaN.
    lowest = torch.finfo(scores.dtype).min
    scores = scores.masked_fill(~mask, lowest) if mask.dtype == torch.bool else scores + mask
    weights = scores.softmax(-1, dtype=torch.float32).to(scores.dtype)
    return (nn.functional.dropout(weights, dropout) @ value).transpose(1, 2).contiguous()


def _forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    factor = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    call = AttentionCall(layer, query, key, value, attention_mask, factor, softcap)
    for look in _looks:
        look(call)
    if _substitutes:
        output = _substitutes[-1](call)
        if output is not None:
            return output, None
    if _recorders:
        groups = query.shape[1] // key.shape[1]
        repeated = repeat_kv(key, groups)
        for rows in _recorders:
            positions = rows.positions.to(query.device)
            rows.pattern[layer] = attention_rows(query, repeated, attention_mask, scaling, positions, softcap)
            rows.values[layer] = repeat_kv(value, groups)
    if softcap is not None:
        return _soft_capped_attention(call, dropout), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)


AttentionInterface.register(IMPLEMENTATION, _forward)
# Without a mask function of the same name the padding mask is dropped without a word.
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)


@contextlib.contextmanager
def record_rows(positions: Tensor) -> Iterator[AttentionRows]:
    """Record the attention row of `positions` (`[batch]`) and the values, in every layer run inside the block."""
    rows = AttentionRows(positions)
    _recorders.append(rows)
    try:
        yield rows
    finally:
        _recorders.remove(rows)


@contextlib.contextmanager
def attend_with(attend: Attend) -> Iterator[None]:
    """Let `attend` see, and replace, the attention of every layer run inside the block; the innermost block counts."""
    _substitutes.append(attend)
    try:
        yield
    finally:
        _substitutes.pop()


@contextlib.contextmanager
def look_with(look: Look) -> Iterator[None]:
    """Show `look` the attention call of every layer run inside the block; several blocks may be open at once.

    A model has to run this attention (`HeadModel.record_attention(True)`), or nothing is shown.
    """
    _looks.append(look)
    try:
        yield
    finally:
        _looks.remove(look)


def masked(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Attention scores `[..., keys]` with a row of a mask: None, bool (True = attend) or additive."""
    if mask is None:
        return scores
    mask = mask.to(scores.device)
    return scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask.float()
