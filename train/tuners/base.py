"""What the PEFT tuners of heads have in common: naming heads, merging and unmerging, and their place on a model.

A tuner is a package of its own, as in PEFT: its configuration, the layer around a projection, and the model. The layer
says what it computes (`adapted`) and what it writes into the projection when it is merged (`merged_values`).
"""

from __future__ import annotations

import enum
import logging
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from headtune.analysis.heads.head_set import HeadSet
from headtune.analysis.utils.errors import InputError

if TYPE_CHECKING:
    from headtune.analysis.identify.pipeline import IdentifyResult
    from headtune.analysis.models.head_model import HeadModel

log = logging.getLogger(__name__)


class HeadPeftType(str, enum.Enum):  # noqa: UP042  PEFT compares its types as plain strings
    """The peft_type written into adapter_config.json."""

    HEAD_TUNING = "HEAD_TUNING"
    HEAD_SLICES = "HEAD_SLICES"


def register_tuner(kind: HeadPeftType, config: type[HeadTunerConfig], model: type[HeadTunerModel]) -> None:
    """Make a tuner known to PEFT, so that `PeftModel.from_pretrained`, `AutoPeftModel...` and `load_adapter` work."""
    peft_type: Any = kind
    PEFT_TYPE_TO_CONFIG_MAPPING[peft_type] = config
    PEFT_TYPE_TO_TUNER_MAPPING[peft_type] = model
    PEFT_TYPE_TO_PREFIX_MAPPING[peft_type] = model.prefix


@dataclass
class HeadTunerConfig(PeftConfig):
    """A PEFT configuration that names heads.

    Attributes:
        heads: `[[layer, head], ...]`.
        n_heads: query heads per layer; read from the model when left out.
    """

    heads: list[list[int]] = field(default_factory=list)
    n_heads: int | None = None
    modules_to_save: list[str] | None = None  # read by TRL, as is the next
    trainable_token_indices: list[int] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.heads = sorted([int(layer), int(head)] for layer, head in self.heads)
        if len({tuple(head) for head in self.heads}) < len(self.heads):
            raise InputError(f"heads {self.heads} name a head twice; remove the repeats")

    @classmethod
    def from_head_set(
        cls,
        heads: HeadSet | IdentifyResult | Path | str,
        role: str = "both",
        top: int = 8,
        model: HeadModel | None = None,
        **options: Any,
    ) -> Self:
        """The configuration for the heads that a recipe's `heads: {from: ..., role: ..., top: ...}` would choose.

            config = HeadTuningConfig.from_head_set(identify(model, task), role="recall", top=8)
            peft_model = get_peft_model(model.hf, config)       # or SFTTrainer(model.hf, ..., peft_config=config)

        Args:
            heads: a head set, what `identify` returned, or the path of a heads.json or of the folder that holds it.
            role: `recall`, `suppression`, `both`, or another role of the set.
            top: how many heads per role.
            model: where it is given, a head set of another model is refused here; otherwise what does not fit is
                refused when the adapter is put on the model.
            options: of the configuration; `task_type` is CAUSAL_LM where it is left out.

        Raises:
            InputError: no such file or role, no heads in it, more heads than the set could hold, or another model's.
        """
        if isinstance(heads, str | Path):
            path = Path(heads)
            chosen_from, source = HeadSet.load(path), str(path)
        else:
            chosen_from = heads if isinstance(heads, HeadSet) else heads.heads
            source = "the head set"
        if model is not None:
            for warning in chosen_from.check_model(model.identity()):
                log.warning(warning)
        pairs = chosen_from.top_heads(role, top, source, notify=log.info)
        defaults = {"task_type": "CAUSAL_LM", "n_heads": chosen_from.model["n_heads"]}
        return cls(heads=[list(pair) for pair in pairs], **{**defaults, **options})


class HeadTunerLayer(nn.Module, BaseTunerLayer):
    """A frozen projection with adapters around it.

    Attributes:
        layer: of the projection.
        in_out: its weight is stored `[in, out]`, not `[out, in]`.
        in_features, out_features: of the projection.
    """

    def __init__(self, base_layer: nn.Module, layer: int) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.layer = layer
        base: Any = base_layer
        self.in_out = isinstance(base, Conv1D)
        self.in_features, self.out_features = (
            (base.nx, base.nf) if self.in_out else (base.in_features, base.out_features)
        )
        self.train(base.training)  # gates added to a model in eval mode must not draw
        self.merged_adapters: list[str] = []
        self._original: dict[Any, Any] = {}  # what merging has overwritten, as it was before

    def update_layer(self, adapter_name: str, config: Any) -> None:
        """Add an adapter's parameters to this layer."""
        raise NotImplementedError

    def adapted(self, x: Tensor, names: Sequence[str]) -> Tensor:
        """The projection of `x` with these adapters acting one after the other."""
        raise NotImplementedError

    def merged_values(self, names: Sequence[str]) -> tuple[dict[Any, Any], dict[Any, Tensor]]:
        """What merging these adapters overwrites: the original values, and the new ones in float32."""
        raise NotImplementedError

    def write_values(self, values: dict[Any, Any]) -> None:
        """Write original or new values into the projection, in its dtype."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged:
            projected: Tensor = self.base_layer(x)
            return projected
        return self.adapted(x, self._available(self.active_adapters))

    def _available(self, names: Iterable[str]) -> list[str]:
        """Those of the adapters that this layer has."""
        available = self._get_available_adapters()
        return [name for name in names if name in available]

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fold adapters into the projection.

        Raises:
            InputError: a quantised weight.
            ValueError: with `safe_merge`, a merged weight that is not finite; nothing is merged then.
        """
        names = self._available(check_adapters_to_merge(self, adapter_names))
        if not names:
            return
        if not self.weight.is_floating_point():
            raise InputError(f"weights of type {self.weight.dtype} cannot be merged into; load the base unquantised")
        original, merged = self.merged_values([*self.merged_adapters, *names])
        if safe_merge and not all(value.isfinite().all() for value in merged.values()):
            raise ValueError(f"NaN or infinity in the merged weights of layer {self.layer}, adapters {names}")
        self._original = original
        self.write_values(merged)
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Put the exact original values back."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.write_values(self._original)
        self._original = {}
        self.merged_adapters.clear()


class HeadTunerModel(BaseTuner):
    """Puts tuner layers around the projections that the configuration's heads concern."""

    tuner_name: ClassVar[str]  # in messages

    def _new_layer(
        self, config: Any, adapter_name: str, target: nn.Module, target_name: str, current_key: str
    ) -> HeadTunerLayer:
        """The tuner layer around the module `target`, whose full name is `current_key`."""
        raise NotImplementedError

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
        if isinstance(target, HeadTunerLayer) and isinstance(target, self.tuner_layer_cls):
            target.update_layer(adapter_name, peft_config)
            return
        if isinstance(target, BaseTunerLayer):
            raise InputError(
                f"{current_key} already carries a {type(target).__name__}; {self.tuner_name} cannot be combined with it"
            )
        new = self._new_layer(peft_config, adapter_name, target, target_name, current_key)
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


def require_heads_in_range(heads: Iterable[Sequence[int]], n_layers: int, n_heads: int) -> None:
    """Refuse heads that a model of this size does not have.

    Raises:
        InputError: the first of them.
    """
    for layer, head in heads:
        if not (0 <= layer < n_layers and 0 <= head < n_heads):
            raise InputError(
                f"head L{layer}H{head} is out of range: the model has layers 0-{n_layers - 1} and heads 0-{n_heads - 1}"
            )
