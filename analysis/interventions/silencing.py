"""Heads silenced at every position, in any forward pass: whole prompts, padded batches, decoding with a cache.

    with silence(model, [(18, 6), (17, 3)], "zero"):
        model.hf.generate(...)

    zero        z[l, h, q] := 0
    mean        z[l, h, q] := mean of z[l, h] over the positions of the neutral text
    uniform     z[l, h, q] := mean of v[l, h, k] over the keys k that q sees
    streaming   attention to the first SINK and the last RECENT keys alone, renormalised

`uniform` does not remove a head: it puts the average of all values in its place, which also breaks heads that do
nothing for the task. Read it beside its random control. (Masking in Wu et al. 2024, arXiv 2404.15574, is one or the
other, by the code path; streaming heads are those of DuoAttention, Xiao et al. 2024, arXiv 2410.10819.)
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from headtune.analysis.models import hooks
from headtune.analysis.models.attention import AttentionCall, head_log_rows, look_with
from headtune.analysis.models.head_model import HeadModel
from headtune.analysis.tasks.neutral import neutral_text
from headtune.analysis.tasks.prompt_tokens import prefix_ids, token_ids
from headtune.analysis.utils.errors import CheckError, InputError, nearest

from .intervention import Head
from .last_layer import first_from_end

How = Literal["zero", "mean", "uniform", "streaming"]
HOWS: tuple[How, ...] = ("zero", "mean", "uniform", "streaming")
SINK, RECENT = 4, 64  # keys that a streaming head sees: the first, and the last with the query's own
_QUERIES = 64  # attention rows at a time
_WINDOW = 512  # tokens of text at a time

# (call, heads, queries `[batch, T]`) -> attention weights `[batch, heads, T, keys]`
Weights = Callable[[AttentionCall, Sequence[int], Tensor], Tensor]


def silence(model: HeadModel, heads: Sequence[Head], how: str = "zero") -> contextlib.AbstractContextManager[None]:
    """Silence heads, at all positions, for the length of a `with` block.

    Args:
        heads: (layer, head).
        how: one of HOWS. `mean` runs the model over the neutral text now, before the block.

    Raises:
        InputError: an unknown `how`, or no such head; inside the block, for `streaming`: an attention mask that is not
            `[batch, positions]`, or a cache other than transformers' DynamicCache.
        CheckError: inside the block: attention was replaced, so that its weights cannot be changed.
    """
    if how not in HOWS:
        raise InputError(f"how {how!r} is no way to silence a head; {nearest(how, HOWS, listed=True)}")
    hooks.require_heads(model, heads)
    if how == "zero":
        return hooks.ablate(model, heads)
    if how == "mean":
        return hooks.replace(model, mean_outputs(model, heads))
    return _reweighted(model, heads, _uniform) if how == "uniform" else _streaming(model, heads)


@torch.no_grad()
def mean_outputs(model: HeadModel, heads: Sequence[Head], text: str | None = None) -> dict[Head, Tensor]:
    """Head -> `[head_dim]` float32, its mean output over all positions of a text, in windows of 512 tokens.

    In front of every window stands what the tokenizer puts in front of a text; the mean leaves it out.

    Args:
        text: default: the neutral text, which no task is about.
    """
    prefix = prefix_ids(model.tokenizer)
    tokens = token_ids(model.tokenizer, [neutral_text() if text is None else text])[0][len(prefix) :]
    window = min(_WINDOW, model.positions or _WINDOW) - len(prefix)
    total = {(layer, head): torch.zeros(model.head_dim) for layer, head in heads}
    for start in range(0, len(tokens), window):
        inputs = torch.tensor([prefix + tokens[start : start + window]], device=model.device)
        with hooks.capture(model, {layer for layer, _ in heads}) as z:
            model.hf(inputs, use_cache=False, logits_to_keep=1)
        for layer, head in total:
            total[layer, head] += z[layer][0, len(prefix) :, head].float().sum(0).cpu()
    return {head: value / len(tokens) for head, value in total.items()}


def _uniform(call: AttentionCall, heads: Sequence[int], queries: Tensor) -> Tensor:
    seen = head_log_rows(call, heads, queries).isfinite().float()
    return seen / seen.sum(-1, keepdim=True)


@contextlib.contextmanager
def _streaming(model: HeadModel, heads: Sequence[Head]) -> Iterator[None]:
    backbone = model.hf.get_submodule(model.architecture.layers.rpartition(".")[0])  # what holds the layers
    first: list[Tensor] = []  # of the running forward pass: position of the first key, counted from the end

    def before_model(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        first[:] = [first_from_end(backbone, args, kwargs, "silence with how=streaming")]

    def weights(call: AttentionCall, chosen: Sequence[int], queries: Tensor) -> Tensor:
        n_queries, n_keys = call.query.shape[2], call.key.shape[2]
        begin = (n_keys - first[0].to(queries.device))[:, None, None]  # negative: no longer in the cache
        keys = torch.arange(n_keys, device=queries.device)
        recent = keys > (queries + n_keys - n_queries)[..., None] - RECENT
        seen = (recent | ((keys >= begin) & (keys < begin + SINK)))[:, None]  # [batch, 1, T, keys]
        return head_log_rows(call, chosen, queries).masked_fill(~seen, float("-inf")).softmax(-1)

    handle = backbone.register_forward_pre_hook(before_model, with_kwargs=True)
    try:
        with _reweighted(model, heads, weights):
            yield
    finally:
        handle.remove()


@contextlib.contextmanager
def _reweighted(model: HeadModel, heads: Sequence[Head], weights: Weights) -> Iterator[None]:
    """Put `weights(...) @ v` in place of heads' outputs."""
    by_layer: dict[int, list[int]] = {}
    for layer, head in sorted(set(heads)):
        by_layer.setdefault(layer, []).append(head)
    outputs: dict[int, Tensor] = {}  # of the running forward pass: layer -> [batch, queries, its heads, head_dim]

    def look(call: AttentionCall) -> None:
        if (chosen := by_layer.get(call.layer)) is None:
            return
        batch, n_heads, n_queries, _ = call.query.shape
        group = n_heads // call.value.shape[1]
        value = call.value[:, [head // group for head in chosen]].float()
        every = torch.arange(n_queries, device=value.device).expand(batch, -1)
        parts = [weights(call, chosen, queries) @ value for queries in every.split(_QUERIES, 1)]
        outputs[call.layer] = torch.cat(parts, 2).transpose(1, 2)

    def edit(layer: int) -> Callable[[Tensor], Tensor]:
        def change(z: Tensor) -> Tensor:
            if layer not in outputs:
                raise CheckError(
                    f"layer {layer}'s attention was replaced inside a silence block, which cannot change its weights "
                    "then; measure with whole forward passes, or silence with how=zero"
                )
            z = z.clone()
            z[:, :, by_layer[layer]] = outputs.pop(layer).to(z)
            return z

        return change

    with look_with(look), hooks.at_projections(model, {layer: edit(layer) for layer in by_layer}):
        yield
