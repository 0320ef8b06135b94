"""Penalties on heads as plain functions of tensors. No model, no trainer.

All return float32 with gradient to what a model computed; means are over what is present, so that padding and rows
without a label count nowhere.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

ReduceMean = Callable[[Tensor], Tensor]  # the mean over processes (`distributed.all_reduce_mean`)


def _one_process(value: Tensor) -> Tensor:
    """The mean over processes where there is one."""
    return value


def _shared(total: Tensor, count: Tensor, reduce_mean: ReduceMean) -> Tensor:
    """`total / count`, the count averaged over processes; 0 where it is 0."""
    size = reduce_mean(count.to(total))  # of two processes with one row between them half a row: no clamp at 1
    return total / torch.where(size > 0, size, 1)


# --- where to look ----------------------------------------------------------------------------------------------------


def draw_queries(present: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """`n` query positions a sample, drawn without replacement; all of them where there are fewer.

    Args:
        present: `[batch, seq]` bool, tokens that are not padding.
        generator: on the CPU.

    Returns:
        `[batch, T]` positions, ascending, padded with -1 at the end; T at most `n`.
    """
    on_cpu = present.cpu()  # the same draw on every device
    order = torch.rand(on_cpu.shape, generator=generator).masked_fill(~on_cpu, 2.0).argsort(-1)[:, :n]
    width = on_cpu.shape[1]
    drawn = torch.where(on_cpu.gather(1, order), order, width).sort(-1).values
    drawn = drawn[:, : max(1, int((drawn < width).sum(-1).max()))]
    return drawn.masked_fill(drawn == width, -1).to(present.device)


def last_present(present: Tensor) -> Tensor:
    """`[batch]` position of each row's last token, padding on either side; -1 for a row of padding."""
    return torch.where(present, torch.arange(present.shape[1], device=present.device), -1).max(-1).values


