"""The gates of head-tuning adapters on a model: how many are open, and which."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from headtune.analysis.utils.errors import InputError

from .. import hard_concrete
from .layer import HeadTuningLayer


class GatedHead(NamedTuple):
    """A head with its gates, as they are evaluated and merged, in 0..1; None where the part is not trained."""

    layer: int
    head: int
    gate_scale: float | None
    gate_offset: float | None


def _gated(model: nn.Module) -> list[tuple[HeadTuningLayer, str]]:
    """Layer and name of every active adapter that has gates."""
    gated = [
        (module, name)
        for module in model.modules()
        if isinstance(module, HeadTuningLayer)
        for name in module.active_adapters
        if name in module.head_tuning_gate_scale or name in module.head_tuning_gate_offset
    ]
    if not gated:
        raise InputError("no active adapter has gates; make one with HeadTuningConfig(gates=True)")
    return gated


def l0(model: nn.Module) -> Tensor:
    """The mean probability that a gate of the active adapters is open, in 0..1: the expected L0 norm over its maximum.

    A scalar with a gradient to every gate's log alpha, to be added to the loss times a weight.

    Raises:
        InputError: no active adapter has gates.
    """
    chances = [
        hard_concrete.probability_open(gates[name]).flatten()
        for layer, name in _gated(model)
        for gates in (layer.head_tuning_gate_scale, layer.head_tuning_gate_offset)
        if name in gates
    ]
    return torch.cat([chance.to(chances[0].device) for chance in chances]).mean()


@torch.no_grad()
def open_heads(model: nn.Module, threshold: float = 0.0) -> list[GatedHead]:
    """The heads of the active adapters that have a gate above `threshold`, by layer and head.

    Raises:
        InputError: no active adapter has gates.
    """
    rows = []
    for layer, name in _gated(model):
        heads = layer.chosen_heads[name]
        scales, offsets = (
            hard_concrete.without_noise(gates[name]).flatten().tolist() if name in gates else [None] * len(heads)
            for gates in (layer.head_tuning_gate_scale, layer.head_tuning_gate_offset)
        )
        rows += [GatedHead(layer.layer, *row) for row in zip(heads, scales, offsets, strict=True)]
    open_rows = [row for row in rows if any(gate is not None and gate > threshold for gate in row[2:])]
    return sorted(open_rows, key=lambda row: row[:2])
