"""Scale and offset on chosen heads, as a PEFT tuner.

On the input of the attention output projection, for each chosen head h of layer l:

    z[l, h] <- (1 + g2[l, h] * a[l, h]) * z[l, h] + g1[l, h] * v[l, h]        a, v in R^head_dim (a may be one number)

`a` alone is LoFiT's first stage, `v` alone its second (Yin et al. 2024, section 3). The gates g are 1 unless the
adapter asks for them; then they are HardConcrete, one pair per head, and choose the heads while `a` and `v` are tuned
(JoLA, Lai et al. 2025): in training mode drawn anew at every forward pass, otherwise without noise. The output of a
layer's MLP can get an offset of its own:

    M[l] <- M[l] + w[l]                                                        w in R^d_model

`a`, `v` and `w` start at zero, so a fresh adapter changes nothing. Everything else is frozen. Importing this module
makes the type known to PEFT, so `PeftModel.from_pretrained`, `AutoPeftModelForCausalLM` and `load_adapter` work.
"""

from __future__ import annotations

import enum
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from headtune.analysis.models.architectures import ARCHITECTURES, architecture_of
from headtune.analysis.utils.errors import InputError

from . import hard_concrete
from .base import HeadTunerConfig

SCALES = ("none", "head", "vector")


class HeadPeftType(str, enum.Enum):  # noqa: UP042  PEFT compares its types as plain strings
    """The peft_type written into adapter_config.json."""

    HEAD_TUNING = "HEAD_TUNING"


@dataclass
class HeadTuningConfig(HeadTunerConfig):
    """Which heads to tune, and how.

    Attributes:
        heads: `[[layer, head], ...]`.
        scale: `vector` trains one factor per dimension of a head, `head` one per head, `none` no factor.
        offset: train an offset vector.
        gates: train a gate per head on each of these. Where `a` and `v` are 0 their gates get no gradient, so with
            an `init_std` of 0 the task moves them from the second step on.
        mlp_layers: layers whose MLP output gets an offset vector.
        init_std: standard deviation of the initial `a`, `v` and `w`; 0 starts exactly at the base model.
        n_heads: query heads per layer; read from the model when left out.
        target_modules: the output projections; read from the family's row when left out.
        mlp_projection: the MLP's last projection within a layer; read from the family's row when left out.
    """

    scale: str = "vector"
    offset: bool = True
    gates: bool = False
    mlp_layers: list[int] = field(default_factory=list)
    init_std: float = 0.0
    target_modules: list[str] | str | None = None
    mlp_projection: str | None = None
    exclude_modules: list[str] | str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = HeadPeftType.HEAD_TUNING
        if self.scale not in SCALES:
            raise InputError(f"scale {self.scale!r} is unknown; choose one of {', '.join(SCALES)}")
        self.mlp_layers = sorted(int(layer) for layer in self.mlp_layers)
        if self.heads and self.scale == "none" and not self.offset:
            raise InputError("an adapter with scale 'none' and offset false trains nothing; switch one on")
        if len(set(self.mlp_layers)) < len(self.mlp_layers):
            raise InputError(f"mlp_layers {self.mlp_layers} name a layer twice; remove the repeats")
        if self.gates and not self.heads:
            raise InputError("gates: true gates heads, and the adapter names none; give heads: [[layer, head], ...]")

    def heads_of(self, layer: int) -> list[int]:
        return [head for of_layer, head in self.heads if of_layer == layer]


