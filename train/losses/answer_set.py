"""Losses as plain functions of logits. No trainer, no model."""

from __future__ import annotations

import torch
from torch import Tensor


def answer_set(logits: Tensor, remaining: Tensor, previous: Tensor, unlikelihood: float = 1.0) -> dict[str, Tensor]:
    """Any answer not given yet will do, none of those given will.

        recall      = -log sum_{t in remaining} p(t)
        suppression = -log(1 - sum_{t in previous} p(t))
        loss        = mean(recall + unlikelihood * suppression)

    The first term is the marginal likelihood of a set, so no particular order of answers is taught; the second is the
    unlikelihood of repeats (Welleck et al. 2020) on the set of answers already given.

    Args:
        logits: `[batch, vocabulary]` at END.
        remaining: `[batch, n]` first tokens of the answers not given yet, padded with -1; at least one a row.
        previous: `[batch, m]` first tokens of the answers given, without repeats, padded with -1; may be all padding.
        unlikelihood: weight of the second term.

    Returns:
        `loss`, `recall`, `suppression` (means over the batch, in nats), float32.
    """
    log_p = logits.float().log_softmax(-1)
    recall = -_log_mass(log_p, remaining)
    mass = _log_mass(log_p, previous)
    # log(1 - e^m) is taken in the form that keeps its digits on each side of m = -log 2; the cap keeps it finite.
    mass = mass.clamp(max=-1e-6)
    suppression = -torch.where(mass > -0.693, (-torch.expm1(mass)).log(), torch.log1p(-mass.exp()))
    return {
        "loss": (recall + unlikelihood * suppression).mean(),
        "recall": recall.mean(),
        "suppression": suppression.mean(),
    }


def kl_to_base(logits: Tensor, reference: Tensor) -> Tensor:
    """`mean KL(base || adapted)` in nats: what the base model would say next where no answer is due.

    Args:
        logits, reference: `[n, vocabulary]` of the adapted and of the base model at the same positions.

    Returns:
        A scalar, float32; 0 where there are no positions.
    """
    if not len(logits):
        return logits.float().sum()  # 0, and still part of the graph
    log_q, log_p = logits.float().log_softmax(-1), reference.float().log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean()


def _log_mass(log_p: Tensor, tokens: Tensor) -> Tensor:
    """`log sum_{t in tokens} p(t)` by row, `[batch]`; -inf becomes a very small number where a row is all padding."""
    padding = tokens < 0
    chosen = log_p.gather(-1, tokens.clamp(min=0)).masked_fill(padding, -1e4)
    return chosen.logsumexp(-1)
