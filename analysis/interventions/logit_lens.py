"""Decoding parts of a run: attention and MLP outputs, the Token Lens of heads, and answers as whole strings.

    decoded[part](token) = u(token) . part            u: the unembedding through the final norm, at the run's own scale
    lens[S, l, h](token) = sum_{t in S} A[l, h, last, t] v[l, h, t] . (W_O[l, h]^T u(token))

so the parts of a run add up to its logits (before a cap, where a model has one), and Token Lenses of sources that
partition the positions add up to what the heads wrote. First tokens may be shared between answers; `string_logprobs`
scores whole answers instead. Source: Yan & Jia 2025, section 3, whose Token Lens is per layer: the sum over its heads.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedTokenizerBase

from headtune.analysis.models import hooks
from headtune.analysis.models.attention import AttentionCall, attend_with, masked, softcapped
from headtune.analysis.models.head_model import HeadModel
from headtune.analysis.tasks.answer_starts import answer_rows
from headtune.analysis.tasks.tokenized import Encoded, continuation
from headtune.analysis.utils.errors import InputError

from .batches import rows_in_memory
from .intervention import CLEAN, Activation, Intervention, InterventionResult
from .last_token import LastTokenRunner

PARTS: tuple[Activation, ...] = ("attention", "mlp", "residual")  # what `decode` needs recorded


@dataclass(frozen=True)
class Decoded:
    """The logits of chosen tokens at the last token, part by part, float32.

    Attributes:
        attention, mlp: `[rows, n_layers, n_tokens]` of what each layer's attention and MLP add to the residual stream.
        start: `[rows, n_tokens]` of what enters the first layer.
        constant: `[n_tokens]` from the biases of the final norm and of the unembedding.
    """

    attention: Tensor
    mlp: Tensor
    start: Tensor
    constant: Tensor

    @property
    def logits(self) -> Tensor:
        """`[rows, n_tokens]`, the sum of all parts: the logits, before a cap where the model has one."""
        return self.attention.sum(1) + self.mlp.sum(1) + self.start + self.constant


@torch.no_grad()
def decode(model: HeadModel, result: InterventionResult, tokens: Tensor) -> Decoded:
    """Decode the rows of a result with PARTS recorded, each with its own run's final-norm scale.

    Args:
        tokens: `[n]` token ids.
    """
    attention, mlp, residual = (result.activations[name].float() for name in PARTS)
    start = residual - attention.sum(1) - mlp.sum(1)
    parts = torch.cat([attention, mlp, start[:, None]], 1)  # [rows, 2 * n_layers + 1, d_model]
    directions = torch.stack([model.unembedding_directions(row, tokens) for row in residual])
    decoded = torch.einsum("rpm,rnm->rpn", parts, directions.to(parts))
    n = model.n_layers
    return Decoded(decoded[:, :n], decoded[:, n : 2 * n], decoded[:, -1], _constant(model, tokens).to(parts))


def _constant(model: HeadModel, tokens: Tensor) -> Tensor:
    unembedding = model.hf.get_output_embeddings()
    weight: Tensor = unembedding.weight
    chosen = tokens.to(weight.device)
    constant = torch.zeros(len(tokens), device=weight.device)
    norm_bias, bias = getattr(model.final_norm, "bias", None), getattr(unembedding, "bias", None)
    if norm_bias is not None:
        constant = constant + weight[chosen].float() @ norm_bias.to(weight.device).float()
    return constant if bias is None else constant + bias[chosen].float()


@torch.no_grad()
def token_lens(runner: LastTokenRunner, sources: Mapping[str, Sequence[int]], tokens: Tensor) -> Tensor:
    """What each head reads from each group of positions at the last token, decoded toward tokens.

    Sum over heads for the Token Lens of a layer.

    Args:
        runner: of the prompt.
        sources: name -> positions; groups may overlap or be empty.
        tokens: `[n]` token ids.

    Returns:
        `[len(sources), n_layers, n_heads, n]` float32 logits.

    Raises:
        InputError: a position that the prompt does not have.
    """
    model, seq = runner.model, len(runner.tokens)
    # Which positions each source holds.
    membership = torch.zeros(len(sources), seq, device=model.device)
    for row, (name, positions) in enumerate(sources.items()):
        if outside := [position for position in positions if not 0 <= position < seq]:
            raise InputError(
                f"source {name!r} has position {outside[0]}; expected 0 to {seq - 1}, the prompt's positions"
            )
        membership[row, list(positions)] = 1
    # The clean run, and the directions that decode what heads read in it.
    activations = {
        name: tensor[0]
        for name, tensor in runner.run([CLEAN], record=["pattern", "value", "z", "residual"]).activations.items()
    }
    directions = model.unembedding_directions(activations["residual"], tokens)
    group = model.n_heads // model.n_kv_heads
    # Layer by layer: attention to a source times values, decoded.
    lens = []
    for layer in range(model.n_layers):
        weight = model.output_weight(layer).float()  # [heads, head_dim, d_model]
        through = directions.to(weight)
        if (norm := model.post_attention_norm(layer)) is not None:
            output = torch.einsum("hd,hdm->m", activations["z"][layer].to(weight), weight)
            bias: Tensor | None = model.projection(layer).bias  # type: ignore[assignment]
            through = model.norm_directions(norm, output if bias is None else output + bias.float(), through).to(weight)
        past = runner.values[layer].repeat_interleave(group, 0).to(weight)  # [heads, seq - 1, head_dim]
        values = torch.cat([past, activations["value"][layer][:, None].to(weight)], 1)
        weights = membership.to(weight)[:, None] * activations["pattern"][layer].to(weight)  # [sources, heads, seq]
        read = torch.einsum("hdm,nm->hdn", weight, through)
        lens.append(torch.einsum("ght,htd,hdn->ghn", weights, values, read).to(model.device))
    return torch.stack(lens, 1)


# --- whole strings ----------------------------------------------------------------------------------------------------


def answer_tokens(tokenizer: PreTrainedTokenizerBase, encoded: Encoded, answer: str) -> tuple[int, ...] | None:
    """All tokens of an answer after `encoded.tokens`; None where tokens merge across the border: there are none."""
    prompt = encoded.example.prompt
    texts = {answer: prompt + continuation(prompt, answer)}
    for special in (True, False):  # a chat template has written its own special tokens
        if row := answer_rows(tokenizer, texts, encoded.tokens.tolist(), special)[answer]:
            return row
    return None


@torch.no_grad()
def string_logprobs(
    model: HeadModel, tokens: Tensor, answers: Sequence[Sequence[int]], rows: Sequence[Intervention] = (CLEAN,)
) -> Tensor:
    """Log probability that what follows the prompt begins with an answer, all its tokens, under interventions.

    `sum_i log p(answer_i | prompt, answer_<i)`. A row's changes hold at the last token and at every later position of
    the answer; what stands before the last token is the clean run, computed once. An answer that begins another one
    ("New York", "New York City") includes the other's probability.

    Args:
        tokens: `[seq]` ids of the prompt.
        answers: token ids of each answer, none empty.
        rows: what to change: factors and outputs of heads, and knocked-out positions.

    Returns:
        `[len(rows), len(answers)]` float32 nats.

    Raises:
        InputError: an empty answer, a prompt of one token, or a row that changes queries, keys or values or freezes.
    """
    if len(tokens) < 2:
        raise InputError(
            f"the prompt has {len(tokens)} token; whole answers need at least two, so that one stands before the last"
        )
    if not all(len(answer) for answer in answers):
        raise InputError("an answer has no tokens; leave out answers whose tokens merge with the prompt's")
    for row in rows:
        if row.queries or row.keys or row.values or row.freeze != "nothing":
            raise InputError(
                "whole answers are scored with head outputs or attention changed, not with queries, keys or values, or "
                "frozen parts; use factors, outputs or knocked_out"
            )
    # What stands before the last token is run once, then each chunk of answers after each row.
    tokens = tokens.to(model.device)
    before = DynamicCache()
    model.hf(tokens[None, :-1], past_key_values=before, use_cache=True, logits_to_keep=1)
    longest = max((len(answer) for answer in answers), default=1)
    # Every position has logits of its own here, where the estimate counts them once a row.
    size = max(1, rows_in_memory(model, len(tokens) + longest, positions=longest) // longest)
    result = torch.zeros(len(rows), len(answers), device=model.device)
    for start in range(0, len(answers), size):
        chunk = answers[start : start + size]
        for index, row in enumerate(rows):
            result[index, start : start + size] = _after(model, tokens, chunk, row, copy.deepcopy(before))
    return result


def _after(
    model: HeadModel, tokens: Tensor, answers: Sequence[Sequence[int]], row: Intervention, cache: DynamicCache
) -> Tensor:
    longest = max(len(answer) for answer in answers)
    targets = torch.zeros(len(answers), longest, dtype=torch.long, device=tokens.device)
    present = torch.zeros(len(answers), longest, dtype=torch.bool, device=tokens.device)
    for index, answer in enumerate(answers):
        targets[index, : len(answer)] = torch.tensor(list(answer), device=tokens.device)
        present[index, : len(answer)] = True
    cache.batch_repeat_interleave(len(answers))
    inputs = torch.cat(
        [tokens[-1:].expand(len(answers), 1), targets[:, :-1]], 1
    )  # the last token, then the answer less its last token
    positions = torch.arange(len(tokens) - 1, len(tokens) - 1 + longest, device=tokens.device)[None]

    def attend(call: AttentionCall) -> Tensor | None:
        return _knocked_out(call, row) if row.knocked_out and (row.layers is None or call.layer in row.layers) else None

    with attend_with(attend), hooks.scale(model, row.factors), hooks.replace(model, row.outputs):
        logits = model.hf(inputs, past_key_values=cache, position_ids=positions, use_cache=True).logits
    chosen = logits.float().log_softmax(-1).gather(-1, targets.to(logits.device)[..., None])[..., 0]
    return (chosen * present.to(chosen)).sum(-1).to(tokens.device)


def _knocked_out(call: AttentionCall, row: Intervention) -> Tensor:
    """`[batch, queries, n_heads, head_dim]` attention of all queries with a row's positions knocked out."""
    group = call.query.shape[1] // call.key.shape[1]
    key, value = call.key.float().repeat_interleave(group, 1), call.value.float().repeat_interleave(group, 1)
    scores = softcapped(call.query.float() @ key.transpose(2, 3) * call.scaling, call.softcap)
    n_queries, n_keys = scores.shape[-2:]
    causal = torch.ones(n_queries, n_keys, dtype=torch.bool, device=scores.device).tril(n_keys - n_queries)
    pattern = masked(scores, causal if call.mask is None else call.mask[..., :n_keys]).softmax(-1)
    pattern[..., list(row.knocked_out)] = 0
    if row.renormalise:
        left = pattern.sum(-1, keepdim=True)
        pattern = pattern / left.clamp(min=torch.finfo(left.dtype).tiny)  # nothing left: no output, not NaN
    return (pattern @ value).transpose(1, 2).to(call.query.dtype)
