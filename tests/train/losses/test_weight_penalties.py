"""Held slices are the heads' own, what adapters add to them counts, and the anchors are sums of plain quadratics.

Where a head's slices are is written out, head by head, in `test_slices`; here every term is computed from whole weights
and those masks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from headtune.analysis.models.head_model import HeadModel
from headtune.analysis.models.loading import wrap_model
from headtune.analysis.utils.errors import CheckError, InputError
from headtune.train.losses.weight_penalties import WeightAnchor, fisher_diagonal, slice_anchor
from headtune.train.tuners.head_slices import PARTS, HeadSlicesConfig
from headtune.train.tuners.head_tuning import HeadTuningConfig
from headtune.train.tuners.head_weights import head_weights, output_slices
from helpers.close import close
from helpers.slices import masks_of
from helpers.tiny import KINDS, Kind, tiny_model, tiny_tokenizer

FAMILIES = ["llama-gqa", "qwen2", "gpt2", "phi3", "gemma2", "gpt_neox", "opt", "llama-mqa"]
HEADS = [(0, 1), (2, 0), (2, 3)]
ROWS = [
    {"input_ids": [5, 9, 30, 7, 8], "labels": [-100, -100, -100, 7, 8]},
    {"input_ids": [6, 11, 12], "labels": [6, 11, 12]},
    {"input_ids": [40, 41, 42, 43], "labels": [-100, -100, -100, 43]},
]


@pytest.fixture(params=FAMILIES)
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


def heads_of(kind: Kind) -> HeadModel:
    return wrap_model(tiny_model(kind.family, **kind.config), tiny_tokenizer())


def shake(parameters: Any, seed: int = 0, size: float = 0.1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))


def all_linear(model: HeadModel) -> list[str]:
    row = model.architecture
    return [*row.qkv, row.output_projection]


def masked(kind: Kind, of: Any, parts: tuple[str, ...] = PARTS) -> list[Tensor]:
    """The slices of `of(weight name)`, in the order of names, from whole weights."""
    masks = masks_of(kind, [list(head) for head in HEADS], parts)
    return [of(name).index_select(axis, torch.tensor(positions)) for name, (axis, positions) in masks.items()]


def half_square(parts: list[Tensor]) -> Tensor:
    return torch.stack([part.pow(2).sum() for part in parts]).sum() / 2


# --- slices -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [PARTS, ("k",), ("q", "o")])
def test_full_fine_tuning(kind: Kind, parts: tuple[str, ...]) -> None:
    model = heads_of(kind)
    before = {name: parameter.detach().clone() for name, parameter in model.hf.named_parameters()}
    anchor = slice_anchor(model, HEADS, parts)
    assert anchor.term(model).item() == 0
    shake(model.hf.parameters())
    weights = dict(model.hf.named_parameters())
    expected = half_square(masked(kind, lambda name: weights[name] - before[name], parts))
    assert expected > 0.1
    found = anchor.term(model)
    close(found, expected)
    names = sorted({held.weight for held in anchor.slices})
    own, other = (torch.autograd.grad(term, [weights[name] for name in names]) for term in (found, expected))
    for gradient, reference in zip(own, other, strict=True):
        close(gradient, reference)


def test_fisher_weighs_entry_by_entry(kind: Kind) -> None:
    model = heads_of(kind)
    before = {name: parameter.detach().clone() for name, parameter in model.hf.named_parameters()}
    names = {held.weight for held in head_weights(model, HEADS)}
    fisher = fisher_diagonal(model.hf, ROWS, names)
    assert fisher.keys() == names
    anchor = slice_anchor(model, HEADS, PARTS, fisher)
    shake(model.hf.parameters())
    weights = dict(model.hf.named_parameters())
    expected = half_square(masked(kind, lambda name: fisher[name].sqrt() * (weights[name] - before[name])))
    assert expected > 0
    close(anchor.term(model), expected)
    with pytest.raises(InputError, match="diagonal has no "):
        slice_anchor(model, HEADS, PARTS, {})


def test_lora_counts_as_its_product(kind: Kind) -> None:
    heads = heads_of(kind)
    config = LoraConfig(r=2, lora_alpha=5, target_modules=all_linear(heads), init_lora_weights=False)
    model = get_peft_model(heads.hf, config)
    modules = {name.removeprefix("base_model.model."): module for name, module in model.named_modules()}
    anchor = slice_anchor(heads, HEADS, adapted=True)
    assert anchor.start is None, "nothing is copied"

    def delta(name: str) -> Tensor:
        found: Tensor = modules[name.removesuffix(".weight")].get_delta_weight("default")
        return found

    expected, found = half_square(masked(kind, delta)), anchor.term(heads)
    assert expected > 1e-3
    close(found, expected)
    trained = [parameter for name, parameter in model.named_parameters() if "lora_" in name]
    own = torch.autograd.grad(found, trained, allow_unused=True)
    other = torch.autograd.grad(expected, trained, allow_unused=True)
    for gradient, reference in zip(own, other, strict=True):
        assert (gradient is None) == (reference is None)
        if gradient is not None:
            close(gradient, reference)
    with model.disable_adapter():
        assert all(held.delta(heads) is None for held in anchor.slices)


def merged_change(model: PeftModel, kind: Kind) -> Tensor:
    base = {
        name: parameter.detach().clone()
        for name, parameter in tiny_model(kind.family, **kind.config).named_parameters()
    }
    merged = dict(model.merge_and_unload().named_parameters())
    return half_square(masked(kind, lambda name: merged[name].detach() - base[name]))


@pytest.mark.parametrize("chosen", [HEADS, [(0, 0), (2, 3)]], ids=["all", "some"])
def test_head_slices_and_head_tuning_count_as_what_they_merge_to(kind: Kind, chosen: list[tuple[int, int]]) -> None:
    """Whichever heads the adapter itself trains."""
    lists = [list(head) for head in chosen]
    for config in (
        HeadSlicesConfig(heads=lists),
        HeadSlicesConfig(heads=lists, rank=3),
        HeadSlicesConfig(heads=lists, rank=3, parts=["o"], share="layer"),
        HeadTuningConfig(heads=lists),
    ):
        heads = heads_of(kind)
        model = get_peft_model(heads.hf, config)
        shake([parameter for parameter in model.parameters() if parameter.requires_grad])
        found = slice_anchor(heads, HEADS, adapted=True).term(heads)
        assert found.requires_grad and found > 1e-3
        close(found.detach(), merged_change(model, kind))


def test_output_slices_are_the_weights_that_z_meets(kind: Kind) -> None:
    heads = heads_of(kind)
    plain = heads.output_weight(2).detach().clone()
    close(output_slices(heads, 2, [3, 0]).detach(), plain[[3, 0]])
    config = LoraConfig(r=2, target_modules=[heads.architecture.output_projection], init_lora_weights=False)
    model = get_peft_model(heads.hf, config)
    found = output_slices(heads, 2, [3, 0]).detach()
    model.merge_and_unload()
    close(found, heads.output_weight(2).detach()[[3, 0]])
    assert (found - plain[[3, 0]]).abs().max() > 1e-2


def test_another_models_weights_can_be_the_anchor() -> None:
    kind = KINDS["qwen2"]
    heads, other = heads_of(kind), heads_of(kind)
    shake(other.hf.parameters())
    theirs, own = dict(other.hf.named_parameters()), dict(heads.hf.named_parameters())
    expected = half_square(masked(kind, lambda name: own[name] - theirs[name]))
    close(slice_anchor(heads, HEADS, reference=other).term(heads), expected)
    assert all(torch.equal(held.effective(heads), held.base(heads)) for held in head_weights(heads, HEADS))


def test_what_cannot_be_held_is_refused() -> None:
    heads = heads_of(KINDS["llama"])
    with pytest.raises(InputError, match="L3H0 is out of range"):
        head_weights(heads, [(3, 0)])
    with pytest.raises(InputError, match="parts"):
        head_weights(heads, HEADS, ["x"])
    model = get_peft_model(heads.hf, HeadTuningConfig(heads=[[0, 1]], scale="none"))
    with pytest.raises(InputError, match="output_drift"):
        slice_anchor(heads, [(0, 1)], adapted=True).term(heads)
    model.unload()
    get_peft_model(heads.hf, LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
    with pytest.raises(InputError, match="plain LoRA"):
        slice_anchor(heads, [(0, 1)], adapted=True).term(heads)


# --- Fisher and the anchor of all weights -----------------------------------------------------------------------------


def slow_fisher(model: nn.Module, names: list[str]) -> dict[str, Tensor]:
    parameters = dict(model.named_parameters())
    total = {name: torch.zeros_like(parameters[name]) for name in names}
    for row in ROWS:
        log_p = model(torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
        labelled = [(t - 1, label) for t, label in enumerate(row["labels"]) if label != -100 and t]
        loss = -torch.stack([log_p[t, label] for t, label in labelled]).sum()
        for name, gradient in zip(names, torch.autograd.grad(loss, [parameters[n] for n in names]), strict=True):
            total[name] += gradient.pow(2) / len(ROWS)
    return total


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_the_fisher_diagonal_is_the_mean_square_of_row_gradients(family: str) -> None:
    model = tiny_model(family)
    names = [name for name, parameter in model.named_parameters() if "1" in name or parameter.ndim == 1]
    expected = slow_fisher(model, names)
    model.requires_grad_(False)
    model.train()
    next(model.parameters()).requires_grad_(True)
    found = fisher_diagonal(model, ROWS, names)
    assert model.training and [p.requires_grad for p in model.parameters()].count(True) == 1
    for name in names:
        torch.testing.assert_close(found[name], expected[name], atol=1e-6, rtol=1e-4)
    assert list(fisher_diagonal(model, ROWS)) == [next(iter(dict(model.named_parameters())))], "what is trained"


def test_bad_fisher_input() -> None:
    model = tiny_model("llama")
    with pytest.raises(InputError, match="row 0 has no label"):
        fisher_diagonal(model, [{"input_ids": [5, 6], "labels": [5, -100]}])
    with pytest.raises(InputError, match="no parameter 'x'"):
        fisher_diagonal(model, ROWS, ["x"])
    with pytest.raises(InputError, match="0 rows"):
        fisher_diagonal(model, [])
    assert all(parameter.grad is None for parameter in model.parameters())


def test_tasks_add_up_in_the_memory_of_one(tmp_path: Path) -> None:
    model = tiny_model("llama")
    anchor, seen = WeightAnchor.empty(), []
    assert anchor.penalty(model).item() == 0
    for seed in range(3):
        shake(model.parameters(), seed)
        generator = torch.Generator().manual_seed(seed)
        fisher = {
            name: torch.rand(parameter.shape, generator=generator)
            .pow(4)
            .where(torch.rand(parameter.shape, generator=generator) > 0.3, torch.zeros(()))
            for name, parameter in model.named_parameters()
        }
        anchor = anchor.with_task(model, fisher)
        seen.append((fisher, {name: parameter.detach().clone() for name, parameter in model.named_parameters()}))
    assert anchor.tasks == 3
    shake(model.parameters(), 9)
    weights = dict(model.named_parameters())
    expected = torch.stack(
        [(f[name] * (weights[name] - then[name]).pow(2)).sum() / 2 for f, then in seen for name in weights]
    ).sum()
    found = anchor.penalty(model)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    own, other = (torch.autograd.grad(term, list(weights.values())) for term in (found, expected))
    for gradient, reference in zip(own, other, strict=True):
        close(gradient, reference)

    anchor.save(tmp_path / "anchor.safetensors")
    again = WeightAnchor.load(tmp_path / "anchor.safetensors")
    assert again.penalty(model).item() == found.item() and again.tasks == 3
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes((tmp_path / "anchor.safetensors").read_bytes()[:-7])
    for path in (damaged, tmp_path / "none.safetensors"):
        with pytest.raises(CheckError, match="no readable weight anchor"):
            WeightAnchor.load(path)


def test_an_anchor_of_an_adapter_and_of_another_model() -> None:
    model = get_peft_model(tiny_model("llama"), LoraConfig(r=2, init_lora_weights=False, task_type="CAUSAL_LM"))
    fisher = fisher_diagonal(model, ROWS)
    assert fisher and all("lora_" in name for name in fisher)
    anchor = WeightAnchor.empty().with_task(model, fisher)
    assert anchor.penalty(model).item() == 0
    with pytest.raises(InputError, match="no parameter"):
        anchor.penalty(tiny_model("llama"))
    some = dict(list(fisher.items())[:1])
    with pytest.raises(InputError, match="one task's Fisher"):
        anchor.with_task(model, some)
