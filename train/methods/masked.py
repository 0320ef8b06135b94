"""Fine-tune the slices of W_Q, W_K, W_V, W_O that belong to chosen heads."""

from __future__ import annotations

from typing import Any

from headtune.train.config.method_registry import register_tuning_method
from headtune.train.config.methods import MaskedConfig
from headtune.train.memory import model_shape

from .base import Pairs, TuningMethod, as_lists


@register_tuning_method
class Masked(TuningMethod):
    name, config = "masked", MaskedConfig

    def peft_config(self, config: MaskedConfig, pairs: Pairs, model: Any) -> Any:
        from headtune.train.tuners.head_slices import HeadSlicesConfig

        return HeadSlicesConfig(heads=as_lists(pairs), parts=list(config.parts), task_type="CAUSAL_LM")

    def trained_weights(self, config: MaskedConfig, shape: model_shape.Shape, pairs: Pairs) -> model_shape.Trained:
        return model_shape.head_slices(shape, pairs, config.parts)
