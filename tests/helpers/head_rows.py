"""A padded batch, and the heads and queries whose rows are looked at."""

from __future__ import annotations

import torch
from torch import Tensor

HEADS = [3, 0, 2]  # in no order, and heads 2 and 3 share a key head under GQA


def padded(side: str) -> dict[str, Tensor]:
    """Three rows of 9, 6 and 4 tokens."""
    tokens = torch.randint(3, 300, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[1] * 9, [1] * 6 + [0] * 3, [1] * 4 + [0] * 5])
    if side == "left":
        mask = mask.flip(1)
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0)
    return {"input_ids": tokens.masked_fill(mask == 0, 0), "attention_mask": mask, "position_ids": position_ids}


POSITIONS = {
    "right": torch.tensor([[8, 0, 3], [5, 2, -1], [1, -1, -1]]),
    "left": torch.tensor([[8, 0, 3], [3, 8, -1], [7, -1, -1]]),
}
