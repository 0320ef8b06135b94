"""Fine-tune only the weight slices that belong to chosen heads, as a PEFT tuner.

A head h of a layer reads the residual stream x through head_dim rows of W_Q, W_K and W_V and writes to it through
head_dim columns of W_O. With everything else frozen, the trained parameters are additions to those slices, D, that
start at zero:

    q, k, v:   y = base(x),   y[..., rows] += x @ D.T             D [n_rows, in]
    o:         y = base(x) + x[..., columns] @ D.T                D [out, n_columns]

This is full fine-tuning with the gradients of all other weights masked to zero, without the mask: gradients and
optimiser state exist for the slices only. Biases are not trained. Weight decay acts on D and so pulls towards the base
weights, not towards zero: a slice that the loss does not need returns to what it was.

With grouped-query attention a key or value head is shared by a group of query heads, and W_K and W_V can only be
trained per group. The chosen heads' groups are, once each, and that changes all heads of a group: `touched_heads`
lists them.

Importing this module makes the type known to PEFT; so does `import headtune.train`.
"""

from __future__ import annotations

import enum
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from headtune.analysis.models.architectures import ARCHITECTURES, Architecture, architecture_of
from headtune.analysis.utils.errors import InputError

from .base import HeadTunerConfig

PARTS = ("q", "k", "v", "o")
SHARED = ("k", "v")  # one per KV group, not per head

Block = tuple[str, int]  # a part and its index: that of a head for q and o, that of a KV group for k and v


class SlicesPeftType(str, enum.Enum):  # noqa: UP042  PEFT compares its types as plain strings
    """The peft_type written into adapter_config.json."""

    HEAD_SLICES = "HEAD_SLICES"


