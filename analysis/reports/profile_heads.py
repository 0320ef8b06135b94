"""What single heads look at from END and what they write there: the numbers of head profiles.

For a head (l, h), over examples e, with A its attention row at END, v its values, W_O its slice of the output
projection, and J_e the linear map from the attention block's output to the unembedding (the final norm, and the block's
own norm in families that have one, at example e's own scale):

    reads        sum of A over the positions of a source, and by token string
    writes       mean_e W_U J_e (z_e W_O), less its mean over the vocabulary
    copying      W_U[token t] . J_e (v_t W_O), less the mean over the vocabulary, for the tokens t of a source: what the
                 head would do to t's own token if it attended to t alone
    one prompt   A_t, and A_t v_t W_O . u(answers) for every t, which sums to the head's direct logit attribution

All of it is direct and linear; whether it matters for what the model does is what the effects in heads.json say.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headtune.analysis.methods.scores import Array
from headtune.analysis.models import hooks
from headtune.analysis.models.attention import record_rows
from headtune.analysis.models.head_model import HeadModel
from headtune.analysis.tasks.tokenized import Encoded
from headtune.analysis.utils.errors import InputError

from .head_profiles import SOURCES, Copying, HeadProfile, Prompt, Read, Written

COPIED = ("subject", "previous")  # the sources whose tokens the copying test is made on
READ_TOKENS = 8
VOCABULARY_SAMPLE = 8192  # tokens that a token is compared with, evenly spaced over a larger vocabulary
PIECE = 8192  # rows of the unembedding decoded at a time


@dataclass(frozen=True)
class _Reading:
    """One head in one example; all vectors are `J c` of contributions c, to be decoded with the bare unembedding.

    Attributes:
        attention, target, previous: `[seq]`, see Prompt.
        written: `[d_model]`, of the head's output at END.
        by_source: source -> (token ids `[n]`, `[n, d_model]` of full attention on each of these tokens).
    """

    encoded: Encoded
    attention: Array
    target: Array
    previous: Array | None
    written: Tensor
    by_source: dict[str, tuple[Tensor, Tensor]]


@torch.no_grad()
def profile_heads(
    model: HeadModel,
    examples: Sequence[Encoded],
    heads: Sequence[tuple[int, int]],
    top_tokens: int = 10,
    max_examples: int = 40,
) -> list[HeadProfile]:
    """Profiles of `heads` (each once, in order), from at most `max_examples` examples, evenly spread over the list.

    Raises:
        InputError: no examples, or a head that the model does not have.
    """
    if not examples:
        raise InputError("head profiles need at least one example; the task has none that can be scored")
    heads = list(dict.fromkeys(heads))
    hooks.require_heads(model, heads)
    chosen = np.linspace(0, len(examples) - 1, min(len(examples), max_examples)).round().astype(int)
    readings: dict[tuple[int, int], list[_Reading]] = {head: [] for head in heads}
    for index in chosen:
        for head, reading in _read(model, examples[index], heads).items():
            readings[head].append(reading)
    return [_profile(model, head, of_head, top_tokens) for head, of_head in readings.items()]


def _read(model: HeadModel, encoded: Encoded, heads: Sequence[tuple[int, int]]) -> dict[tuple[int, int], _Reading]:
    end = torch.tensor([encoded.end], device=model.device)
    by_layer: dict[int, list[int]] = defaultdict(list)
    for layer, head in heads:
        by_layer[layer].append(head)
    post_norms = {layer: model.post_attention_norm(layer) for layer in by_layer}
    norms = [model.final_norm, *(norm for norm in post_norms.values() if norm is not None)]
    with record_rows(end) as rows, hooks.capture(model, by_layer, end) as z, hooks.watch(norms) as seen:
        model.hf(encoded.tokens[None].to(model.device), use_cache=False, logits_to_keep=1)

    def back(layer: int, directions: Tensor) -> Tensor:
        """`J^T directions`: from the unembedding to what the layer's heads write."""
        for norm in (model.final_norm, post_norms[layer]):
            if norm is not None:
                inputs = seen[norm][0]
                directions = model.norm_directions(norm, inputs[0, encoded.end], directions)
        return directions

    answers = _rows(model, torch.tensor([*encoded.target_tokens, *encoded.previous_tokens]))
    n_targets = len(encoded.target_tokens)
    positions = _positions(encoded)
    result = {}
    for layer, head in heads:
        weight = model.output_weight(layer)[head].float()  # [head_dim, d_model]
        values = rows.values[layer][0, head].to(weight)  # [seq, head_dim]
        pattern = rows.pattern[layer][0, head]
        read = weight @ back(layer, answers).to(weight).T  # [head_dim, answers]
        toward = pattern.to(weight)[:, None] * (values @ read)  # [seq, answers]

        def decodable(vectors: Tensor, layer: int = layer, weight: Tensor = weight) -> Tensor:
            return _forth(lambda u: back(layer, u).to(weight), vectors.to(weight) @ weight)

        result[layer, head] = _Reading(
            encoded,
            pattern.cpu().numpy(),
            toward[:, :n_targets].mean(-1).cpu().numpy(),
            toward[:, n_targets:].mean(-1).cpu().numpy() if encoded.previous_tokens else None,
            decodable(z[layer][0, head]),
            {source: (encoded.tokens[at], decodable(values[at])) for source in COPIED if (at := positions.get(source))},
        )
    return result