def predicting(batch: Mapping[str, Tensor], present: Tensor) -> tuple[Tensor, Tensor]:
    """Where a trainer's batch predicts its first label (END), and the right tokens there.

    `remaining` (answer sets): END is the last token and every token of the set is right. `completion_mask` (pairs): the
    first token of the completion; only the chosen rows, which come first, have a right one. `labels` (all others): the
    first label that something precedes.

    Args:
        batch: as collated.
        present: `[batch, seq]` bool.

    Returns:
        positions `[batch]`, -1 where a row has none; tokens `[batch, n]`, padded with -1.
    """
    if "remaining" in batch:
        return last_present(present), batch["remaining"].to(present.device)
    tokens = batch["input_ids"].to(present.device)
    if "completion_mask" in batch:
        labelled = batch["completion_mask"].to(present.device).bool()
    else:
        labelled = batch["labels"].to(present.device) != -100
        tokens = batch["labels"].to(present.device)
    following = labelled[:, 1:]
    first = following.long().argmax(-1)  # of equals, the first
    some = following.any(-1)
    targets = tokens[:, 1:].gather(1, first[:, None])
    right = some.clone()
    if "completion_mask" in batch:
        right[len(right) // 2 :] = False
    return first.masked_fill(~some, -1), targets.masked_fill(~right[:, None], -1)


def option_queries(tokens: Tensor, end: Tensor, positive: int, negative: int) -> tuple[Tensor, Tensor]:
    """Where a prompt names two options, and the query positions behind both.

    Args:
        tokens: `[batch, seq]`.
        end: `[batch]` last position of the prompt; -1 for a row that is not to be read.
        positive, negative: the options' tokens. The first time each is named counts.

    Returns:
        keys `[batch, 2]` positions of the positive and the negative option; queries `[batch, T]` from the position
        after the later one to END, padded with -1: all -1 in rows that do not name both or have nothing behind them.
    """
    columns = torch.arange(tokens.shape[1], device=tokens.device)
    prompt = columns <= end[:, None]
    named = torch.stack([(tokens == option) & prompt for option in (positive, negative)], 1)  # [batch, 2, seq]
    keys = named.long().argmax(-1)
    behind = prompt & (columns > keys.max(-1).values[:, None]) & named.any(-1).all(-1)[:, None]
    queries = torch.where(behind, columns, tokens.shape[1]).sort(-1).values
    queries = queries[:, : max(1, int(behind.sum(-1).max()))]
    return keys, queries.masked_fill(queries == tokens.shape[1], -1)


# --- terms ------------------------------------------------------------------------------------------------------------


def output_drift(
    z: Sequence[Tensor],
    base: Sequence[Tensor],
    present: Tensor,
    relative: bool,
    reduce_mean: ReduceMean = _one_process,
) -> Tensor:
    """`mean ||z - z_base||^2` over present tokens and heads; `relative`: divided by `mean ||z_base||^2`.

    Args:
        z, base: head outputs of the model and of the reference, one tensor a layer: `[batch, seq, heads, head_dim]`.
        present: `[batch, seq]` bool.
        reduce_mean: what is divided by, from this process's alone (see `distributed.all_reduce_mean`).
    """
    device = z[0].device
    moved, size, count = [], [], 0
    for values, base_values in zip(z, base, strict=True):
        here = present.to(values.device)
        base_values = base_values.to(values.device).float()
        moved.append((values.float() - base_values).pow(2).sum((-1, -2))[here].sum().to(device))
        size.append(base_values.pow(2).sum((-1, -2))[here].sum().to(device))
        count += values.shape[2] * int(here.sum())
    drift = torch.stack(moved).sum()
    if relative:
        return drift / reduce_mean(torch.stack(size).sum()).clamp(min=torch.finfo(torch.float32).tiny)
    return drift / reduce_mean(drift.new_tensor(float(count))).clamp(min=1)


def contributions(z: Tensor, weight: Tensor, directions: Tensor) -> Tensor:
    """Direct logit attribution `c = (z_h W_O[h]) . u`: `[batch, heads, n]`.

    Args:
        z: `[batch, heads, head_dim]` at the position that predicts.
        weight: `[heads, head_dim, d_model]`.
        directions: `[batch, n, d_model]`, one a right token (`HeadModel.unembedding_directions`).
    """
    read = torch.einsum("hdm,bnm->bhdn", weight.float(), directions.to(weight.device))
    return torch.einsum("bhd,bhdn->bhn", z.float().to(read.device), read)


def hinge(c: Tensor, floor: Tensor | float, right: Tensor, reduce_mean: ReduceMean = _one_process) -> Tensor:
    """`mean relu(floor - c)`: over the right tokens of a row and over heads, then over rows that have any.

    Suppression heads, which may not lower a right answer's logit by more than a margin: `floor = -margin`. Recall
    heads, which keep what they contributed, less a margin: `floor = c_base - margin`.

    Args:
        c: `[batch, heads, n]`.
        floor: a number, or shaped as `c`.
        right: `[batch, n]` bool, tokens that count.
        reduce_mean: what is divided by, from this process's alone (see `distributed.all_reduce_mean`).
    """
    right = right.to(c.device)
    short = (floor - c).relu().mean(1) * right  # [batch, n]
    per_row = short.sum(-1) / right.sum(-1).clamp(min=1)
    return _shared(per_row.sum(), right.any(-1).sum(), reduce_mean)


def negative_attention_scores(log_rows: Tensor, keys: Tensor, queries: Tensor) -> Tensor:
    """`NAS = sum_i (A[i, yes] + A[i, no]) log(A[i, no] / A[i, yes])` by row and head: `[batch, heads]`.

    Positive: the head looks at the negative option, whatever is asked. Yu et al. 2025 (NASA), section 3.

    Args:
        log_rows: `[batch, heads, T, seq]` log attention.
        keys: `[batch, 2]` positions of the positive and the negative option.
        queries: `[batch, T]`, -1 where there is none. Rows that a sliding window keeps from either option count 0.
    """
    index = keys[:, None, None, :].expand(*log_rows.shape[:3], 2)
    log_a = log_rows.gather(-1, index)
    seen = log_a.isfinite().all(-1) & (queries >= 0)[:, None]
    log_a = log_a.masked_fill(~seen[..., None], 0)  # log(1 / 1) = 0
    return (log_a.exp().sum(-1) * (log_a[..., 1] - log_a[..., 0])).sum(-1)


def alignment(scores: Tensor, named: Tensor, reduce_mean: ReduceMean = _one_process) -> Tensor:
    """`mean over heads of (mean over rows of NAS)^2`; 0 where no row names the options.

    NASA tunes heads until their score is about 0 and stops when it turns over, so being biased the other way is no
    better: the penalty is even. It is the square, not the absolute value, so that its gradient fades at 0 instead of
    flipping with every step. The mean over rows comes first because the bias is what does not depend on the question:
    a head that looks at one option in some prompts and at the other in others is not biased.

    Args:
        scores: `[batch, heads]`.
        named: `[batch]` bool, rows that name both options.
        reduce_mean: as for `hinge`. The mean over rows is that over all processes', and so is the value; the gradient
            is this process's part of it, which the processes' mean makes whole.
    """
    part = _shared((scores * named[:, None]).sum(0), named.sum(), reduce_mean)
    mean = reduce_mean(part).detach()
    return (mean * (mean + 2 * (part - part.detach()))).mean()
