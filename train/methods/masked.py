"""Fine-tune the slices of W_Q, W_K, W_V, W_O that belong to chosen heads: whole, or by a product of low rank."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from headtune.train.config.errors import Problem
from headtune.train.config.method_registry import register_tuning_method
from headtune.train.config.methods import MaskedConfig
from headtune.train.memory import model_shape

from .base import Pairs, TuningMethod, as_lists

if TYPE_CHECKING:
    from headtune.train.config.schema import Recipe

_OF_RANK = ("alpha", "share")  # keys that are not read without rank


@register_tuning_method
class Masked(TuningMethod):
    name, config = "masked", MaskedConfig

    def issues(self, recipe: Recipe) -> Iterator[Problem]:
        method = recipe.method
        if method.rank is None:
            for key in _OF_RANK:
                if key in method.model_fields_set:
                    message = f"method.{key} belongs to method.rank, which is missing; give method.rank or remove it"
                    yield Problem(("method", key), message)
        elif method.share == "layer" and method.parts != ["o"]:
            message = (
                f"method.share layer is for method.parts [o], found [{', '.join(method.parts)}]: heads write to one "
                "space and read through rows of their own; use share head, or parts [o]"
            )
            yield Problem(("method", "share"), message)

    def drop_unread(self, config: MaskedConfig, names_heads: bool, data: dict[str, Any]) -> None:
        if config.rank is None:
            for key in _OF_RANK:
                data.pop(key)

    def peft_config(self, config: MaskedConfig, pairs: Pairs, model: Any) -> Any:
        from headtune.train.tuners.head_slices import HeadSlicesConfig

        return HeadSlicesConfig(
            heads=as_lists(pairs),
            parts=list(config.parts),
            rank=config.rank,
            alpha=config.alpha,
            share=config.share,
            task_type="CAUSAL_LM",
        )

    def has_stock_lora(self, config: MaskedConfig) -> bool:
        return config.rank is not None

    def trained_weights(self, config: MaskedConfig, shape: model_shape.Shape, pairs: Pairs) -> model_shape.Trained:
        if config.rank is None:
            return model_shape.head_slices(shape, pairs, config.parts)
        return model_shape.low_rank_slices(shape, pairs, config.parts, config.rank, config.share == "layer")
