"""Only positions that carry loss reach the unembedding, on every device.

    with labelled_positions(trainer.model):
        trainer.train()

TRL's fused unembedding leaves out the others on GPUs with Triton; elsewhere it projects every position onto the
vocabulary and throws most of it away. For a loss that is a sum over labelled positions (SFTTrainer's), `[batch, seq]`
can be made `[1, n + 1]` before it: the n hidden states whose next token is a label, in order, and one that is ignored.
Not for losses that need to know which row a position is in, such as DPO's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn


@contextlib.contextmanager
def labelled_positions(model: Any) -> Iterator[None]:
    """Inside the block, `model(..., labels=labels, fused_lm_head=True)` gives per-token values of labels alone.

    Args:
        model: a causal language model with TRL's fused head, with or without a PEFT adapter. Other calls are untouched,
            and so is a batch without any label.
    """
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
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
