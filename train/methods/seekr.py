"""SEEKR (He et al. 2024) and its baselines: tasks in order, and what keeps the earlier ones from being forgotten."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headtune.train.config.continual import SeekrConfig
from headtune.train.config.errors import Problem
from headtune.train.config.method_registry import register_tuning_method
from headtune.train.memory import model_shape
from headtune.train.memory.estimate import Objective, Setup

from .base import Pairs, TuningMethod
from .lora import lora_config

if TYPE_CHECKING:
    from headtune.train.config.schema import Recipe

# Which strategies read a key. A recipe may hold others, so that one file serves all strategies; the resolved recipe of
# a run holds what it read.
_READ_BY = {
    "distil": ("seekr", "der", "lwf"),
    "replay": ("seekr", "replay", "der"),
    "der_weight": ("der",),
    "ewc_weight": ("ewc",),
    "ewc_rows": ("ewc",),
    "lwf_weight": ("lwf",),
}
_CHOOSING = ("choice", "heads", "layers", "selection")  # of method.distil, where the recipe names no heads


@register_tuning_method
class Seekr(TuningMethod):
    name, config, requires_heads, learns_sequence = "seekr", SeekrConfig, False, True

    def tunes_everything(self, config: SeekrConfig) -> bool:
        return config.tune == "full"

    def issues(self, recipe: Recipe) -> Iterator[Problem]:
        heads, method = recipe.heads, recipe.method
        if recipe.task.sequence is None:
            yield Problem(("task", "sequence"), "task.sequence is missing; list the tasks in the order they are learnt")
        if heads is not None and method.strategy != "seekr" and not method.regularisers:
            yield Problem(("heads",), f"heads are of no use to method.strategy {method.strategy!r}; remove heads")
        if method.strategy == "der" and method.distil.logits_top is not None:
            message = "method.distil.logits_top keeps too little for strategy der; remove it"
            yield Problem(("method", "distil", "logits_top"), message)
        if method.strategy == "der" and method.distil.teacher == "latest":
            message = "method.distil.teacher=latest is for strategy seekr; remove it"
            yield Problem(("method", "distil", "teacher"), message)
        if heads is not None and heads.learnt:
            message = "heads.lofit and heads.probe choose on one task; name a head set (heads.from)"
            yield Problem(("heads", "lofit" if heads.lofit else "probe"), message)

    def drop_unread(self, config: SeekrConfig, names_heads: bool, data: dict[str, Any]) -> None:
        for key, strategies in _READ_BY.items():
            if config.strategy not in strategies:
                data.pop(key)
        if names_heads and "distil" in data:
            for key in _CHOOSING:
                data["distil"].pop(key, None)

    def peft_config(self, config: SeekrConfig, pairs: Pairs, model: Any) -> Any:
        return lora_config(config.lora) if config.tune == "lora" else None

    def why_no_model(self, config: SeekrConfig, folder: Path) -> str | None:
        if self.keeps_model(config):
            return None
        return f"run {str(folder)!r} did not keep its model; run it again with method.keep=last"

    def trained_weights(self, config: SeekrConfig, shape: model_shape.Shape, pairs: Pairs) -> model_shape.Trained:
        if config.tune == "full":
            return model_shape.everything(shape)
        return model_shape.lora(shape, config.lora.r, config.lora.target_modules, config.lora.layers)

    def objective(self, recipe: Recipe, trained: model_shape.Trained, setup: Setup, pairs: Pairs | None) -> Objective:
        method = recipe.method
        tasks = len(recipe.task.sequence or [])
        copies = 2 if method.strategy == "ewc" else 0  # Fisher information, and where the weights were
        again = 0
        if method.replays:
            limit = recipe.task.max_train_examples
            share = method.replay.ratio or ((method.replay.count or 0) / limit if limit else 0.01)
            again = max(1, round(share * (tasks - 1) * setup.batch + 0.499))
        distilled = _n_heads(method, pairs) if method.strategy == "seekr" else 0
        return Objective("sequence", copies, again, distilled, method.distil.queries)

    def stored_bytes(
        self, recipe: Recipe, shape: model_shape.Shape, setup: Setup, rows: int, pairs: Pairs | None
    ) -> int:
        """Stored teachers: `heads x queries x length / 2` probabilities a row, and logits."""
        method = recipe.method
        if method.strategy != "seekr" or not _n_heads(method, pairs):
            return 0
        tasks = len(recipe.task.sequence or [])
        n_rows = method.replay.count or round(method.replay.ratio * rows)
        top = method.distil.logits_top
        logits = setup.labels * (shape.vocabulary if top is None else 2 * top + 1)
        attention = _n_heads(method, pairs) * min(method.distil.queries, setup.length) * setup.length // 2
        return int(n_rows * (tasks - 1) * (attention + logits) * (2 if method.distil.dtype == "float16" else 4))


def _n_heads(config: SeekrConfig, pairs: Pairs | None) -> int:
    return config.distil.heads if pairs is None else len(pairs)
