"""What the head adapter computes, the same for every family.

It is checked against a reference written out here: forward hooks on the projections, a loop over heads, nothing of
`headtune.train.tuners.head_tuning`. What every tuner owes PEFT is in test_peft_contract.py.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from headtune.analysis.utils.errors import InputError
from headtune.train.tuners import hard_concrete
from headtune.train.tuners.head_tuning import SCALES, HeadTuningConfig, HeadTuningLayer, l0, open_heads
from helpers.close import close
from helpers.tiny import D_MODEL, N_HEADS, N_LAYERS, tiny_model

HEADS = [[0, 1], [2, 0], [2, 3]]  # one layer without, one with one, one with two


@dataclass(frozen=True)
class Kind:
    """A tiny model, and where its projections are, by a path of its own and not by the table of families."""

    family: str
    projection: str
    config: dict[str, Any] = field(default_factory=dict)
    head_dim: int = 8
    mlp: str = "model.layers.{}.mlp.down_proj"


KINDS = {
    "llama": Kind("llama", "model.layers.{}.self_attn.o_proj"),
    "llama-gqa": Kind("llama", "model.layers.{}.self_attn.o_proj", {"num_key_value_heads": 2}),
    "llama-head-dim": Kind("llama", "model.layers.{}.self_attn.o_proj", {"head_dim": 12}, head_dim=12),
    "gpt2": Kind("gpt2", "transformer.h.{}.attn.c_proj", mlp="transformer.h.{}.mlp.c_proj"),
    "opt": Kind("opt", "model.decoder.layers.{}.self_attn.out_proj", mlp="model.decoder.layers.{}.fc2"),
    "gpt_neox": Kind("gpt_neox", "gpt_neox.layers.{}.attention.dense", mlp="gpt_neox.layers.{}.mlp.dense_4h_to_h"),
    "qwen2": Kind("qwen2", "model.layers.{}.self_attn.o_proj"),
    "phi": Kind("phi", "model.layers.{}.self_attn.dense", mlp="model.layers.{}.mlp.fc2"),
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


def build(kind: Kind) -> Any:
    return tiny_model(kind.family, **kind.config)


def batch(rows: int = 2, length: int = 7) -> Tensor:
    return torch.randint(3, 300, (rows, length), generator=torch.Generator().manual_seed(1))


def logits(model: Any, tokens: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(batch() if tokens is None else tokens, use_cache=False).logits
    return found


def adapter_parameters(model: nn.Module, adapter: str = "default") -> dict[str, nn.Parameter]:
    """`scale.<layer>`, `offset.<layer>`, `gate_scale.<layer>`, `gate_offset.<layer>`, `mlp_offset.<layer>`."""
    found = {}
    for name, parameter in model.named_parameters():
        match = re.search(r"\.(\d+)\..*\.head_tuning_(\w+)\." + adapter + "$", name)
        if match:
            found[f"{match.group(2)}.{match.group(1)}"] = parameter
    return found


def randomise(model: nn.Module, adapter: str = "default", seed: int = 3) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter_parameters(model, adapter).values():
            parameter.copy_(0.7 * torch.randn(parameter.shape, generator=generator))


def adapted(kind: Kind, **options: Any) -> Any:
    """A PeftModel with a random adapter."""
    model = get_peft_model(build(kind), HeadTuningConfig(heads=HEADS, **options))
    randomise(model)
    return model.eval()


def slow_gate(log_alpha: Tensor, u: Tensor | None) -> Tensor:
    """HardConcrete, temperature 0.33, stretched to -0.1..1.1; without noise where there is no `u`."""
    s = torch.sigmoid(log_alpha if u is None else (torch.log(u / (1 - u)) + log_alpha) / 0.33)
    return torch.clip(s * 1.2 - 0.1, 0, 1)


@contextmanager
def slow_adapter(
    model: nn.Module,
    kind: Kind,
    values: Mapping[str, Tensor],
    heads: list[list[int]],
    noise: Mapping[str, Tensor] | None = None,
) -> Iterator[None]:
    """The definition, head by head: `z[l, h] <- (1 + g2 * a[l, h]) * z[l, h] + g1 * v[l, h]`, `M[l] <- M[l] + w[l]`."""
    handles = []

    def gated(name: str, layer: int, row: int) -> Tensor:
        value, gate = values[f"{name}.{layer}"][row], f"gate_{name}.{layer}"
        if gate not in values:
            return value
        return value * slow_gate(values[gate][row], None if noise is None else noise[gate][row])

    def hook_of(layer: int) -> Any:
        chosen = sorted(head for of, head in heads if of == layer)

        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
            parts = list(args[0].split(kind.head_dim, dim=-1))
            assert len(parts) == N_HEADS
            for row, head in enumerate(chosen):
                if f"scale.{layer}" in values:
                    parts[head] = parts[head] + parts[head] * gated("scale", layer, row)
                if f"offset.{layer}" in values:
                    parts[head] = parts[head] + gated("offset", layer, row)
            return (torch.cat(parts, dim=-1),)

        return hook

    def add(offset: Tensor) -> Any:
        return lambda _module, _args, output: output + offset

    for layer in {layer for layer, _ in heads}:
        module = model.get_submodule(kind.projection.format(layer))
        handles.append(module.register_forward_pre_hook(hook_of(layer)))
    for name, value in values.items():
        if name.startswith("mlp_offset."):
            module = model.get_submodule(kind.mlp.format(name.split(".")[1]))
            handles.append(module.register_forward_hook(add(value)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def without_dropout(model: Any) -> Any:
    """In training mode, and yet without noise."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "dropout", None), float):  # opt
            module.dropout = 0.0
    return model.train()


