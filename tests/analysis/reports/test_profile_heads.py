"""Portraits against references that are written out: eager attention, explicit norms, one vocabulary row at a time."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from headtune.analysis.methods.logit_attribution import attribute
from headtune.analysis.models import hooks
from headtune.analysis.models.architectures import ARCHITECTURES
from headtune.analysis.models.attention import record_rows
from headtune.analysis.models.head_model import HeadModel
from headtune.analysis.models.loading import wrap_model
from headtune.analysis.reports.head_profiles import HeadProfile
from headtune.analysis.reports.profile_heads import READ_TOKENS, profile_heads
from headtune.analysis.tasks.task import Task
from headtune.analysis.tasks.tokenized import Encoded, encode
from headtune.analysis.utils.errors import InputError
from helpers.tiny import KINDS, Kind, tiny_model, tiny_task, tiny_tokenizer

GAIN_OFFSETS = {"gemma": 1.0, "gemma2": 1.0, "gemma3_text": 1.0}
HEADS = [(0, 1), (2, 3), (1, 0)]


@pytest.fixture(scope="module", params=["llama-gqa", "gpt2", "gemma2", "gemma3", "phi"])
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


@pytest.fixture(scope="module")
def model(kind: Kind) -> HeadModel:
    return wrap_model(tiny_model(kind.family, **kind.config), tiny_tokenizer())


@pytest.fixture(scope="module")
def examples(model: HeadModel) -> list[Encoded]:
    return encode(tiny_task(subjects=4), model.tokenizer).examples


def listing(model: HeadModel, previous: tuple[int, ...] = (2,)) -> list[Encoded]:
    return encode(tiny_task(previous, subjects=4), model.tokenizer).examples


def linearised(norm: Any, x: Tensor, offset: float) -> Callable[[Tensor], Tensor]:
    """A norm as a linear map: its scale is that of x."""
    centred = isinstance(norm, nn.LayerNorm)
    epsilon = norm.eps if hasattr(norm, "eps") else norm.variance_epsilon
    centre = (lambda part: part - part.mean(-1, keepdim=True)) if centred else (lambda part: part)
    scale = (centre(x).pow(2).mean() + epsilon).sqrt()
    return lambda part: centre(part) / scale * (offset + norm.weight)


@torch.no_grad()
def decode(model: HeadModel, kind: Kind, encoded: Encoded, layer: int) -> Callable[[Tensor], Tensor]:
    """Part of the layer's attention output, `[..., d_model]` -> its part of the logits at END, `[..., vocabulary]`."""
    offset = GAIN_OFFSETS.get(kind.family, 0.0)
    norms = [model.hf.get_submodule(ARCHITECTURES[kind.family].final_norm)]
    if kind.family in ("gemma2", "gemma3_text"):
        norms.insert(0, model.layers[layer].get_submodule("post_attention_layernorm"))
    inputs: dict[nn.Module, Tensor] = {}
    handles = [
        norm.register_forward_hook(lambda module, args, _output: inputs.update({module: args[0][0, -1]}))
        for norm in norms
    ]
    model.hf(encoded.tokens[None])
    for handle in handles:
        handle.remove()
    weight: Any = model.hf.get_output_embeddings().weight

    def through(part: Tensor) -> Tensor:
        for norm in norms:
            part = linearised(norm, inputs[norm], offset)(part)
        return part @ weight[: len(model.tokenizer)].T

    return through


@torch.no_grad()
def rows_of(model: HeadModel, encoded: Encoded) -> tuple[Any, dict[int, Tensor]]:
    """Attention rows with values, and z at END."""
    end = torch.tensor([encoded.end])
    with record_rows(end) as rows, hooks.capture(model, positions=end) as z:
        model.hf(encoded.tokens[None])
    return rows, z


def values(written: Any) -> list[float]:
    return [entry.logits for entry in written]


