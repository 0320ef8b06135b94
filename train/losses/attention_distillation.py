"""Losses that keep chosen heads looking where they looked: attention rows and logits of a teacher (SEEKR).

    KL(A^T || A)[h, q] = sum_k A^T[h, q, k] (log A^T[h, q, k] - log A[h, q, k])

for chosen heads h and chosen query positions q only (He et al. 2024, arXiv 2411.06171). The model runs SDPA; a
`RowRecorder` computes the rows asked for beside it, with their gradient, so that no full attention matrix exists:

    recorder = RowRecorder({3: [0, 5], 7: [1]})
    with recorder.record(positions) as rows:
        model(input_ids=..., attention_mask=...)
    loss = attention_distillation(rows, teacher, present)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from headtune.analysis.models.attention import IMPLEMENTATION, AttentionCall, head_log_rows, look_with
from headtune.analysis.utils.errors import CheckError, InputError

from .answer_set import kl_to_base

Reduction = Literal["mean", "layers", "sum"]


def query_positions(length: int, n: int, generator: torch.Generator) -> list[int]:
    """`n` of a sample's `length` query positions at random, without repeats, sorted; all of them if there are fewer."""
    if length < 1 or n < 1:
        raise InputError(f"{n} query positions of {length} tokens; expected at least 1 of each")
    return sorted(torch.randperm(length, generator=generator)[:n].tolist())


class RowRecorder:
    """Attention rows of chosen heads, with gradient, of the forward pass inside a `record` block.

    Works with any wrapping of a model that runs our attention (`HeadModel.record_attention(True)`), in training mode,
    and under gradient checkpointing without re-entrance; what checkpointing computes again is not recorded again.

    Args:
        heads: layer -> query heads; layers without heads may be left out.
    """

    def __init__(self, heads: Mapping[int, Sequence[int]]) -> None:
        self.heads = {layer: list(chosen) for layer, chosen in sorted(heads.items()) if len(chosen)}

    @contextlib.contextmanager
    def record(self, positions: Tensor, first: int = 0) -> Iterator[dict[int, Tensor]]:
        """Record one forward pass; the backward pass may come inside or after the block.

        Args:
            positions: `[batch, T]` query positions in the batch as it is padded; -1 is padding.
            first: leave out that many examples at the batch's beginning; `positions` are those of the others.

        Yields:
            layer -> `[batch, len(heads[layer]), T, keys]` float32 log probabilities, filled by the forward pass: -inf
            at masked keys, finite filler where the position is padding (see `head_log_rows`).

        Raises:
            CheckError: when the block ends, a chosen layer was not recorded; or two forward passes; or re-entrant
                checkpointing, which would cut the rows off from their gradient.
            InputError: a position or a head that the model or the batch does not have.
        """
        rows: dict[int, Tensor] = {}
        last, with_gradient = int(positions.max()) if positions.numel() else -1, torch.is_grad_enabled()
        on_device: dict[torch.device, Tensor] = {}

        def look(call: AttentionCall) -> None:
            # Inside a backward pass, this is checkpointing that computes a layer again.
            if call.layer not in self.heads or torch._C._current_graph_task_id() != -1:
                return
            device = call.query.device
            if device not in on_device:
                on_device[device] = positions.to(device)
            call = _from(call, first)
            self._require(call, positions, last, with_gradient, call.layer in rows)
            # What the rows' gradient needs is kept here rather than by checkpointing, which counts what a layer saves
            # and would miss it when the layer is computed again.
            with torch.autograd.graph.saved_tensors_hooks(_itself, _itself):
                rows[call.layer] = head_log_rows(call, self.heads[call.layer], on_device[device])

        with look_with(look):
            yield rows
        if missing := [layer for layer in self.heads if layer not in rows]:
            raise CheckError(
                f"no attention rows of layers {missing}: the model has no such layer, was not run, or runs another "
                f"attention than {IMPLEMENTATION!r}; switch it on with HeadModel.record_attention(True)"
            )

    def _require(self, call: AttentionCall, positions: Tensor, last: int, with_gradient: bool, again: bool) -> None:
        batch, n_heads, n_queries, _ = call.query.shape
        if again:
            raise CheckError(f"layer {call.layer} ran twice in one record block; open a block for each forward pass")
        if with_gradient and not torch.is_grad_enabled():
            raise CheckError(
                "attention rows would have no gradient: the layers run without one, as under re-entrant checkpointing; "
                "use gradient_checkpointing_kwargs={'use_reentrant': False}"
            )
        if positions.ndim != 2 or len(positions) != batch or last >= n_queries:
            raise InputError(
                f"query positions of shape {tuple(positions.shape)} up to {last} for a batch of {batch} x {n_queries} "
                "tokens; expected [batch, T] indices into the padded batch, -1 where there is none"
            )
        if wrong := [head for head in self.heads[call.layer] if not 0 <= head < n_heads]:
            raise InputError(f"layer {call.layer} has no head {wrong[0]}; expected 0 to {n_heads - 1}")