def loss_of(model: Any) -> Tensor:
    tokens = batch()
    loss: Tensor = model(tokens, labels=tokens, use_cache=False).loss
    return loss


# --- what it computes -------------------------------------------------------------------------------------------------


def test_forward_and_gradients_are_the_definition(kind: Kind) -> None:
    for scale, offset in itertools.product(SCALES, (True, False)):
        if (scale, offset) != ("none", False):
            require_the_definition(kind, scale, offset)


def require_the_definition(kind: Kind, scale: str, offset: bool) -> None:
    model = adapted(kind, scale=scale, offset=offset)
    parameters = adapter_parameters(model)
    width = {"vector": kind.head_dim, "head": 1}
    expected_shapes = {
        **({f"scale.{layer}": (n, width[scale]) for layer, n in ((0, 1), (2, 2))} if scale != "none" else {}),
        **({f"offset.{layer}": (n, kind.head_dim) for layer, n in ((0, 1), (2, 2))} if offset else {}),
    }
    assert {name: tuple(p.shape) for name, p in parameters.items()} == expected_shapes
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        name for name, _ in model.named_parameters() if "head_tuning_" in name
    }
    is_the_definition(model, build(kind), kind)


def is_the_definition(
    model: Any, reference: Any, kind: Kind, noise: Mapping[str, Tensor] | None = None, seed: int = 0
) -> None:
    """Logits, loss and the gradient of every parameter; `noise` is what a forward pass draws after this seed."""
    parameters = adapter_parameters(model)
    torch.manual_seed(seed)
    found = loss_of(model)
    gradients = torch.autograd.grad(found, list(parameters.values()))
    torch.manual_seed(seed)
    found_logits = logits(model)

    values = {name: parameter.detach().clone().requires_grad_() for name, parameter in parameters.items()}
    with slow_adapter(reference, kind, values, HEADS, noise):
        expected = loss_of(reference)
        expected_logits = logits(reference)
        expected_gradients = torch.autograd.grad(expected, list(values.values()))
    close(found_logits, expected_logits)
    assert (expected_logits - logits(reference)).abs().max() > 1e-2, "the random adapter must matter"
    close(found, expected)
    for name, gradient, wanted in zip(values, gradients, expected_gradients, strict=True):
        assert wanted.abs().max() > 1e-6, name
        close(gradient, wanted)


