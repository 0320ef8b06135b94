"""Whether a few heads in low layers make a training much slower than the others would.

Autograd goes down to the lowest layer with a trained number: a step takes about a forward pass of all `n` layers and a
backward pass of those from the lowest trained one, `k`, up. With one unit for either pass of a layer

    cost(k) = n + (n - k),    with the prefix cache, which does not run frozen lower layers again: 2 (n - k)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from headtune.analysis.models.head_model import HeadModel
from headtune.analysis.utils.errors import InputError
from headtune.train.config.schema import Recipe
from headtune.train.memory.model_shape import of_config
from headtune.train.methods.base import method_named

WORTH = 1.3  # times faster, from which on it is told
FEW = 0.1  # of the heads may be left out, one at least


def slowed_by(recipe: Recipe, model: HeadModel, pairs: Sequence[tuple[int, int]]) -> str | None:
    """The few lowest heads without which steps are much faster, in words; None where there are none such."""
    family, config = method_named(recipe.recipe), recipe.method
    if not family.trains or len(pairs) < 2:
        return None
    try:
        shape = of_config(model.hf.config, model.name)
        lowest = family.trained_weights(config, shape, pairs).lowest
    except InputError:  # a method of a plugin, or a family, without a plan
        return None
    in_order = sorted(pairs)
    if lowest != in_order[0][0]:
        return None  # it is not the heads that decide
    before = _cost(config, model.n_layers, lowest)
    choices = []
    for count in range(1, max(1, int(FEW * len(pairs))) + 1):
        layer = in_order[count][0]
        faster = before / _cost(config, model.n_layers, layer)
        choices.append((faster, -count, layer))
    faster, negative, layer = max(choices)
    if faster < WORTH:
        return None
    names = " ".join(f"L{layer}H{head}" for layer, head in in_order[:-negative])
    return (
        f"{names} alone reach{'es' * (negative == -1)} below layer {layer}, and steps go through all layers from "
        f"{lowest} up: without {'it' if negative == -1 else 'them'} they are about {faster:.1f} times faster"
    )


def _cost(config: Any, n_layers: int, lowest: int) -> int:
    cached = getattr(config, "prefix_cache", False) and not config.regularisers
    return (n_layers - lowest) * 2 if cached else n_layers + (n_layers - lowest)
