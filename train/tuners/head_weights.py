"""The weight slices of chosen heads, as the model computes with them.

A head h owns head_dim rows of W_Q and head_dim columns of W_O; W_K and W_V belong to its KV group and are held once,
whichever of the group's heads are chosen. What an adapter adds to a projection is part of the weight that counts:

    LoRA           W + scaling * B A
    head slices    W + D
    head tuning    W_O diag(1 + a)            (its offset moves no weight)
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from headtune.analysis.models.head_model import HeadModel
from headtune.analysis.models.hooks import require_heads
from headtune.analysis.utils.errors import InputError

from .head_slices import PARTS, SHARED, HeadSlicesLayer, projection_slices
from .head_tuning import HeadTuningLayer


@dataclass(frozen=True)
class HeadWeights:
    """The slices of one projection's weight that belong to chosen heads.

    Attributes:
        layer: of the projection; `projection`: its name within the attention block.
        weight: the weight's parameter name in the model without an adapter.
        on_input: the slices are input columns (output projection), not output rows.
        index: `[n]` the rows or columns, of the weight as `[out, in]`, ascending.
    """

    layer: int
    projection: str
    weight: str
    on_input: bool
    index: Tensor

    @property
    def axis(self) -> int:
        return int(self.on_input)

    def module(self, model: HeadModel) -> nn.Module:
        """The projection, with whatever adapter is around it."""
        return model.attention(self.layer).get_submodule(self.projection)

    def slice_of(self, weight: Tensor, in_out: bool) -> Tensor:
        """The slices of a weight as it is stored, float32, `[n, in]` or `[out, n]`; `in_out`: stored as `[in, out]`."""
        oriented = weight.T if in_out else weight
        return oriented.index_select(self.axis, self.index.to(weight.device)).float()

    def base(self, model: HeadModel) -> Tensor:
        """The slices of the weight itself, without any adapter: float32 `[n, in]`, or `[out, n]` on input."""
        return self.slice_of(_adapters_and_base(self.module(model))[-1].weight, model.architecture.in_out_weight)

    def delta(self, model: HeadModel, scaled: bool = True) -> Tensor | None:
        """What active adapters add to the slices, float32 with gradient, shaped as `base`; None where nothing is added.

        Dropout inside a LoRA is left out.

        Args:
            scaled: count `W_O diag(a)` of a head-tuning adapter; not where its z is already the scaled one.

        Raises:
            InputError: an adapter whose addition is not known.
        """
        total: Tensor | None = None
        for layer in _adapters_and_base(self.module(model))[:-1]:
            if not (layer.disable_adapters or layer.merged):
                for name in layer.active_adapters:
                    addition = _addition(model, layer, name, self, scaled)
                    if addition is not None:
                        total = addition if total is None else total + addition
        return total

    def effective(self, model: HeadModel, scaled: bool = True) -> Tensor:
        """The slices that the model computes with: `base + delta`."""
        delta = self.delta(model, scaled)
        return self.base(model) if delta is None else self.base(model) + delta


def head_weights(
    model: HeadModel, pairs: Collection[tuple[int, int]], parts: Sequence[str] = PARTS
) -> list[HeadWeights]:
    """The slices of W_Q, W_K, W_V, W_O (those in `parts`) that belong to heads, by projection; each row once.

    Raises:
        InputError: a head that the model does not have, or an unknown part.
    """
    require_heads(model, pairs)
    if not parts or not set(parts) <= set(PARTS):
        raise InputError(f"parts {list(parts)} are not understood; give some of {', '.join(PARTS)}")
    row, group = model.architecture, model.n_heads // model.n_kv_heads
    weights = []
    for layer in sorted({layer for layer, _ in pairs}):
        chosen = [head for of_layer, head in pairs if of_layer == layer]
        slices = {(part, head // group if part in SHARED else head) for part in parts for head in chosen}
        for projection in (*row.qkv, row.output_projection):
            order = projection_slices(row, projection, model.n_heads, model.n_kv_heads)
            positions = torch.tensor([i for i, each in enumerate(order) if each in slices], dtype=torch.long)
            if len(positions):
                index = (positions[:, None] * model.head_dim + torch.arange(model.head_dim)).flatten()
                name = f"{row.layers}.{layer}.{row.attention}.{projection}.weight"
                weights.append(HeadWeights(layer, projection, name, projection == row.output_projection, index))
    return weights


def _adapters_and_base(module: nn.Module) -> list[Any]:
    """A projection's adapter layers from the outside in, and the projection itself."""
    layers: list[Any] = [module]
    while isinstance(layers[-1], BaseTunerLayer):
        layers.append(layers[-1].base_layer)  # type: ignore[attr-defined]
    return layers


def _addition(model: HeadModel, module: Any, name: str, weights: HeadWeights, scaled: bool) -> Tensor | None:
    index = weights.index.to(module.weight.device)
    if isinstance(module, HeadSlicesLayer):
        return _of_slices(module, name, weights, index)
    if isinstance(module, HeadTuningLayer):
        if len(module.active_adapters) > 1:  # their factors multiply
            raise InputError(f"head-tuning adapters {module.active_adapters} are active at once; activate one of them")
        factor = module.factors(name)[0] if scaled and name in module.chosen_heads else None
        return None if factor is None else weights.base(model) * (factor[index].float() - 1)
    if not isinstance(module, LoraLayer) or name in module.lora_variant:
        raise InputError(
            f"{weights.weight} carries a {type(module).__name__} whose change of the weight is not known; use a plain "
            "LoRA, head slices, head tuning or full fine-tuning"
        )
    if name not in module.lora_A:
        return None
    lora: Any = module
    a, b = lora.lora_A[name].weight.float(), lora.lora_B[name].weight.float()
    product = b @ a[:, index] if weights.on_input else b[index] @ a
    return product * lora.scaling[name]


def _of_slices(module: HeadSlicesLayer, name: str, weights: HeadWeights, index: Tensor) -> Tensor | None:
    if name not in module.head_slices_chosen:
        return None
    delta = module.delta(name).float()
    within = torch.arange(module.head_dim, device=index.device)
    trained = (module.head_slices_chosen[name][:, None] * module.head_dim + within).flatten()
    place = torch.full((len(module.slices) * module.head_dim,), -1, device=index.device)
    place[trained] = torch.arange(len(trained), device=index.device)
    rows = place[index]
    is_trained = (rows >= 0).unsqueeze(1 - weights.axis)
    return delta.index_select(weights.axis, rows.clamp(min=0)) * is_trained


def output_slices(model: HeadModel, layer: int, chosen: Sequence[int]) -> Tensor:
    """`W_O` of chosen heads of a layer, in the order given, with what adapters add: `[heads, head_dim, d_model]`.

    For a z taken behind a head-tuning adapter's scale, which is therefore left out.
    """
    weights = head_weights(model, {(layer, head) for head in chosen}, ["o"])[0]
    ascending = sorted(set(chosen))
    weight = weights.effective(model, scaled=False).T.reshape(len(ascending), model.head_dim, -1)
    return weight[torch.tensor([ascending.index(head) for head in chosen], device=weight.device)]
