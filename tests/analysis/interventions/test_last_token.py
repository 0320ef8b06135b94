"""Batches of counterfactual runs equal whole forward passes, one a row, with every change written out in hooks."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from headtune.analysis.interventions import batches
from headtune.analysis.interventions.all_positions import everywhere
from headtune.analysis.interventions.batches import rows_in_memory
from headtune.analysis.interventions.intervention import CLEAN, Head, Intervention, silenced
from headtune.analysis.interventions.last_token import LastTokenRunner
from headtune.analysis.methods import patching
from headtune.analysis.methods.patching import INPUTS, every_head
from headtune.analysis.models.attention import AttentionCall, attend_with
from headtune.analysis.models.head_model import HeadModel
from headtune.analysis.models.loading import wrap_model
from headtune.analysis.tasks.tokenized import Encoded, encode
from headtune.analysis.utils.errors import InputError
from helpers.tiny import D_MODEL, KINDS, N_HEADS, N_LAYERS, tiny_model, tiny_task, tiny_tokenizer

# Groups of heads, sliding windows shorter than the prompt, learned positions, parallel residuals, Conv1D, soft caps and
# norms after the blocks.
FAMILIES = (
    "llama-gqa",
    "mistral-sliding",
    "gpt2",
    "opt",
    "gpt_neox",
    "phi",
    "phi3-mqa",
    "gemma2-caps",
    "gemma3-sliding",
)
KEPT: tuple[Any, ...] = ("attention", "mlp", "residual", "z", "pattern", "query", "key", "value")


@pytest.fixture(scope="module", params=FAMILIES)
def heads(request: pytest.FixtureRequest) -> HeadModel:
    kind = KINDS[request.param]
    return wrap_model(tiny_model(kind.family, **kind.config), tiny_tokenizer(), request.param)


@pytest.fixture(scope="module")
def prompt(heads: HeadModel) -> Encoded:
    return encode(tiny_task(subjects=1), heads.tokenizer).examples[0]


@pytest.fixture
def tokens(prompt: Encoded) -> Tensor:
    return prompt.tokens


@dataclass(frozen=True)
class Changes:
    """What a slow pass changes at END; `mlps` by layer, all else by head."""

    outputs: Mapping[Head, Tensor] = field(default_factory=dict)
    factors: Mapping[Head, float] = field(default_factory=dict)
    query: Mapping[Head, Tensor] = field(default_factory=dict)
    key: Mapping[Head, Tensor] = field(default_factory=dict)
    value: Mapping[Head, Tensor] = field(default_factory=dict)
    mlps: Mapping[int, Tensor] = field(default_factory=dict)
    knocked_out: Mapping[int, Sequence[int]] = field(default_factory=dict)
    renormalise: bool = False


NONE = Changes()


@torch.no_grad()
def slow(model: HeadModel, tokens: Tensor, changes: Changes = NONE) -> dict[str, Tensor]:
    """One whole forward pass, all positions, attention head by head: an `InterventionResult` of one row."""
    seen: dict[str, dict[int, Tensor]] = {name: {} for name in KEPT}
    length = len(tokens)

    def attend(call: AttentionCall) -> Tensor:
        group = call.query.shape[1] // call.key.shape[1]
        outputs, rows, ends = [], [], {name: [] for name in INPUTS}
        for head in range(call.query.shape[1]):
            own = {
                "query": call.query[0, head].clone(),
                "key": call.key[0, head // group].clone(),
                "value": call.value[0, head // group].clone(),
            }
            for name, tensor in own.items():
                ends[name].append(tensor[-1].clone())
                if (call.layer, head) in getattr(changes, name):
                    tensor[-1] = getattr(changes, name)[call.layer, head]
            scores = own["query"] @ own["key"].T * call.scaling
            if call.softcap:
                scores = call.softcap * torch.tanh(scores / call.softcap)
            causal = torch.ones(length, length, dtype=torch.bool).tril()
            if call.mask is not None and call.mask.dtype == torch.bool:
                causal &= call.mask[0, 0]
            elif call.mask is not None:
                scores = scores + call.mask[0, 0]
            pattern = scores.masked_fill(~causal, float("-inf")).softmax(-1)
            if gone := changes.knocked_out.get(call.layer):
                pattern[-1, list(gone)] = 0
                if changes.renormalise:
                    pattern[-1] /= pattern[-1].sum()
            rows.append(pattern[-1])
            outputs.append(pattern @ own["value"])
        seen["pattern"][call.layer] = torch.stack(rows)
        for name in INPUTS:
            seen[name][call.layer] = torch.stack(ends[name])
        return torch.stack(outputs, 1)[None]

    def at_projection(layer: int) -> Any:
        def hook(_module: Any, args: tuple[Tensor]) -> tuple[Tensor]:
            z = args[0].clone().view(length, model.n_heads, model.head_dim)
            for head in range(model.n_heads):
                if (layer, head) in changes.factors:
                    z[-1, head] *= changes.factors[layer, head]
                if (layer, head) in changes.outputs:
                    z[-1, head] = changes.outputs[layer, head]
            seen["z"][layer] = z[-1].clone()
            return (z.view_as(args[0]),)

        return hook

    def at_mlp(layer: int) -> Any:
        def hook(_module: Any, _args: Any, output: Tensor) -> Tensor:
            flat = output.clone().view(length, -1)
            if layer in changes.mlps:
                flat[-1] = changes.mlps[layer]
            seen["mlp"][layer] = flat[-1].clone()
            return flat.view_as(output)

        return hook

    def at_attention(layer: int) -> Any:
        def hook(_module: Any, _args: Any, output: Any) -> None:
            seen["attention"][layer] = (output[0] if isinstance(output, tuple) else output).view(length, -1)[-1]

        return hook

    def at_final_norm(_module: Any, args: tuple[Tensor]) -> None:
        seen["residual"][0] = args[0][0, -1]

    with contextlib.ExitStack() as stack:
        stack.enter_context(attend_with(attend))
        handles = [model.final_norm.register_forward_pre_hook(at_final_norm)]
        for layer in range(model.n_layers):
            handles.append(model.projection(layer).register_forward_pre_hook(at_projection(layer)))
            handles.append(model.mlp(layer).register_forward_hook(at_mlp(layer)))
            handles.append(model.attention_added(layer).register_forward_hook(at_attention(layer)))
        for handle in handles:
            stack.callback(handle.remove)
        logits = model.hf(tokens[None], use_cache=False).logits[0, -1]
    kept = {name: torch.stack([by_layer[layer] for layer in sorted(by_layer)]) for name, by_layer in seen.items()}
    return kept | {"logits": logits, "residual": kept["residual"][0]}


def slow_row(model: HeadModel, tokens: Tensor, row: Intervention) -> dict[str, Tensor]:
    """What a `Intervention` says, as changes to a whole pass."""
    clean = slow(model, tokens)
    layers = range(N_LAYERS) if row.layers is None else row.layers
    outputs, mlps = dict(row.outputs), {}
    if row.freeze != "nothing":
        outputs |= {head: clean["z"][head] for head in every_head(model) if head not in row.heads}
    if row.freeze == "heads and mlps":
        mlps = {layer: clean["mlp"][layer] for layer in range(N_LAYERS)}
    knocked = dict.fromkeys(layers, row.knocked_out) if row.knocked_out else {}
    changes = Changes(outputs, row.factors, row.queries, row.keys, row.values, mlps, knocked, row.renormalise)
    return slow(model, tokens, changes)


def vector(model: HeadModel, seed: int = 0) -> Tensor:
    return torch.randn(model.head_dim, generator=torch.Generator().manual_seed(seed))


def rows_of(model: HeadModel, length: int) -> dict[str, Intervention]:
    """Every feature of a row. Heads 0 and 1, and 2 and 3, share keys and values where there are groups."""
    a, b, c = (vector(model, seed) for seed in range(3))
    near = [length - 2, length - 4]
    return {
        "nothing": CLEAN,
        "silenced": silenced([(0, 1)]),
        "silenced in the last layer": silenced([(2, 3)]),
        "factors": Intervention(factors={(0, 2): 2.5, (1, 0): -0.5, (2, 1): 0.0}),
        "outputs": Intervention(outputs={(1, 1): a}),
        "outputs in all layers": Intervention(outputs={(2, 0): a, (0, 3): b, (1, 1): c}),
        "query": Intervention(queries={(1, 2): a}),
        "key": Intervention(keys={(1, 1): a}),
        "value": Intervention(values={(1, 1): a}),
        "keys of one group": Intervention(keys={(0, 0): a, (0, 1): b}),
        "values of one group": Intervention(values={(2, 2): a, (2, 3): b}),
        "queries, keys and values": Intervention(
            queries={(0, 1): a, (2, 2): b}, keys={(1, 0): c}, values={(1, 0): a, (0, 1): b}
        ),
        "values and outputs": Intervention(values={(0, 1): a}, factors={(1, 2): 0.5}, outputs={(2, 2): c}),
        "knocked out": Intervention(knocked_out=near),
        "knocked out with END and the first": Intervention(knocked_out=[0, length - 1]),
        "knocked out, renormalised": Intervention(knocked_out=near, renormalise=True),
        "knocked out in one layer": Intervention(knocked_out=near, layers=[1]),
        "knocked out in two layers, renormalised": Intervention(knocked_out=near, renormalise=True, layers={0, 2}),
        "knocked out and silenced": Intervention(factors={(0, 0): 0.0}, knocked_out=near, layers=[2]),
        "heads frozen": Intervention(outputs={(0, 2): a}, freeze="heads"),
        "heads frozen, several": Intervention(outputs={(0, 2): a}, factors={(2, 1): 2.0, (1, 3): 0.0}, freeze="heads"),
        "heads frozen, a query": Intervention(queries={(1, 2): a}, freeze="heads"),
        "heads and mlps frozen": Intervention(outputs={(0, 2): a}, freeze="heads and mlps"),
        "heads and mlps frozen, a value": Intervention(values={(1, 3): a}, freeze="heads and mlps"),
    }


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=2e-5)


# --- the slow reference -----------------------------------------------------------------------------------------------


def test_the_slow_pass_without_changes_is_the_model(heads: HeadModel, tokens: Tensor) -> None:
    with torch.no_grad():
        close(slow(heads, tokens)["logits"], heads.hf(tokens[None]).logits[0, -1])


# --- changes at END ---------------------------------------------------------------------------------------------------


def test_rows_of_every_kind_at_once_are_slow_passes(heads: HeadModel, tokens: Tensor) -> None:
    """All features in one call, in random order, some rows twice; all that can be kept is kept."""
    rows = list(rows_of(heads, len(tokens)).items())
    rows += rows[3:6]
    random.Random(0).shuffle(rows)
    results = [
        LastTokenRunner(heads, tokens).run([row for _, row in rows], record=KEPT, max_rows=max_rows)
        for max_rows in (None, 1, 5)
    ]
    assert all(set(result.activations) == set(KEPT) for result in results)
    clean = slow(heads, tokens)["logits"]
    for index, (name, row) in enumerate(rows):
        expected = slow_row(heads, tokens, row)
        assert ((expected["logits"] - clean).abs().max() > 1e-3) == (name != "nothing"), name
        for result in results:
            close(result.logits[index], expected["logits"])
            for kept in KEPT:
                close(result.activations[kept][index], expected[kept])


@pytest.mark.parametrize("name", ["silenced", "query", "knocked out", "heads frozen"])
def test_a_row_does_not_depend_on_its_company(heads: HeadModel, tokens: Tensor, name: str) -> None:
    """Alone, without anything kept, the result is the one it has among others."""
    rows = rows_of(heads, len(tokens))
    runner = LastTokenRunner(heads, tokens)
    close(runner.run([rows[name]]).logits[0], runner.run(list(rows.values())).logits[list(rows).index(name)])


def test_layers_say_whose_values_are_kept(heads: HeadModel, tokens: Tensor) -> None:
    rows = [silenced([(2, 0)]), CLEAN, silenced([(0, 1), (1, 1)])]
    runner, names = LastTokenRunner(heads, tokens), ("z", "query", "mlp", "pattern")
    everything, some = (
        runner.run(rows, record=names).activations,
        runner.run(rows, record=names, layers=[0, 2]).activations,
    )
    for name in names:
        assert torch.equal(some[name], everything[name][:, [0, 2]])


def test_what_is_kept_has_the_shapes_that_are_promised(heads: HeadModel, tokens: Tensor) -> None:
    kept = LastTokenRunner(heads, tokens).run([CLEAN, silenced([(1, 0)])], record=KEPT).activations
    per_head = (2, N_LAYERS, N_HEADS, heads.head_dim)
    assert {name: tuple(tensor.shape) for name, tensor in kept.items()} == {
        "attention": (2, N_LAYERS, D_MODEL),
        "mlp": (2, N_LAYERS, D_MODEL),
        "residual": (2, D_MODEL),
        "z": per_head,
        "query": per_head,
        "key": per_head,
        "value": per_head,
        "pattern": (2, N_LAYERS, N_HEADS, len(tokens)),
    }
    assert kept["pattern"].dtype == torch.float32


def test_a_changed_key_or_value_is_one_query_heads_own(llama: HeadModel) -> None:
    """Heads 0 and 1 share a key-value head; changing it for head 1 leaves head 0's output alone."""
    tokens = encode(tiny_task(subjects=1), llama.tokenizer).examples[0].tokens
    rows = [CLEAN, Intervention(keys={(1, 1): vector(llama)}), Intervention(values={(1, 1): vector(llama)})]
    z = LastTokenRunner(llama, tokens).run(rows, record=["z"]).activations["z"][:, 1]
    for changed in z[1:]:
        moved = (changed - z[0]).abs().amax(-1) > 1e-5
        assert moved.tolist() == [False, True, False, False]


