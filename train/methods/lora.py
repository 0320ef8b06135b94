"""LoRA on all linear layers (Hu et al. 2021), a baseline."""

from __future__ import annotations

from typing import Any

from headtune.train.config.base import LoraSizes
from headtune.train.config.method_registry import register_tuning_method
from headtune.train.config.methods import LoraConfig
from headtune.train.memory import model_shape

from .base import Pairs, TuningMethod


def lora_config(sizes: LoraSizes) -> Any:
    """PEFT's configuration of a LoRA."""
    import peft

    return peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=sizes.r,
        lora_alpha=sizes.alpha,
        target_modules=sizes.target_modules,
        layers_to_transform=sizes.layers,
    )


@register_tuning_method
class Lora(TuningMethod):
    name, config, requires_heads = "lora", LoraConfig, False

    def peft_config(self, config: LoraConfig, pairs: Pairs, model: Any) -> Any:
        return lora_config(config)

    def trained_weights(self, config: LoraConfig, shape: model_shape.Shape, pairs: Pairs) -> model_shape.Trained:
        return model_shape.lora(shape, config.r, config.target_modules, config.layers)
