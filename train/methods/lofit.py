"""The head adapter: scale and offset on chosen heads (LoFiT, Yin et al. 2024)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headtune.train.config.errors import Problem
from headtune.train.config.method_registry import register_tuning_method
from headtune.train.config.methods import LofitConfig
from headtune.train.memory import model_shape

from .base import Pairs, TuningMethod, as_lists

if TYPE_CHECKING:
    from headtune.analysis.models.head_model import HeadModel
    from headtune.analysis.tasks.task import Task
    from headtune.train.config.schema import Recipe


@register_tuning_method
class Lofit(TuningMethod):
    name, config = "lofit", LofitConfig

    def stops_after_heads(self, config: LofitConfig) -> bool:
        return config.select_only

    def issues(self, recipe: Recipe) -> Iterator[Problem]:
        heads, method = recipe.heads, recipe.method
        if method.select_only and (heads is None or not (heads.learnt or heads.identify)):
            fix = "use heads.lofit, probe or identify"
            message = f"method.select_only stops after choosing heads, and none are chosen; {fix}"
            yield Problem(("method", "select_only"), message)
        if method.init is not None and not method.offset:
            yield Problem(("method", "init"), "method.init starts offsets, and method.offset is false; leave init out")

    def peft_config(self, config: LofitConfig, pairs: Pairs, model: Any) -> Any:
        from headtune.train.tuners.head_tuning import HeadTuningConfig

        return HeadTuningConfig(
            heads=as_lists(pairs),
            scale=config.scale,
            offset=config.offset,
            init_std=config.init_std,
            task_type="CAUSAL_LM",
        )

    def require_usable(self, recipe: Recipe, model: HeadModel, train: Task, pairs: Pairs | None) -> None:
        init = recipe.method.init
        if init is not None:
            from headtune.train.tuners.head_tuning import start

            start.require_offsets(start.read_offsets(init.source), pairs or (), model.head_dim, init.source)

    def set_start(self, config: LofitConfig, model: HeadModel, adapted: Any) -> None:
        if config.init is not None:
            from headtune.train.tuners.head_tuning import start

            offsets = start.read_offsets(config.init.source)
            pairs = [(layer, head) for layer, head in adapted.peft_config["default"].heads]
            start.require_offsets(offsets, pairs, model.head_dim, config.init.source)
            start.start_offsets(adapted, offsets)

    def carries_offsets(self, config: LofitConfig) -> frozenset[str]:
        return frozenset({"attention"} if config.offset else ())

    def why_no_model(self, config: LofitConfig, folder: Path) -> str | None:
        if not config.select_only:
            return None
        return f"run {str(folder)!r} chose heads and trained nothing; tune them with heads.from={folder}"

    def trained_weights(self, config: LofitConfig, shape: model_shape.Shape, pairs: Pairs) -> model_shape.Trained:
        return model_shape.head_values(shape, pairs, config.scale, config.offset)
