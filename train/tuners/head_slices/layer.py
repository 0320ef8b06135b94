"""A projection with trained additions to the slices of its weight that belong to chosen heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor, nn
from torch.nn import functional

from ..base import HeadTunerLayer
from .config import HeadSlice, HeadSlicesConfig


class HeadSlicesLayer(HeadTunerLayer):
    """A projection with an addition to the slices of its weight that belong to chosen heads.

    Attributes:
        slices: what each `head_dim` entries of the head axis are: the output axis of query, key and value
            projections, the input axis of the output projection.
        head_slices_delta: parameters by adapter name, `[n_rows, in]`; in the output projection `[out, n_columns]`.
        head_slices_A, head_slices_B: instead, those of an adapter with a rank, by slice: `[n_chosen, rank, in]` and
            `[n_chosen, head_dim, rank]`; in the output projection `[n_chosen, rank, head_dim]` and
            `[n_chosen, out, rank]`, or `[1, out, rank]` where the heads share it.
        head_slices_scaling: `alpha / rank` by adapter name, of those with a rank.
        head_slices_chosen: the positions within `slices` of the trained slices by adapter name, `[n_chosen]`.
    """

    adapter_layer_names = ("head_slices_delta", "head_slices_A", "head_slices_B")
    other_param_names = ("head_slices_chosen", "head_slices_scaling")

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, layer: int, slices: list[HeadSlice], config: HeadSlicesConfig
    ) -> None:
        super().__init__(base_layer, layer)
        self.slices = slices
        self.on_input = slices[0][0] == "o"
        self._head_axis = int(self.on_input != self.in_out)  # of the stored weight
        self.head_dim = (self.in_features if self.on_input else self.out_features) // len(slices)
        self.head_slices_delta = nn.ParameterDict()
        self.head_slices_A = nn.ParameterDict()
        self.head_slices_B = nn.ParameterDict()
        self.head_slices_scaling: dict[str, float] = {}
        self.head_slices_chosen = BufferDict(persistent=False)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: HeadSlicesConfig, **_: Any) -> None:
        """Add an adapter's parameters to this layer."""
        trained = config.slices_of(self.layer)
        chosen = [position for position, head_slice in enumerate(self.slices) if head_slice in trained]
        if config.rank is None:
            width = len(chosen) * self.head_dim
            shape = (self.out_features, width) if self.on_input else (width, self.in_features)
            self.head_slices_delta[adapter_name] = nn.Parameter(torch.zeros(shape))
        else:
            self._add_factors(adapter_name, len(chosen), config.rank, config.share == "layer")
            self.head_slices_scaling[adapter_name] = config.alpha / config.rank
        self._move_adapter_to_device_of_base_layer(adapter_name)
        # After the line above, which casts to the base's dtype in some versions of PEFT.
        self.head_slices_chosen[adapter_name] = torch.tensor(chosen, device=self.weight.device)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _add_factors(self, adapter_name: str, n: int, rank: int, share: bool) -> None:
        inputs, outputs = (self.head_dim, self.out_features) if self.on_input else (self.in_features, self.head_dim)
        bound = (inputs * (n if share else 1)) ** -0.5  # by the width that A reads, as a LoRA's
        factor = nn.init.uniform_(torch.empty(n, rank, inputs), -bound, bound)
        self.head_slices_A[adapter_name] = nn.Parameter(factor)
        self.head_slices_B[adapter_name] = nn.Parameter(torch.zeros(1 if share else n, outputs, rank))

    def delta(self, name: str) -> Tensor:
        """What an adapter of this layer adds to the chosen slices, with gradient, as `head_slices_delta` holds it."""
        if name in self.head_slices_delta:
            return self.head_slices_delta[name]
        product = self.head_slices_scaling[name] * (self.head_slices_B[name] @ self.head_slices_A[name])
        return product.transpose(0, 1).flatten(1) if self.on_input else product.flatten(0, 1)

    def adapted(self, x: Tensor, names: Sequence[str]) -> Tensor:
        y: Tensor = self.base_layer(x)
        for name in names:
            chosen = self.head_slices_chosen[name]
            # An addition kept in float32 over a half-precision base is computed in float32.
            if self.on_input:
                z = x.unflatten(-1, (len(self.slices), self.head_dim)).index_select(-2, chosen)
                y = y + self._from_slices(z, name).to(y.dtype)
            else:
                added = self._to_slices(x, name).to(y.dtype)
                y = y.unflatten(-1, (len(self.slices), self.head_dim)).index_add(-2, chosen, added).flatten(-2)
        return y

    def _from_slices(self, z: Tensor, name: str) -> Tensor:
        """What chosen heads' outputs, `[..., n_chosen, head_dim]`, add to the projection's: `[..., out]`."""
        if name in self.head_slices_delta:
            delta = self.head_slices_delta[name]
            return functional.linear(z.flatten(-2).to(delta.dtype), delta)
        a, b = self.head_slices_A[name], self.head_slices_B[name]
        inner = torch.einsum("...nd,nrd->...nr", z.to(a.dtype), a)
        inner = inner.sum(-2, keepdim=True) if len(b) < len(a) else inner
        return self.head_slices_scaling[name] * torch.einsum("...nr,nor->...o", inner, b)

    def _to_slices(self, x: Tensor, name: str) -> Tensor:
        """What is added to the outputs of the chosen slices: `[..., n_chosen, head_dim]`."""
        if name in self.head_slices_delta:
            delta = self.head_slices_delta[name]
            return functional.linear(x.to(delta.dtype), delta).unflatten(-1, (-1, self.head_dim))
        a, b = self.head_slices_A[name], self.head_slices_B[name]
        inner = torch.einsum("...i,nri->...nr", x.to(a.dtype), a)
        return self.head_slices_scaling[name] * torch.einsum("...nr,ndr->...nd", inner, b)

    def _by_slice(self, weight: Tensor, axis: int) -> Tensor:
        """A view of a weight whose `axis` is the head axis: `[slices, head_dim, the other axis]`."""
        return (weight if axis == 0 else weight.T).unflatten(0, (-1, self.head_dim))

    def merged_values(self, names: Sequence[str]) -> tuple[dict[Any, Any], dict[Any, Tensor]]:
        """The trained slices alone, by position."""
        # From the original weights, so that of several merged adapters nothing is rounded twice.
        slices = self._by_slice(self.weight.data, self._head_axis)
        original, total = dict(self._original), dict(self._original)
        for name in names:
            delta = self._by_slice(self.delta(name).detach().float(), int(self.on_input))
            for position, addition in zip(self.head_slices_chosen[name].tolist(), delta, strict=True):
                if position not in original:
                    original[position] = total[position] = slices[position].clone()
                total[position] = total[position] + addition
        return original, total

    def write_values(self, values: dict[Any, Any]) -> None:
        slices = self._by_slice(self.weight.data, self._head_axis)
        for position, weight in values.items():
            slices[position] = weight.to(slices.dtype)

    def __repr__(self) -> str:
        return "head_slices." + super().__repr__()
