"""Exact causal effects of heads at END, at the cost of one decoding step.

A change at END reaches no earlier position. So one pass over the prompt fills the key-value cache; then a single-token
step carries a batch of rows, each with its own set of silenced heads. A row only enters at the first layer where it
differs from the clean run. The result is the same as one full forward pass per row, to rounding.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from .hooks import require_heads
from .model import HeadModel
from .scores import Array
from .tasks import Encoded

Row = Sequence[tuple[int, int]]  # the (layer, head) pairs silenced in one row


@dataclass(frozen=True)
class AnswerProbabilities:
    """What next-token logits say of the answers' first tokens.

    Attributes:
        target: `[rows]` total probability of the remaining answers' first tokens.
        previous: `[rows]` total probability of the previous answers' first tokens (0 where there are none).
        logs: name -> `[rows]` natural logarithm of the total, finite where the probability itself underflows to 0.
        logits: name -> `[rows]` mean logit of each of the two sets.
    """

    target: Tensor
    previous: Tensor
    logs: dict[str, Tensor]
    logits: dict[str, Tensor]


def answer_probabilities(logits: Tensor, encoded: Encoded) -> AnswerProbabilities:
    """Reduce `[rows, vocabulary]` logits in float32."""
    logits = logits.float()
    norm = logits.logsumexp(-1, keepdim=True)
    # Only the columns asked for are copied: rows x vocabulary is the largest tensor of the whole step.
    chosen = {"target": sorted(set(encoded.target_tokens)), "previous": sorted(set(encoded.previous_tokens))}
    parts = {name: logits[:, tokens] for name, tokens in chosen.items()}  # [rows, n]
    present = {name: part for name, part in parts.items() if part.shape[1]}
    return AnswerProbabilities(
        (parts["target"] - norm).exp().sum(-1),
        (parts["previous"] - norm).exp().sum(-1),
        {name: (part - norm).logsumexp(-1) for name, part in present.items()},
        {name: part.mean(-1) for name, part in present.items()},
    )


@torch.no_grad()
def silenced_logits(heads: HeadModel, tokens: Tensor, rows: Sequence[Row], max_rows: int = 512) -> Tensor:
    """Next-token logits with each row's heads silenced at END, `z[l, h, END] := 0`.

    Args:
        tokens: `[seq]` ids of one prompt, at least two.
        rows: the heads to silence, row by row; an empty row is the clean run.
        max_rows: rows per pass, which bounds memory (keys and values are held once per row in the layers it runs).

    Returns:
        `[len(rows), vocabulary]` in the model's dtype.
    """
    for row in rows:
        require_heads(heads, row)
    tokens = tokens.to(heads.device)[None]
    past = heads.model(tokens[:, :-1], use_cache=True, logits_to_keep=1).past_key_values
    order = sorted(range(len(rows)), key=lambda index: _entry(heads, rows[index]))
    parts = []
    for start in range(0, len(order), max_rows):
        chunk = order[start : start + max_rows]
        parts.append(_one_step(heads, tokens[:, -1:], past, [rows[index] for index in chunk]))
    stacked = torch.cat(parts)
    return stacked[torch.tensor(order, device=stacked.device).argsort()]


def _entry(heads: HeadModel, row: Row) -> int:
    return min((layer for layer, _ in row), default=heads.n_layers)


def _one_step(heads: HeadModel, token: Tensor, past: DynamicCache, rows: Sequence[Row]) -> Tensor:
    """One decoding step; `rows` are sorted by entry layer. Row 0 of the batch is the clean run throughout."""
    cache = copy.copy(past)
    cache.layers = [copy.copy(layer) for layer in past.layers]
    entries = [_entry(heads, row) for row in rows]
    sizes = [1 + sum(entry <= layer for entry in entries) for layer in range(heads.n_layers)]

    def grow(layer: int) -> Any:
        before = sizes[layer - 1] if layer else 1

        def hook(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            new = sizes[layer] - before
            if new:
                hidden = args[0] if args else kwargs["hidden_states"]
                hidden = torch.cat([hidden, hidden[:1].expand(new, -1, -1)])
                if args:
                    args = (hidden, *args[1:])
                else:
                    kwargs = kwargs | {"hidden_states": hidden}
            stored: Any = cache.layers[layer]
            stored.keys = stored.keys.expand(sizes[layer], -1, -1, -1)
            stored.values = stored.values.expand(sizes[layer], -1, -1, -1)
            return args, kwargs

        return hook

    def silence(pairs: list[tuple[int, int]]) -> Any:
        batch = torch.tensor([row for row, _ in pairs], device=token.device)
        head = torch.tensor([head for _, head in pairs], device=token.device)

        def hook(_module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            z = args[0].unflatten(-1, (heads.n_heads, heads.head_dim)).clone()  # [rows, 1, heads, head_dim]
            z[batch, 0, head] = 0
            return (z.flatten(-2), *args[1:])

        return hook

    by_layer: dict[int, list[tuple[int, int]]] = {}
    for index, row in enumerate(rows, start=1):
        for layer, head in row:
            by_layer.setdefault(layer, []).append((index, head))
    handles = [
        module.register_forward_pre_hook(grow(layer), with_kwargs=True) for layer, module in enumerate(heads.layers)
    ]
    handles += [heads.projection(layer).register_forward_pre_hook(silence(p)) for layer, p in by_layer.items()]
    try:
        logits = heads.model(token, past_key_values=cache, use_cache=True).logits[:, -1]
    finally:
        for handle in handles:
            handle.remove()
    # Clean rows (empty sets) never enter; the clean run stands for them.
    entered = logits[1:]
    clean = logits[:1].expand(len(rows) - len(entered), -1)
    return torch.cat([entered, clean])


def ablation_effects(heads: HeadModel, encoded: Encoded, max_rows: int = 512) -> dict[str, Array]:
    """What every head does to the answers at END: clean minus ablated, so positive = the head raises the quantity.

    Returns:
        name -> `[n_layers, n_heads]`: `ablation.target` and `ablation.previous` in logits (mean over the
        answers' first tokens, the unit of direct attribution), `ablation.target_logp` / `ablation.previous_logp` in
        nats of the answers' total probability, `ablation.target_p` / `ablation.previous_p` in probability. The
        `previous` ones are absent where there are no previous answers.
    """
    rows: list[Row] = [()]
    rows += [[(layer, head)] for layer in range(heads.n_layers) for head in range(heads.n_heads)]
    result = answer_probabilities(silenced_logits(heads, encoded.tokens, rows, max_rows), encoded)
    quantities = {
        "target": result.logits["target"],
        "target_logp": result.logs["target"],
        "target_p": result.target,
    }
    if encoded.previous_tokens:
        quantities |= {
            "previous": result.logits["previous"],
            "previous_logp": result.logs["previous"],
            "previous_p": result.previous,
        }
    shape = (heads.n_layers, heads.n_heads)
    return {
        f"ablation.{name}": (value[0] - value[1:]).reshape(shape).cpu().numpy().astype(np.float32)
        for name, value in quantities.items()
    }


def set_probabilities(
    heads: HeadModel, examples: Iterable[Encoded], sets: dict[str, Row]
) -> dict[str, tuple[list[float], list[float]]]:
    """p(remaining) and p(previous) with each named set of heads silenced at END, one value an example."""
    result: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in sets}
    for encoded in examples:
        probabilities = answer_probabilities(silenced_logits(heads, encoded.tokens, list(sets.values())), encoded)
        for index, name in enumerate(sets):
            result[name][0].append(probabilities.target[index].item())
            result[name][1].append(probabilities.previous[index].item())
    return result
