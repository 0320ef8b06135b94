"""How much a task's loss depends on each head's attention: S of SEEKR's importance (see `importance`).

S[l, h] = mean over rows of ||dL/dA[l, h]||_F
dL/dA[i, j] = dL/dz[i] . v[j]      as z = A V: one backward pass gives dL/dz of every layer
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from headtune.analysis.models import hooks
from headtune.analysis.models.attention import AttentionCall, look_with
from headtune.analysis.models.head_model import HeadModel
from headtune.analysis.utils.progress import Progress, silent

from .attention_entries import (
    IGNORED,
    TokenRow,
    batches,
    call_of_example,
    padded,
    query_blocks,
    require_finite,
    require_rows,
)


def measure_sensitivity(
    model: HeadModel, rows: Sequence[TokenRow], batch_size: int = 1, progress: Progress = silent
) -> Tensor:
    """`S[l, h] = mean over rows of ||dL/dA[l, h]||_F`, L the row's mean cross-entropy over its label tokens.

    The norm is over the entries a query may see: those of the future, of padding and beyond a sliding window are no
    attention weights, and are left out, although autograd has a number for them. A is taken after the softmax, as free
    entries. One forward and one backward pass a batch, without parameter gradients; logits exist where a label is.

    Returns:
        `[n_layers, n_heads]` float32 on the CPU, never negative.

    Raises:
        InputError: no rows, or a row of which nothing is learnt.
        CheckError: a value is not finite.
    """
    require_rows(rows, labels=True)
    total = torch.zeros(model.n_layers, model.n_heads, dtype=torch.float64)
    for batch in progress(batches(rows, batch_size), "sensitivity"):
        total += _gradient_squares(model, batch).sqrt().sum(0)
    return require_finite(total / len(rows), "sensitivity")


def _gradient_squares(model: HeadModel, batch: Sequence[TokenRow]) -> Tensor:
    """`||dL/dA[l, h]||_F^2` of each row, `[batch, n_layers, n_heads]` float64."""
    squares = torch.zeros(len(batch), model.n_layers, model.n_heads, dtype=torch.float64)
    calls: dict[int, AttentionCall] = {}

    def edit_of(layer: int) -> Callable[[Tensor], Tensor]:
        def edit(z: Tensor) -> Tensor:
            call = calls.pop(layer)

            def of_gradient(gradient: Tensor) -> None:
                for example, row in enumerate(batch):
                    squares[example, layer] = _gradient_square(
                        call, example, gradient[example, : len(row["input_ids"])]
                    )

            z.register_hook(of_gradient)
            return z

        return edit

    def look(call: AttentionCall) -> None:
        calls[call.layer] = call

    with model.measuring(), _graph_from_embeddings(model) as leaves, torch.enable_grad():
        with look_with(look), hooks.at_projections(model, {layer: edit_of(layer) for layer in range(model.n_layers)}):
            loss = _losses(model, batch).sum()
        torch.autograd.grad(loss, leaves)
    return squares


def _gradient_square(call: AttentionCall, example: int, gradient: Tensor) -> Tensor:
    """`sum over visible i, j of (dL/dz[i] . v[j])^2`, `[n_heads]` float64.

    Args:
        gradient: `[queries, n_heads, head_dim]`, dL/dz of the example, without padding.
    """
    n_heads, n_kv_heads = call.query.shape[1], call.key.shape[1]
    square = torch.zeros(n_heads, dtype=torch.float64)
    for start, stop in query_blocks(len(gradient), n_heads):
        part = call_of_example(call, example, stop)
        value = part.value[0].detach().float()  # [n_kv_heads, stop, head_dim]
        grouped = gradient[start:stop].float().transpose(0, 1).reshape(n_kv_heads, -1, gradient.shape[-1])
        entries = (grouped @ value.transpose(1, 2)).view(n_heads, stop - start, stop)
        square += entries.masked_fill_(~_visible(part, start), 0).square_().sum((1, 2)).double().cpu()
    return square


def _visible(call: AttentionCall, start: int) -> Tensor:
    """`[heads or 1, queries - start, keys]` bool: what the queries from `start` on may attend to."""
    queries, keys, device = call.query.shape[2], call.key.shape[2], call.query.device
    if call.mask is None:
        return (torch.arange(keys, device=device) <= torch.arange(start, queries, device=device)[:, None])[None]
    mask = call.mask[0, :, start:]
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def _losses(model: HeadModel, batch: Sequence[TokenRow]) -> Tensor:
    """`[batch]` float32: each row's mean cross-entropy over the tokens with a label."""
    ids, mask = padded(model, batch)
    labels = torch.full_like(ids, IGNORED)
    for example, row in enumerate(batch):
        labels[example, : len(row["labels"])] = torch.tensor(row["labels"])
    following = functional.pad(labels[:, 1:], (0, 1), value=IGNORED)  # what each position has to predict
    predicting = (following != IGNORED).any(0).nonzero()[:, 0]
    logits = model.hf(ids, attention_mask=mask, use_cache=False, logits_to_keep=predicting).logits.float()
    targets = following[:, predicting].to(logits.device)
    # The vocabulary comes last: along another dimension PyTorch's sum over a large one is good to 1e-4 only.
    values = functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none"
    ).view_as(targets)
    return values.sum(1) / (targets != IGNORED).sum(1)


@contextlib.contextmanager
def _graph_from_embeddings(model: HeadModel) -> Iterator[list[Tensor]]:
    """Inside, gradients flow down to the token embeddings' output, which is collected, and into no parameter."""
    leaves: list[Tensor] = []

    def keep(_module: Any, _args: Any, output: Tensor) -> Tensor:
        leaves.append(output.detach().requires_grad_())
        return leaves[-1]

    embeddings: Any = model.hf.get_input_embeddings()
    trained = [parameter for parameter in model.hf.parameters() if parameter.requires_grad]
    handle = embeddings.register_forward_hook(keep)
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield leaves
    finally:
        handle.remove()
        for parameter in trained:
            parameter.requires_grad_(True)
