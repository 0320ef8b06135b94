"""Every penalty equals what eager attention and plain loops give, row by row without padding, gradient included; and it
does in the real trainers what it is for.
"""

from __future__ import annotations

import functools
import gc
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from peft import LNTuningConfig, LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D
from trl.trainer.utils import add_fused_lm_head

from headtune.analysis.models.head_model import HeadModel
from headtune.analysis.models.loading import wrap_model
from headtune.analysis.tasks.tokenized import encode
from headtune.analysis.utils.errors import CheckError, InputError
from headtune.train.config.methods import AnswerSetConfig
from headtune.train.config.regularisers import (
    AttentionKl,
    AttributionHinge,
    NegativeAttention,
    OutputDrift,
    PruneGates,
    Regulariser,
    WeightDrift,
)
from headtune.train.losses import head_penalties
from headtune.train.losses.label_logits import labelled_positions
from headtune.train.losses.regularisers import Regularisers
from headtune.train.trainer import answer_set_trainer, penalised_trainers, training_rows
from headtune.train.trainer.prefix_cache import PrefixCache
from headtune.train.tuners.head_slices import HeadSlicesConfig
from headtune.train.tuners.head_tuning import HeadTuningConfig
from helpers.tiny import FACTS, KINDS, N_HEADS, Kind, tiny_model, tiny_task, tiny_tokenizer
from helpers.trainers import config_of

FAMILIES = ["llama", "qwen2", "gpt2", "phi3", "gemma2", "gemma2-caps", "opt", "gpt_neox", "qwen2-sliding"]
PAIRS = [(0, 1), (2, 0), (2, 3)]
Term = tuple[Regulariser, Sequence[tuple[int, int]]]
YES, NO = 50, 60  # stand for the two options
ALL_ROWS = 64  # more than any row has, so that nothing is left to chance

# Prompts of different lengths, two of which name both options; (tokens, first label).
ROWS: list[tuple[list[int], int]] = [
    ([5, YES, 6, NO, 7, 8, 9, YES, 31], 8),
    ([40, 41, 42, 43, 44], 3),
    ([NO, 12, YES, 14, 15, 16, 17], 5),
]


def heads_of(kind: Kind, **config: Any) -> HeadModel:
    dropouts: dict[str, Any] = (
        {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0} if kind.family == "gpt2" else {}
    )
    dropouts |= {"dropout": 0.0} if kind.family == "opt" else {}
    return wrap_model(tiny_model(kind.family, **(kind.config | dropouts | config)), tiny_tokenizer())


def batch_of(rows: Sequence[tuple[list[int], int]], left: bool) -> dict[str, Tensor]:
    """As a collator pads them, with labels."""
    width = max(len(tokens) for tokens, _ in rows)
    found: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for tokens, first in rows:
        pad = width - len(tokens)
        labels = [-100] * first + tokens[first:]
        for name, values, filler in (
            ("input_ids", tokens, 0),
            ("attention_mask", [1] * len(tokens), 0),
            ("labels", labels, -100),
        ):
            found[name].append([filler] * pad + values if left else values + [filler] * pad)
    batch = {name: torch.tensor(values) for name, values in found.items()}
    if left:
        batch["position_ids"] = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    return batch


def all_linear(model: HeadModel) -> list[str]:
    return [*model.architecture.qkv, model.architecture.output_projection]


def shake(model: nn.Module, size: float = 0.3) -> list[nn.Parameter]:
    """Move what is trained; returns it."""
    generator = torch.Generator().manual_seed(4)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with torch.no_grad():
        for parameter in trained:
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return trained


def lora(model: HeadModel) -> PeftModel:
    config = LoraConfig(r=2, target_modules=all_linear(model), init_lora_weights=False, task_type="CAUSAL_LM")
    return get_peft_model(model.hf, config)