class TunedProjection(nn.Module, BaseTunerLayer):
    """A frozen projection with adapters around it: what scales its input or moves its output can be merged into it."""

    def __init__(self, base_layer: nn.Module, layer: int) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.layer = layer
        base: Any = base_layer
        self.in_out = isinstance(base, Conv1D)  # a weight [in, out], not [out, in]
        self.in_features, self.out_features = (
            (base.nx, base.nf) if self.in_out else (base.in_features, base.out_features)
        )
        self.train(base.training)  # gates added to a model in eval mode must not draw
        self.merged_adapters: list[str] = []
        self._original: dict[str, Any] = {}

    def update_layer(self, adapter_name: str, config: HeadTuningConfig) -> None:
        """Add an adapter's parameters to this layer."""
        for parameters, start in self.start_values(adapter_name, config):
            parameters[adapter_name] = nn.Parameter(start)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def start_values(self, adapter_name: str, config: HeadTuningConfig) -> list[tuple[nn.ParameterDict, Tensor]]:
        """Where a new adapter's parameters go, and where they start."""
        raise NotImplementedError

    def adapted(self, x: Tensor, names: Sequence[str]) -> Tensor:
        """The projection of `x` with these adapters acting one after the other."""
        raise NotImplementedError

    def folded(self, names: Sequence[str], weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """A float32 weight `[out, in]` and bias `[out]` that do what `adapted` does without noise."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged:
            projected: Tensor = self.base_layer(x)
            return projected
        return self.adapted(x, self._here(self.active_adapters))

    def _here(self, names: Sequence[str]) -> list[str]:
        available = self._get_available_adapters()
        return [name for name in names if name in available]

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fold adapters into the projection.

        A projection without a bias gets one when there is an offset; stock checkpoints of such a model need the
        export's config flag (see `headtune.train.export.checkpoint`).

        Raises:
            InputError: a quantised weight.
            ValueError: with `safe_merge`, a merged weight that is not finite; nothing is merged then.
        """
        names = self._here(check_adapters_to_merge(self, adapter_names))
        if not names:
            return
        base: Any = self.base_layer
        if not base.weight.is_floating_point():
            raise InputError(f"weights of type {base.weight.dtype} cannot be merged into; load the base unquantised")
        original = self._original or {"weight": base.weight.data, "bias": base.bias}
        # Always from the original weights: adapters act one after the other, so a later scale reaches earlier offsets.
        dtype = original["weight"].dtype
        old = (original["weight"].T if self.in_out else original["weight"]).float()
        old_bias = None if original["bias"] is None else original["bias"].float()
        new, bias = self.folded([*self.merged_adapters, *names], old, old_bias)
        if safe_merge and not (new.isfinite().all() and (bias is None or bias.isfinite().all())):
            raise ValueError(f"NaN or infinity in the merged weights of layer {self.layer}, adapters {names}")
        self._original = original
        if new is not old:
            base.weight.data = (new.T if self.in_out else new).to(dtype).contiguous()
        if bias is not old_bias:
            base.bias = nn.Parameter(bias.to(dtype), requires_grad=False)  # type: ignore[union-attr]
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Put the exact original weights back."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        base: Any = self.base_layer
        base.weight.data = self._original["weight"]
        base.bias = self._original["bias"]
        self._original = {}
        self.merged_adapters.clear()

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


OUTPUT_PROJECTIONS = {name: [f"{row.attention}.{row.output_projection}"] for name, row in ARCHITECTURES.items()}


class HeadTuningModel(BaseTuner):
    """Puts a `HeadTuningLayer` around the output projections of the layers that hold chosen heads, and a
    `MlpOffsetLayer` around the last projection of the chosen MLPs.
    """

    prefix: str = "head_tuning_"
    tuner_layer_cls = TunedProjection
    target_module_mapping: dict[str, list[str]] = OUTPUT_PROJECTIONS

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        config: HeadTuningConfig = peft_config
        # The object and not its dict, which has the family's own names for sizes (gpt2: n_head).
        sizes = self.model.config.get_text_config()
        architecture = architecture_of(sizes.model_type)
        n_heads, n_layers = int(sizes.num_attention_heads), int(sizes.num_hidden_layers)
        if config.n_heads not in (None, n_heads):
            raise InputError(
                f"the adapter has n_heads {config.n_heads} but the model {n_heads}; use the adapter's model"
            )
        config.n_heads = n_heads
        if not config.heads and not config.mlp_layers:
            raise InputError(
                "the adapter names no heads and no MLPs; give heads: [[layer, head], ...] or mlp_layers: [layer, ...]"
            )
        for layer, head in config.heads:
            if not (0 <= layer < n_layers and 0 <= head < n_heads):
                raise InputError(
                    f"head L{layer}H{head} is out of range: the model has layers 0-{n_layers - 1} and heads "
                    f"0-{n_heads - 1}"
                )
        for layer in config.mlp_layers:
            if not 0 <= layer < n_layers:
                raise InputError(f"mlp_layers has {layer}, and the model has layers 0-{n_layers - 1}")
        if config.target_modules is None:
            config.target_modules = list(self.target_module_mapping[sizes.model_type]) if config.heads else []
        if config.mlp_layers and config.mlp_projection is None:
            config.mlp_projection = architecture.mlp_projection
            if config.mlp_projection is None:
                raise InputError(
                    f"mlp_layers {config.mlp_layers}: in family {sizes.model_type!r} a norm follows the MLP's last "
                    "projection, so an offset there is not one of the MLP's output; leave mlp_layers out"
                )
        self._require_modules(config)
        return config

    def _require_modules(self, config: HeadTuningConfig) -> None:
        """PEFT asks for one match; here every layer that is named has to have its module."""
        wanted: set[Any] = {(HeadTuningLayer, layer) for layer, _ in config.heads}
        wanted |= {(MlpOffsetLayer, layer) for layer in config.mlp_layers}
        missing = wanted - {_place(config, name) for name, _ in self.model.named_modules()}
        if missing:
            raise InputError(
                f"layers {sorted({layer for _, layer in missing})} have no module {config.target_modules} (heads) or "
                f"{config.mlp_projection} (MLP); leave target_modules and mlp_projection out for the family's own"
            )

    @staticmethod
    def _check_target_module_exists(peft_config: Any, key: str) -> bool:
        return _place(peft_config, key) is not None

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, TunedProjection):
            target.update_layer(adapter_name, peft_config)
            return
        if isinstance(target, BaseTunerLayer):
            raise InputError(
                f"{current_key} already carries a {type(target).__name__}; head tuning cannot be combined with it"
            )
        place = _place(peft_config, current_key)
        assert place is not None
        kind, layer = place
        new = kind(target, adapter_name, layer, peft_config)
        if adapter_name not in self.active_adapters:
            new.requires_grad_(False)
        self._replace_module(parent, target_name, new, target)

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter; where it was the only active one, the first of the others becomes active.

        PEFT lets each layer choose among its own adapters, so that layers of different adapters would disagree.
        """
        others = [name for name in self.peft_config if name != adapter_name]
        active = [name for name in self.active_adapters if name != adapter_name] or others[:1]
        super().delete_adapter(adapter_name)
        self.set_adapter(active)


def _place(config: HeadTuningConfig, key: str) -> tuple[type[HeadTuningLayer | MlpOffsetLayer], int] | None:
    """What an adapter puts around the module of this name, and its layer."""
    match = re.search(r"\.(\d+)\.(.+)$", key)
    if match is None:
        return None
    layer, path = int(match.group(1)), match.group(2)
    targets = [config.target_modules] if isinstance(config.target_modules, str) else config.target_modules or []
    if path in targets and config.heads_of(layer):
        return HeadTuningLayer, layer
    if path == config.mlp_projection and layer in config.mlp_layers:
        return MlpOffsetLayer, layer
    return None


class GatedHead(NamedTuple):
    """A head with its gates, as they are evaluated and merged, in 0..1; None where the part is not trained."""

    layer: int
    head: int
    gate_scale: float | None
    gate_offset: float | None


def _gated(model: nn.Module) -> list[tuple[HeadTuningLayer, str]]:
    """Layer and name of every active adapter that has gates."""
    found = [
        (module, name)
        for module in model.modules()
        if isinstance(module, HeadTuningLayer)
        for name in module.active_adapters
        if name in module.head_tuning_gate_scale or name in module.head_tuning_gate_offset
    ]
    if not found:
        raise InputError("no active adapter has gates; make one with HeadTuningConfig(gates=True)")
    return found


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
    found = [row for row in rows if any(gate is not None and gate > threshold for gate in row[2:])]
    return sorted(found, key=lambda row: row[:2])


def _register() -> None:
    kind: Any = HeadPeftType.HEAD_TUNING
    PEFT_TYPE_TO_CONFIG_MAPPING[kind] = HeadTuningConfig
    PEFT_TYPE_TO_TUNER_MAPPING[kind] = HeadTuningModel
    PEFT_TYPE_TO_PREFIX_MAPPING[kind] = HeadTuningModel.prefix


_register()