def test_one_prompt_is_the_attention_row_and_sums_to_direct_attribution(
    model: HeadModel, kind: Kind, examples: list[Encoded]
) -> None:
    encoded = examples[1]
    found = attribute(model, encoded)
    rows, _ = rows_of(model, encoded)
    for card in profile_heads(model, [encoded], HEADS):
        at = card.layer, card.head
        prompt = card.prompt
        assert prompt.attention == pytest.approx(rows.pattern[card.layer][0, card.head].tolist(), abs=1e-6)
        assert sum(prompt.attention) == pytest.approx(1, abs=1e-5)
        assert prompt.previous is not None
        assert sum(prompt.target) == pytest.approx(found["dla.target"][at], abs=1e-4)
        assert sum(prompt.previous) == pytest.approx(found["dla.previous"][at], abs=1e-4)
        # Token by token, through explicit norms.
        decoded = decode(model, kind, encoded, card.layer)
        weight = model.output_weight(card.layer)[card.head]
        for t in range(len(encoded.tokens)):
            part = rows.pattern[card.layer][0, card.head, t] * rows.values[card.layer][0, card.head, t]
            logits = decoded(part @ weight)
            assert prompt.target[t] == pytest.approx(logits[list(encoded.target_tokens)].mean().item(), abs=1e-4)
            assert prompt.previous[t] == pytest.approx(logits[list(encoded.previous_tokens)].mean().item(), abs=1e-4)


def test_masses_are_the_mean_attention_by_source(model: HeadModel, examples: list[Encoded]) -> None:
    found = [attribute(model, encoded) for encoded in examples]
    for card in profile_heads(model, examples, HEADS):
        assert sum(card.attention.values()) == pytest.approx(1, abs=1e-5)
        assert list(card.attention) == ["subject", "previous", "first", "end", "rest"]
        for source, mass in card.attention.items():
            expected = sum(row[f"attention.{source}"][card.layer, card.head] for row in found) / len(found)
            assert mass == pytest.approx(expected, abs=1e-5)


def test_what_it_writes_is_the_mean_of_its_decoded_outputs(
    model: HeadModel, kind: Kind, examples: list[Encoded]
) -> None:
    size = len(model.tokenizer)
    for card in profile_heads(model, examples, HEADS, top_tokens=size):
        decoded = []
        for encoded in examples:
            _, z = rows_of(model, encoded)
            output = z[card.layer][0, card.head] @ model.output_weight(card.layer)[card.head]
            decoded.append(decode(model, kind, encoded, card.layer)(output))
        mean = torch.stack(decoded).mean(0)
        mean = mean - mean.mean()
        assert values(card.raises) == pytest.approx(sorted(mean[mean > 0].tolist(), reverse=True), abs=1e-4)
        assert values(card.lowers) == pytest.approx(sorted(mean[mean < 0].tolist()), abs=1e-4)
        assert card.raises[0].token == model.tokenizer.decode([int(mean.argmax())])
        # The one prompt: beyond the average.
        here = next(index for index, e in enumerate(examples) if strings(model, e) == card.prompt.tokens)
        beyond = decoded[here] - torch.stack(decoded).mean(0)
        beyond = beyond - beyond.mean()
        assert values(card.prompt.raises[:20]) == pytest.approx(beyond.topk(20).values.tolist(), abs=1e-4)
        assert values(card.prompt.lowers[:20]) == pytest.approx(beyond.sort().values[:20].tolist(), abs=1e-4)


def strings(model: HeadModel, encoded: Encoded) -> tuple[str, ...]:
    return tuple(model.tokenizer.decode([int(token)]) for token in encoded.tokens)


def test_copying_is_the_own_token_s_logit_under_full_attention(
    model: HeadModel, kind: Kind, examples: list[Encoded]
) -> None:
    for card in profile_heads(model, examples, HEADS):
        assert list(card.copying) == ["subject", "previous"]
        for source, test in card.copying.items():
            own, above, others = [], [], []
            vocabulary = {
                int(e.tokens[t]) for e in examples for t in (e.subject if source == "subject" else sum(e.previous, ()))
            }
            for encoded in examples:
                rows, _ = rows_of(model, encoded)
                decoded = decode(model, kind, encoded, card.layer)
                for t in encoded.subject if source == "subject" else sum(encoded.previous, ()):
                    value = rows.values[card.layer][0, card.head, t]
                    logits = decoded(value @ model.output_weight(card.layer)[card.head]).detach()
                    token = int(encoded.tokens[t])
                    own.append(logits[token] - logits.mean())
                    others += [logits[i] - logits.mean() for i in vocabulary - set(encoded.tokens.tolist())]
                    larger = sum(float(logits[i]) > float(logits[token]) for i in range(len(logits)) if i != token)
                    above.append(larger / (len(logits) - 1))
            assert test.tokens == len(own)
            assert test.own == pytest.approx(torch.stack(own).mean().item(), abs=1e-4)
            assert test.others == pytest.approx(torch.stack(others).mean().item(), abs=1e-4)
            assert test.above == pytest.approx(torch.tensor(above).median().item(), abs=2 / len(logits))