class Slow:
    """A model row by row, with eager attention and everything kept."""

    def __init__(self, model: HeadModel) -> None:
        self.heads = model

    @contextmanager
    def eager(self) -> Iterator[None]:
        before = self.heads.hf.config._attn_implementation
        self.heads.hf.set_attn_implementation("eager")
        try:
            yield
        finally:
            self.heads.hf.set_attn_implementation(before)

    def run(self, tokens: list[int]) -> dict[str, Any]:
        """`attentions` by layer, `z` by layer `[seq, heads, head_dim]`, `final` and `post` norms' inputs."""
        heads, kept = self.heads, {}

        def keep(name: str) -> Any:
            return lambda _module, args: kept.__setitem__(name, args[0][0])

        def plain(module: Any) -> Any:
            return module.get_base_layer() if hasattr(module, "get_base_layer") else module

        norms = {f"post{layer}": heads.post_attention_norm(layer) for layer in range(heads.n_layers)}
        modules = {f"z{layer}": plain(heads.projection(layer)) for layer in range(heads.n_layers)}
        modules |= {"final": heads.final_norm} | {name: norm for name, norm in norms.items() if norm is not None}
        handles = [module.register_forward_pre_hook(keep(name)) for name, module in modules.items()]
        with self.eager():
            output = heads.hf(torch.tensor([tokens]), use_cache=False, output_attentions=True)
        for handle in handles:
            handle.remove()
        z = {layer: kept[f"z{layer}"].unflatten(-1, (N_HEADS, heads.head_dim)) for layer in range(heads.n_layers)}
        return {"attentions": [rows[0] for rows in output.attentions], "z": z} | kept

    def contribution(self, run: dict[str, Any], layer: int, head: int, end: int, token: int) -> Tensor:
        """`(z_h W_O[h]) . u`, the norms written out, W_O with what LoRA adds."""
        heads, size = self.heads, self.heads.head_dim
        module: Any = heads.projection(layer)
        base = module.get_base_layer() if hasattr(module, "get_base_layer") else module
        weight = base.weight.T if isinstance(base, Conv1D) else base.weight  # [out, in]
        if hasattr(module, "lora_A") and not module.disable_adapters:
            weight = (
                weight + module.lora_B["default"].weight @ module.lora_A["default"].weight * module.scaling["default"]
            )
        part = weight[:, head * size : (head + 1) * size] @ run["z"][layer][end, head]

        def through(norm: Any, part: Tensor, x: Tensor) -> Tensor:
            x = x.detach()
            gain = norm.weight.detach()
            if isinstance(norm, nn.LayerNorm):
                return gain * (part - part.mean()) / (x.var(unbiased=False) + norm.eps).sqrt()
            gain = gain + 1 if heads.hf.config.model_type.startswith("gemma") else gain
            eps = norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps
            return gain * part / (x.pow(2).mean() + eps).sqrt()

        if f"post{layer}" in run:
            part = through(heads.post_attention_norm(layer), part, run[f"post{layer}"][end])
        part = through(heads.final_norm, part, run["final"][end])
        unembedding: Any = heads.hf.get_output_embeddings()
        return part @ unembedding.weight[token].detach()


def slow_terms(slow: Slow, off: Any, rows: Sequence[tuple[list[int], int]] = ROWS) -> dict[str, Tensor]:
    """Each term by loops over rows, heads and query positions."""
    kl, moved, size = [], [], []
    lowered, kept, scores = [], [], {pair: [] for pair in PAIRS}
    for tokens, first in rows:
        own = slow.run(tokens)
        with torch.no_grad(), off():
            base = slow.run(tokens)
            base_c = {pair: slow.contribution(base, *pair, first - 1, tokens[first]) for pair in PAIRS}
        for layer, head in PAIRS:
            a, b = own["attentions"][layer][head], base["attentions"][layer][head]
            for q in range(len(tokens)):
                seen = b[q] > 0
                kl.append((b[q][seen] * (b[q][seen].log() - a[q][seen].log())).sum())
                moved.append((own["z"][layer][q, head] - base["z"][layer][q, head]).pow(2).sum())
                size.append(base["z"][layer][q, head].pow(2).sum())
            c = slow.contribution(own, layer, head, first - 1, tokens[first])
            lowered.append((-0.02 - c).relu())
            kept.append((base_c[layer, head] - 0.01 - c).relu())
            if {YES, NO} <= set(tokens[:first]):
                yes, no = tokens.index(YES), tokens.index(NO)
                nas = torch.zeros(())
                for q in range(max(yes, no) + 1, first):
                    if a[q, yes] > 0 and a[q, no] > 0:
                        nas = nas + (a[q, yes] + a[q, no]) * (a[q, no] / a[q, yes]).log()
                scores[layer, head].append(nas)

    def mean(values: list[Tensor]) -> Tensor:
        return torch.stack(values).mean()

    return {
        "attention_kl": mean(kl),
        "output_drift": mean(moved) / mean(size),
        "output_drift_2": mean(moved),
        "attribution_hinge": mean(lowered),
        "attribution_hinge_2": mean(kept),
        "negative_attention": mean([mean(of_head).pow(2) for of_head in scores.values()]),
    }