@dataclass
class HeadSlicesConfig(HeadTunerConfig):
    """Which slices to train.

    Attributes:
        heads: `[[layer, head], ...]`.
        parts: any of `q`, `k`, `v`, `o`: the slices of W_Q, W_K, W_V, W_O.
        n_heads, n_kv_heads: query heads and KV groups per layer; read from the model when left out.
        target_modules: the projections that hold the slices; read from the family's row when left out.
    """

    parts: list[str] = field(default_factory=lambda: list(PARTS))
    n_kv_heads: int | None = None
    target_modules: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = SlicesPeftType.HEAD_SLICES
        if not self.parts or len(set(self.parts)) < len(self.parts) or not set(self.parts) <= set(PARTS):
            raise InputError(f"parts {self.parts} are not understood; give some of {', '.join(PARTS)}, each once")
        self.parts = [part for part in PARTS if part in self.parts]

    def blocks_of(self, layer: int) -> set[Block]:
        """The trained slices of a layer, each `head_dim` rows or columns wide."""
        assert self.n_heads is not None and self.n_kv_heads is not None
        group = self.n_heads // self.n_kv_heads
        heads = [head for of_layer, head in self.heads if of_layer == layer]
        return {(part, head // group if part in SHARED else head) for part in self.parts for head in heads}


def touched_heads(
    heads: Sequence[Sequence[int]], parts: Sequence[str], n_heads: int, n_kv_heads: int
) -> list[list[int]]:
    """The heads `[[layer, head], ...]` whose own computation changes when the slices of `heads` are trained.

    All heads of the chosen heads' KV groups where `parts` has `k` or `v`, the chosen heads themselves where not.
    """
    group = n_heads // n_kv_heads if set(parts) & set(SHARED) else 1
    touched = {(layer, head // group * group + i) for layer, head in heads for i in range(group)}
    return [list(head) for head in sorted(touched)]


def _blocks(architecture: Architecture, projection: str, n_heads: int, n_kv_heads: int) -> list[Block]:
    """What each `head_dim` outputs of a projection are (for the output projection: inputs), in order."""
    if projection == architecture.output_projection:
        return [("o", head) for head in range(n_heads)]
    if architecture.qkv_layout == "per_head":
        return [(part, head) for head in range(n_heads) for part in "qkv"]
    parts = "qkv" if architecture.qkv_layout == "blocks" else "qkv"[architecture.qkv.index(projection)]
    return [(part, index) for part in parts for index in range(n_kv_heads if part in SHARED else n_heads)]


def _targets(architecture: Architecture, parts: Sequence[str]) -> list[str]:
    """Paths, within a layer, of the projections that hold any of the parts."""
    names = [*architecture.qkv, architecture.output_projection]
    held = {name: {part for part, _ in _blocks(architecture, name, 1, 1)} for name in names}
    return [f"{architecture.attention}.{name}" for name in names if held[name] & set(parts)]


class HeadSlicesLayer(nn.Module, BaseTunerLayer):
    """A projection with an addition to the slices of its weight that belong to chosen heads.

    Attributes:
        blocks: what each `head_dim` entries of the head axis are: the output axis of query, key and value
            projections, the input axis of the output projection.
        head_slices_delta: parameters by adapter name, `[n_rows, in]`; in the output projection `[out, n_columns]`.
        head_slices_chosen: the positions within `blocks` of the trained slices by adapter name, `[n_chosen]`.
    """

    adapter_layer_names = ("head_slices_delta",)
    other_param_names = ("head_slices_chosen",)

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, layer: int, blocks: list[Block], config: HeadSlicesConfig
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.layer = layer
        self.blocks = blocks
        self.on_input = blocks[0][0] == "o"
        base: Any = base_layer
        conv = isinstance(base, Conv1D)
        self.in_features, self.out_features = (base.nx, base.nf) if conv else (base.in_features, base.out_features)
        self._head_axis = int(self.on_input != conv)  # of the stored weight; Conv1D's is [in, out]
        self.head_dim = (self.in_features if self.on_input else self.out_features) // len(blocks)
        self.head_slices_delta = nn.ParameterDict()
        self.head_slices_chosen = BufferDict(persistent=False)
        self.merged_adapters = []
        self._active_adapter = adapter_name
        self._original: dict[int, Tensor] = {}  # the slices, by position, that were merged into, as they were before
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: HeadSlicesConfig, **_: Any) -> None:
        """Add an adapter's parameters to this layer."""
        wanted = config.blocks_of(self.layer)
        chosen = [position for position, block in enumerate(self.blocks) if block in wanted]
        width = len(chosen) * self.head_dim
        shape = (self.out_features, width) if self.on_input else (width, self.in_features)
        self.head_slices_delta[adapter_name] = nn.Parameter(torch.zeros(shape))
        self._move_adapter_to_device_of_base_layer(adapter_name)
        # After the line above, which casts to the base's dtype in some versions of PEFT.
        self.head_slices_chosen[adapter_name] = torch.tensor(chosen, device=self.weight.device)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        y: Tensor = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return y
        for name in self.active_adapters:
            if name not in self.head_slices_delta:
                continue
            delta, chosen = self.head_slices_delta[name], self.head_slices_chosen[name]
            # An addition kept in float32 over a half-precision base is computed in float32.
            if self.on_input:
                z = x.unflatten(-1, (len(self.blocks), self.head_dim)).index_select(-2, chosen).flatten(-2)
                y = y + functional.linear(z.to(delta.dtype), delta).to(y.dtype)
            else:
                added = functional.linear(x.to(delta.dtype), delta).to(y.dtype).unflatten(-1, (-1, self.head_dim))
                y = y.unflatten(-1, (len(self.blocks), self.head_dim)).index_add(-2, chosen, added).flatten(-2)
        return y

    def _by_block(self, weight: Tensor, axis: int) -> Tensor:
        """A view of a weight whose `axis` is the head axis: `[blocks, head_dim, the other axis]`."""
        return (weight if axis == 0 else weight.T).unflatten(0, (-1, self.head_dim))

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters to the base weight; only the trained slices are written."""
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.head_slices_delta]
        if not names:
            return
        if not self.weight.is_floating_point():
            raise InputError(f"weights of type {self.weight.dtype} cannot be merged into; load the base unquantised")
        # From the original weights, so that of several merged adapters nothing is rounded twice.
        slices = self._by_block(self.weight.data, self._head_axis)
        original, total = dict(self._original), dict(self._original)
        for name in [*self.merged_adapters, *names]:
            delta = self._by_block(self.head_slices_delta[name].detach().float(), int(self.on_input))
            for position, addition in zip(self.head_slices_chosen[name].tolist(), delta, strict=True):
                if position not in original:
                    original[position] = total[position] = slices[position].clone()
                total[position] = total[position] + addition
        if safe_merge and not all(torch.isfinite(weight).all() for weight in total.values()):
            raise ValueError(f"NaN or infinity in the merged weights of layer {self.layer}, adapters {names}")
        for position, weight in total.items():
            slices[position] = weight.to(slices.dtype)
        self._original = original
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Put the exact original slices back."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        slices = self._by_block(self.weight.data, self._head_axis)
        for position, weight in self._original.items():
            slices[position] = weight
        self._original = {}
        self.merged_adapters.clear()

    def __repr__(self) -> str:
        return "head_slices." + super().__repr__()


PROJECTIONS = {name: _targets(row, PARTS) for name, row in ARCHITECTURES.items()}


class HeadSlicesModel(BaseTuner):
    """Puts `HeadSlicesLayer` around the projections that hold slices of chosen heads."""

    prefix: str = "head_slices_"
    tuner_layer_cls = HeadSlicesLayer
    target_module_mapping: dict[str, list[str]] = PROJECTIONS

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        config: HeadSlicesConfig = peft_config
        # The object and not its dict, which has the family's own names for sizes (gpt2: n_head).
        sizes = self.model.config.get_text_config()
        architecture = architecture_of(sizes.model_type)
        n_heads, n_layers = int(sizes.num_attention_heads), int(sizes.num_hidden_layers)
        found = {
            "n_heads": n_heads,
            "n_kv_heads": int(getattr(sizes, "num_key_value_heads", None) or n_heads),
            "target_modules": _targets(architecture, config.parts),
        }
        for name, value in found.items():
            given = getattr(config, name)
            if given is not None and given != value:
                raise InputError(f"the adapter has {name} {given} but the model {value}; use the model it was made for")
            setattr(config, name, value)
        if not config.heads:
            raise InputError("the adapter names no heads; give heads: [[layer, head], ...]")
        for layer, head in config.heads:
            if not (0 <= layer < n_layers and 0 <= head < n_heads):
                raise InputError(
                    f"head L{layer}H{head} is out of range: the model has layers 0-{n_layers - 1} and heads "
                    f"0-{n_heads - 1}"
                )
        return config

    @staticmethod
    def _check_target_module_exists(peft_config: Any, key: str) -> bool:
        config: HeadSlicesConfig = peft_config
        match = re.search(r"\.(\d+)\.", key)
        if match is None or not config.blocks_of(int(match.group(1))):
            return False
        return any(key.endswith(f".{match.group(1)}.{target}") for target in config.target_modules or [])

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
        if isinstance(target, HeadSlicesLayer):
            target.update_layer(adapter_name, peft_config)
            return
        if isinstance(target, BaseTunerLayer):
            raise InputError(
                f"{current_key} already carries a {type(target).__name__}; head slices cannot be combined with it"
            )
        match = re.search(r"\.(\d+)\.", current_key)
        assert match is not None
        architecture = architecture_of(self.model.config.get_text_config().model_type)
        blocks = _blocks(architecture, target_name, peft_config.n_heads, peft_config.n_kv_heads)
        new = HeadSlicesLayer(target, adapter_name, int(match.group(1)), blocks, peft_config)
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


def _register() -> None:
    kind: Any = SlicesPeftType.HEAD_SLICES
    PEFT_TYPE_TO_CONFIG_MAPPING[kind] = HeadSlicesConfig
    PEFT_TYPE_TO_TUNER_MAPPING[kind] = HeadSlicesModel
    PEFT_TYPE_TO_PREFIX_MAPPING[kind] = HeadSlicesModel.prefix


_register()
