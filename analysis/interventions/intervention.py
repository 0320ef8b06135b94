"""What a counterfactual run changes at the last token of a prompt, and what comes of it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

Head = tuple[int, int]  # (layer, head)
Activation = Literal["attention", "mlp", "residual", "z", "pattern", "query", "key", "value"]


@dataclass(frozen=True)
class Intervention:
    """What one row changes at the last token; all that follows from it is recomputed, unless frozen.

    Attributes:
        factors: head -> factor on its output z, 0 silences it.
        outputs: head -> `[head_dim]` its output z instead.
        queries, keys, values: head -> `[head_dim]` instead of the last token's own, after the rotary embedding. A key
            or value is changed for this one query head, also where a group of heads shares it.
        knocked_out: positions whose attention weight from the last token is set to 0 after the softmax, for all heads
            in `layers`.
        renormalise: let the weights that are left sum to 1 again.
        layers: where `knocked_out` holds; None = in all.
        freeze: `heads` holds the output of every head that the row does not name at its clean value (path patching),
            `heads and mlps` also the MLPs' outputs.
    """

    factors: Mapping[Head, float] = field(default_factory=dict)
    outputs: Mapping[Head, Tensor] = field(default_factory=dict)
    queries: Mapping[Head, Tensor] = field(default_factory=dict)
    keys: Mapping[Head, Tensor] = field(default_factory=dict)
    values: Mapping[Head, Tensor] = field(default_factory=dict)
    knocked_out: Sequence[int] = ()
    renormalise: bool = False
    layers: Collection[int] | None = None
    freeze: Literal["nothing", "heads", "heads and mlps"] = "nothing"

    @property
    def heads(self) -> list[Head]:
        return [head for part in (self.factors, self.outputs, self.queries, self.keys, self.values) for head in part]

    def entry(self, n_layers: int) -> int:
        """The first layer where the row can differ from the clean run; `n_layers` for a row that changes nothing."""
        layers = [layer for layer, _ in self.heads]
        if self.knocked_out:
            layers += [0] if self.layers is None else list(self.layers)
        return min(layers, default=n_layers)


CLEAN = Intervention()


def silenced(heads: Collection[Head]) -> Intervention:
    """The row in which `heads` are silenced together."""
    return Intervention(factors=dict.fromkeys(heads, 0.0))


@dataclass(frozen=True)
class InterventionResult:
    """What rows came to.

    Attributes:
        logits: `[rows, vocabulary]` next-token logits in the model's dtype.
        activations: what was asked for, at the last token: `attention`, `mlp` `[rows, n_layers, d_model]` (as added to
            the residual stream), `residual` `[rows, d_model]` (the final norm's input), `z`, `query`, `key`, `value`
            `[rows, n_layers, n_heads, head_dim]` (z after the row's changes; the others before), `pattern`
            `[rows, n_layers, n_heads, seq]` float32 (after knock-out).
    """

    logits: Tensor
    activations: dict[str, Tensor]
