"""Train the model, or a LoRA, while regularisers keep chosen heads as they are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from headtune.train.config.errors import Problem
from headtune.train.config.method_registry import register_tuning_method
from headtune.train.config.methods import RegulariseConfig
from headtune.train.memory import model_shape

from .base import Pairs, TuningMethod
from .lora import lora_config

if TYPE_CHECKING:
    from headtune.train.config.schema import Recipe


@register_tuning_method
class Regularise(TuningMethod):
    name, config, requires_heads, prunes = "regularise", RegulariseConfig, False, True

    def tunes_everything(self, config: RegulariseConfig) -> bool:
        return config.tune == "full"

    def issues(self, recipe: Recipe) -> Iterator[Problem]:
        if not recipe.method.regularisers:
            message = "method.regularisers is empty; give at least one, such as {kind: attention_kl}"
            yield Problem(("method", "regularisers"), message)

    def peft_config(self, config: RegulariseConfig, pairs: Pairs, model: Any) -> Any:
        return lora_config(config.lora) if config.tune == "lora" else None

    def trained_weights(self, config: RegulariseConfig, shape: model_shape.Shape, pairs: Pairs) -> model_shape.Trained:
        if config.tune == "full":
            return model_shape.everything(shape)
        return model_shape.lora(shape, config.lora.r, config.lora.target_modules, config.lora.layers)
