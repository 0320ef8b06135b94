"""Attention rows on demand: SDPA for everybody, probabilities only for the query positions asked for.

A function registered with transformers' attention interface runs SDPA unchanged and, while a `record_rows` block is
open, recomputes `A[l, :, q, :]` for one query position per example. The full `[heads, seq, seq]` matrix never exists.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
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


def attention_rows(query: Tensor, key: Tensor, mask: Tensor | None, scaling: float | None, positions: Tensor) -> Tensor:
    """`softmax(q_pos . k^T * scaling + mask)` in float32 for one query position per example: `[batch, heads, keys]`.

    Args:
        query: `[batch, n_heads, queries, head_dim]`.
        key: `[batch, n_heads, keys, head_dim]`, KV groups already repeated.
        mask: None (causal), bool (True = attend) or additive, `[batch or 1, heads or 1, queries, keys]`.
        scaling: the block's own; None means `head_dim ** -0.5`.
        positions: `[batch]` indices into `queries`.
    """
    batch = torch.arange(query.shape[0], device=query.device)
    chosen = query[batch, :, positions].float()  # [batch, heads, head_dim]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    logits = torch.einsum("bhd,bhkd->bhk", chosen, key.float()) * scale
    n_queries, n_keys = query.shape[2], key.shape[2]
    if mask is None:
        visible = torch.arange(n_keys, device=query.device) <= (positions + n_keys - n_queries)[:, None]
        logits = logits.masked_fill(~visible[:, None], float("-inf"))
    else:
        rows = mask.expand(query.shape[0], *mask.shape[1:])[batch, :, positions]  # [batch, heads or 1, keys]
        rows = rows[..., :n_keys]
        logits = logits.masked_fill(~rows, float("-inf")) if rows.dtype == torch.bool else logits + rows.float()
    return logits.softmax(-1)


def _forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    if _recorders:
        groups = query.shape[1] // key.shape[1]
        repeated = repeat_kv(key, groups)
        for rows in _recorders:
            layer = int(module.layer_idx)  # type: ignore[arg-type]
            rows.pattern[layer] = attention_rows(query, repeated, attention_mask, scaling, rows.positions)
            rows.values[layer] = repeat_kv(value, groups)
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
