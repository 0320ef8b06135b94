"""Scale and offset on chosen heads, as a PEFT tuner.

On the input of the attention output projection, for each chosen head h of layer l:

    z[l, h] <- (1 + a[l, h]) * z[l, h] + v[l, h]          a, v in R^head_dim (a may be a single number)

`a` alone is LoFiT's first stage, `v` alone its second (Yin et al. 2024, section 3); both start at zero, so a fresh
adapter changes nothing. Everything else is frozen. Importing this module makes the type known to PEFT, so
`PeftModel.from_pretrained`, `AutoPeftModelForCausalLM` and `load_adapter` work after `import headtune.train.adapter`.
"""

from __future__ import annotations

import enum
import re
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..analysis.architectures import ARCHITECTURES, architecture_of
from ..analysis.errors import InputError

SCALES = ("none", "head", "vector")


class HeadPeftType(str, enum.Enum):  # noqa: UP042  PEFT compares its types as plain strings
    """The peft_type written into adapter_config.json."""

    HEAD_TUNING = "HEAD_TUNING"


@dataclass
class HeadTuningConfig(PeftConfig):
    """Which heads to tune, and how.

    Attributes:
        heads: `[[layer, head], ...]`.
        scale: `vector` trains one factor per dimension of a head, `head` one per head, `none` no factor.
        offset: train an offset vector.
        init_std: standard deviation of the initial `a` and `v`; 0 starts exactly at the base model.
        n_heads: query heads per layer; read from the model when left out.
        target_modules: the output projections; read from the family's row when left out.
    """

    heads: list[list[int]] = field(default_factory=list)
    scale: str = "vector"
    offset: bool = True
    init_std: float = 0.0
    n_heads: int | None = None
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    trainable_token_indices: list[int] | None = None  # read by TRL

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = HeadPeftType.HEAD_TUNING
        self.heads = sorted([int(layer), int(head)] for layer, head in self.heads)
        if self.scale not in SCALES:
            raise InputError(f"scale {self.scale!r} is unknown; choose one of {', '.join(SCALES)}")
        if self.scale == "none" and not self.offset:
            raise InputError("an adapter with scale 'none' and offset false trains nothing; switch one on")
        if len({tuple(head) for head in self.heads}) < len(self.heads):
            raise InputError(f"heads {self.heads} name a head twice; remove the repeats")

    def heads_of(self, layer: int) -> list[int]:
        return [head for of_layer, head in self.heads if of_layer == layer]


