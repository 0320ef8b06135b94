"""LN tuning (Zhao et al. 2023): the gains and biases of all norms."""

from __future__ import annotations

from typing import Any

from headtune.train.config.method_registry import register_tuning_method
from headtune.train.config.methods import LnConfig
from headtune.train.memory import model_shape

from .base import Pairs, TuningMethod


@register_tuning_method
class Ln(TuningMethod):
    name, config, requires_heads = "ln", LnConfig, False

    def peft_config(self, config: LnConfig, pairs: Pairs, model: Any) -> Any:
        from peft import LNTuningConfig

        return LNTuningConfig(target_modules=norms(model), task_type="CAUSAL_LM")

    def trained_weights(self, config: LnConfig, shape: model_shape.Shape, pairs: Pairs) -> model_shape.Trained:
        return model_shape.norm_gains(shape)


def norms(model: Any) -> list[str]:
    """Names of a model's norms: the modules without children all of whose parameters are vectors."""
    return [
        name
        for name, module in model.named_modules()
        if not list(module.children())
        and (parameters := list(module.parameters(recurse=False)))
        and all(parameter.ndim == 1 for parameter in parameters)
    ]
