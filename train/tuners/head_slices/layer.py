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
        head_slices_chosen: the positions within `slices` of the trained slices by adapter name, `[n_chosen]`.
    """

    adapter_layer_names = ("head_slices_delta",)
    other_param_names = ("head_slices_chosen",)

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, layer: int, slices: list[HeadSlice], config: HeadSlicesConfig
    ) -> None:
        super().__init__(base_layer, layer)
        self.slices = slices
        self.on_input = slices[0][0] == "o"
        self._head_axis = int(self.on_input != self.in_out)  # of the stored weight
        self.head_dim = (self.in_features if self.on_input else self.out_features) // len(slices)
        self.head_slices_delta = nn.ParameterDict()
        self.head_slices_chosen = BufferDict(persistent=False)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: HeadSlicesConfig, **_: Any) -> None:
        """Add an adapter's parameters to this layer."""
        trained = config.slices_of(self.layer)
        chosen = [position for position, head_slice in enumerate(self.slices) if head_slice in trained]
        width = len(chosen) * self.head_dim
        shape = (self.out_features, width) if self.on_input else (width, self.in_features)
        self.head_slices_delta[adapter_name] = nn.Parameter(torch.zeros(shape))
        self._move_adapter_to_device_of_base_layer(adapter_name)
        # After the line above, which casts to the base's dtype in some versions of PEFT.
        self.head_slices_chosen[adapter_name] = torch.tensor(chosen, device=self.weight.device)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def adapted(self, x: Tensor, names: Sequence[str]) -> Tensor:
        y: Tensor = self.base_layer(x)
        for name in names:
            delta, chosen = self.head_slices_delta[name], self.head_slices_chosen[name]
            # An addition kept in float32 over a half-precision base is computed in float32.
            if self.on_input:
                z = x.unflatten(-1, (len(self.slices), self.head_dim)).index_select(-2, chosen).flatten(-2)
                y = y + functional.linear(z.to(delta.dtype), delta).to(y.dtype)
            else:
                added = functional.linear(x.to(delta.dtype), delta).to(y.dtype).unflatten(-1, (-1, self.head_dim))
                y = y.unflatten(-1, (len(self.slices), self.head_dim)).index_add(-2, chosen, added).flatten(-2)
        return y

    def _by_slice(self, weight: Tensor, axis: int) -> Tensor:
        """A view of a weight whose `axis` is the head axis: `[slices, head_dim, the other axis]`."""
        return (weight if axis == 0 else weight.T).unflatten(0, (-1, self.head_dim))

    def merged_values(self, names: Sequence[str]) -> tuple[dict[Any, Any], dict[Any, Tensor]]:
        """The trained slices alone, by position."""
        # From the original weights, so that of several merged adapters nothing is rounded twice.
        slices = self._by_slice(self.weight.data, self._head_axis)
        original, total = dict(self._original), dict(self._original)
        for name in names:
            delta = self._by_slice(self.head_slices_delta[name].detach().float(), int(self.on_input))
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
