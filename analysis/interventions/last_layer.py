"""Two knobs on the last layer that give answers back some of the probability it takes from them (Lv et al. 2024).

    with scale_sink_heads(heads, tau=0.5, gamma=0.5), subtract_mlp_intercept(heads, b, beta=0.5):
        model.hf.generate(...)

Many last-layer heads attend to the first position and bring frequent tokens from there, and the last MLP adds them
whatever the input (its intercept b, see `mlp_regression`). Both knobs act at every position, in any forward pass inside
the block: whole prompts, decoding with a cache, padded batches. They change probabilities and, sometimes, which token
comes first: look at p(answer) *and* at accuracy.

    sink:       z[L, h, q] <- gamma * z[L, h, q]      where A[L, h, q, first position] > tau
    intercept:  M_L <- M_L - beta * b_L               b fitted at the last token, subtracted everywhere
"""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from headtune.analysis.models.attention import AttentionCall, attend_with, softcapped
from headtune.analysis.models.head_model import HeadModel
from headtune.analysis.tasks.loading import load_task
from headtune.analysis.tasks.task import Task
from headtune.analysis.utils.errors import CheckError, InputError

FIT = "one_to_many:train"  # what an intercept is fitted on by default: several wordings, training subjects
_FIT_EXAMPLES = 200
_QUERIES = 64  # attention rows at a time


# --- scaling heads that look at the first position --------------------------------------------------------------------