SPECS: list[Term] = [
    (AttentionKl(rows=ALL_ROWS), PAIRS),
    (OutputDrift(), PAIRS),
    (OutputDrift(relative=False), PAIRS),
    (AttributionHinge(role="suppression", margin=0.02), PAIRS),
    (AttributionHinge(role="recall", margin=0.01), PAIRS),
    (NegativeAttention(), PAIRS),
]


@pytest.fixture(autouse=True)
def options(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny tokenizer knows neither ' Yes' nor ' No' as one token."""
    from headtune.train.losses import builtin_regularisers

    real = builtin_regularisers.option_tokens
    default = (NegativeAttention().positive, NegativeAttention().negative)
    monkeypatch.setattr(
        builtin_regularisers,
        "option_tokens",
        lambda heads, *named: [YES, NO] if named == default else real(heads, *named),
    )


def compare(found: dict[str, tuple[Tensor, float]], expected: dict[str, Tensor], trained: list[nn.Parameter]) -> None:
    assert found.keys() == expected.keys()
    for name, (term, _) in found.items():
        torch.testing.assert_close(term, expected[name], atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
        assert expected[name] > 1e-4, f"{name} is too small to tell anything"
        own = torch.autograd.grad(term, trained, retain_graph=True, allow_unused=True)
        other = torch.autograd.grad(expected[name], trained, retain_graph=True, allow_unused=True)
        found_all, expected_all = (
            torch.cat(
                [(torch.zeros_like(p) if g is None else g).flatten() for g, p in zip(gradients, trained, strict=True)]
            )
            for gradients in (own, other)
        )
        size = expected_all.abs().max()
        assert size > 1e-3
        torch.testing.assert_close(
            found_all, expected_all, atol=1e-5 * size, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("name", FAMILIES)
def test_terms_and_gradients_under_lora(name: str, left: bool) -> None:
    heads = heads_of(KINDS[name])
    before = heads.hf.config._attn_implementation
    model = lora(heads)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    batch = batch_of(ROWS, left)
    penalties = Regularisers(heads, SPECS)
    with penalties.installed():
        model.train()
        penalties.see(batch)
        model(**{key: value for key, value in batch.items() if key != "labels"}, use_cache=False)
        found = penalties(model, 0.5)
        assert model.training and all(parameter.requires_grad for parameter in trained)
    assert heads.hf.config._attn_implementation == before
    model.eval()
    compare(found, slow_terms(Slow(heads), model.disable_adapter), trained)
    assert penalties.counts == {"negative_attention.rows": 3, "negative_attention.skipped": 1}


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_terms_and_gradients_under_full_fine_tuning(name: str) -> None:
    """Against the frozen copy that the block makes of the model as it is when it is entered."""
    heads, other = heads_of(KINDS[name]), heads_of(KINDS[name])
    model, batch = heads.hf, batch_of(ROWS, False)
    penalties = Regularisers(heads, SPECS)
    with penalties.installed():
        trained = shake(model, 0.05)
        model.train()
        penalties.see(batch)
        model(**batch)
        found = penalties(model, 0.5)
    model.eval()
    slow, base = Slow(heads), Slow(other)

    @contextmanager
    def off() -> Iterator[None]:
        slow.heads = base.heads
        yield
        slow.heads = heads

    compare(found, slow_terms(slow, off), trained)


@pytest.mark.parametrize("kind", ["tuning", "slices", "ln"])
def test_terms_under_the_other_adapters(kind: str) -> None:
    """Of a head-tuning adapter, z is the tuned one."""
    heads = heads_of(KINDS["qwen2"])
    config = {
        "tuning": HeadTuningConfig(heads=[list(pair) for pair in PAIRS], task_type="CAUSAL_LM"),
        "slices": HeadSlicesConfig(heads=[list(pair) for pair in PAIRS], task_type="CAUSAL_LM"),
        "ln": LNTuningConfig(
            target_modules=["input_layernorm", "post_attention_layernorm", "norm"], task_type="CAUSAL_LM"
        ),
    }[kind]
    model = get_peft_model(heads.hf, config)  # type: ignore[arg-type]
    shake(model)
    batch = batch_of(ROWS, False)
    penalties = Regularisers(heads, SPECS)
    with penalties.installed():
        model.train()
        penalties.see(batch)
        model(**batch)
        found = {name: term.detach() for name, (term, _) in penalties(model, 0.5).items()}
    merged = wrap_model(model.merge_and_unload(), tiny_tokenizer())
    slow, base = Slow(merged), heads_of(KINDS["qwen2"])

    @contextmanager
    def off() -> Iterator[None]:
        slow.heads = base
        yield
        slow.heads = merged

    # Merged, scale and offset are in W_O and its bias: z is the head's own, and contributions lack the offset's part.
    unseen = (
        {"output_drift", "output_drift_2", "attribution_hinge", "attribution_hinge_2"} if kind == "tuning" else set()
    )
    for name, term in slow_terms(slow, off).items():
        if name not in unseen:
            torch.testing.assert_close(
                found[name], term.detach(), atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
            )


def test_head_tuning_moves_z() -> None:
    """One row, one head: the drift is that of `(1 + a) z + v` from z, and the contribution that of the tuned z."""
    heads = heads_of(KINDS["llama"])
    tokens, first = ROWS[0]
    z = Slow(heads).run(tokens)["z"][2][:, 3].detach()
    model = get_peft_model(heads.hf, HeadTuningConfig(heads=[[2, 3]], task_type="CAUSAL_LM"))
    shake(model)
    layer: Any = heads.projection(2)
    tuned = (1 + layer.head_tuning_scale["default"]) * z + layer.head_tuning_offset["default"]
    penalties = Regularisers(
        heads, [(OutputDrift(), [(2, 3)]), (AttributionHinge.model_construct(margin=-3.0), [(2, 3)])]
    )
    with penalties.installed():
        model.train()
        batch = batch_of([(tokens, first)], False)
        penalties.see(batch)
        model(**batch)
        found = penalties(model, 0.0)
    close = torch.testing.assert_close
    close(found["output_drift"][0], (tuned - z).pow(2).sum() / z.pow(2).sum(), atol=1e-5, rtol=1e-5)
    model.eval()
    run = Slow(heads).run(tokens)
    run["z"][2][first - 1, 3] = tuned[first - 1]
    c = Slow(heads).contribution(run, 2, 3, first - 1, tokens[first])
    close(found["attribution_hinge"][0], (3.0 - c).relu(), atol=1e-5, rtol=1e-5)


# --- how it is used ---------------------------------------------------------------------------------------------------


def passes(model: HeadModel, trained: Any, specs: Sequence[Term] = SPECS) -> dict[str, float]:
    penalties = Regularisers(model, specs)
    with penalties.installed():
        trained.train()
        batch = batch_of(ROWS, False)
        penalties.see(batch)
        trained(**batch, use_cache=False)
        return {name: term.item() for name, (term, _) in penalties(trained, 0.0).items()}


def test_the_fused_head_labelled_positions_and_other_passes_change_nothing() -> None:
    heads = heads_of(KINDS["llama"])
    add_fused_lm_head(heads.hf)
    model = lora(heads)
    expected = passes(heads, model)
    batch = batch_of(ROWS, False)
    penalties = Regularisers(heads, SPECS)
    with penalties.installed(), labelled_positions(model):
        model.train()
        penalties.see(batch)
        model(**batch, fused_lm_head=True)
        with torch.no_grad(), model.disable_adapter():  # a reference's, as DPO makes one
            model(input_ids=batch["input_ids"][:1])
        model.eval()
        model(input_ids=batch["input_ids"][:2])
        model.train()
        found = penalties(model, 0.0)
    assert {name: term.item() for name, (term, _) in found.items()} == expected


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_gradient_checkpointing_changes_nothing(name: str) -> None:
    def gradients(checkpointing: bool, reentrant: bool = False) -> list[Tensor]:
        heads = heads_of(KINDS[name])
        model = lora(heads)
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        penalties = Regularisers(heads, SPECS)
        with penalties.installed():
            model.train()
            batch = batch_of(ROWS, False)
            penalties.see(batch)
            loss = model(**batch).loss
            loss = loss + torch.stack([term for term, _ in penalties(model, 0.0).values()]).sum()
            loss.backward()
        return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]

    for gradient, expected in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-5)
    with pytest.raises(CheckError, match="use_reentrant"):
        gradients(True, reentrant=True)


def test_nothing_is_held_afterwards() -> None:
    heads = heads_of(KINDS["llama"])
    model = lora(heads)
    penalties = Regularisers(heads, SPECS)
    with penalties.installed():
        model.train()
        batch = batch_of(ROWS, False)
        penalties.see(batch)
        output = model(**batch)
        kept = penalties._watcher.last
        assert kept is not None
        watched = [weakref.ref(tensor) for tensor in (*kept.z.values(), *kept.norms.values(), output.logits)]
        watched += [weakref.ref(call.query) for call in kept.attention.values()]
        del kept
        found = penalties(model, 0.0)
        del output, found
        gc.collect()
        assert all(reference() is None for reference in watched)
    hooks = [hook for module in model.modules() for hook in (*module._forward_hooks, *module._forward_pre_hooks)]
    assert not hooks


def test_a_prefix_cache_below_the_heads_changes_nothing() -> None:
    def drift(cached: bool) -> list[float]:
        heads = heads_of(KINDS["llama"])
        model = get_peft_model(heads.hf, HeadSlicesConfig(heads=[[2, 0]], task_type="CAUSAL_LM"))
        shake(model)
        model.train()
        specs = [(AttentionKl(rows=ALL_ROWS), [(2, 0)]), (OutputDrift(), [(2, 0)])]
        with PrefixCache(model).installed() if cached else nullcontext() as stats:
            found = [value for _ in range(3) for value in passes(heads, model, specs).values()]
        assert not cached or (stats.served and stats.plain == {}), stats
        return found

    assert drift(True) == pytest.approx(drift(False), rel=1e-4)
    heads = heads_of(KINDS["llama"])
    model = get_peft_model(heads.hf, HeadSlicesConfig(heads=[[2, 0]], task_type="CAUSAL_LM")).train()
    with PrefixCache(model).installed(), pytest.raises(CheckError, match="prefix_cache=false"):
        passes(heads, model, [(OutputDrift(), [(0, 0)])])


def test_the_pass_within_a_pass_of_a_prefix_cache_is_not_the_pass() -> None:
    """Installed after the penalties, as trainers do: rows it does not know run through the lower layers first."""
    heads = heads_of(KINDS["llama"])
    model = get_peft_model(heads.hf, HeadSlicesConfig(heads=[[2, 0]], task_type="CAUSAL_LM"))
    shake(model)
    penalties = Regularisers(heads, [(OutputDrift(), [(2, 0)])])
    with penalties.installed(), PrefixCache(model.train()).installed() as stats:
        model(**batch_of(ROWS, False), use_cache=False)
        assert stats.misses == 3 and penalties(model, 0.0)["output_drift"][0] > 0


def test_the_base_has_no_dropout() -> None:
    heads = heads_of(KINDS["gpt2"], attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5)
    model = lora(heads).train()
    batch, seen = batch_of(ROWS, False), []
    penalties = Regularisers(heads, [(OutputDrift(relative=False), PAIRS)])
    with penalties.installed():
        again = penalties._watcher.again
        penalties._watcher.again = lambda *given: seen.append(again(*given)) or seen[-1]  # type: ignore[func-returns-value, method-assign]
        for _ in range(2):
            model(**batch)
            assert penalties(model, 0.0)["output_drift"][0] > 0
    assert all(torch.equal(seen[0].z[layer], seen[1].z[layer]) for layer in (0, 2))
    assert model.training


def test_a_given_reference_is_the_base() -> None:
    """Another frozen model; its own heads and weights are what is compared with."""
    heads, base = heads_of(KINDS["llama"]), heads_of(KINDS["llama"])
    shake(base.hf, 0.05)
    specs = [*SPECS, (WeightDrift(), PAIRS)]
    penalties = Regularisers(heads, specs, reference=base.hf)
    batch = batch_of(ROWS, False)
    with penalties.installed():
        heads.hf.train()
        penalties.see(batch)
        heads.hf(**batch)
        found = penalties(heads.hf, 0.0)
    slow = Slow(heads.hf.eval() and heads)

    @contextmanager
    def off() -> Iterator[None]:
        slow.heads = base
        yield
        slow.heads = heads

    expected = slow_terms(slow, off)
    for name, term in expected.items():
        torch.testing.assert_close(found[name][0], term, atol=1e-5, rtol=1e-5)
    assert found["weight_drift"][0] > 0.01


def test_a_batch_with_nothing_to_look_at_gives_0() -> None:
    """No labels that anything precedes, no options: terms are 0, with a gradient of 0, and rows are counted."""
    heads = heads_of(KINDS["gemma2"])
    model = lora(heads)
    batch = batch_of([([5, 6, 7], 3), ([8, 9, 10], 3)], False)
    specs = [(AttributionHinge(), PAIRS), (AttributionHinge(role="recall"), PAIRS), (NegativeAttention(), PAIRS)]
    penalties = Regularisers(heads, specs)
    with penalties.installed():
        model.train()
        penalties.see(batch)
        loss = model(**batch).logits.mean()
        found = penalties(model, 0.0)
        (loss + torch.stack([term for term, _ in found.values()]).sum()).backward()
    assert {name: term.item() for name, (term, _) in found.items()} == dict.fromkeys(found, 0.0)
    assert penalties.counts == {"negative_attention.rows": 2, "negative_attention.skipped": 2}
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in model.parameters())


def test_schedules() -> None:
    grows = OutputDrift(weight=4.0, schedule="linear", warmup=0.5)
    assert [grows.weight_at(progress) for progress in (0.0, 0.25, 0.5, 0.9)] == [0.0, 2.0, 4.0, 4.0]
    assert OutputDrift(weight=4.0).weight_at(0.0) == 4.0


def test_bad_input() -> None:
    model = heads_of(KINDS["llama"])

    def refused(match: str, make: Any) -> None:
        with pytest.raises(InputError, match=match) as caught:
            make()
        assert "\n" not in str(caught.value)

    refused("L3H0 is out of range", lambda: Regularisers(model, [(OutputDrift(), [(3, 0)])]))
    refused("no heads", lambda: Regularisers(model, [(OutputDrift(), [])]))
    refused("twice", lambda: Regularisers(model, [(OutputDrift(), [(0, 1), (0, 1)])]))
    refused("'prune' is no penalty", lambda: Regularisers(model, [(PruneGates(), PAIRS)]))
    refused("Fisher", lambda: Regularisers(model, [(WeightDrift(fisher=True), PAIRS)]))
    refused(
        "' Zebra crossing', which is",
        lambda: Regularisers(model, [(NegativeAttention(positive=" Zebra crossing"), PAIRS)]),
    )
    refused("same token", lambda: Regularisers(model, [(NegativeAttention(positive=" Rome", negative=" Rome"), PAIRS)]))


def test_what_was_not_shown_or_not_run_is_an_error() -> None:
    heads = heads_of(KINDS["llama"])
    model = lora(heads)
    batch = batch_of(ROWS, False)
    for spec in ((AttributionHinge(), PAIRS), (AttributionHinge(role="recall"), PAIRS), (NegativeAttention(), PAIRS)):
        penalties = Regularisers(heads, [spec])
        with penalties.installed():
            model.train()
            with pytest.raises(CheckError, match="without a training pass"):
                penalties(model, 0.0)
            model(**batch)
            with pytest.raises(CheckError, match=r"see\(inputs\)"):
                penalties(model, 0.0)
            penalties.see({"input_ids": batch["input_ids"]})
            model(**batch)
            with pytest.raises(CheckError, match="no labels"):
                penalties(model, 0.0)


# --- where things are -------------------------------------------------------------------------------------------------


def test_queries_are_drawn_among_tokens_without_repeats() -> None:
    present = torch.tensor([[True] * 8, [False] * 5 + [True] * 3, [True, True] + [False] * 6, [False] * 8])
    generator = torch.Generator().manual_seed(0)
    seen: list[set[int]] = [set() for _ in range(4)]
    for _ in range(100):
        queries = head_penalties.draw_queries(present, 3, generator)
        assert queries.shape == (4, 3)
        for row, drawn in enumerate(queries.tolist()):
            own = [q for q in drawn if q >= 0]
            assert own == sorted(set(own)) and drawn == own + [-1] * (3 - len(own))
            assert len(own) == min(3, int(present[row].sum()))
            seen[row] |= set(own)
    assert seen == [set(range(8)), {5, 6, 7}, {0, 1}, set()]


def test_draws_change_with_every_batch_and_repeat_with_the_seed() -> None:
    penalties = Regularisers(heads_of(KINDS["llama"]), SPECS)

    def seeds() -> list[int]:
        torch.manual_seed(7)
        return [penalties._seed(progress) for progress in (0.0, 0.0, 0.5, 0.5, 0.75)]

    first = seeds()
    assert len(set(first)) == 5
    state = torch.get_rng_state()
    assert seeds() == first
    torch.manual_seed(7)
    assert torch.equal(state, torch.get_rng_state()), "torch's own generator is left alone"
    torch.manual_seed(8)
    assert penalties._seed(0.0) not in first


def test_where_the_first_label_is_predicted() -> None:
    tokens = torch.tensor([[5, 6, 7, 8], [0, 9, 10, 11], [5, 6, 0, 0], [5, 6, 7, 8]])
    present = tokens != 0
    labels = torch.tensor([[-100, -100, 7, 8], [-100, -100, -100, 11], [-100] * 4, [5, 6, -100, -100]])
    ends, right = head_penalties.predicting({"input_ids": tokens, "labels": labels}, present)
    assert ends.tolist() == [1, 2, -1, 0] and right.tolist() == [[7], [11], [-1], [6]]
    ends, right = head_penalties.predicting({"input_ids": tokens, "completion_mask": (labels != -100).long()}, present)
    assert ends.tolist() == [1, 2, -1, 0]
    assert right.tolist() == [[7], [11], [-1], [-1]], "the rejected half has no right token"
    sets = torch.tensor([[-1, 3], [3, 4], [3, 5], [-1, -1]])
    ends, right = head_penalties.predicting({"input_ids": tokens, "remaining": sets}, present)
    assert ends.tolist() == [3, 3, 1, 3] and torch.equal(right, sets)


def test_a_hinge_counts_rows_alike_however_many_right_tokens_they_have() -> None:
    c = torch.tensor([[[-1.0, -3.0]], [[-5.0, 9.0]], [[-7.0, -7.0]]])
    right = torch.tensor([[True, True], [True, False], [False, False]])
    assert head_penalties.hinge(c, -0.5, right).item() == pytest.approx((1.5 + 4.5) / 2)


@pytest.mark.parametrize("cut", [1, 3])
def test_the_mean_over_processes_is_that_of_their_rows_together(cut: int) -> None:
    """Uneven numbers of rows that count in two processes: values and gradients are those of one process."""
    torch.manual_seed(0)
    scores, c = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3, 2, requires_grad=True)
    named, right = torch.tensor([True, False, True, True]), torch.rand(4, 2) > 0.3
    right[1] = False
    terms: list[Any] = [
        lambda own, pooled: head_penalties.alignment(scores[own], named[own], pooled),
        lambda own, pooled: head_penalties.hinge(c[own], 0.5, right[own], pooled),
    ]
    for term, given in zip(terms, (scores, c), strict=True):
        together = term(slice(None), lambda size: size)
        (expected,) = torch.autograd.grad(together, given)
        found = in_step([functools.partial(term, own) for own in (slice(cut), slice(cut, None))])
        assert torch.stack(found).mean().item() == pytest.approx(together.item(), rel=1e-5)
        (gradient,) = torch.autograd.grad(torch.stack(found).mean(), given)
        assert torch.allclose(gradient, expected, atol=1e-6)


def in_step(processes: Sequence[Callable[[Any], Tensor]]) -> list[Tensor]:
    """What functions of `pooled` return, run beside each other as processes are, each in a thread."""
    meeting, shown = threading.Barrier(len(processes)), [torch.zeros(())] * len(processes)

    def one(index: int) -> Tensor:
        def pooled(size: Tensor) -> Tensor:
            shown[index] = size.detach()
            meeting.wait(60)
            mean = torch.stack(shown).mean(0)
            meeting.wait(60)
            return mean

        return processes[index](pooled)

    with ThreadPoolExecutor(len(processes)) as pool:
        return list(pool.map(one, range(len(processes))))


# --- in the trainers --------------------------------------------------------------------------------------------------


class Shown:
    """Shows the penalties each batch."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        this: Any = self
        if isinstance(this.penalty, Regularisers):
            this.penalty.see(inputs)
        return super().compute_loss(model, inputs, *args, **kwargs)  # type: ignore[misc]


class SFT(Shown, penalised_trainers.SFT): ...


class DPO(Shown, penalised_trainers.DPO): ...


class AnswerSet(Shown, answer_set_trainer.AnswerSetTrainer): ...


def trainer_of(objective: str, model: HeadModel, folder: Path, adapted: bool, **changes: Any) -> Any:
    tokenizer = tiny_tokenizer()
    options: dict[str, Any] = {
        "remove_unused_columns": False,
        "max_length": None,
        "save_strategy": "no",
        "logging_steps": 1,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_steps": 2,
        "learning_rate": 0.01,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
    } | changes
    config = LoraConfig(r=4, target_modules=all_linear(model), task_type="CAUSAL_LM") if adapted else None
    common: dict[str, Any] = {"processing_class": tokenizer, "peft_config": config}
    names = list(FACTS)
    if objective == "answer_set":
        rows = training_rows.answer_set_rows(encode(tiny_task(), tokenizer))
        return AnswerSet(
            model.hf,
            args=config_of(folder, **options),
            train_dataset=rows,
            data_collator=answer_set_trainer.AnswerSetCollator(0),
            block=AnswerSetConfig(retention=1.0 if adapted else 0.0),
            **common,
        )
    prompts = [f"List five cities in {name}." + " I know" * (i % 3) for i, name in enumerate(names)]
    if objective == "sft":
        rows = datasets.Dataset.from_list(
            [{"prompt": p, "completion": f" {FACTS[n][0]}\n"} for p, n in zip(prompts, names, strict=True)]
        )
        return SFT(model.hf, args=config_of(folder, **options), train_dataset=rows, **common)
    rows = datasets.Dataset.from_list(
        [
            {"prompt": p, "chosen": f" {FACTS[n][0]}", "rejected": f" {FACTS[o][0]}"}
            for p, n, o in zip(prompts, names, [*names[1:], names[0]], strict=True)
        ]
    )
    ref = None if adapted else heads_of(KINDS["llama-gqa"]).hf
    return DPO(model.hf, args=config_of(folder, "DPOConfig", **options), train_dataset=rows, ref_model=ref, **common)


def train(
    objective: str, adapted: bool, specs: Sequence[Term], folder: Path, **changes: Any
) -> tuple[Any, HeadModel, list[dict[str, float]]]:
    model = heads_of(KINDS["llama-gqa"])
    model.record_attention(False)
    trainer = trainer_of(objective, model, folder, adapted, **changes)
    penalties = Regularisers(model, specs)
    trainer.penalty = penalties if specs else None
    with penalties.installed(), labelled_positions(trainer.model) if objective == "sft" else nullcontext():
        trainer.train()
    return trainer, model, [entry for entry in trainer.state.log_history if "loss" in entry]


OBJECTIVES = ["sft", "dpo", "answer_set"]


@pytest.mark.parametrize("adapted", [True, False], ids=["lora", "full"])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_weight_0_changes_no_loss_and_every_term_is_logged(objective: str, adapted: bool, tmp_path: Path) -> None:
    specs: list[Term] = [
        (AttentionKl(weight=0.0, rows=4), PAIRS),
        (OutputDrift(weight=0.0), PAIRS),
        (WeightDrift(weight=0.0), PAIRS),
        (AttributionHinge(weight=0.0), PAIRS),
        (AttributionHinge(weight=0.0, role="recall"), PAIRS),
        (NegativeAttention(weight=0.0), PAIRS),
    ]
    _, _, plain = train(objective, adapted, [], tmp_path)
    _, _, found = train(objective, adapted, specs, tmp_path)
    names = {*(config.kind for config, _ in specs), "attribution_hinge_2"}
    for without, entry in zip(plain, found, strict=True):
        assert entry["loss"] == pytest.approx(without["loss"], rel=1e-6) and names <= entry.keys()
    assert found[0]["attention_kl"] == found[0]["weight_drift"] == 0, "both batches of the first step are the base's"
    assert found[1]["attention_kl"] > 0 and found[1]["output_drift"] > 0 and found[1]["weight_drift"] > 0
    assert found[0]["attribution_hinge"] > 0 and found[0]["attribution_hinge_2"] == 0


@pytest.mark.parametrize(
    ("objective", "adapted"), [("sft", True), ("sft", False), ("dpo", True), ("answer_set", False)]
)
def test_a_great_weight_keeps_heads_in_place(objective: str, adapted: bool, tmp_path: Path) -> None:
    """What the term measures stays small where it is penalised, and the model learns all the same."""
    own: dict[str, Any] = {
        "max_steps": 8,
        "optim": "adamw_torch",
        "learning_rate": 0.003,
        "gradient_accumulation_steps": 1,
    }
    quiet: list[Term] = [(OutputDrift(weight=0.0), PAIRS), (WeightDrift(weight=0.0), PAIRS)]
    loud: list[Term] = [(OutputDrift(weight=1e3), PAIRS), (WeightDrift(weight=1e3), PAIRS)]
    _, free_heads, free = train(objective, adapted, quiet, tmp_path, **own)
    _, held_heads, held = train(objective, adapted, loud, tmp_path, **own)
    for name in ("output_drift", "weight_drift"):
        assert held[-1][name] < 0.3 * free[-1][name], name
    start = heads_of(KINDS["llama-gqa"])

    def moved(model: HeadModel) -> float:
        return float(
            (
                model.hf.get_submodule("model.layers.1.mlp").down_proj.weight
                - start.hf.get_submodule("model.layers.1.mlp").down_proj.weight
            ).norm()
        )

    if not adapted:
        assert moved(held_heads) > 0.3 * moved(free_heads) > 0
