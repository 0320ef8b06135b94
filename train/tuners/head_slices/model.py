"""Head slices on a whole model."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from headtune.analysis.models.architectures import ARCHITECTURES
from headtune.analysis.models.structure import architecture_for
from headtune.analysis.utils.errors import InputError

from ..base import HeadTunerModel, require_heads_in_range
from .config import PARTS, HeadSlicesConfig, projection_slices, target_projections
from .layer import HeadSlicesLayer

PROJECTIONS = {name: target_projections(row, PARTS) for name, row in ARCHITECTURES.items()}


class HeadSlicesModel(HeadTunerModel):
    """Puts `HeadSlicesLayer` around the projections that hold slices of chosen heads."""

    prefix: str = "head_slices_"
    tuner_name = "head slices"
    tuner_layer_cls = HeadSlicesLayer
    target_module_mapping: dict[str, list[str]] = PROJECTIONS

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        config: HeadSlicesConfig = peft_config
        # The object and not its dict, which has the family's own names for sizes (gpt2: n_head).
        sizes = self.model.config.get_text_config()
        architecture = architecture_for(self.model)
        n_heads, n_layers = int(sizes.num_attention_heads), int(sizes.num_hidden_layers)
        expected = {
            "n_heads": n_heads,
            "n_kv_heads": int(getattr(sizes, "num_key_value_heads", None) or n_heads),
            "target_modules": target_projections(architecture, config.parts),
        }
        for name, value in expected.items():
            current = getattr(config, name)
            if current is not None and current != value:
                raise InputError(
                    f"the adapter has {name} {current} but the model {value}; use the model it was made for"
                )
            setattr(config, name, value)
        if not config.heads:
            raise InputError("the adapter names no heads; give heads: [[layer, head], ...]")
        require_heads_in_range(config.heads, n_layers, n_heads)
        return config

    @staticmethod
    def _check_target_module_exists(peft_config: Any, key: str) -> bool:
        config: HeadSlicesConfig = peft_config
        match = re.search(r"\.(\d+)\.", key)
        if match is None or not config.slices_of(int(match.group(1))):
            return False
        return any(key.endswith(f".{match.group(1)}.{target}") for target in config.target_modules or [])

    def _new_layer(
        self, config: Any, adapter_name: str, target: nn.Module, target_name: str, current_key: str
    ) -> HeadSlicesLayer:
        match = re.search(r"\.(\d+)\.", current_key)
        assert match is not None
        architecture = architecture_for(self.model)
        slices = projection_slices(architecture, target_name, config.n_heads, config.n_kv_heads)
        return HeadSlicesLayer(target, adapter_name, int(match.group(1)), slices, config)