@contextlib.contextmanager
def scale_sink_heads(
    model: HeadModel, tau: float = 0.5, gamma: float = 0.5, layer: int | None = None
) -> Iterator[None]:
    """Multiply, query by query, the output of heads that attend to the first position with more than `tau` by `gamma`.

    The first position is the first that is not padding; where a sliding window has moved past it, attention to it is 0.
    The first position's own query sees nothing else, so its heads are scaled too (for tau < 1). Not for several
    documents packed into one row.

    Args:
        layer: default: the last.

    Raises:
        InputError: tau is not in [0, 1], gamma is not a number or no such layer; inside the block: an attention mask
            that is not `[batch, positions]`, or a cache other than transformers' DynamicCache.
    """
    if not 0 <= tau <= 1:
        raise InputError(f"tau is {tau}; expected an attention probability between 0 and 1, such as 0.5")
    chosen = _layer(model, layer)
    backbone = model.hf.get_submodule(model.architecture.layers.rpartition(".")[0])  # what holds the layers
    first: list[Tensor] = []  # of the running forward pass: position of the first key, counted from the end
    factors: list[Tensor] = []

    # What hooks do: note where prompts begin, look at the attention, scale the outputs.
    def before_model(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        first[:] = [first_from_end(backbone, args, kwargs, "scale_sink_heads")]
        factors.clear()

    def look(call: AttentionCall) -> None:
        if call.layer == chosen:
            columns = call.key.shape[2] - first[0].to(call.key.device)  # negative: no longer in the cache
            attention = attention_to(call, columns)  # [batch, n_heads, queries]
            factors.append(torch.where(attention > tau, gamma, 1.0).transpose(1, 2))

    def before_projection(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if not factors:
            raise CheckError(
                f"layer {chosen}'s attention was replaced inside a scale_sink_heads block, which cannot see it then; "
                "measure with whole forward passes"
            )
        z = args[0].unflatten(-1, (model.n_heads, model.head_dim))
        return ((z * factors.pop()[..., None].to(z)).flatten(-2), *args[1:])

    # Installed for the length of the block.
    handles = [
        backbone.register_forward_pre_hook(before_model, with_kwargs=True),
        model.projection(chosen).register_forward_pre_hook(before_projection),
    ]
    try:
        with attend_with(look):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _layer(model: HeadModel, layer: int | None) -> int:
    chosen = model.n_layers - 1 if layer is None else layer
    if not 0 <= chosen < model.n_layers:
        raise InputError(f"layer {chosen} is out of range: {model.name} has layers 0-{model.n_layers - 1}")
    return chosen


def first_from_end(backbone: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], what: str) -> Tensor:
    """`[batch]` how many positions a forward pass knows of, from the first that is not padding to its last.

    Args:
        backbone: the module that holds the layers.
        args, kwargs: what it is called with.
        what: the intervention, for errors.

    Raises:
        InputError: an attention mask that is not `[batch, positions]`, or a cache other than DynamicCache.
    """
    bound = inspect.signature(backbone.forward).bind_partial(*args, **kwargs).arguments
    inputs = bound["input_ids"] if bound.get("input_ids") is not None else bound["inputs_embeds"]
    cache, mask = bound.get("past_key_values"), bound.get("attention_mask")
    if cache is not None and not isinstance(cache, DynamicCache):
        raise InputError(f"{what} works with a DynamicCache, not a {type(cache).__name__}; leave the cache out")
    total = inputs.shape[1] + (0 if cache is None else cache.get_seq_length())
    if mask is None:
        return torch.full((len(inputs),), total, device=inputs.device)
    if mask.ndim != 2 or mask.shape[1] != total:
        raise InputError(
            f"{what} got an attention mask of shape {tuple(mask.shape)}; expected [batch, {total}], padding 0"
        )
    positions: Tensor = total - (mask != 0).int().argmax(1)
    return positions


def attention_to(call: AttentionCall, columns: Tensor) -> Tensor:
    """Attention probability of one key for every query.

    Args:
        columns: `[batch]` the key's index; where it is negative there is no such key and attention to it is 0.

    Returns:
        `[batch, n_heads, queries]` float32; NaN for a query that sees nothing (padding).
    """
    n_queries, n_keys = call.query.shape[2], call.key.shape[2]
    key = call.key.float().repeat_interleave(call.query.shape[1] // call.key.shape[1], 1)
    mask = call.mask
    if mask is None:
        mask = torch.ones(n_queries, n_keys, dtype=torch.bool, device=key.device).tril(n_keys - n_queries)[None, None]
    parts = []
    for start in range(0, n_queries, _QUERIES):
        rows = slice(start, start + _QUERIES)
        scores = softcapped(call.query[:, :, rows].float() @ key.mT * call.scaling, call.softcap)
        seen = mask[:, :, rows, :n_keys]
        scores = scores.masked_fill(~seen, float("-inf")) if seen.dtype == torch.bool else scores + seen.float()
        index = columns.clamp(min=0)[:, None, None, None].expand(*scores.shape[:3], 1)
        parts.append(scores.softmax(-1).gather(-1, index)[..., 0])
    return torch.cat(parts, 2) * (columns >= 0)[:, None, None]


# --- taking the MLP's intercept away ----------------------------------------------------------------------------------


@contextlib.contextmanager
def subtract_mlp_intercept(
    model: HeadModel, intercept: Tensor, beta: float = 1.0, layer: int | None = None
) -> Iterator[None]:
    """`M <- M - beta * intercept` at every position, M being what a layer's MLP adds to the residual stream.

    Args:
        intercept: `[d_model]`, such as `mlp.decompose(...)[0].intercept[-1]`.
        layer: default: the last.

    Raises:
        InputError: no such layer.
    """

    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        tensor = output[0] if isinstance(output, tuple) else output
        tensor = tensor - (beta * intercept).to(tensor)
        return (tensor, *output[1:]) if isinstance(output, tuple) else tensor

    handle = model.mlp(_layer(model, layer)).register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


# --- settings ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sink:
    """`sink:tau=0.5,gamma=0.5`: see `scale_sink_heads`."""

    tau: float = 0.5
    gamma: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.tau <= 1:
            raise InputError(f"knob sink: tau={self.tau} is no attention probability; expected 0 to 1, such as 0.5")
        if not (math.isfinite(self.gamma) and self.gamma >= 0):
            raise InputError(f"knob sink: gamma={self.gamma} is no factor; expected 0 or more (1 changes nothing)")


@dataclass(frozen=True)
class Intercept:
    """`intercept:beta=0.5,fit=one_to_many:train`: see `subtract_mlp_intercept`.

    Attributes:
        fit: task whose prompts the intercept is fitted on, at most 200 of them, spread over subjects; of those, 30% of
            the subjects are held out to say how well the fit describes the MLP.
    """

    beta: float = 1.0
    fit: str = FIT

    def __post_init__(self) -> None:
        if not math.isfinite(self.beta):
            raise InputError(
                f"knob intercept: beta={self.beta} is not a finite number; 0 changes nothing, 1 takes all of b"
            )
        self.task()

    def task(self) -> Task:
        """The task fitted on; InputError if there is no such task."""
        return load_task(self.fit).limited(_FIT_EXAMPLES)