def _positions(encoded: Encoded) -> dict[str, list[int]]:
    """`Encoded.sources` with all previous answers as one."""
    merged: dict[str, list[int]] = defaultdict(list)
    for name, span in encoded.sources().items():
        merged["previous" if name.startswith("previous_") else name] += span
    return dict(merged)


def _forth(back: Callable[[Tensor], Tensor], vectors: Tensor) -> Tensor:
    """`J vectors`, given `back(u) = J^T u`: the gradient of `back(u) . vectors` with respect to u."""
    with torch.enable_grad():
        u = torch.zeros_like(vectors, requires_grad=True)
        (result,) = torch.autograd.grad((back(u) * vectors).sum(), u)
    return result


def _profile(model: HeadModel, head: tuple[int, int], readings: Sequence[_Reading], top: int) -> HeadProfile:
    typical = _typical(readings)
    average = torch.stack([reading.written for reading in readings]).mean(0)
    (raises, lowers), (more, less) = _written(model, torch.stack([average, typical.written - average]), top)
    encoded = typical.encoded
    by_position = {t: name for name, span in encoded.sources().items() for t in span}
    return HeadProfile(
        *head,
        examples=len(readings),
        attention=_masses(readings),
        reads=_most_read(model, readings),
        raises=raises,
        lowers=lowers,
        copying={
            source: _copying(model, readings, source)
            for source in COPIED
            if any(source in reading.by_source for reading in readings)
        },
        prompt=Prompt(
            tuple(_strings(model, encoded.tokens)),
            tuple(by_position[t] for t in range(len(encoded.tokens))),
            tuple(typical.attention.tolist()),
            tuple(typical.target.tolist()),
            None if typical.previous is None else tuple(typical.previous.tolist()),
            tuple(_strings(model, encoded.target_tokens)),
            tuple(_strings(model, encoded.previous_tokens)),
            more,
            less,
        ),
    )


def _typical(readings: Sequence[_Reading]) -> _Reading:
    """The example with attributions closest to the medians, each distance in units of its median; with previous answers
    where any has them."""
    listing = [reading for reading in readings if reading.previous is not None] or list(readings)
    toward = np.array([[parts.sum() for parts in (r.target, r.previous) if parts is not None] for r in listing])
    distance = np.abs(toward - np.median(toward, axis=0))
    unit = np.median(distance, axis=0)
    return listing[int(np.argmin((distance / np.where(unit > 0, unit, 1)).sum(-1)))]


def _masses(readings: Sequence[_Reading]) -> dict[str, float]:
    """Mean attention mass by source, all previous answers together; an example without a source gives it none."""
    total: dict[str, float] = {}
    for reading in readings:
        for source, span in _positions(reading.encoded).items():
            total[source] = total.get(source, 0.0) + float(reading.attention[span].sum())
    return {source: total[source] / len(readings) for source in SOURCES if source in total}


