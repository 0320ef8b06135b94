"""Head tuning on a whole model."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from headtune.analysis.models.architectures import ARCHITECTURES
from headtune.analysis.models.structure import architecture_for
from headtune.analysis.utils.errors import InputError

from ..base import HeadTunerModel, require_heads_in_range
from .config import HeadTuningConfig
from .layer import HeadTuningLayer, MlpOffsetLayer, TunedProjection

OUTPUT_PROJECTIONS = {name: [f"{row.attention}.{row.output_projection}"] for name, row in ARCHITECTURES.items()}


class HeadTuningModel(HeadTunerModel):
    """Puts a `HeadTuningLayer` around the output projections of the layers that hold chosen heads, and a
    `MlpOffsetLayer` around the last projection of the chosen MLPs.
    """

    prefix: str = "head_tuning_"
    tuner_name = "head tuning"
    tuner_layer_cls = TunedProjection
    target_module_mapping: dict[str, list[str]] = OUTPUT_PROJECTIONS

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        config: HeadTuningConfig = peft_config
        # The object and not its dict, which has the family's own names for sizes (gpt2: n_head).
        sizes = self.model.config.get_text_config()
        architecture = architecture_for(self.model)
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
        require_heads_in_range(config.heads, n_layers, n_heads)
        for layer in config.mlp_layers:
            if not 0 <= layer < n_layers:
                raise InputError(f"mlp_layers has {layer}, and the model has layers 0-{n_layers - 1}")
        if config.target_modules is None:
            path = f"{architecture.attention}.{architecture.output_projection}"
            config.target_modules = [path] if config.heads else []
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
        required: set[Any] = {(HeadTuningLayer, layer) for layer, _ in config.heads}
        required |= {(MlpOffsetLayer, layer) for layer in config.mlp_layers}
        missing = required - {_place(config, name) for name, _ in self.model.named_modules()}
        if missing:
            raise InputError(
                f"layers {sorted({layer for _, layer in missing})} have no module {config.target_modules} (heads) or "
                f"{config.mlp_projection} (MLP); leave target_modules and mlp_projection out for the family's own"
            )

    @staticmethod
    def _check_target_module_exists(peft_config: Any, key: str) -> bool:
        return _place(peft_config, key) is not None

    def _new_layer(
        self, config: Any, adapter_name: str, target: nn.Module, target_name: str, current_key: str
    ) -> TunedProjection:
        place = _place(config, current_key)
        assert place is not None
        kind, layer = place
        return kind(target, adapter_name, layer, config)


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