def _from(call: AttentionCall, first: int) -> AttentionCall:
    """Without the first examples of the batch."""
    mask = call.mask if call.mask is None or len(call.mask) == 1 else call.mask[first:]
    return replace(call, query=call.query[first:], key=call.key[first:], value=call.value[first:], mask=mask)


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def row_kl(student_log: Tensor, teacher: Tensor) -> Tensor:
    """`KL(teacher || student)` of each row in nats: `[batch, heads, T]` float32, with the student's gradient.

    Exactly zero, as its gradient is, for a row that equals the student's bit for bit; infinite where the teacher
    attends to a key that the student cannot see, which only rows of other tokens do.

    Args:
        student_log: `[batch, heads, T, keys]` log probabilities, -inf at masked keys.
        teacher: same shape, probabilities in any dtype, normalised here; 0 at masked keys and in rows of padding.
    """
    if student_log.shape != teacher.shape:
        raise InputError(f"a teacher of shape {tuple(teacher.shape)} for rows of {tuple(student_log.shape)}")
    teacher = teacher.detach().to(student_log.device).float()
    tiny = torch.finfo(torch.float32).tiny
    same = (teacher == student_log.detach().exp()).all(-1)
    teacher = teacher / teacher.sum(-1, keepdim=True).clamp(min=tiny)
    log_ratio = teacher.clamp(min=tiny).log() - student_log.masked_fill(teacher == 0, 0)
    return (teacher * log_ratio).sum(-1).masked_fill(same, 0)


def attention_distillation(
    rows: Mapping[int, Tensor],
    teacher: Mapping[int, Tensor],
    present: Mapping[int, Tensor] | Tensor,
    reduction: Reduction = "mean",
) -> Tensor:
    """`KL(teacher || student)` over every layer, head and query row that is present, in nats; 0 where there is none.

    Args:
        rows: layer -> `[batch, heads, T, keys]` log probabilities, as `RowRecorder` gives them.
        teacher: layer -> probabilities of the same shape.
        present: `[batch, T]` bool, or layer -> `[batch, T]` or `[batch, heads, T]`: rows that count.
        reduction: "mean" over the rows present, whatever sample and layer they are of; "layers", the mean of the
            layers' means, each the mean over samples of a sample's mean row (the authors' code); "sum" over layers,
            heads and rows, mean over the samples that have any (the paper's).
    """
    if rows.keys() != teacher.keys() or not rows:
        raise InputError(f"rows of layers {sorted(rows)} and a teacher of {sorted(teacher)}; give the same, at least 1")
    device = next(iter(rows.values())).device
    total, n_rows, has_any = torch.zeros((), device=device), torch.zeros((), device=device), None
    of_layers, n_layers = torch.zeros((), device=device), torch.zeros((), device=device)
    for layer, student_log in rows.items():
        kl = row_kl(student_log, teacher[layer])
        counts = (present if isinstance(present, Tensor) else present[layer]).to(kl.device)
        counts = (counts[:, None] if counts.ndim == 2 else counts).expand_as(kl)
        of_sample, rows_of_sample = torch.where(counts, kl, 0).flatten(1).sum(1), counts.flatten(1).sum(1)
        total = total + of_sample.sum().to(device)
        of_layers = of_layers + (of_sample / rows_of_sample.clamp(min=1)).sum().to(device)
        n_rows = n_rows + rows_of_sample.sum().to(device)
        n_layers = n_layers + rows_of_sample.any().to(device)
        present_here = (rows_of_sample > 0).to(device)
        has_any = present_here if has_any is None else has_any | present_here
    assert has_any is not None
    if reduction == "mean":
        return total / n_rows.clamp(min=1)
    samples = has_any.sum().clamp(min=1)
    return total / samples if reduction == "sum" else of_layers / samples / n_layers.clamp(min=1)