def _most_read(model: HeadModel, readings: Sequence[_Reading]) -> tuple[Read, ...]:
    masses: dict[str, list[float]] = defaultdict(list)
    for reading in readings:
        here: dict[str, float] = defaultdict(float)
        for token, mass in zip(_strings(model, reading.encoded.tokens), reading.attention.tolist(), strict=True):
            here[token] += mass
        for token, mass in here.items():
            masses[token].append(mass)
    reads = [Read(token, float(np.mean(each)), len(each)) for token, each in masses.items()]
    return tuple(sorted(reads, key=lambda read: -read.mass)[:READ_TOKENS])


def _written(model: HeadModel, vectors: Tensor, top: int) -> list[tuple[tuple[Written, ...], tuple[Written, ...]]]:
    """What each of `vectors` (`[n, d_model]`) raises and lowers most, up to `top` tokens each."""
    weight = _unembedding(model)
    vectors = vectors.to(weight.device)
    # In pieces: a half-precision unembedding is never held in float32 as a whole.
    logits = torch.cat([rows.float() @ vectors.T for rows in weight.split(PIECE)]).T  # [n, vocabulary]
    logits = logits - logits.mean(-1, keepdim=True)
    result = []
    for row in logits:
        high, low = row.topk(min(top, len(row))), row.topk(min(top, len(row)), largest=False)
        raised = zip(_strings(model, high.indices), high.values.tolist(), strict=True)
        lowered = zip(_strings(model, low.indices), low.values.tolist(), strict=True)
        # Of a vector that is all zero, nothing.
        result.append(
            (
                tuple(Written(token, value) for token, value in raised if value > 0),
                tuple(Written(token, value) for token, value in lowered if value < 0),
            )
        )
    return result


def _copying(model: HeadModel, readings: Sequence[_Reading], source: str) -> Copying:
    having = [reading for reading in readings if source in reading.by_source]
    tokens = torch.cat([reading.by_source[source][0] for reading in having])  # [n]
    vectors = torch.cat([reading.by_source[source][1] for reading in having])  # [n, d_model]
    weight = _unembedding(model)
    mean = vectors @ weight.mean(0, dtype=torch.float32).to(vectors)
    logits = (_rows(model, tokens).to(vectors) * vectors).sum(-1)
    sample = torch.arange(0, len(weight), -(-len(weight) // VOCABULARY_SAMPLE))
    # Not the token itself: the same product, summed in another order, may come out a little larger.
    rivals = (sample[None] != tokens[:, None]).to(vectors.device)
    above = ((vectors @ _rows(model, sample).to(vectors).T > logits[:, None]) & rivals).sum(-1) / rivals.sum(-1)
    distinct = tokens.unique()
    prompts = [set(reading.encoded.tokens.tolist()) for reading in having for _ in reading.by_source[source][0]]
    elsewhere = torch.tensor([[int(token) not in prompt for token in distinct] for prompt in prompts])  # [n, distinct]
    others = (vectors @ _rows(model, distinct).to(vectors).T - mean[:, None])[elsewhere.to(vectors.device)]
    return Copying(
        tokens=len(tokens),
        own=float((logits - mean).mean()),
        others=float(others.mean()) if len(others) else None,
        above=float(above.median()),
    )


def _unembedding(model: HeadModel) -> Tensor:
    """`[vocabulary, d_model]`, less the rows beyond the tokenizer's vocabulary: padding, which no text has."""
    weight: Any = model.hf.get_output_embeddings().weight
    rows: Tensor = weight[: len(model.tokenizer)]
    return rows


def _rows(model: HeadModel, tokens: Tensor) -> Tensor:
    """Rows of the unembedding in float32, `[n, d_model]`."""
    weight = _unembedding(model)
    return weight[tokens.to(weight.device)].float()


def _strings(model: HeadModel, tokens: Iterable[int] | Tensor) -> list[str]:
    """Each token as it reads within a text: decoded alone, some tokenizers drop its leading space."""
    decode: Any = model.tokenizer.decode
    before = model.tokenizer("a", add_special_tokens=False).input_ids
    prefix = decode(before)
    return [decode([*before, int(token)])[len(prefix) :] for token in tokens]
