"""One contract that the view of every family keeps, checked against slow references written out here.

Also what every change at a head means (`hooks`), and that the fast ablation is the slow one.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from headtune.analysis.methods.logit_attribution import attribute
from headtune.analysis.methods.patching import (
    ablation_effects,
    answer_probabilities,
    set_probabilities,
    silenced_logits,
)
from headtune.analysis.models import hooks
from headtune.analysis.models.architectures import ARCHITECTURES
from headtune.analysis.models.attention import record_rows
from headtune.analysis.models.head_model import HeadModel
from headtune.analysis.models.loading import check, wrap_model
from headtune.analysis.tasks.tokenized import Encoded, encode
from headtune.analysis.utils.errors import CheckError, InputError
from helpers.close import close
from helpers.tiny import FOUND_KINDS, HARD_KINDS, KINDS, N_HEADS, N_LAYERS, Kind, tiny_model, tiny_task, tiny_tokenizer

# What each family adds to a norm's weight, written down here once more.
GAIN_OFFSETS = {"gemma": 1.0, "gemma2": 1.0, "gemma3_text": 1.0, "nemotron": 1.0}
# The module whose output is what an MLP adds to the residual stream.
MLPS = {
    "opt": "fc2",
    "glm4": "post_mlp_layernorm",
    "llama4_text": "feed_forward",
    **dict.fromkeys(("gemma2", "gemma3_text", "olmo2", "olmo3", "exaone4"), "post_feedforward_layernorm"),
}
# The norm between the attention block and the residual stream.
POST_NORMS = {
    "glm4": "post_self_attn_layernorm",
    **dict.fromkeys(("gemma2", "gemma3_text", "olmo2", "olmo3", "exaone4"), "post_attention_layernorm"),
}


def paths(family: str) -> tuple[str, str, str, str]:
    """Layers, attention, output projection and final norm, where a family found by its structure has them."""
    if family in ARCHITECTURES:
        row = ARCHITECTURES[family]
        return row.layers, row.attention, row.output_projection, row.final_norm
    others = {"persimmon": ("model.layers", "self_attn", "dense", "model.final_layernorm")}
    return others.get(family, ("model.layers", "self_attn", "o_proj", "model.norm"))


@pytest.fixture(scope="module", params=[*KINDS, *FOUND_KINDS])
def kind(request: pytest.FixtureRequest) -> Kind:
    return (KINDS | FOUND_KINDS)[request.param]


# The view's own contract holds for every kind; what is computed through it is tested on the hard ones.
hard_kinds = pytest.mark.parametrize("kind", HARD_KINDS, indirect=True, scope="module")


@pytest.fixture(scope="module")
def model(kind: Kind) -> HeadModel:
    return wrap_model(tiny_model(kind.family, **kind.config), tiny_tokenizer(), kind.family)


@pytest.fixture(scope="module")
def prompt(model: HeadModel) -> Encoded:
    """One list prompt with two answers given."""
    return encode(tiny_task(subjects=1), model.tokenizer).examples[0]


def batch_of(model: HeadModel, rows: int = 3, length: int = 9) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(3, model.hf.config.vocab_size, (rows, length), generator=generator)


def hook_count(model: HeadModel) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.hf.modules())


# --- the view ---------------------------------------------------------------------------------------------------------


def test_every_family_of_the_table_is_tested() -> None:
    assert {kind.family for kind in KINDS.values()} == set(ARCHITECTURES)


def test_sizes(model: HeadModel, kind: Kind) -> None:
    found = (model.n_layers, model.n_heads, model.n_kv_heads, model.head_dim, model.d_model)
    assert found == (N_LAYERS, N_HEADS, kind.n_kv_heads, kind.head_dim, 32)
    identity = model.identity()
    assert (identity["head_dim"], identity["n_kv_heads"]) == (kind.head_dim, kind.n_kv_heads)
    assert identity["dtype"] == "float32" and identity["model_type"] == kind.family


@torch.no_grad()
def test_contributions_and_bias_are_the_attention_output(model: HeadModel, kind: Kind) -> None:
    """Head by head, from slices of the stored weight, with the head size that this test knows from the config."""
    seen: dict[int, tuple[Tensor, Tensor]] = {}
    handles = []
    for layer in range(N_LAYERS):
        _, attention, output_projection, _ = paths(kind.family)
        block = model.layers[layer].get_submodule(attention)
        projection = block.get_submodule(output_projection)
        inputs: list[Tensor] = []
        handles.append(projection.register_forward_pre_hook(lambda _m, args, inputs=inputs: inputs.append(args[0])))
        handles.append(
            block.register_forward_hook(
                lambda _m, _a, output, layer=layer, inputs=inputs: seen.update({layer: (inputs[0], output[0])})
            )
        )
    model.hf(batch_of(model))
    for handle in handles:
        handle.remove()
    for layer, (z, output) in seen.items():
        projection = model.projection(layer)
        total = torch.zeros_like(output)
        for head in range(N_HEADS):
            part = slice(head * kind.head_dim, (head + 1) * kind.head_dim)
            # GPT-2's Conv1D computes x @ W, every other projection x @ W^T.
            weight = projection.weight[part] if kind.family == "gpt2" else projection.weight[:, part].T
            contribution = z[..., part] @ weight
            close(z[..., part] @ model.output_weight(layer)[head], contribution, 1e-5)
            total += contribution
        close(total if projection.bias is None else total + projection.bias, output, 1e-5)


def rolled(weight: Tensor) -> Tensor:
    return weight.roll(1, dims=0)


def transposed(weight: Tensor) -> Tensor:
    n_heads, head_dim, d_model = weight.shape
    return weight.reshape(n_heads * head_dim, d_model).T.reshape(n_heads, head_dim, d_model)


def wrong_group(weight: Tensor) -> Tensor:
    """Interleaved heads, `[head_dim, n_heads]` instead of `[n_heads, head_dim]`."""
    n_heads, head_dim, d_model = weight.shape
    return weight.reshape(head_dim, n_heads, d_model).transpose(0, 1)


@hard_kinds
def test_a_wrong_output_weight_fails_the_check(model: HeadModel, kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    right, row = HeadModel.output_weight, ARCHITECTURES[kind.family]
    for wrong in (rolled, transposed, wrong_group):
        if wrong is transposed and kind.head_dim * N_HEADS != model.d_model:
            continue  # not square: the transposition would not even multiply
        monkeypatch.setattr(HeadModel, "output_weight", lambda self, layer, wrong=wrong: wrong(right(self, layer)))
        expected = rf"^{row.layers}\.0\.{row.attention}: head contributions plus bias differ"
        with pytest.raises(CheckError, match=expected):
            check(model)


@hard_kinds
def test_a_wrong_layer_is_named(model: HeadModel, kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    right = HeadModel.output_weight
    monkeypatch.setattr(
        HeadModel, "output_weight", lambda self, layer: right(self, layer) * (1.001 if layer == 2 else 1)
    )
    with pytest.raises(CheckError, match=rf"^{ARCHITECTURES[kind.family].layers}\.2\."):
        check(model)


def test_a_forgotten_bias_fails_the_check(llama: HeadModel) -> None:
    model = tiny_model("gpt2")
    heads = wrap_model(model, tiny_tokenizer())
    handle = heads.projection(1).register_forward_hook(lambda _m, _a, output: output + 0.01)
    with pytest.raises(CheckError, match=r"^transformer\.h\.1\.attn: head contributions"):
        check(heads)
    handle.remove()
    check(heads)


def test_other_logits_fail_the_check(llama: HeadModel) -> None:
    tokens = torch.randint(0, 5, (2, 7))
    with torch.no_grad(), pytest.raises(CheckError, match=r"tiny llama: logits under the head view differ"):
        check(llama, llama.hf(tokens).logits)


def test_attention_outside_the_interface_fails_the_check(llama: HeadModel) -> None:
    llama.hf.set_attn_implementation("sdpa")
    try:
        with pytest.raises(
            CheckError, match=r"model\.layers\.0\.self_attn: does not go through the attention interface"
        ):
            check(llama)
    finally:
        llama.hf.set_attn_implementation("headtune_rows")
    check(llama)


def test_a_dead_head_or_a_dead_layer_passes_the_check() -> None:
    """As a pruned model has them."""
    model = wrap_model(tiny_model("llama"), tiny_tokenizer())
    for dead in (slice(0, model.head_dim), slice(None)):
        with torch.no_grad():
            model.projection(0).weight[:, dead] = 0
        check(model)


def test_silencing_that_does_not_silence_fails_the_check(llama: HeadModel, monkeypatch: pytest.MonkeyPatch) -> None:
    right = hooks.ablate
    wrong = r"layers\.0: silencing head \d does not take what it writes out"
    with pytest.raises(CheckError, match=wrong), monkeypatch.context() as patch:
        patch.setattr(hooks, "ablate", lambda *_: contextlib.nullcontext())
        check(llama)
    with pytest.raises(CheckError, match=wrong), monkeypatch.context() as patch:
        patch.setattr(hooks, "ablate", lambda model, _heads: right(model, [(0, head) for head in range(N_HEADS)]))
        check(llama)
    check(llama)


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_half_precision(family: str) -> None:
    """The view passes its own check, and scores stay finite and near those in float32."""
    models = [
        wrap_model(tiny_model(family).to(dtype), tiny_tokenizer())
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
    ]
    assert [model.identity()["dtype"] for model in models] == ["float32", "bfloat16", "float16"]
    example = encode(tiny_task(subjects=1), models[0].tokenizer).examples[0]
    exact, *halves = (attribute(model, example) | ablation_effects(model, example) for model in models)
    for rounded in halves:
        assert set(rounded) == set(exact)
        for name, score in rounded.items():
            assert score == pytest.approx(exact[name], abs=0.1 * max(1, abs(exact[name]).max())), name


REFUSED = {
    "bloom": ({"n_layer": 3, "n_head": 4}, "does not go through transformers' attention interface"),
    "gpt_neo": (
        {"num_layers": 3, "num_heads": 4, "attention_types": [[["global", "local", "global"], 1]]},
        "does not go through transformers' attention interface",
    ),
    "gptj": (
        {"n_embd": 32, "n_layer": 3, "n_head": 4, "rotary_dim": 8},
        "does not go through transformers' attention interface",
    ),
    "falcon": ({"num_kv_heads": 4}, "does not go through transformers' attention interface"),
    "mpt": ({"d_model": 32, "n_layers": 3, "n_heads": 4}, "does not go through transformers' attention interface"),
    "codegen": (
        {"n_embd": 32, "n_layer": 3, "n_head": 4, "rotary_dim": 8},
        "does not go through transformers' attention interface",
    ),
    "cohere2": ({}, "the linearised norm differs"),
    "gpt_oss": ({"num_local_experts": 4, "head_dim": 8}, "its attention has sinks"),
    "mamba": ({}, "no list of 3 layers holds attention blocks"),
    "qwen3_next": (
        {
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
            "head_dim": 8,
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
        "layers 0, 2 have no attention heads",
    ),
    "olmo": ({}, "no norm with a gain after its layers"),
    "granite": ({"residual_multiplier": 0.22}, "such as a multiple of them"),
    "biogpt": ({}, r"beside its attention a layer must have one MLP, and here is \['fc1', 'fc2'\]"),
    "cohere": ({}, "the linearised norm differs"),
    "gpt_bigcode": (
        {"n_embd": 32, "n_layer": 3, "n_head": 4},
        "attends with 1 key heads, and the configuration says",
    ),
}


@pytest.mark.parametrize("family", REFUSED)
def test_families_without_a_view_are_refused_with_the_reason(family: str) -> None:
    config, reason = REFUSED[family]
    with pytest.raises((InputError, CheckError), match=reason) as refusal:
        wrap_model(tiny_model(family, **config), tiny_tokenizer())
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("config", [{"word_embed_proj_dim": 16}, {"do_layer_norm_before": False}])
def test_opt_members_that_are_not_additive_are_refused(config: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="projects its embeddings or normalises after"):
        wrap_model(tiny_model("opt", **config), tiny_tokenizer())


def test_identity_knows_weights_and_configuration() -> None:
    one, same, other, shaped = (
        wrap_model(tiny_model("llama", seed, **config), tiny_tokenizer()).identity()
        for seed, config in ((0, {}), (0, {}), (1, {}), (0, {"rope_theta": 500.0}))
    )
    assert one == same
    assert one["config_sha256"] == other["config_sha256"] and one["weights_sha256"] != other["weights_sha256"]
    assert one["weights_sha256"] == shaped["weights_sha256"] and one["config_sha256"] != shaped["config_sha256"]


def test_the_weights_hash_covers_every_parameter() -> None:
    model = wrap_model(tiny_model("gpt2"), tiny_tokenizer())
    digests = {model.weights_sha256}
    with torch.no_grad():
        for parameter in model.hf.parameters():
            parameter.view(-1)[-1] += 1
            digests.add(replace(model).weights_sha256)  # a copy without the cached value
            parameter.view(-1)[-1] -= 1
    assert len(digests) == 1 + len(list(model.hf.parameters()))


# --- attention rows ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_recorded_rows_are_those_of_eager_attention(model: HeadModel, kind: Kind) -> None:
    """At a different query position in each example."""
    tokens, positions = batch_of(model), torch.tensor([8, 3, 0])
    eager = tiny_model(kind.family, attn_implementation="eager", **kind.config)
    expected = eager(tokens, output_attentions=True).attentions
    with record_rows(positions) as rows:
        model.hf(tokens)
    assert sorted(rows.pattern) == list(range(N_LAYERS))
    for layer in range(N_LAYERS):
        assert rows.pattern[layer].shape == (3, N_HEADS, 9)
        close(rows.pattern[layer], expected[layer][torch.arange(3), :, positions], 1e-5)


@torch.no_grad()
def test_recorded_rows_with_left_padding(model: HeadModel, kind: Kind) -> None:
    tokens = batch_of(model)
    mask = torch.ones_like(tokens)
    mask[1, :4] = 0
    mask[2, :1] = 0
    tokens = tokens.masked_fill(mask == 0, 0)
    given = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    eager = tiny_model(kind.family, attn_implementation="eager", **kind.config)
    expected = eager(tokens, output_attentions=True, **given)
    end = torch.full((3,), 8)
    with record_rows(end) as rows:
        logits = model.hf(tokens, **given).logits
    for layer in range(N_LAYERS):
        assert rows.pattern[layer][1, :, :4].abs().max() == 0
        close(rows.pattern[layer], expected.attentions[layer][:, :, -1], 1e-5)
    close(logits[:, -1], expected.logits[:, -1], 1e-4)
    # And padding changes nothing: the padded row alone, without its padding, ends in the same logits.
    close(logits[1, -1], model.hf(tokens[1:2, 4:]).logits[0, -1], 1e-4)


@torch.no_grad()
def test_recorded_values_and_rows_make_z(model: HeadModel) -> None:
    """`z[l, h, q] = sum_t A[l, h, q, t] v[l, h, t]`: rows, values and heads stand in the same order."""
    positions = torch.tensor([8, 3, 5])
    with record_rows(positions) as rows, hooks.capture(model, positions=positions) as z:
        model.hf(batch_of(model))
    for layer in range(N_LAYERS):
        close(torch.einsum("bht,bhtd->bhd", rows.pattern[layer], rows.values[layer]), z[layer], 1e-5)


@torch.no_grad()
def test_rows_under_a_key_value_cache(llama: HeadModel) -> None:
    """The query of a single-token step sees all the keys before it."""
    tokens = batch_of(llama)
    with record_rows(torch.full((3,), 8)) as whole:
        llama.hf(tokens)
    past = llama.hf(tokens[:, :-1], use_cache=True).past_key_values
    with record_rows(torch.zeros(3, dtype=torch.long)) as step:
        llama.hf(tokens[:, -1:], past_key_values=past)
    for layer in range(N_LAYERS):
        close(step.pattern[layer], whole.pattern[layer], 1e-5)


def test_recording_stops_with_the_block_however_it_ends(llama: HeadModel) -> None:
    end = torch.full((3,), 8)
    with pytest.raises(RuntimeError, match="boom"), record_rows(end) as rows:
        raise RuntimeError("boom")
    llama.hf(batch_of(llama))
    assert not rows.pattern


@torch.no_grad()
def test_two_recordings_at_once(llama: HeadModel) -> None:
    tokens = batch_of(llama)
    with record_rows(torch.full((3,), 8)) as outer:
        with record_rows(torch.full((3,), 2)) as inner:
            llama.hf(tokens)
        assert torch.all(inner.pattern[0][..., 3:] == 0)
    assert torch.all(outer.pattern[0][..., 3:] > 0)


# --- fast ablation ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def slow_logits(model: HeadModel, tokens: Tensor, row: Any) -> Tensor:
    """One whole forward pass with the heads silenced at END."""
    with hooks.ablate(model, row, positions=torch.tensor([len(tokens) - 1])):
        return model.hf(tokens[None], use_cache=False).logits[0, -1]


def test_fast_ablation_is_the_slow_one(model: HeadModel, prompt: Encoded) -> None:
    """Every head alone, nothing, sets across layers, in random order, with and without chunks."""
    everyone = [(layer, head) for layer in range(N_LAYERS) for head in range(N_HEADS)]
    generator = random.Random(0)
    rows: list[Any] = [[pair] for pair in everyone] + [(), everyone, ()]
    rows += [generator.sample(everyone, size) for size in (2, 3, 5)]
    generator.shuffle(rows)
    slow = torch.stack([slow_logits(model, prompt.tokens, row) for row in rows])
    for max_rows in (512, 3):
        fast = silenced_logits(model, prompt.tokens, rows, max_rows)
        assert fast.shape == (len(rows), model.hf.config.vocab_size)
        close(fast, slow, 1e-4)
    clean = slow[rows.index(())]
    changed = (slow - clean).abs().amax(-1)
    assert all((change > 1e-3) == bool(row) for change, row in zip(changed, rows, strict=True))


def test_fast_ablation_leaves_nothing_behind(llama: HeadModel, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = batch_of(llama, 1)[0]
    before, hooked = llama.hf(tokens[None]).logits, hook_count(llama)
    silenced_logits(llama, tokens, [[(0, 1)], [(2, 3)]])
    assert hook_count(llama) == hooked
    assert torch.equal(llama.hf(tokens[None]).logits, before)
    monkeypatch.setattr(llama.layers[2], "forward", lambda *_a, **_k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        silenced_logits(llama, tokens, [[(0, 1)]])
    assert hook_count(llama) == hooked


@pytest.mark.parametrize("row", [[(3, 0)], [(0, 4)], [(-1, 0)], [(0, -1)]])
def test_heads_out_of_range_are_refused(llama: HeadModel, row: Any) -> None:
    expected = rf"head L{row[0][0]}H{row[0][1]} is out of range: tiny llama has layers 0-2 and heads 0-3"
    with pytest.raises(InputError, match=expected):
        silenced_logits(llama, batch_of(llama, 1)[0], [[(0, 0)], row])
    for block in (hooks.ablate(llama, row), hooks.scale(llama, dict.fromkeys(row, 2.0))):
        with pytest.raises(InputError, match=expected), block:
            pass


@hard_kinds
def test_ablation_effects_are_clean_minus_ablated(model: HeadModel, prompt: Encoded) -> None:
    effects = ablation_effects(model, prompt, max_rows=5)
    clean = slow_logits(model, prompt.tokens, ())
    targets, previous = list(prompt.target_tokens), list(prompt.previous_tokens)
    for layer, head in ((0, 1), (1, 3), (2, 0)):
        ablated = slow_logits(model, prompt.tokens, [(layer, head)])
        for name, chosen in (("target", targets), ("previous", previous)):
            p, q = (logits.softmax(-1)[chosen].sum().item() for logits in (clean, ablated))
            found = [effects[f"ablation.{name}{suffix}"][layer, head] for suffix in ("_p", "_logp", "")]
            wanted = [p - q, torch.tensor(p / q).log().item(), (clean - ablated)[chosen].mean().item()]
            assert found == pytest.approx(wanted, abs=1e-4)


def test_effects_without_previous_answers(llama: HeadModel) -> None:
    example = encode(tiny_task(previous=(0,), subjects=1), llama.tokenizer).examples[0]
    assert set(ablation_effects(llama, example)) == {
        f"ablation.target{unit}" for unit in ("", "_contrast", "_centred", "_p", "_logp")
    }
    assert not [name for name in attribute(llama, example) if "previous" in name]


def test_effects_stay_finite_where_a_probability_underflows() -> None:
    """p(previous) = e^-300 is 0 in float32; its logarithm is not."""
    model = wrap_model(tiny_model("llama"), tiny_tokenizer())
    example = encode(tiny_task(subjects=1), model.tokenizer).examples[0]
    output = model.hf.get_output_embeddings()
    with torch.no_grad():
        output.weight.mul_(300)
    effects = ablation_effects(model, example)
    assert all(torch.from_numpy(value).isfinite().all() for value in effects.values())


def test_answer_probabilities_sum_over_answers() -> None:
    example = Encoded(tiny_task().examples[0], torch.arange(9), (1,), ((2,), (3,)), (4, 5), (6, 6))
    logits = torch.log(torch.tensor([[0.1, 0.1, 0.1, 0.1, 0.2, 0.3, 0.1]]))
    found = answer_probabilities(logits, example)
    assert found.target.item() == pytest.approx(0.5)
    assert found.previous.item() == pytest.approx(0.1)  # a token shared by two previous answers counts once


def test_set_probabilities(llama: HeadModel) -> None:
    examples = encode(tiny_task(subjects=2), llama.tokenizer).examples
    sets = [[(0, 1), (2, 2)], [], [(1, 1)]]
    for example in examples:
        values = set_probabilities(llama, example, sets)
        for row, found in zip(sets, values, strict=True):
            p = slow_logits(llama, example.tokens, row).softmax(-1)
            wanted = [p[list(chosen)].sum().item() for chosen in (example.target_tokens, example.previous_tokens)]
            assert list(found) == pytest.approx(wanted, abs=1e-5)


# --- attribution ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Frozen:
    """A run on a prompt as a linear map: every norm on the way with this run's scale, at END.

    Attributes:
        logits: `[d_model]` in the residual stream -> `[vocabulary]` logits, before any cap.
        z: layer -> `[1, n_heads, head_dim]`.
        added: layer -> what a part of the attention block's output, `[d_model]`, adds to the residual stream.
        others: everything else in the residual stream: the embedding, MLP outputs, biases on attention outputs.
        residual: `[d_model]` the final norm's input.
    """

    logits: Callable[[Tensor], Tensor]
    z: dict[int, Tensor]
    added: dict[int, Callable[[Tensor], Tensor]]
    others: list[Tensor]
    residual: Tensor


def linearised(norm: Any, x: Tensor, gain_offset: float) -> Callable[[Tensor], Tensor]:
    """A norm as a linear map, without its bias: its scale is that of x."""
    centred = isinstance(norm, nn.LayerNorm)

    def centre(part: Tensor) -> Tensor:
        return part - part.mean() if centred else part

    epsilon = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
    scale = (centre(x).pow(2).mean() + epsilon).sqrt()
    return lambda part: centre(part) / scale * (gain_offset + norm.weight)


@torch.no_grad()
def frozen_run(model: HeadModel, kind: Kind, prompt: Encoded) -> Frozen:
    offset = GAIN_OFFSETS.get(kind.family, 0.0)
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(_module: Any, args: Any, kwargs: Any, output: Any) -> None:
            given, result = (args or [kwargs["hidden_states"]])[0], output[0] if isinstance(output, tuple) else output
            # OPT folds batch and sequence into one for its MLP.
            inputs[name], outputs[name] = given.flatten(end_dim=-2)[-1], result.flatten(end_dim=-2)[-1]

        return hook

    output = model.hf.get_output_embeddings()
    watched = {"final": model.hf.get_submodule(paths(kind.family)[3]), "unembedding": output}
    for index, layer in enumerate(model.layers):
        watched[f"layer {index}"] = layer
        watched[f"mlp {index}"] = layer.get_submodule(MLPS.get(kind.family, "mlp"))
        if kind.family in POST_NORMS:
            watched[f"norm {index}"] = layer.get_submodule(POST_NORMS[kind.family])
    handles = [module.register_forward_hook(keep(name), with_kwargs=True) for name, module in watched.items()]
    with hooks.capture(model, positions=torch.tensor([prompt.end])) as z:
        model_logits = model.hf(prompt.tokens[None]).logits[0, -1]
    for handle in handles:
        handle.remove()

    final = linearised(watched["final"], inputs["final"], offset)
    bias = getattr(watched["final"], "bias", None)

    def logits(x: Tensor) -> Tensor:
        return output(final(x) if bias is None else final(x) + bias)

    added: dict[int, Callable[[Tensor], Tensor]] = {}
    others = [inputs["layer 0"]]
    for index in range(N_LAYERS):
        norm = f"norm {index}"
        added[index] = linearised(watched[norm], inputs[norm], offset) if norm in inputs else lambda part: part
        projection: Any = model.projection(index)
        if projection.bias is not None:
            others.append(added[index](projection.bias))
        others.append(outputs[f"mlp {index}"])
    # The reference itself is right.
    cap = getattr(model.hf.config, "final_logit_softcapping", None)
    decoded = logits(inputs["final"])
    close(decoded, outputs["unembedding"], 1e-4)
    close(decoded if cap is None else cap * torch.tanh(decoded / cap), model_logits, 1e-4)
    return Frozen(logits, z, added, others, inputs["final"])


@torch.no_grad()
@hard_kinds
def test_direct_attribution_is_what_the_logit_loses(model: HeadModel, kind: Kind, prompt: Encoded) -> None:
    """With every norm's scale held, take a head's contribution out of the final residual and decode."""
    run = frozen_run(model, kind, prompt)
    found = attribute(model, prompt)
    for layer in range(N_LAYERS):
        for head in range(N_HEADS):
            contribution = run.added[layer](run.z[layer][0, head] @ model.output_weight(layer)[head])
            lost = run.logits(run.residual) - run.logits(run.residual - contribution)
            for name, chosen in (("target", prompt.target_tokens), ("previous", prompt.previous_tokens)):
                expected = lost[list(chosen)].mean().item()
                assert found[f"dla.{name}"][layer, head] == pytest.approx(expected, abs=1e-4)


@torch.no_grad()
def test_attributions_of_all_parts_add_up_to_the_logit(model: HeadModel, kind: Kind, prompt: Encoded) -> None:
    """All heads, the embedding, the MLPs and the biases: nothing is missing and nothing is counted twice."""
    run = frozen_run(model, kind, prompt)
    tokens = list(prompt.target_tokens)
    constant = run.logits(torch.zeros_like(run.residual))
    of_others = sum((run.logits(part) - constant)[tokens].mean().item() for part in run.others)
    total = attribute(model, prompt)["dla.target"].sum() + of_others + constant[tokens].mean().item()
    assert total == pytest.approx(run.logits(run.residual)[tokens].mean().item(), abs=1e-4)
    # The directions are those of the same decoding.
    directions = model.unembedding_directions(run.residual, torch.tensor(tokens))
    close(directions @ run.residual + constant[tokens], run.logits(run.residual)[tokens], 1e-4)


@hard_kinds
def test_lens_by_source_adds_up_to_direct_attribution(model: HeadModel, prompt: Encoded) -> None:
    found = attribute(model, prompt)
    sources = prompt.sources()
    assert set(sources) == {"subject", "previous_1", "previous_2", "first", "end", "rest"}
    for name in ("target", "previous"):
        total = sum(found[f"lens.{source}.{name}"] for source in sources)
        assert total == pytest.approx(found[f"dla.{name}"], abs=1e-5)
        both = found[f"lens.previous_1.{name}"] + found[f"lens.previous_2.{name}"]
        assert found[f"lens.previous.{name}"] == pytest.approx(both, abs=1e-6)
    assert sum(found[f"attention.{source}"] for source in sources) == pytest.approx(1, abs=1e-5)


@torch.no_grad()
def test_lens_reads_the_source_it_names(llama: HeadModel) -> None:
    """The lens of the subject, token by token: A[END, t] v[t] through W_O and the unembedding direction."""
    prompt = encode(tiny_task(subjects=1), llama.tokenizer).examples[0]
    end = torch.tensor([prompt.end])
    run = frozen_run(llama, KINDS["llama"], prompt)
    with record_rows(end) as rows:
        llama.hf(prompt.tokens[None])
    found = attribute(llama, prompt)
    for layer in range(N_LAYERS):
        for head in range(N_HEADS):
            (t,) = prompt.subject
            read = rows.pattern[layer][0, head, t] * rows.values[layer][0, head, t]
            lost = run.logits(run.residual) - run.logits(run.residual - read @ llama.output_weight(layer)[head])
            expected = lost[list(prompt.target_tokens)].mean().item()
            assert found["lens.subject.target"][layer, head] == pytest.approx(expected, abs=1e-4)
            mass = rows.pattern[layer][0, head, t].item()
            assert found["attention.subject"][layer, head] == pytest.approx(mass, abs=1e-6)


# --- hooks ------------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def no_hook_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "llama" in request.fixturenames:
        assert hook_count(request.getfixturevalue("llama")) == 0


@torch.no_grad()
def z_of(model: HeadModel, tokens: Tensor) -> dict[int, Tensor]:
    with hooks.capture(model) as z:
        model.hf(tokens)
    return z


@torch.no_grad()
def seen_by_projection(model: HeadModel, layer: int, tokens: Tensor) -> Tensor:
    """What the projection is really given: `[batch, seq, n_heads, head_dim]`."""
    given: list[Tensor] = []
    handle = model.projection(layer).register_forward_hook(lambda _m, args, _o: given.append(args[0]))
    model.hf(tokens)
    handle.remove()
    return given[0].unflatten(-1, (model.n_heads, model.head_dim))


def test_capture(llama: HeadModel) -> None:
    tokens = batch_of(llama)
    z = z_of(llama, tokens)
    assert {layer: value.shape for layer, value in z.items()} == dict.fromkeys(range(3), (3, 9, 4, 8))
    positions = torch.tensor([0, 4, 8])
    with hooks.capture(llama, layers=[1], positions=positions) as some, torch.no_grad():
        llama.hf(tokens)
    assert list(some) == [1]
    assert torch.equal(some[1], z[1][torch.arange(3), positions])


@pytest.mark.parametrize("positions", [None, torch.tensor([8, 4, 0])])
def test_edits_change_the_heads_and_positions_asked_for_and_no_other(
    llama: HeadModel, positions: Tensor | None
) -> None:
    tokens = batch_of(llama)
    clean = seen_by_projection(llama, 1, tokens)
    value = torch.arange(8.0)
    edits = {
        "scale": (hooks.scale(llama, {(1, 2): 3.0}, positions), lambda z: 3 * z),
        "ablate": (hooks.ablate(llama, [(1, 2)], positions), torch.zeros_like),
        "replace": (hooks.replace(llama, {(1, 2): value}, positions), lambda z: value.expand_as(z)),
    }
    for block, edit in edits.values():
        expected = clean.clone()
        if positions is None:
            expected[:, :, 2] = edit(clean[:, :, 2])
        else:
            rows = torch.arange(3)
            expected[rows, positions, 2] = edit(clean[rows, positions, 2])
        with block:
            close(seen_by_projection(llama, 1, tokens), expected, 1e-6)
        assert torch.equal(seen_by_projection(llama, 1, tokens), clean)


def test_replace_with_another_runs_heads_reproduces_that_run(llama: HeadModel) -> None:
    """All heads of the last layer, at END, taken from a run on other tokens, with a value per example."""
    tokens, end = batch_of(llama), torch.full((3,), 8)
    donor = z_of(llama, tokens.flip(0))
    with hooks.replace(llama, {(2, head): donor[2][:, -1, head] for head in range(4)}, end):
        seen = seen_by_projection(llama, 2, tokens)
    close(seen[:, -1], donor[2][:, -1], 1e-6)
    close(seen[:, :-1], z_of(llama, tokens)[2][:, :-1], 1e-6)


def test_several_heads_in_several_layers(llama: HeadModel) -> None:
    tokens = batch_of(llama)
    with hooks.ablate(llama, [(0, 1), (0, 3), (2, 0)]):
        assert [seen_by_projection(llama, 0, tokens)[:, :, h].any().item() for h in range(4)] == [
            True,
            False,
            True,
            False,
        ]
        assert [seen_by_projection(llama, 2, tokens)[:, :, h].any().item() for h in range(4)] == [
            False,
            True,
            True,
            True,
        ]


def test_capture_inside_and_outside_an_edit(llama: HeadModel) -> None:
    """Hooks run in the order in which they were opened, and an edit leaves what was captured before it as it was."""
    tokens = batch_of(llama)
    clean = z_of(llama, tokens)[1]
    with torch.no_grad(), hooks.capture(llama) as before, hooks.ablate(llama, [(1, 1)]), hooks.capture(llama) as after:
        llama.hf(tokens)
    assert torch.equal(before[1], clean)
    assert after[1][:, :, 1].abs().max() == 0 and torch.equal(after[1][:, :, 0], clean[:, :, 0])


def test_hooks_go_when_the_block_raises(llama: HeadModel) -> None:
    tokens = batch_of(llama)
    before = llama.hf(tokens).logits
    blocks = [
        hooks.capture(llama),
        hooks.scale(llama, {(0, 0): 2.0}),
        hooks.ablate(llama, [(1, 1)]),
        hooks.replace(llama, {(1, 1): torch.ones(8)}),
    ]
    for block in blocks:
        with pytest.raises(RuntimeError, match="boom"), block:
            assert hook_count(llama) > 0
            raise RuntimeError("boom")
        assert hook_count(llama) == 0
    assert torch.equal(llama.hf(tokens).logits, before)