def planted(sign: float) -> HeadModel:
    """Head 1 of layer 1 writes +-its attended token: embeddings are orthogonal, its OV circuit is the identity."""
    model = tiny_model("llama", hidden_size=512, num_attention_heads=2, num_key_value_heads=2, head_dim=512)
    size = len(tiny_tokenizer())
    with torch.no_grad():
        table = torch.linalg.qr(torch.randn(size, 512, generator=torch.Generator().manual_seed(0)))[0]
        table = table / table.norm(dim=-1, keepdim=True)
        model.model.embed_tokens.weight.copy_(table)
        model.lm_head.weight.copy_(table)
        for layer in model.model.layers:
            layer.mlp.down_proj.weight.zero_()
            layer.self_attn.o_proj.weight.zero_()
            layer.input_layernorm.weight.fill_(1)
        model.model.norm.weight.fill_(1)
        attention = model.model.layers[1].self_attn
        attention.v_proj.weight[512:] = torch.eye(512)
        attention.o_proj.weight[:, 512:] = sign * torch.eye(512)
        # Head 0 of layer 2 writes the same vector whatever it attends to: it copies nothing.
        model.model.layers[2].self_attn.o_proj.weight[:, :512] = 0.01 * torch.randn(512, 512)
        # The view wants every head to matter.
        for layer in (0, 2):
            model.model.layers[layer].self_attn.o_proj.weight.add_(1e-3 * torch.randn(512, 1024))
    return wrap_model(model, tiny_tokenizer())


@pytest.mark.parametrize(("sign", "verdict"), [(1.0, "copies"), (-1.0, "suppresses")])
def test_a_planted_head_is_seen_to_copy_or_to_suppress(sign: float, verdict: str) -> None:
    model = planted(sign)
    copier, other = profile_heads(model, listing(model), [(1, 1), (2, 0)])
    for test in copier.copying.values():
        assert test.verdict == verdict and test.own * sign > 0.1
        assert test.others is not None and abs(test.others) < abs(test.own) / 5
    assert {test.verdict for test in other.copying.values()} == {"neither"}


def test_the_tokens_most_attended_where_they_occur(llama: HeadModel) -> None:
    examples = listing(llama)
    (card,) = profile_heads(llama, examples, [(1, 2)])
    by_string: dict[str, list[float]] = {}
    for encoded in examples:
        rows, _ = rows_of(llama, encoded)
        here: dict[str, float] = {}
        for token, mass in zip(strings(llama, encoded), rows.pattern[1][0, 2].tolist(), strict=True):
            here[token] = here.get(token, 0) + mass
        for token, mass in here.items():
            by_string.setdefault(token, []).append(mass)
    expected = sorted(by_string.items(), key=lambda item: -sum(item[1]) / len(item[1]))[:READ_TOKENS]
    assert [(read.token, read.examples) for read in card.reads] == [(token, len(each)) for token, each in expected]
    assert [read.mass for read in card.reads] == pytest.approx([sum(each) / len(each) for _, each in expected])


def test_the_prompt_shown_is_the_most_typical_one(llama: HeadModel) -> None:
    """Of three copies of one example, and others, the median is among the copies."""
    examples = listing(llama)
    many = [examples[2]] * 3 + [examples[0], examples[5]]
    for card in profile_heads(llama, many, HEADS):
        assert card.prompt.tokens == strings(llama, examples[2])
    # Several prompts, by the definition.
    found = [attribute(llama, encoded) for encoded in examples]
    for card in profile_heads(llama, examples, HEADS):
        at = card.layer, card.head
        distance = torch.zeros(len(examples))
        for name in ("dla.target", "dla.previous"):
            x = torch.tensor([float(row[name][at]) for row in found], dtype=torch.float64)
            gap = (x - x.quantile(0.5)).abs()
            distance += gap / gap.quantile(0.5)
        assert card.prompt.tokens == strings(llama, examples[int(distance.argmin())])


def test_sources_and_answers_of_the_prompt(llama: HeadModel) -> None:
    encoded = listing(llama)[0]
    (card,) = profile_heads(llama, [encoded], [(0, 0)])
    assert "".join(card.prompt.tokens) == encoded.example.prompt
    read = {name: [t for t, of in enumerate(card.prompt.sources) if of == name] for name in encoded.sources()}
    assert read == encoded.sources()
    assert len(card.prompt.targets) == len(encoded.target_tokens)
    assert set(card.prompt.given) <= {" " + answer.split()[0] for answer in encoded.example.previous}
    # One example differs in nothing from its average.
    assert card.prompt.raises == card.prompt.lowers == ()