@dataclass(frozen=True, eq=False)
class TopLogits:
    """The k largest logits of each position, and what the others weigh together.

    Attributes:
        tokens: `[n, k]` their tokens.
        logits: `[n, k]` raw, float32.
        rest: `[n]` log-sum-exp of all other logits, float32.
    """

    tokens: Tensor
    logits: Tensor
    rest: Tensor

    def to(self, device: torch.device | str) -> TopLogits:
        return TopLogits(self.tokens.to(device), self.logits.to(device), self.rest.to(device))


def top_logits(logits: Tensor, k: int) -> TopLogits:
    """Keep the k largest of `[n, vocabulary]` logits.

    Raises:
        InputError: k is not between 1 and vocabulary - 1.
    """
    if not 1 <= k < logits.shape[-1]:
        raise InputError(f"top {k} of {logits.shape[-1]} logits; expected 1 to {logits.shape[-1] - 1}")
    logits = logits.float()
    largest, tokens = logits.topk(k)
    return TopLogits(tokens, largest, logits.scatter(-1, tokens, float("-inf")).logsumexp(-1))


def logit_kl(student_logits: Tensor, teacher_logits: Tensor | TopLogits, top: int | None = None) -> Tensor:
    """`KL(teacher || student)` of next-token distributions in nats, mean over positions; 0 where there are none.

    With `top`, or a teacher of which only the top logits were kept, all other tokens are one bucket: a lower bound of
    the full KL (merging outcomes never raises it), tight where the teacher's mass is on its top tokens.

    Args:
        student_logits: `[n, vocabulary]`, with gradient.
        teacher_logits: `[n, vocabulary]` at the same positions, or their `TopLogits`.
        top: how many tokens keep a bucket of their own; None: all that the teacher has.
    """
    if isinstance(teacher_logits, Tensor):
        if student_logits.shape != teacher_logits.shape:
            raise InputError(
                f"teacher logits of shape {tuple(teacher_logits.shape)} for a student's {tuple(student_logits.shape)}"
            )
        teacher_logits = teacher_logits.to(student_logits.device).detach()
        if top is None:
            return kl_to_base(student_logits, teacher_logits)
        teacher_logits = top_logits(teacher_logits, top)
    elif top is not None:
        raise InputError(f"top={top} of a teacher that already keeps its top {teacher_logits.logits.shape[-1]}")
    student, teacher_logits = student_logits.float(), teacher_logits.to(student_logits.device)
    tokens = teacher_logits.tokens
    if len(tokens) != len(student):
        raise InputError(f"teacher logits of {len(tokens)} positions for {len(student)} of the student")
    rest = student.scatter(-1, tokens, float("-inf")).logsumexp(-1, keepdim=True)
    buckets = torch.cat([teacher_logits.logits.float(), teacher_logits.rest.float()[:, None]], -1)
    return kl_to_base(torch.cat([student.gather(-1, tokens), rest], -1), buckets)
