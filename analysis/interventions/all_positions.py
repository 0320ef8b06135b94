"""Counterfactual runs in batches, with heads' outputs changed at all positions: rows are whole prompts."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from headtune.analysis.models.head_model import HeadModel
from headtune.analysis.models.hooks import require_heads
from headtune.analysis.utils.errors import InputError

from .batches import entered, growing, rows_in_memory, spread
from .intervention import Head


@torch.no_grad()
def everywhere(
    model: HeadModel, tokens: Tensor, rows: Sequence[Mapping[Head, Tensor | float]], max_rows: int | None = None
) -> Tensor:
    """Next-token logits with heads' outputs changed at every position.

    Args:
        tokens: `[seq]` ids of one prompt.
        rows: per row, head -> a factor on its output (0 silences it), or `[seq, head_dim]` or `[head_dim]` in its
            place.

    Returns:
        `[len(rows), vocabulary]` in the model's dtype.
    """
    if not rows:
        raise InputError("no rows to run; give at least one, such as {}")
    for row in rows:
        require_heads(model, row)
    tokens = tokens.to(model.device)
    order = sorted(range(len(rows)), key=lambda index: _first(rows[index], model.n_layers))
    size = max_rows or rows_in_memory(model, len(tokens), positions=len(tokens))
    parts = []
    for start in range(0, len(order), size):
        chunk = [rows[index] for index in order[start : start + size]]
        sizes = entered([_first(row, model.n_layers) for row in chunk], model.n_layers)
        with contextlib.ExitStack() as stack:
            stack.enter_context(growing(model, sizes))
            for layer in {layer for row in chunk for layer, _ in row}:
                hook = _changed_everywhere(model, layer, chunk)
                stack.callback(model.projection(layer).register_forward_pre_hook(hook).remove)
            logits = model.hf(tokens[None], use_cache=False, logits_to_keep=1).logits[:, -1]
        parts.append(spread(logits, len(chunk)))
    stacked = torch.cat(parts)
    return stacked[torch.tensor(order, device=stacked.device).argsort()]


def _first(row: Mapping[Head, Any], n_layers: int) -> int:
    return min((layer for layer, _ in row), default=n_layers)


def _changed_everywhere(model: HeadModel, layer: int, rows: Sequence[Mapping[Head, Tensor | float]]) -> Any:
    changes = [(i, head, value) for i, row in enumerate(rows, 1) for (at, head), value in row.items() if at == layer]

    def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        z = args[0].unflatten(-1, (model.n_heads, model.head_dim)).clone()  # [rows, seq, heads, head_dim]
        for index, head, value in changes:
            z[index, :, head] = value.to(z) if isinstance(value, Tensor) else z[index, :, head] * value
        return (z.flatten(-2), *args[1:])

    return hook
