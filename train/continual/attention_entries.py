"""Attention matrices of training rows, made a block of query rows at a time, so that none is ever whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from headtune.analysis.models.attention import AttentionCall, look_with
from headtune.analysis.models.head_model import HeadModel
from headtune.analysis.utils.errors import CheckError, InputError

IGNORED = -100  # a label that carries no loss
BLOCK = 1 << 22  # attention entries made at once: 16 MiB in float32

# A row of training data: equally long `input_ids` and `labels`, -100 where nothing is learnt.
TokenRow = Mapping[str, Sequence[int]]


def require_rows(rows: Sequence[TokenRow], labels: bool = False) -> None:
    """Refuse no rows at all, rows whose labels do not fit and, with `labels`, rows without a loss (InputError)."""
    if not rows:
        raise InputError("no rows to measure heads on; give at least one")
    for index, row in enumerate(rows):
        if len(row["input_ids"]) != len(row["labels"]) or not row["input_ids"]:
            raise InputError(
                f"row {index} has {len(row['input_ids'])} tokens and {len(row['labels'])} labels; expected a label of "
                "each token"
            )
        if labels and all(label == IGNORED for label in row["labels"][1:]):
            raise InputError(f"row {index} has no label after its first token, so it has no loss; leave it out")


def batches(rows: Sequence[TokenRow], size: int) -> list[Sequence[TokenRow]]:
    """The rows in batches of `size`, in order."""
    if size < 1:
        raise InputError(f"batches of {size} rows; expected at least 1")
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def padded(model: HeadModel, batch: Sequence[TokenRow]) -> tuple[Tensor, Tensor]:
    """`[batch, seq]` token ids, padded on the right, and the mask of what is no padding."""
    longest = max(len(row["input_ids"]) for row in batch)
    ids = torch.zeros(len(batch), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for example, row in enumerate(batch):
        ids[example, : len(row["input_ids"])] = torch.tensor(row["input_ids"])
        mask[example, : len(row["input_ids"])] = 1
    return ids.to(model.device), mask.to(model.device)


def run_rows(model: HeadModel, batch: Sequence[TokenRow], look: Callable[[AttentionCall], None]) -> None:
    """One forward pass over a batch; `look` sees the attention call of every layer."""
    ids, mask = padded(model, batch)
    with model.measuring(), look_with(look):
        model.hf(ids, attention_mask=mask, use_cache=False, logits_to_keep=1)


def query_blocks(queries: int, n_heads: int) -> Iterator[tuple[int, int]]:
    """Consecutive ranges of queries whose attention entries, `n_heads * block * queries`, fit `BLOCK`."""
    size = max(1, BLOCK // (n_heads * queries))
    for start in range(0, queries, size):
        yield start, min(queries, start + size)


def call_of_example(call: AttentionCall, example: int, n: int) -> AttentionCall:
    """The call of one example of the batch and its first `n` tokens."""
    mask = call.mask
    if mask is not None:
        mask = mask[example % len(mask)][None, :, :n, :n]
    query, key, value = (tensor[example : example + 1, :, :n].detach() for tensor in (call.query, call.key, call.value))
    return replace(call, query=query, key=key, value=value, mask=mask)


def require_finite(values: Tensor, name: str) -> Tensor:
    """`values` in float32, or a CheckError where one is not finite."""
    wrong = (~values.isfinite()).nonzero().tolist()
    if wrong:
        layer, head = wrong[0]
        raise CheckError(
            f"{name} of {len(wrong)} heads, such as L{layer}H{head}, is not finite; has training diverged?"
        )
    return values.float()