def test_nothing_left_to_read_is_nothing_and_not_nan(llama: HeadModel) -> None:
    tokens = encode(tiny_task(subjects=1), llama.tokenizer).examples[0].tokens
    everything = Intervention(knocked_out=range(len(tokens)))
    logits = LastTokenRunner(llama, tokens).run([everything, replace(everything, renormalise=True)]).logits
    assert logits.isfinite().all()
    close(logits[0], logits[1])
    close(logits[0], LastTokenRunner(llama, tokens).run([silenced(every_head(llama))]).logits[0])


def test_a_prompt_of_one_token(llama: HeadModel) -> None:
    tokens = torch.tensor([7])
    result = LastTokenRunner(llama, tokens).run([CLEAN, silenced([(1, 1)])])
    for logits, row in zip(result.logits, (CLEAN, silenced([(1, 1)])), strict=True):
        close(logits, slow_row(llama, tokens, row)["logits"])


def test_a_row_outside_the_model_is_refused(llama: HeadModel) -> None:
    runner = LastTokenRunner(llama, torch.arange(5))
    for row in (
        silenced([(3, 0)]),
        Intervention(queries={(0, 4): vector(llama)}),
        Intervention(outputs={(-1, 0): vector(llama)}),
    ):
        with pytest.raises(InputError, match=r"head L-?\dH\d is out of range: tiny llama has layers 0-2"):
            runner.run([CLEAN, row])