@pytest.mark.parametrize(("scale", "offset"), [("vector", True), ("head", True), ("none", True), ("vector", False)])
def test_gates_are_the_definition(kind: Kind, scale: str, offset: bool) -> None:
    """Free of noise in eval mode; in training mode a draw per head and pass, the scale's before the offset's."""
    model = adapted(kind, scale=scale, offset=offset, gates=True)
    gates = {name: parameter for name, parameter in adapter_parameters(model).items() if name.startswith("gate_")}
    parts = [part for part, there in (("scale", scale != "none"), ("offset", offset)) if there]
    assert {name: tuple(parameter.shape) for name, parameter in gates.items()} == {
        f"gate_{part}.{layer}": (n, 1) for part in parts for layer, n in ((0, 1), (2, 2))
    }
    is_the_definition(model, build(kind), kind)

    def noise_of(seed: int) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        return {f"gate_{part}.{layer}": torch.rand(n, 1) for layer, n in ((0, 1), (2, 2)) for part in parts}

    def moves(name: str, u: Tensor) -> bool:
        return any(0 < gate < 1 for gate in slow_gate(gates[name], u).flatten().tolist())

    # A gate drawn at 0 or 1 has no gradient; wanted is a draw where every parameter has some.
    seed = next(seed for seed in range(1000) if all(moves(name, u) for name, u in noise_of(seed).items()))
    is_the_definition(without_dropout(model), without_dropout(build(kind)), kind, noise_of(seed), seed)
    assert not torch.equal(logits(model), logits(model)), "every forward pass draws anew"


def test_an_offset_on_an_mlp_is_the_definition(kind: Kind) -> None:
    for heads in ([], HEADS):
        model = get_peft_model(build(kind), HeadTuningConfig(heads=heads, mlp_layers=[2, 1]))
        randomise(model)
        offsets = {n: tuple(p.shape) for n, p in adapter_parameters(model).items() if n.startswith("mlp_offset")}
        assert offsets == {"mlp_offset.1": (D_MODEL,), "mlp_offset.2": (D_MODEL,)}
        assert (len(adapter_parameters(model)) > 2) == bool(heads)
        is_the_definition(model.eval(), build(kind), kind)


def test_init_std_starts_away_from_the_base() -> None:
    torch.manual_seed(0)
    heads = [[layer, head] for layer in range(N_LAYERS) for head in range(N_HEADS)]
    model = get_peft_model(build(KINDS["llama"]), HeadTuningConfig(heads=heads, init_std=0.5))
    values = torch.cat([parameter.detach().flatten() for parameter in adapter_parameters(model).values()])
    assert values.std().item() == pytest.approx(0.5, rel=0.2)


# --- gates ------------------------------------------------------------------------------------------------------------


def test_the_distribution_of_gates() -> None:
    """Shares at 0 and at 1 against those counted; the start; no draw is lost in rounding."""
    torch.manual_seed(0)
    for log_alpha in (-3.0, 0.0, hard_concrete.OPEN):
        draws = hard_concrete.sampled(torch.full((200_000,), log_alpha))
        assert draws.min() >= 0 and draws.max() <= 1
        share = (draws > 0).float().mean().item()
        assert share == pytest.approx(hard_concrete.probability_open(torch.tensor(log_alpha)).item(), abs=0.005)
        assert share == pytest.approx(1 / (1 + math.exp(-log_alpha + 0.33 * math.log(0.1 / 1.1))), abs=0.005)
    assert (draws < 1).float().mean().item() == pytest.approx(0.17, abs=0.01)
    assert hard_concrete.without_noise(torch.tensor(hard_concrete.OPEN)) == 1.0
    assert hard_concrete.without_noise(torch.tensor(2.39)) < 1.0
    assert hard_concrete.without_noise(torch.tensor([-2.4, 0.0])).tolist() == pytest.approx([0.0, 0.5])


def test_l0_is_the_mean_probability_of_open_gates() -> None:
    model = adapted(KINDS["gpt2"], gates=True, mlp_layers=[0])
    gates = [parameter for name, parameter in adapter_parameters(model).items() if name.startswith("gate_")]
    expected = torch.cat([1 / (1 + torch.exp(-gate + 0.33 * math.log(0.1 / 1.1))) for gate in gates]).mean()
    found = l0(model)
    close(found, expected)
    for gradient, wanted in zip(torch.autograd.grad(found, gates), torch.autograd.grad(expected, gates), strict=True):
        close(gradient, wanted)
    model.add_adapter("other", HeadTuningConfig(heads=[[1, 0]], gates=True))
    assert l0(model) == found, "gates of an adapter that is not active are not counted"