class HeadTuningLayer(nn.Module, BaseTunerLayer):
    """An output projection with scale and offset on its chosen heads' inputs.

    Parameters by adapter name: `head_tuning_scale` `[n_chosen, head_dim or 1]` (a, added to 1) and
    `head_tuning_offset` `[n_chosen, head_dim]` (v).
    """

    adapter_layer_names = ("head_tuning_scale", "head_tuning_offset")
    other_param_names = ("chosen_heads",)

    def __init__(self, base_layer: nn.Module, adapter_name: str, layer: int, config: HeadTuningConfig) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.layer = layer
        weight: Any = base_layer.weight
        self.in_features = weight.shape[0] if isinstance(base_layer, Conv1D) else weight.shape[1]
        self.head_tuning_scale = nn.ParameterDict()
        self.head_tuning_offset = nn.ParameterDict()
        self.chosen_heads: dict[str, list[int]] = {}
        self.head_dim: dict[str, int] = {}
        self.merged_adapters = []
        self._active_adapter = adapter_name
        self._original: dict[str, Tensor | None] = {}
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: HeadTuningConfig, **_: Any) -> None:
        """Add an adapter's parameters to this layer."""
        assert config.n_heads is not None
        chosen = config.heads_of(self.layer)
        head_dim = self.in_features // config.n_heads
        self.chosen_heads[adapter_name] = chosen
        self.head_dim[adapter_name] = head_dim
        if config.scale != "none":
            width = head_dim if config.scale == "vector" else 1
            self.head_tuning_scale[adapter_name] = nn.Parameter(torch.zeros(len(chosen), width))
        if config.offset:
            self.head_tuning_offset[adapter_name] = nn.Parameter(torch.zeros(len(chosen), head_dim))
        if config.init_std:
            for parameters in (self.head_tuning_scale, self.head_tuning_offset):
                if adapter_name in parameters:
                    nn.init.normal_(parameters[adapter_name], std=config.init_std)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def factors(self, adapter_name: str) -> tuple[Tensor | None, Tensor | None]:
        """`(1 + a, v)` spread over the projection's whole input, each `[in_features]` or None if not trained."""
        head_dim = self.head_dim[adapter_name]
        chosen = self.chosen_heads[adapter_name]
        scale = offset = None
        if adapter_name in self.head_tuning_scale:
            a = self.head_tuning_scale[adapter_name]
            ones = a.new_ones(self.in_features // head_dim, head_dim)
            scale = ones.index_add(0, torch.tensor(chosen, device=a.device), a.expand(-1, head_dim)).flatten()
        if adapter_name in self.head_tuning_offset:
            v = self.head_tuning_offset[adapter_name]
            zeros = v.new_zeros(self.in_features // head_dim, head_dim)
            offset = zeros.index_add(0, torch.tensor(chosen, device=v.device), v).flatten()
        return scale, offset

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        if self.merged:
            return self.base_layer(x, *args, **kwargs)
        dtype = x.dtype
        for name in self.active_adapters:
            if name not in self.chosen_heads:
                continue
            scale, offset = self.factors(name)
            trained = scale if scale is not None else offset
            assert trained is not None
            x = x.to(trained.dtype)  # an adapter kept in float32 over a half-precision base computes in float32
            if scale is not None and offset is not None:
                x = torch.addcmul(offset, x, scale)
            elif scale is not None:
                x = x * scale
            elif offset is not None:
                x = x + offset
        return self.base_layer(x.to(dtype), *args, **kwargs)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fold adapters into the projection: `W <- W diag(1 + a)`, `b <- b + W v` (W before scaling).

        A projection without a bias gets one when there is an offset; stock checkpoints of such a model need the
        export's config flag (see `headtune.train.export`).
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.chosen_heads]
        if not names:
            return
        base: Any = self.base_layer
        in_out = isinstance(base, Conv1D)
        if not self._original:
            bias = base.bias
            self._original = {"weight": base.weight.data.clone(), "bias": None if bias is None else bias.data.clone()}
        # Always from the original weights: adapters act one after the other, so a later scale reaches earlier offsets.
        scale = offset = None
        for name in [*self.merged_adapters, *names]:
            of_name, shift = self.factors(name)
            if of_name is not None:
                scale = of_name if scale is None else scale * of_name
                offset = None if offset is None else offset * of_name
            if shift is not None:
                offset = shift if offset is None else offset + shift
        original: Any = self._original["weight"]
        weight, bias = original.float(), self._original["bias"]
        if offset is not None:
            v = offset.detach().float()
            total = v @ weight if in_out else weight @ v
            bias = total if bias is None else bias.float() + total
        if scale is not None:
            a = scale.detach().float()
            weight = weight * (a[:, None] if in_out else a[None, :])
        if safe_merge and not (torch.isfinite(weight).all() and (bias is None or torch.isfinite(bias).all())):
            if not self.merged:
                self._original = {}
            raise ValueError(f"NaN or infinity in the merged weights of layer {self.layer}, adapters {names}")
        base.weight.data = weight.to(original.dtype)
        if offset is not None:
            base.bias = nn.Parameter(bias.to(original.dtype), requires_grad=False)
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Put the exact original weights back."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        base: Any = self.base_layer
        base.weight.data = self._original["weight"]
        bias = self._original["bias"]
        base.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self._original = {}
        self.merged_adapters.clear()

    def __repr__(self) -> str:
        return "head_tuning." + super().__repr__()


OUTPUT_PROJECTIONS = {name: [f"{row.attention}.{row.output_projection}"] for name, row in ARCHITECTURES.items()}


class HeadTuningModel(BaseTuner):
    """Puts `HeadTuningLayer` around the output projections of the layers that hold chosen heads."""

    prefix: str = "head_tuning_"
    tuner_layer_cls = HeadTuningLayer
    target_module_mapping: dict[str, list[str]] = OUTPUT_PROJECTIONS

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        config: HeadTuningConfig = peft_config
        # The object and not its dict, which has the family's own names for sizes (gpt2: n_head).
        sizes = self.model.config.get_text_config()
        architecture_of(sizes.model_type)
        n_heads, n_layers = int(sizes.num_attention_heads), int(sizes.num_hidden_layers)
        if config.n_heads is None:
            config.n_heads = n_heads
        if not config.heads:
            raise InputError("the adapter names no heads; give heads: [[layer, head], ...]")
        for layer, head in config.heads:
            if not (0 <= layer < n_layers and 0 <= head < n_heads):
                raise InputError(
                    f"head L{layer}H{head} is out of range: the model has layers 0-{n_layers - 1} and heads "
                    f"0-{n_heads - 1}"
                )
        if config.target_modules is None:
            config.target_modules = list(self.target_module_mapping[sizes.model_type])
        return config

    @staticmethod
    def _check_target_module_exists(peft_config: Any, key: str) -> bool:
        config: HeadTuningConfig = peft_config
        match = re.search(r"\.(\d+)\.", key)
        if match is None or not config.heads_of(int(match.group(1))):
            return False
        targets = [config.target_modules] if isinstance(config.target_modules, str) else config.target_modules or []
        return any(key.endswith(f".{match.group(1)}.{target}") for target in targets)

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
        if isinstance(target, HeadTuningLayer):
            target.update_layer(adapter_name, peft_config)
            return
        if isinstance(target, BaseTunerLayer):
            raise InputError(
                f"{current_key} already carries a {type(target).__name__}; head tuning cannot be combined with it"
            )
        match = re.search(r"\.(\d+)\.", current_key)
        assert match is not None
        new = HeadTuningLayer(target, adapter_name, int(match.group(1)), peft_config)
        if adapter_name not in self.active_adapters:
            new.requires_grad_(False)
        self._replace_module(parent, target_name, new, target)


def _register() -> None:
    kind: Any = HeadPeftType.HEAD_TUNING
    PEFT_TYPE_TO_CONFIG_MAPPING[kind] = HeadTuningConfig
    PEFT_TYPE_TO_TUNER_MAPPING[kind] = HeadTuningModel
    PEFT_TYPE_TO_PREFIX_MAPPING[kind] = HeadTuningModel.prefix


_register()
