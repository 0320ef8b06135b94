"""Only positions that carry loss reach the unembedding, on every device.

    with labelled_positions(trainer.model):
        trainer.train()

TRL's fused unembedding leaves out the others on GPUs with Triton; elsewhere it projects every position onto the
vocabulary and throws most of it away. For a loss that is a sum over labelled positions (SFTTrainer's), `[batch, seq]`
can be made `[1, n + 1]` before it: the n hidden states whose next token is a label, in order, and one that is ignored.
Not for losses that need to know which row a position is in, such as DPO's.

    with positions_only(model, label_mask(labels)):
        logits = model(input_ids=..., attention_mask=...).logits     # [1, n, vocabulary]

does the same for logits themselves, such as those a distillation compares.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from headtune.analysis.utils.errors import InputError


@contextlib.contextmanager
def labelled_positions(model: Any) -> Iterator[None]:
    """Inside the block, `model(..., labels=labels, fused_lm_head=True)` gives per-token values of labels alone.

    Args:
        model: a causal language model with TRL's fused head, with or without a PEFT adapter. Other calls are untouched,
            and so is a batch without any label.
    """
    base = _base(model)
    chosen: list[Tensor] = []  # of the running call: `[batch, seq - 1]`, the positions whose next token is a label

    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        chosen.clear()
        labels = kwargs.get("labels")
        if not kwargs.get("fused_lm_head") or labels is None or kwargs.get("shift_labels") is not None:
            return args, kwargs
        following = labels[:, 1:]
        mask = following != -100
        if not mask.any():
            return args, kwargs
        chosen.append(mask)
        # The first label is never predicted, as in any row.
        return args, kwargs | {"labels": torch.cat([following.new_full((1,), -100), following[mask]])[None]}

    def after(_module: nn.Module, _args: Any, output: Any) -> Any:
        if chosen:
            mask = chosen.pop()
            hidden = output.last_hidden_state[:, :-1][mask.to(output.last_hidden_state.device)]
            output["last_hidden_state"] = torch.cat([hidden, hidden[-1:]])[None]
        return output

    handles = [
        model.register_forward_pre_hook(before, with_kwargs=True),
        base.base_model.register_forward_hook(after),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def label_mask(labels: Tensor) -> Tensor:
    """`[batch, seq]` bool: positions whose next token is a label (not -100), for `labels` of the same shape."""
    return torch.cat([labels[:, 1:] != -100, labels.new_zeros(len(labels), 1, dtype=torch.bool)], 1)


@contextlib.contextmanager
def positions_only(model: Any, mask: Tensor) -> Iterator[None]:
    """Inside the block, `model(**inputs).logits` is `[1, n, vocabulary]`: those of the n True positions, in row order.

    Args:
        model: a causal language model, with or without a PEFT adapter. Calls inside may not pass `labels`.
        mask: `[batch, seq]` bool, for every call inside the block.

    Raises:
        InputError: a call whose batch has another shape than `mask`.
    """

    def after(_module: nn.Module, _args: Any, output: Any) -> Any:
        hidden = output.last_hidden_state
        if hidden.shape[:2] != mask.shape:
            raise InputError(
                f"a batch of shape {tuple(hidden.shape[:2])} for a mask of {tuple(mask.shape)}; give both the same"
            )
        output["last_hidden_state"] = hidden[mask.to(hidden.device)][None]
        return output

    handle = _base(model).get_decoder().register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()


def _base(model: Any) -> Any:
    return model.get_base_model() if isinstance(model, PeftModel) else model