def test_steps_leave_no_hooks_behind(llama: HeadModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def hooked() -> int:
        return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in llama.hf.modules())

    before, runner = hooked(), LastTokenRunner(llama, torch.arange(5))
    rows = list(rows_of(llama, 5).values())
    runner.run(rows, record=KEPT)
    everywhere(llama, torch.arange(5), [{(0, 0): 0.0}])
    assert hooked() == before
    monkeypatch.setattr(llama.layers[2], "forward", lambda *_a, **_k: 1 / 0)
    for broken in (lambda: runner.run(rows, record=KEPT), lambda: everywhere(llama, torch.arange(5), [{(0, 0): 0.0}])):
        with pytest.raises(ZeroDivisionError):
            broken()
        assert hooked() == before


# --- changes at all positions -----------------------------------------------------------------------------------------


@torch.no_grad()
def slow_everywhere(model: HeadModel, tokens: Tensor, row: Mapping[Head, Tensor | float]) -> Tensor:
    def at_projection(layer: int) -> Any:
        def hook(_module: Any, args: tuple[Tensor]) -> tuple[Tensor]:
            z = args[0].clone().view(len(tokens), model.n_heads, model.head_dim)
            for position in range(len(tokens)):
                for head in range(model.n_heads):
                    change = row.get((layer, head), 1.0)
                    if isinstance(change, float):
                        z[position, head] *= change
                    else:
                        z[position, head] = change if change.ndim == 1 else change[position]
            return (z.view_as(args[0]),)

        return hook

    handles = [model.projection(layer).register_forward_pre_hook(at_projection(layer)) for layer in range(N_LAYERS)]
    logits: Tensor = model.hf(tokens[None], use_cache=False).logits[0, -1]
    for handle in handles:
        handle.remove()
    return logits


