"""JoLA: scale and offset with a HardConcrete gate on each, which chooses heads while it tunes them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from headtune.train.config.method_registry import register_tuning_method
from headtune.train.config.methods import JolaConfig
from headtune.train.memory import model_shape

from .base import Pairs, TuningMethod, as_lists

if TYPE_CHECKING:
    from headtune.analysis.models.head_model import HeadModel
    from headtune.train.config.resolve_heads import ResolvedHeads
    from headtune.train.config.schema import Recipe
    from headtune.train.types import Penalty

GATE = "jola.gate"


@register_tuning_method
class Jola(TuningMethod):
    name, config = "jola", JolaConfig

    def peft_config(self, config: JolaConfig, pairs: Pairs, model: Any) -> Any:
        from headtune.train.tuners.head_tuning import HeadTuningConfig

        return HeadTuningConfig(heads=as_lists(pairs), gates=True, init_std=config.init_std, task_type="CAUSAL_LM")

    def carries_offsets(self, config: JolaConfig) -> frozenset[str]:
        return frozenset({"attention"})

    def penalty(self, config: JolaConfig) -> Penalty:
        return l0_penalty(config)

    def learning_rates(self, config: JolaConfig) -> dict[str, float]:
        return {"head_tuning_gate": config.gate_learning_rate}

    def heads_after(
        self, recipe: Recipe, model: HeadModel, trained: Any, resolved: ResolvedHeads, data: dict[str, Any]
    ) -> ResolvedHeads:
        return open_gates(recipe, model, trained, resolved, data)

    def trained_weights(self, config: JolaConfig, shape: model_shape.Shape, pairs: Pairs) -> model_shape.Trained:
        return model_shape.head_values(shape, pairs, gates=True)


def l0_penalty(config: JolaConfig) -> Penalty:
    """Mean P(gate > 0), its weight growing linearly over the first `l0_warmup` of the steps."""
    from headtune.train import distributed
    from headtune.train.tuners import head_tuning

    def penalty(model: Any, progress: float) -> dict[str, tuple[Any, float]]:
        weight = config.l0 * (min(1.0, progress / config.l0_warmup) if config.l0_warmup else 1.0)
        with distributed.gathered_parameters(distributed.trainable_modules(model)):
            return {"l0": (head_tuning.l0(model), weight)}

    return penalty


def open_gates(
    recipe: Recipe, model: HeadModel, trained: Any, resolved: ResolvedHeads, data: dict[str, Any]
) -> ResolvedHeads:
    """The heads that JoLA's gates left open; `resolved` says which had gates.

    Ranked by what their gates let through, `||g2 a||_2 + ||g1 v||_2`: many gates are open as far as they go.
    """
    import torch

    from headtune.train.config.resolve_heads import ranked_heads, selected
    from headtune.train.tuners import head_tuning

    gates, through = (torch.zeros(model.n_layers, model.n_heads) for _ in range(2))
    for row in head_tuning.open_heads(trained):
        gates[row.layer, row.head] = max(row.gate_scale or 0.0, row.gate_offset or 0.0)
    with torch.no_grad():
        for module in trained.modules():
            if isinstance(module, head_tuning.HeadTuningLayer):
                scale, offset = (None if f is None else f.float().cpu() for f in module.factors("default"))
                changes = [part for part in (None if scale is None else scale - 1, offset) if part is not None]
                through[module.layer] = sum(part.unflatten(0, (model.n_heads, -1)).norm(dim=-1) for part in changes)
    method = {"parameters": {"l0": recipe.method.l0, "gated": len(resolved.pairs)}}
    ranked = ranked_heads(
        through.masked_fill(gates <= 0, 0.0),
        int((gates > 0).sum()),
        "training.learning_rate or method.gate_learning_rate",
    )
    return selected("jola", {GATE: gates, "jola.norm": through}, ranked, recipe.seed, model, data, method)
