"""A regulariser that a package adds: recipes take it, its loss is that of a training, and its name is its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

import pytest
import torch
from pydantic import Field

from headtune.analysis.models.loading import wrap_model
from headtune.analysis.utils.errors import InputError
from headtune.train.config import recipe, regularisers
from headtune.train.config.regularisers import REGULARISERS, Regulariser
from headtune.train.config.schema import Recipe
from headtune.train.losses.activation_capture import Captures
from headtune.train.losses.registry import PENALTIES, HeadPenalty, TrainingBatch, register_regulariser
from headtune.train.losses.regularisers import Regularisers
from helpers.tiny import tiny_model, tiny_tokenizer


class SmallOutputs(Regulariser):
    kind: Literal["small_outputs"] = "small_outputs"
    margin: Annotated[float, Field(ge=0)] = 0.0


class SmallOutputsPenalty(HeadPenalty[SmallOutputs]):
    def captures(self) -> Captures:
        return Captures(z=self.layers)

    def loss(self, batch: TrainingBatch) -> torch.Tensor:
        sizes = [batch.z(self.model, layer, heads).norm(dim=-1).mean() for layer, heads in self.by_layer.items()]
        return (torch.stack(sizes) - self.config.margin).relu().mean()


@pytest.fixture(autouse=True)
def as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for registry in (REGULARISERS, PENALTIES):
        for kind, value in registry.items():
            monkeypatch.setitem(registry, kind, value)
    yield
    for added in (REGULARISERS, PENALTIES):
        added.pop("small_outputs", None)
    regularisers._any_kind.cache_clear()


def a_recipe(*terms: dict[str, Any]) -> Recipe:
    method = {"objective": "sft", "regularisers": list(terms)}
    return recipe.parse({"recipe": "regularise", "heads": {"all": True}, "method": method})


def test_recipes_take_it() -> None:
    with pytest.raises(InputError, match="tag 'small_outputs'"):
        a_recipe({"kind": "small_outputs"})
    register_regulariser("small_outputs", SmallOutputs)(SmallOutputsPenalty)
    read = a_recipe({"kind": "small_outputs", "margin": 2.0, "weight": 0.5}, {"kind": "output_drift"})
    terms: Any = read.method.regularisers
    assert terms[0] == SmallOutputs(margin=2.0, weight=0.5) and terms[1].kind == "output_drift"
    dumped = read.dump()["method"]["regularisers"][0]
    assert dumped["kind"] == "small_outputs" and dumped["margin"] == 2.0
    assert recipe.parse(read.dump()) == read
    for wrong, words in [
        ({"margin": -1}, "method.regularisers.0.small_outputs.margin: input should be greater than or equal to 0"),
        ({"margn": 1}, "unknown key 'method.regularisers.0.small_outputs.margn'; did you mean 'margin'?"),
    ]:
        with pytest.raises(InputError) as caught:
            a_recipe({"kind": "small_outputs", **wrong})
        assert words in str(caught.value)
    assert "SmallOutputs" in Recipe.model_json_schema()["$defs"]


def test_its_loss_is_a_trainings() -> None:
    register_regulariser("small_outputs", SmallOutputs)(SmallOutputsPenalty)
    model = wrap_model(tiny_model("llama"), tiny_tokenizer())
    z: list[torch.Tensor] = []
    penalties = Regularisers(model, [(SmallOutputs(weight=3.0), [(1, 0), (1, 2)]), (SmallOutputs(), [(0, 0)])])
    hook = model.projection(1).register_forward_pre_hook(lambda _module, args: z.append(args[0]))
    with penalties.installed():
        model.hf.train()
        model.hf(torch.arange(3, 9)[None])
        terms = penalties(model.hf, 0.0)
    hook.remove()
    assert terms.keys() == {"small_outputs", "small_outputs_2"}
    value, weight = terms["small_outputs"]
    torch.testing.assert_close(value, z[0].unflatten(-1, (4, 8))[:, :, [0, 2]].norm(dim=-1).mean())
    assert weight == 3.0 and value.requires_grad


def test_names_are_taken_once() -> None:
    class Other(Regulariser):
        kind: Literal["attention_kl"] = "attention_kl"

    class Unnamed(Regulariser):
        kind: str = "small_outputs"

    register_regulariser("small_outputs", SmallOutputs)(SmallOutputsPenalty)
    for kind, config, words in [
        ("small_outputs", SmallOutputs, "regulariser 'small_outputs' is SmallOutputsPenalty's kind already"),
        ("attention_kl", Other, "regulariser 'attention_kl' is AttentionKlPenalty's kind already"),
        ("prune", Other, "regulariser 'prune' is PruneGates's kind already"),
        ("outputs", SmallOutputs, "SmallOutputs needs a field `kind: Literal['outputs'] = 'outputs'`"),
        ("outputs", Unnamed, "needs a field `kind: Literal['outputs']"),
    ]:
        with pytest.raises(InputError) as caught:
            register_regulariser(kind, config)(SmallOutputsPenalty)
        assert words in str(caught.value) and "\n" not in str(caught.value)
