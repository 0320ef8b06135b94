"""Steering, without training: heads scaled, moved (ITI, a few-shot prompt's offsets), or a last-layer intervention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from headtune.train.config.base import StrictConfig
from headtune.train.config.method_registry import register_tuning_method
from headtune.train.config.methods import STEERING, InContextConfig, InterceptConfig, ScaleConfig, SinkConfig

from .base import ComputedModel, Pairs, TuningMethod

if TYPE_CHECKING:
    from headtune.analysis.identify.pipeline import Progress
    from headtune.analysis.models.head_model import HeadModel
    from headtune.analysis.tasks.task import Task
    from headtune.train.config.resolve_heads import ResolvedHeads
    from headtune.train.config.schema import Recipe


@register_tuning_method
class Steer(TuningMethod):
    name, config, trains = "steer", ScaleConfig, False

    @property
    def kinds(self) -> Mapping[str, type[StrictConfig]]:
        return STEERING

    def needs_heads(self, config: Any) -> bool:
        return self.takes_heads(config)

    def takes_heads(self, config: Any) -> bool:
        return not isinstance(config, SinkConfig | InterceptConfig)  # which find their own

    def carries_offsets(self, config: Any) -> frozenset[str]:
        if isinstance(config, ScaleConfig | SinkConfig):
            return frozenset()
        return frozenset({"mlp" if isinstance(config, InterceptConfig) else "attention"})

    def require_usable(self, recipe: Recipe, model: HeadModel, train: Task, pairs: Pairs | None) -> None:
        config = recipe.method
        if isinstance(config, InContextConfig):
            from headtune.analysis.methods.in_context import few_shot_prompts

            part = train.limited(recipe.task.max_train_examples, recipe.seed)
            few_shot_prompts(model, part, config.shots, config.prompts, config.separator, recipe.seed)

    def compute(
        self, config: Any, model: HeadModel, resolved: ResolvedHeads, task: Task, seed: int, progress: Progress
    ) -> ComputedModel:
        from headtune.train.tuners import steering

        part = task.limited(getattr(config, "max_examples", None), seed)
        model.record_attention(True)
        steered = steering.steer(model, config, resolved.pairs or None, part, seed, progress, resolved.probed)
        model.record_attention(False)
        return ComputedModel(steering.apply(model.hf, steered), list(steered.pairs), steered.note)
