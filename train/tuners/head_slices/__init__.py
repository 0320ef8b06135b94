"""Fine-tune only the weight slices that belong to chosen heads, as a PEFT tuner.

A head h of a layer reads the residual stream x through head_dim rows of W_Q, W_K and W_V and writes to it through
head_dim columns of W_O. With everything else frozen, the trained parameters are additions to those slices, D, that
start at zero:

    q, k, v:   y = base(x),   y[..., rows] += x @ D.T             D [n_rows, in]
    o:         y = base(x) + x[..., columns] @ D.T                D [out, n_columns]

This is full fine-tuning with the gradients of all other weights masked to zero, without the mask: gradients and
optimiser state exist for the slices only. Biases are not trained. Weight decay acts on D and so pulls towards the base
weights, not towards zero: a slice that the loss does not need returns to what it was.

With a rank r, the addition is a product of two factors, for each slice or with one B for all heads of a layer:

    q, k, v:   D = (alpha / r) B A            B [head_dim, r], A [r, in]
    o:         D = (alpha / r) B A            B [out, r],      A [r, head_dim]
    o, share:  D_h = (alpha / r) B A_h        HeadMap's map from its heads to the residual stream, without bias

A starts as PEFT's LoRA does, B at zero. Each is exactly a LoRA whose A (o) or B (q, k, v) is zero outside the heads:
`stock_lora` writes it as one.

With grouped-query attention a key or value head is shared by a group of query heads, and W_K and W_V can only be
trained per group. The chosen heads' groups are, once each, and that changes all heads of a group.

Importing this package makes the type known to PEFT; so does `import headtune.train`.
"""

from __future__ import annotations

from ..base import HeadPeftType, register_tuner
from .config import PARTS, SHARED, HeadSlice, HeadSlicesConfig, projection_slices
from .layer import HeadSlicesLayer
from .model import HeadSlicesModel
from .stock_lora import stock_lora

__all__ = [
    "PARTS",
    "SHARED",
    "HeadSlice",
    "HeadSlicesConfig",
    "HeadSlicesLayer",
    "HeadSlicesModel",
    "projection_slices",
    "stock_lora",
]

register_tuner(HeadPeftType.HEAD_SLICES, HeadSlicesConfig, HeadSlicesModel)
