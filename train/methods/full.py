"""Full fine-tuning, the upper baseline."""

from __future__ import annotations

from headtune.train.config.method_registry import register_tuning_method
from headtune.train.config.methods import FullConfig
from headtune.train.memory import model_shape

from .base import Pairs, TuningMethod


@register_tuning_method
class Full(TuningMethod):
    name, config, requires_heads = "full", FullConfig, False

    def tunes_everything(self, config: FullConfig) -> bool:
        return True

    def peft_config(self, config: FullConfig, pairs: Pairs, model: object) -> None:
        return None

    def trained_weights(self, config: FullConfig, shape: model_shape.Shape, pairs: Pairs) -> model_shape.Trained:
        return model_shape.everything(shape)
