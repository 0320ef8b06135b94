"""Head slices of low rank: the product that they say, on the chosen slices alone; a stock LoRA of the same numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn

from headtune.analysis.utils.errors import InputError
from headtune.train.tuners.head_slices import HeadSlicesConfig, HeadSlicesLayer, stock_lora
from headtune.train.tuners.head_tuning import HeadTuningConfig
from helpers.close import close
from helpers.slices import logits, loss_of, masks_of
from helpers.tiny import D_MODEL, HARD_KINDS, KINDS, Kind, tiny_model

HEADS = [[0, 1], [2, 0], [2, 3]]  # one layer without, one with one, one with two
# Parts and sharing: own factors for each slice of every part, of some, and one B for a layer.
SHAPES: dict[str, dict[str, Any]] = {
    "all parts": {"rank": 3, "alpha": 6},
    "q, o": {"rank": 3, "alpha": 6, "parts": ["q", "o"]},
    "shared": {"rank": 3, "alpha": 6, "parts": ["o"], "share": "layer"},
}


@pytest.fixture(params=HARD_KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


@pytest.fixture(params=SHAPES)
def options(request: pytest.FixtureRequest) -> dict[str, Any]:
    return SHAPES[request.param]


def build(kind: Kind) -> Any:
    return tiny_model(kind.family, **kind.config)


def randomise(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "head_slices_" in name:
                parameter.copy_(0.15 * torch.randn(parameter.shape, generator=generator))


def adapted(kind: Kind, **options: Any) -> Any:
    model = get_peft_model(build(kind), HeadSlicesConfig(heads=HEADS, **options))
    randomise(model)
    return model.eval()


def projections(model: Any) -> dict[str, HeadSlicesLayer]:
    """The layers with slices, by the weight that they add to."""
    modules = model.get_base_model().named_modules()
    return {f"{name}.weight": module for name, module in modules if isinstance(module, HeadSlicesLayer)}


# --- what it computes -------------------------------------------------------------------------------------------------


def product(layer: HeadSlicesLayer, i: int, config: dict[str, Any]) -> Tensor:
    """The addition to the i-th chosen slice, `[head_dim, in]`, or `[out, head_dim]` in the output projection."""
    a, b = layer.head_slices_A["default"].detach(), layer.head_slices_B["default"].detach()
    return config["alpha"] / config["rank"] * b[0 if config.get("share") == "layer" else i] @ a[i]


def test_it_is_the_base_with_products_added_to_the_chosen_slices_alone(kind: Kind, options: dict[str, Any]) -> None:
    model = adapted(kind, **options)
    expected, plain = logits(model), build(kind)
    masks = masks_of(kind, HEADS, tuple(options.get("parts", "qkvo")))
    layers = projections(model)
    assert set(layers) == set(masks)
    with torch.no_grad():
        for name, (axis, positions) in masks.items():
            layer = layers[name]
            n = len(positions) // kind.head_dim
            added = torch.cat([product(layer, i, options) for i in range(n)], int(layer.on_input))
            added = added.T if kind.family == "gpt2" else added
            plain.get_parameter(name).index_add_(axis, torch.tensor(positions), added)
    assert (expected - logits(build(kind))).abs().max() > 1e-2, "the random adapter must matter"
    close(expected, logits(plain))

    merged = model.merge_and_unload(safe_merge=True)
    close(logits(merged), expected)
    for name, original in build(kind).state_dict().items():
        found = merged.state_dict()[name]
        if name in masks:
            axis, positions = masks[name]
            outside = torch.tensor([i for i in range(found.shape[axis]) if i not in positions], dtype=torch.long)
            assert not torch.equal(found, original)
            found, original = found.index_select(axis, outside), original.index_select(axis, outside)
        assert torch.equal(found, original), name


def test_with_one_factor_the_identity_a_step_is_that_of_whole_slices(kind: Kind) -> None:
    """At rank = alpha = head_dim, A = I on inputs (B = I on outputs) leaves D = B (D = A): full-rank slices."""
    models = {
        "whole": get_peft_model(build(kind), HeadSlicesConfig(heads=HEADS)).eval(),
        "factors": get_peft_model(
            build(kind), HeadSlicesConfig(heads=HEADS, rank=kind.head_dim, alpha=kind.head_dim)
        ).eval(),
    }
    with torch.no_grad():
        for layer in projections(models["factors"]).values():
            a, b = layer.head_slices_A["default"], layer.head_slices_B["default"]
            identity, learnt = (a, b) if layer.on_input else (b, a)
            identity.copy_(torch.eye(kind.head_dim).expand_as(identity)).requires_grad_(False)
            learnt.zero_()
    for model in models.values():
        optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5, weight_decay=0.1)
        for _ in range(2):
            optimiser.zero_grad()
            loss_of(model).backward()
            optimiser.step()
    whole = projections(models["whole"])
    for name, layer in projections(models["factors"]).items():
        close(layer.delta("default").detach(), whole[name].delta("default").detach())
        assert layer.delta("default").abs().max() > 1e-4, name
    close(logits(models["factors"]), logits(models["whole"]))


def test_steps_with_weight_decay_move_nothing_outside_the_heads(options: dict[str, Any]) -> None:
    kind = KINDS["llama-gqa"]
    model = get_peft_model(build(kind), HeadSlicesConfig(heads=HEADS, **options)).eval()
    start = logits(model)
    assert torch.equal(start, logits(build(kind))), "a fresh adapter changes nothing"
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05, weight_decay=0.5)
    for _ in range(3):
        optimiser.zero_grad()
        loss_of(model).backward()
        optimiser.step()
    assert (logits(model) - start).abs().max() > 1e-2
    masks = masks_of(kind, HEADS, tuple(options.get("parts", "qkvo")))
    state, merged = build(kind).state_dict(), model.merge_and_unload().state_dict()
    for name, original in state.items():
        moved = merged[name] != original
        if name in masks:
            axis, positions = masks[name]
            moved.index_fill_(axis, torch.tensor(positions), False)
        assert not moved.any(), name


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "phi3-mqa", "gemma3-mqa"])
def test_parameters_are_exactly_the_factors(name: str, options: dict[str, Any]) -> None:
    kind = KINDS[name]
    model = get_peft_model(build(kind), HeadSlicesConfig(heads=HEADS, **options))
    masks = masks_of(kind, HEADS, tuple(options.get("parts", "qkvo")))
    slices = sum(len(positions) for _, positions in masks.values()) // kind.head_dim
    of_b = 2 if options.get("share") else slices  # two layers
    assert model.get_nb_trainable_parameters()[0] == 3 * (slices * kind.head_dim + of_b * D_MODEL)


def test_whole_and_low_rank_adapters_add_up() -> None:
    kind = KINDS["llama-gqa"]
    model = get_peft_model(build(kind), HeadSlicesConfig(heads=HEADS))
    model.add_adapter("other", HeadSlicesConfig(heads=[[1, 2], [2, 0]], parts=["q", "o"], rank=2))
    randomise(model)
    model.eval().base_model.set_adapter("default")
    alone = logits(model)
    model.base_model.set_adapter(["default", "other"])
    both = logits(model)
    assert (both - alone).abs().max() > 1e-2
    model.merge_adapter()
    close(logits(model), both)
    model.unmerge_adapter()
    model.delete_adapter("other")
    assert not any(".other" in name for name, _ in model.named_parameters())
    assert torch.equal(logits(model), alone)


# --- as a stock LoRA --------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("error:Found missing adapter keys", "error:fan_in_fan_out")
def test_plain_peft_computes_the_same_from_the_stock_lora(kind: Kind, options: dict[str, Any], tmp_path: Path) -> None:
    model = adapted(kind, **options)
    config, weights = stock_lora(model)
    expected = logits(model)
    assert type(config) is LoraConfig and config.peft_type == "LORA"
    config.save_pretrained(tmp_path)
    save_file(weights, tmp_path / "adapter_model.safetensors")
    loaded: Any = PeftModel.from_pretrained(build(kind), str(tmp_path)).eval()
    assert not any("headtune" in type(module).__module__ for module in loaded.modules())
    close(logits(loaded), expected, 2e-6 * expected.abs().max().item())
    # No other module carries it, and each that does has the rank that the configuration says: vLLM reads no other.
    carrying = [name for name, _ in loaded.get_base_model().named_modules() if name.endswith(".lora_A.default")]
    assert {f"base_model.model.{name.removesuffix('.default')}.weight" for name in carrying} == {
        name for name in weights if ".lora_A." in name
    }
    assert {len(weight) for name, weight in weights.items() if ".lora_A." in name} == {config.r}
    assert config.rank_pattern == {} and config.lora_alpha / config.r == options["alpha"] / options["rank"]
    folded = loaded.merge_and_unload()
    close(logits(folded), expected, 5e-6 * expected.abs().max().item())


def test_a_stock_lora_is_zero_outside_the_heads() -> None:
    kind = KINDS["llama-gqa"]
    _, weights = stock_lora(adapted(kind, rank=3, parts=["q", "o"]))
    for name, weight in weights.items():
        layer = int(name.split(".layers.")[1].split(".")[0])
        mine = [head for of_layer, head in HEADS if of_layer == layer]
        if "o_proj.lora_A" in name:
            by_head = weight.unflatten(1, (4, kind.head_dim)).abs().amax((0, 2))
        elif "q_proj.lora_B" in name:
            by_head = weight.unflatten(0, (4, kind.head_dim)).abs().amax((1, 2))
        else:
            continue
        assert by_head.nonzero().flatten().tolist() == mine, name


def test_only_low_rank_slices_have_a_stock_lora() -> None:
    for config in (HeadSlicesConfig(heads=HEADS), HeadTuningConfig(heads=HEADS)):
        with pytest.raises(InputError, match="no low-rank one of head slices"):
            stock_lora(get_peft_model(build(KINDS["llama"]), config))


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rank": 0}, "rank is 0; expected a whole number from 1 up"),
        ({"rank": 2.0}, "rank is 2.0"),
        ({"rank": 2, "alpha": 0}, "alpha is 0"),
        ({"rank": 2, "share": "model"}, "share 'model' is unknown; choose one of head, layer"),
        ({"rank": 2, "share": "layer"}, r"share 'layer' is for parts \['o'\], found \['q', 'k', 'v', 'o'\]"),
        ({"rank": 2, "share": "layer", "parts": ["q"]}, r"found \['q'\]"),
    ],
    ids=str,
)
def test_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        HeadSlicesConfig(heads=HEADS, **options)
    assert "\n" not in str(caught.value)
