"""Batches of counterfactual runs: each row enters at the first layer where it differs from the clean run, row 0."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from headtune.analysis.models.head_model import HeadModel


def entered(entries: Sequence[int], n_layers: int) -> list[int]:
    """Batch size by layer for rows sorted by entry: the clean run, and the rows that have entered by then."""
    return [1 + sum(entry <= layer for entry in entries) for layer in range(n_layers)]


@contextlib.contextmanager
def growing(model: HeadModel, sizes: Sequence[int]) -> Iterator[None]:
    """Let the batch grow to `sizes[layer]` as it enters each layer, by copies of row 0, the clean run."""

    def hook_for(layer: int) -> Callable[..., Any]:
        new = sizes[layer] - (sizes[layer - 1] if layer else 1)

        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            hidden = torch.cat([hidden, hidden[:1].expand(new, *hidden.shape[1:])])
            return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})

        return hook

    growth = [layer for layer in range(model.n_layers) if sizes[layer] > (sizes[layer - 1] if layer else 1)]
    handles = [model.layers[layer].register_forward_pre_hook(hook_for(layer), with_kwargs=True) for layer in growth]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def rows_in_memory(model: HeadModel, seq: int, positions: int, copied: int = 0) -> int:
    """How many rows of `positions` tokens, in a prompt of `seq`, fit into the view's `max_memory`; at least one.

    An estimate of the widest moment, in float32: the MLP's intermediate activations, the attention scores and, once per
    row, the logits and their float32 copy.

    Args:
        copied: keys (and as many values) that each row holds for itself.
    """
    config = model.hf.config.get_text_config()
    wide = getattr(config, "intermediate_size", None) or getattr(config, "ffn_dim", None) or 4 * model.d_model
    per_position = 6 * model.d_model + 3 * wide + 6 * model.n_heads * model.head_dim + 2 * model.n_heads * seq
    copies = 2 * copied * model.n_kv_heads * model.head_dim
    per_row = 4 * (positions * per_position + 2 * config.vocab_size + copies)
    return max(1, model.max_memory // per_row)


def spread(tensor: Tensor, n_rows: int) -> Tensor:
    """`[1 + entered, ...]` -> `[n_rows, ...]`: the clean run stands for rows that have not entered."""
    entered_rows = tensor[1:]
    return torch.cat([entered_rows, tensor[:1].expand(n_rows - len(entered_rows), *tensor.shape[1:])])