def test_open_heads() -> None:
    model = get_peft_model(build(KINDS["llama"]), HeadTuningConfig(heads=HEADS, gates=True))
    assert open_heads(model) == [(0, 1, 1.0, 1.0), (2, 0, 1.0, 1.0), (2, 3, 1.0, 1.0)]
    with torch.no_grad():
        adapter_parameters(model)["gate_scale.2"].copy_(torch.tensor([[-5.0], [0.0]]))
        adapter_parameters(model)["gate_offset.2"].fill_(-5.0)
    row = open_heads(model)[1]
    assert (row.layer, row.head, row.gate_scale, row.gate_offset) == (2, 3, 0.5, 0.0)
    assert [head for _, head, *_ in open_heads(model, 0.5)] == [1]
    assert len(open_heads(model, -1.0)) == 3
    only_offset = get_peft_model(build(KINDS["llama"]), HeadTuningConfig(heads=[[1, 2]], scale="none", gates=True))
    assert open_heads(only_offset) == [(1, 2, None, 1.0)]
    plain = get_peft_model(build(KINDS["llama"]), HeadTuningConfig(heads=HEADS))
    for function in (l0, open_heads):
        with pytest.raises(InputError, match="no active adapter has gates"):
            function(plain)


def test_gates_merge_without_their_noise(kind: Kind) -> None:
    model = adapted(kind, gates=True, mlp_layers=[1])
    expected = logits(model)
    assert (expected - logits(adapted(kind, mlp_layers=[1]))).abs().max() > 1e-2, "the gates must matter"
    close(logits(model.train().merge_and_unload().eval()), expected)


def test_a_start_at_zero_draws_nothing() -> None:
    """So a run's other random choices do not depend on how many heads are tuned."""
    torch.manual_seed(0)
    get_peft_model(build(KINDS["llama"]), HeadTuningConfig(heads=HEADS, gates=True, mlp_layers=[0]))
    with_adapter = torch.rand(1)
    torch.manual_seed(0)
    build(KINDS["llama"])
    assert torch.equal(with_adapter, torch.rand(1))


# --- off, on, another -------------------------------------------------------------------------------------------------


def test_a_second_adapter(kind: Kind, tmp_path: Path) -> None:
    """Other heads, another scale, a layer the first does not touch: each is itself, whichever was added when."""
    model = adapted(kind)
    first = logits(model)
    model.add_adapter("other", HeadTuningConfig(heads=[[1, 2], [2, 1]], scale="head", offset=False))
    randomise(model, "other", seed=4)
    assert torch.equal(logits(model), first), "adding an adapter must not switch it on"
    assert not any(parameter.requires_grad for parameter in adapter_parameters(model, "other").values())

    model.set_adapter("other")
    second = logits(model)
    values = {name: parameter.detach() for name, parameter in adapter_parameters(model, "other").items()}
    reference = build(kind)
    with slow_adapter(reference, kind, values, [[1, 2], [2, 1]]):
        close(second, logits(reference))
    assert all(parameter.requires_grad for parameter in adapter_parameters(model, "other").values())
    assert not any(parameter.requires_grad for parameter in adapter_parameters(model).values())
    model.set_adapter("default")
    assert torch.equal(logits(model), first)

    model.save_pretrained(str(tmp_path), save_embedding_layers=False)
    loaded = PeftModel.from_pretrained(build(kind), str(tmp_path)).eval()
    loaded.load_adapter(str(tmp_path / "other"), "other")
    assert torch.equal(logits(loaded), first)
    loaded.set_adapter("other")
    assert torch.equal(logits(loaded), second)

    loaded.delete_adapter("other")
    loaded.set_adapter("default")
    assert torch.equal(logits(loaded), first)
    assert not adapter_parameters(loaded, "other")


# --- files ------------------------------------------------------------------------------------------------------------


# --- merging ----------------------------------------------------------------------------------------------------------