def test_single_facts_have_no_previous_answers(llama: HeadModel) -> None:
    (card,) = profile_heads(llama, listing(llama, previous=(0,)), [(1, 1)])
    assert card.prompt.previous is None and card.prompt.given == ()
    assert "previous" not in card.attention and list(card.copying) == ["subject"]
    assert sum(card.attention.values()) == pytest.approx(1, abs=1e-5)


def test_among_both_kinds_a_prompt_with_previous_answers_is_shown(llama: HeadModel) -> None:
    single, several = listing(llama, (0,)), listing(llama)
    (card,) = profile_heads(llama, single + several[:1], [(1, 1)])
    assert card.prompt.tokens == strings(llama, several[0])
    assert sum(card.attention.values()) == pytest.approx(1, abs=1e-5)
    (alone,) = profile_heads(llama, several[:1], [(1, 1)])
    n = len(single) + 1
    assert card.attention["previous"] == pytest.approx(alone.attention["previous"] / n, abs=1e-6)
    assert card.copying["previous"].own == pytest.approx(alone.copying["previous"].own, abs=1e-5)


def test_examples_are_limited_evenly_and_heads_drawn_once(llama: HeadModel) -> None:
    examples = listing(llama)
    cards = profile_heads(llama, examples, [(1, 1), (0, 0), (1, 1)], max_examples=3)
    assert [(card.layer, card.head) for card in cards] == [(1, 1), (0, 0)]
    assert all(card.examples == 3 for card in cards)
    picked = [examples[0], examples[round((len(examples) - 1) / 2)], examples[-1]]
    assert cards == profile_heads(llama, picked, [(1, 1), (0, 0)])
    assert profile_heads(llama, examples, []) == []


def test_a_profile_survives_json(llama: HeadModel) -> None:
    for card in profile_heads(llama, listing(llama), HEADS):
        text = json.dumps(card.to_json(), allow_nan=False)
        assert HeadProfile.from_json(json.loads(text)) == card


def test_bad_requests_are_refused(llama: HeadModel) -> None:
    with pytest.raises(InputError, match="L9H0 is out of range"):
        profile_heads(llama, listing(llama), [(9, 0)])
    with pytest.raises(InputError, match="at least one example"):
        profile_heads(llama, [], [(0, 0)])


def test_half_precision_gives_the_same_profile(llama: HeadModel) -> None:
    examples = listing(llama)
    half = wrap_model(tiny_model("llama", num_key_value_heads=2).to(torch.bfloat16), tiny_tokenizer())
    for exact, rounded in zip(profile_heads(llama, examples, HEADS), profile_heads(half, examples, HEADS), strict=True):
        assert rounded.attention == pytest.approx(exact.attention, abs=0.02)
        assert values(rounded.raises) == pytest.approx(values(exact.raises), rel=0.1, abs=0.05)


def test_padding_rows_of_the_unembedding_are_no_tokens(llama: HeadModel) -> None:
    size = len(llama.tokenizer)
    padded = tiny_model("llama", num_key_value_heads=2, vocab_size=size + 64)
    with torch.no_grad():
        plain: Any = llama.hf
        padded.model.load_state_dict(
            {**plain.model.state_dict(), "embed_tokens.weight": padded.model.embed_tokens.weight}
        )
        padded.model.embed_tokens.weight[:size] = plain.model.embed_tokens.weight
        padded.lm_head.weight[:size] = plain.lm_head.weight
        padded.lm_head.weight[size:] = 1e3
    examples = listing(llama)
    padded_profiles = profile_heads(wrap_model(padded, tiny_tokenizer()), examples, HEADS)
    for with_padding, without in zip(padded_profiles, profile_heads(llama, examples, HEADS), strict=True):
        assert values(with_padding.raises) == pytest.approx(values(without.raises), abs=1e-5)
        assert with_padding.copying["subject"].above == without.copying["subject"].above


def test_a_task_of_one_prompt_has_no_others() -> None:
    model = wrap_model(tiny_model("gpt2"), tiny_tokenizer())
    task = tiny_task(subjects=1)
    examples = encode(Task("one", task.examples[:1]), model.tokenizer).examples
    (card,) = profile_heads(model, examples, [(0, 0)])
    assert card.copying["subject"].others is None