@pytest.mark.parametrize("max_rows", [None, 1, 3])
def test_everywhere_is_a_slow_pass(heads: HeadModel, tokens: Tensor, max_rows: int | None) -> None:
    run = torch.randn(len(tokens), heads.head_dim, generator=torch.Generator().manual_seed(4))
    rows: list[dict[Head, Tensor | float]] = [
        {(2, 1): 0.0},
        {(0, 1): 0.0},
        {},
        {(1, 2): 3.0, (0, 3): -0.5},
        {(1, 0): vector(heads)},
        {(0, 0): run, (2, 2): vector(heads), (1, 3): 0.5},
        {},
    ]
    found = everywhere(heads, tokens, rows, max_rows)
    expected = torch.stack([slow_everywhere(heads, tokens, row) for row in rows])
    close(found, expected)
    changed = (expected - expected[2]).abs().amax(-1) > 1e-3
    assert changed.tolist() == [bool(row) for row in rows]


def test_everywhere_refuses_heads_outside_the_model(llama: HeadModel) -> None:
    with pytest.raises(InputError, match="head L0H4 is out of range"):
        everywhere(llama, torch.arange(5), [{(0, 4): 0.0}])


# --- memory -----------------------------------------------------------------------------------------------------------


def test_less_memory_means_more_passes_and_the_same_numbers(heads: HeadModel, tokens: Tensor) -> None:
    rows = list(rows_of(heads, len(tokens)).values())
    changes = [{head: 0.0} for head in every_head(heads)]
    small = replace(heads, max_memory=100_000)
    passes: list[int] = []
    handle = heads.hf.get_input_embeddings().register_forward_hook(lambda *_: passes.append(1))
    results = []
    for model in (heads, small):
        passes.clear()
        result = LastTokenRunner(model, tokens).run(rows, record=["z"])
        at_end = len(passes) - 1  # less the clean run
        passes.clear()
        results.append(
            (result.logits, result.activations["z"], everywhere(model, tokens, changes), at_end, len(passes))
        )
    handle.remove()
    for large, little in zip(results[0][:3], results[1][:3], strict=True):
        close(little, large)
    assert results[0][3:] == (1, 1)
    size = rows_in_memory(small, len(tokens), positions=1)
    assert 1 < size < len(rows) and results[1][3] == -(-len(rows) // size)
    assert results[1][4] == -(-len(changes) // rows_in_memory(small, len(tokens), positions=len(tokens)))


def test_rows_in_memory_grows_with_memory_and_shrinks_with_the_prompt(llama: HeadModel) -> None:
    def fit(memory: int, seq: int, positions: int) -> int:
        return rows_in_memory(replace(llama, max_memory=memory), seq, positions)

    assert fit(1, 100, 100) == 1
    assert fit(1 << 30, 100, 1) == pytest.approx(2 * fit(1 << 29, 100, 1), abs=1)
    assert fit(1 << 30, 100, 1) > fit(1 << 30, 1000, 1)
    assert fit(1 << 30, 100, 1) > fit(1 << 30, 100, 100)


def test_entered_counts_the_clean_run_and_the_rows_so_far() -> None:
    assert batches.entered([0, 0, 2, 3], n_layers=3) == [3, 3, 4]


# --- path patching ----------------------------------------------------------------------------------------------------


def reference_for(model: HeadModel) -> Tensor:
    return torch.randn(N_LAYERS, N_HEADS, model.head_dim, generator=torch.Generator().manual_seed(9))


def hold_all_but(model: HeadModel, clean: dict[str, Tensor], sender: Head, value: Tensor) -> dict[Head, Tensor]:
    return {head: value if head == sender else clean["z"][head] for head in every_head(model)}


def test_path_patching_to_the_logits_is_two_slow_passes(heads: HeadModel, prompt: Encoded) -> None:
    reference, clean = reference_for(heads), slow(heads, prompt.tokens)
    found = patching.path_logits(heads, prompt, reference)
    close(found[0], clean["logits"])
    for index, sender in enumerate(every_head(heads), start=1):
        held = hold_all_but(heads, clean, sender, reference[sender])
        close(found[index], slow(heads, prompt.tokens, Changes(outputs=held))["logits"])


@pytest.mark.parametrize("through", INPUTS)
def test_path_patching_to_a_head_is_two_slow_passes(heads: HeadModel, prompt: Encoded, through: str) -> None:
    """First pass: what the receiver hears; second pass: the clean run with that put in."""
    reference, clean, receiver = reference_for(heads), slow(heads, prompt.tokens), (2, 1)
    senders, found = patching.head_to_head_logits(heads, prompt, receiver, through, reference)
    assert senders == [head for head in every_head(heads) if head[0] < 2]
    close(found[0], clean["logits"])
    for index, sender in enumerate(senders, start=1):
        held = hold_all_but(heads, clean, sender, reference[sender])
        heard = slow(heads, prompt.tokens, Changes(outputs=held))[through][receiver]
        expected = slow(heads, prompt.tokens, Changes(**{through: {receiver: heard}}))["logits"]
        close(found[index], expected)
    assert (found[1:] - found[0]).abs().max() > 1e-4  # five times the tolerance


def test_nothing_is_before_the_first_layer(llama: HeadModel) -> None:
    prompt = encode(tiny_task(subjects=1), llama.tokenizer).examples[0]
    senders, logits = patching.head_to_head_logits(llama, prompt, (0, 1), "query", reference_for(llama))
    assert not senders and len(logits) == 1
    effects = patching.head_to_head_effects(llama, prompt, (1, 1), "value", reference_for(llama))
    assert set(effects) == {
        f"path_L1H1_value.{name}{unit}"
        for name in ("target", "previous")
        for unit in ("", "_contrast", "_centred", "_p", "_logp")
    }
    values = effects["path_L1H1_value.target"]
    assert values.shape == (N_LAYERS, N_HEADS) and (values[1:] == 0).all() and (values[0] != 0).all()