def test_merge_and_unload_is_a_plain_model_with_the_same_logits(kind: Kind) -> None:
    for scale, offset in (("none", True), ("head", True), ("vector", True), ("vector", False)):
        model = adapted(kind, scale=scale, offset=offset)
        expected = logits(model)
        merged = model.merge_and_unload(safe_merge=True)
        assert not any(isinstance(module, HeadTuningLayer) for module in merged.modules())
        close(logits(merged), expected)


def test_two_merged_adapters_act_one_after_the_other(kind: Kind) -> None:
    """On the same head: the second scales the first one's offset too."""
    model = adapted(kind)
    model.add_adapter("other", HeadTuningConfig(heads=[[0, 1], [1, 2]]))
    randomise(model, "other", seed=4)
    model.base_model.set_adapter(["default", "other"])
    expected = logits(model)
    for steps in ([["default", "other"]], [["default"], ["other"]]):
        for names in steps:
            model.merge_adapter(names)
        close(logits(model), expected)
        model.unmerge_adapter()
        assert torch.equal(logits(model), expected)


def test_safe_merge_refuses_what_is_not_finite_and_restores(kind: Kind) -> None:
    model = adapted(kind)
    projection = model.get_base_model().get_submodule(kind.projection.format(0))
    weight = projection.base_layer.weight.detach().clone()
    with torch.no_grad():
        adapter_parameters(model)["scale.0"][0, 0] = float("nan")
    with pytest.raises(ValueError, match="layer 0"):
        model.merge_and_unload(safe_merge=True)
    assert torch.equal(projection.base_layer.weight, weight)


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"heads": [[0, N_HEADS]]}, ["L0H4", "layers 0-2", "heads 0-3"]),
        ({"heads": [[N_LAYERS, 0]]}, ["L3H0", "layers 0-2"]),
        ({"heads": [[-1, 0]]}, ["L-1H0"]),
        ({"heads": [[0, -1]]}, ["L0H-1"]),
        ({"heads": [[0, 1], [0, 1]]}, ["twice"]),
        ({"heads": [[0, 1]], "scale": "vectors"}, ["'vectors'", "none, head, vector"]),
        ({"heads": [[0, 1]], "scale": "none", "offset": False}, ["trains nothing"]),
        ({"heads": []}, ["names no heads"]),
        ({"heads": [[0, 1]], "n_heads": 8}, ["n_heads 8", "model 4"]),
        ({"mlp_layers": [0, N_LAYERS]}, ["mlp_layers has 3", "layers 0-2"]),
        ({"mlp_layers": [-1]}, ["mlp_layers has -1"]),
        ({"mlp_layers": [1, 1]}, ["[1, 1]", "twice"]),
        ({"mlp_layers": [1], "gates": True}, ["gates heads", "names none"]),
        ({"heads": [[1, 0]], "mlp_layers": [2], "mlp_projection": "mlp.c_proj"}, ["layers [2]", "mlp.c_proj"]),
        ({"heads": [[1, 0]], "mlp_layers": [2], "target_modules": ["attn.o_proj"]}, ["layers [1]", "attn.o_proj"]),
    ],
)
def test_refused(options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        get_peft_model(build(KINDS["llama"]), HeadTuningConfig(**options))
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_a_family_outside_the_table_is_refused() -> None:
    sizes = {"vocab_size": 50, "hidden_size": 16, "n_layer": 1, "n_head": 2}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("bloom", **sizes))
    with pytest.raises(InputError, match="'bloom' is not supported: its attention does not go through"):
        get_peft_model(model, HeadTuningConfig(heads=[[0, 0]]))


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text"])
def test_an_mlp_that_a_norm_follows_is_refused(family: str) -> None:
    with pytest.raises(InputError, match="a norm follows") as caught:
        get_peft_model(tiny_model(family), HeadTuningConfig(heads=[[0, 0]], mlp_layers=[1]))
    assert "\n" not in str(caught.value) and family in str(caught.value)


def test_it_does_not_combine_with_lora() -> None:
    model = get_peft_model(build(KINDS["llama"]), LoraConfig(r=2, target_modules=["o_proj"]))
    with pytest.raises((InputError, ValueError)):
        model.add_adapter("heads", HeadTuningConfig(heads=[[0, 0]]))
