"""Projections with adapters around them: scale and offset on heads, an offset on an MLP's output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import hard_concrete
from ..base import HeadTunerLayer
from .config import HeadTuningConfig


class TunedProjection(HeadTunerLayer):
    """A frozen projection whose input is scaled or whose output is moved; both can be merged into it.

    A projection without a bias gets one when there is an offset; stock checkpoints of such a model need the export's
    config flag (see `headtune.train.export.checkpoint`).
    """

    def update_layer(self, adapter_name: str, config: HeadTuningConfig) -> None:
        """Add an adapter's parameters to this layer."""
        for parameters, start in self.start_values(adapter_name, config):
            parameters[adapter_name] = nn.Parameter(start)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def start_values(self, adapter_name: str, config: HeadTuningConfig) -> list[tuple[nn.ParameterDict, Tensor]]:
        """Where a new adapter's parameters go, and where they start."""
        raise NotImplementedError

    def folded(self, names: Sequence[str], weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """A float32 weight `[out, in]` and bias `[out]` that do what `adapted` does without noise."""
        raise NotImplementedError

    def merged_values(self, names: Sequence[str]) -> tuple[dict[Any, Any], dict[Any, Tensor]]:
        base: Any = self.base_layer
        original = self._original or {"weight": base.weight.data, "bias": base.bias}
        # Always from the original weights: adapters act one after the other, so a later scale reaches earlier offsets.
        weight = (original["weight"].T if self.in_out else original["weight"]).float()
        bias = None if original["bias"] is None else original["bias"].float()
        new_weight, new_bias = self.folded(names, weight, bias)
        merged = {}
        if new_weight is not weight:
            merged["weight"] = (new_weight.T if self.in_out else new_weight).contiguous()
        if new_bias is not None and new_bias is not bias:
            merged["bias"] = new_bias
        return original, merged

    def write_values(self, values: dict[Any, Any]) -> None:
        base: Any = self.base_layer
        dtype = base.weight.dtype
        if "weight" in values:
            base.weight.data = values["weight"].to(dtype)
        if "bias" in values:
            bias = values["bias"]
            is_parameter = bias is None or isinstance(bias, nn.Parameter)
            base.bias = bias if is_parameter else nn.Parameter(bias.to(dtype), requires_grad=False)

    def __repr__(self) -> str:
        return "head_tuning." + super().__repr__()


class HeadTuningLayer(TunedProjection):
    """An output projection with scale and offset on its chosen heads' inputs.

    Parameters by adapter name: `head_tuning_scale` `[n_chosen, head_dim or 1]` (a, added to 1), `head_tuning_offset`
    `[n_chosen, head_dim]` (v), and with gates `head_tuning_gate_scale` and `head_tuning_gate_offset` `[n_chosen, 1]`
    (the gates' log alpha), each only where the part it gates exists.
    """

    adapter_layer_names = (
        "head_tuning_scale",
        "head_tuning_offset",
        "head_tuning_gate_scale",
        "head_tuning_gate_offset",
    )
    other_param_names = ("chosen_heads", "head_dim")

    def __init__(self, base_layer: nn.Module, adapter_name: str, layer: int, config: HeadTuningConfig) -> None:
        super().__init__(base_layer, layer)
        self.head_tuning_scale = nn.ParameterDict()
        self.head_tuning_offset = nn.ParameterDict()
        self.head_tuning_gate_scale = nn.ParameterDict()
        self.head_tuning_gate_offset = nn.ParameterDict()
        self.chosen_heads: dict[str, list[int]] = {}
        self.head_dim: dict[str, int] = {}
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def start_values(self, adapter_name: str, config: HeadTuningConfig) -> list[tuple[nn.ParameterDict, Tensor]]:
        assert config.n_heads is not None
        chosen = config.heads_of(self.layer)
        head_dim = self.in_features // config.n_heads
        self.chosen_heads[adapter_name] = chosen
        self.head_dim[adapter_name] = head_dim
        parts = []
        if config.scale != "none":
            width = head_dim if config.scale == "vector" else 1
            parts.append((self.head_tuning_scale, self.head_tuning_gate_scale, width))
        if config.offset:
            parts.append((self.head_tuning_offset, self.head_tuning_gate_offset, head_dim))
        starts = [(values, _start(config.init_std, len(chosen), width)) for values, _, width in parts]
        if config.gates:
            starts += [(gates, torch.full((len(chosen), 1), hard_concrete.OPEN)) for _, gates, _ in parts]
        return starts

    def factors(self, adapter_name: str, sample: bool = False) -> tuple[Tensor | None, Tensor | None]:
        """`(1 + g2 a, g1 v)` spread over the projection's whole input, each `[in_features]` or None if not trained.

        With `sample` the gates are drawn, those of the scale first; without it they are free of noise.
        """
        head_dim = self.head_dim[adapter_name]
        chosen = self.chosen_heads[adapter_name]
        gate_of = hard_concrete.sampled if sample else hard_concrete.without_noise
        scale = offset = None
        if adapter_name in self.head_tuning_scale:
            a: Tensor = self.head_tuning_scale[adapter_name]
            if adapter_name in self.head_tuning_gate_scale:
                a = gate_of(self.head_tuning_gate_scale[adapter_name]) * a
            ones = a.new_ones(self.in_features // head_dim, head_dim)
            scale = ones.index_add(0, torch.tensor(chosen, device=a.device), a.expand(-1, head_dim)).flatten()
        if adapter_name in self.head_tuning_offset:
            v: Tensor = self.head_tuning_offset[adapter_name]
            if adapter_name in self.head_tuning_gate_offset:
                v = gate_of(self.head_tuning_gate_offset[adapter_name]) * v
            zeros = v.new_zeros(self.in_features // head_dim, head_dim)
            offset = zeros.index_add(0, torch.tensor(chosen, device=v.device), v).flatten()
        return scale, offset

    def adapted(self, x: Tensor, names: Sequence[str]) -> Tensor:
        dtype = x.dtype
        for name in names:
            scale, offset = self.factors(name, sample=self.training)
            trained = scale if scale is not None else offset
            assert trained is not None
            x = x.to(trained.dtype)  # an adapter kept in float32 over a half-precision base computes in float32
            if scale is not None and offset is not None:
                x = torch.addcmul(offset, x, scale)
            elif scale is not None:
                x = x * scale
            elif offset is not None:
                x = x + offset
        projected: Tensor = self.base_layer(x.to(dtype))
        return projected

    def folded(self, names: Sequence[str], weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """`W <- W diag(1 + g2 a)`, `b <- b + W g1 v`, W before scaling."""
        scale = offset = None
        for name in names:
            of_name, shift = self.factors(name)
            if of_name is not None:
                scale = of_name if scale is None else scale * of_name
                offset = None if offset is None else offset * of_name
            if shift is not None:
                offset = shift if offset is None else offset + shift
        if offset is not None:
            total = weight @ offset.float()
            bias = total if bias is None else bias + total
        return (weight if scale is None else weight * scale.float()), bias


class MlpOffsetLayer(TunedProjection):
    """The last projection of an MLP with an offset on its output, `head_tuning_mlp_offset` `[d_model]` (w)."""

    adapter_layer_names = ("head_tuning_mlp_offset",)

    def __init__(self, base_layer: nn.Module, adapter_name: str, layer: int, config: HeadTuningConfig) -> None:
        super().__init__(base_layer, layer)
        self.head_tuning_mlp_offset = nn.ParameterDict()
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def start_values(self, adapter_name: str, config: HeadTuningConfig) -> list[tuple[nn.ParameterDict, Tensor]]:
        return [(self.head_tuning_mlp_offset, _start(config.init_std, self.out_features))]

    def adapted(self, x: Tensor, names: Sequence[str]) -> Tensor:
        projected: Tensor = self.base_layer(x)
        dtype = projected.dtype
        for name in names:
            projected = projected + self.head_tuning_mlp_offset[name]
        return projected.to(dtype)

    def folded(self, names: Sequence[str], weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """`b <- b + w`."""
        total = torch.stack([self.head_tuning_mlp_offset[name].float() for name in names]).sum(0)
        return weight, total if bias is None else bias + total


def _start(std: float, *shape: int) -> Tensor:
    """Normal with standard deviation `std`; zeros, without a draw, where it is 0."""
    return std * torch.randn(shape) if std else torch.zeros(shape)
