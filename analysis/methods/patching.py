"""Exact causal effects of heads: ablation, patching and path patching, without one forward pass per head.

    effect[l, h](quantity) = quantity(clean run) - quantity(run with z[l, h] := reference)

so positive = the head, as it is, raises the quantity. References are zeros (ablation) or those of `counterfactuals`:
the mean over other examples, another example, the corrupted counterpart. See `last_token` for why this is fast.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from headtune.analysis.interventions.all_positions import everywhere
from headtune.analysis.interventions.intervention import CLEAN, Head, Intervention, silenced
from headtune.analysis.interventions.last_token import LastTokenRunner
from headtune.analysis.models.head_model import HeadModel
from headtune.analysis.tasks.tokenized import Encoded
from headtune.analysis.utils.errors import InputError, nearest

from .scores import Array

Metric = Literal["logit", "logit_difference", "probability", "kl"]
METRICS: tuple[Metric, ...] = ("logit", "logit_difference", "probability", "kl")


@dataclass(frozen=True)
class AnswerProbabilities:
    """What next-token logits say of the answers' first tokens.

    Attributes:
        target: `[rows]` total probability of the remaining answers' first tokens.
        previous: `[rows]` total probability of the previous answers' first tokens (0 where there are none).
        logs: name -> `[rows]` natural logarithm of the total, finite where the probability itself underflows to 0.
        logits: name -> `[rows]` mean logit of each of the two sets.
        others: `[rows]` mean logit of the other subjects' answers (see `Encoded.others`); of the whole vocabulary where
            there are none.
        vocabulary: `[rows]` mean logit of all tokens.
    """

    target: Tensor
    previous: Tensor
    logs: dict[str, Tensor]
    logits: dict[str, Tensor]
    others: Tensor
    vocabulary: Tensor

    @property
    def metrics(self) -> dict[str, Tensor]:
        """`logits` and `others`: what gradients are taken of; see `with_contrast`."""
        return self.logits | {"others": self.others}


def with_contrast(scores: dict[str, Tensor]) -> dict[str, Tensor]:
    """Scores toward each of `AnswerProbabilities.metrics`, without `others`, and with their difference from it."""
    others = scores["others"]
    raw = {name: value for name, value in scores.items() if name != "others"}
    return raw | {f"{name}_contrast": value - others for name, value in raw.items()}


def answer_probabilities(logits: Tensor, encoded: Encoded) -> AnswerProbabilities:
    """Reduce `[rows, vocabulary]` logits in float32."""
    logits = logits.float()
    norm = logits.logsumexp(-1, keepdim=True)
    # Only the columns asked for are copied: rows x vocabulary is the largest tensor of the whole step.
    chosen = {"target": sorted(set(encoded.target_tokens)), "previous": sorted(set(encoded.previous_tokens))}
    parts = {name: logits[:, tokens] for name, tokens in chosen.items()}  # [rows, n]
    present = {name: part for name, part in parts.items() if part.shape[1]}
    vocabulary = logits.mean(-1)
    others = vocabulary
    if encoded.others:
        tokens, weights = zip(*encoded.others, strict=True)
        others = logits[:, list(tokens)] @ torch.tensor(weights, device=logits.device)
    return AnswerProbabilities(
        (parts["target"] - norm).exp().sum(-1),
        (parts["previous"] - norm).exp().sum(-1),
        {name: (part - norm).logsumexp(-1) for name, part in present.items()},
        {name: part.mean(-1) for name, part in present.items()},
        others,
        vocabulary,
    )


def every_head(model: HeadModel) -> list[Head]:
    """All (layer, head) pairs, layer by layer: the order of `[n_layers, n_heads]` flattened."""
    return [(layer, head) for layer in range(model.n_layers) for head in range(model.n_heads)]


def silenced_logits(
    model: HeadModel, tokens: Tensor, rows: Sequence[Sequence[Head]], max_rows: int | None = None
) -> Tensor:
    """Next-token logits with each row's heads silenced at the last token, `z[l, h, last] := 0`.

    Args:
        tokens: `[seq]` ids of one prompt.
        rows: the heads to silence, row by row; an empty row is the clean run.
        max_rows: rows per pass; default: as many as the view's `max_memory` allows.

    Returns:
        `[len(rows), vocabulary]` in the model's dtype.
    """
    return LastTokenRunner(model, tokens).run([silenced(row) for row in rows], max_rows=max_rows).logits


def effects(
    method: str, model: HeadModel, logits: Tensor, encoded: Encoded, metric: Metric = "logit"
) -> dict[str, Array]:
    """Clean minus changed, for every head.

    Args:
        logits: `[1 + n_layers * n_heads, vocabulary]`: the clean run, then each head of `every_head` changed.

    Returns:
        name -> `[n_layers, n_heads]`: `<method>.target` and `<method>.previous` in logits (mean over the answers'
        first tokens, the unit of direct attribution), `.target_contrast` / `.previous_contrast` less the mean logit of
        the other subjects' answers, `.target_centred` / `.previous_centred` less that of the vocabulary,
        `.target_logp` / `.previous_logp` in nats of the answers' total probability, `.target_p` / `.previous_p` in
        probability. The `previous` ones are absent where there are no previous answers. With another `metric` than
        `logit`: `<method>.<metric>` alone, see `metric_of`.

    Raises:
        InputError: an unknown metric, or a difference from previous answers where there are none.
    """
    if metric != "logit":
        value = metric_of(metric, logits, encoded)
        change = value[1:] if metric == "kl" else value[0] - value[1:]
        return {f"{method}.{metric}": change.reshape(model.n_layers, model.n_heads).cpu().numpy()}
    result = answer_probabilities(logits, encoded)
    quantities: dict[str, Tensor] = {}
    for name, probability in (("target", result.target), ("previous", result.previous)):
        if name in result.logits:
            quantities |= {
                name: result.logits[name],
                f"{name}_contrast": result.logits[name] - result.others,
                f"{name}_centred": result.logits[name] - result.vocabulary,
                f"{name}_logp": result.logs[name],
                f"{name}_p": probability,
            }
    return {
        f"{method}.{name}": (value[0] - value[1:]).reshape(model.n_layers, model.n_heads).cpu().numpy()
        for name, value in quantities.items()
    }


def metric_of(metric: Metric, logits: Tensor, encoded: Encoded) -> Tensor:
    """`[rows]` what a causal method compares, of `[rows, vocabulary]` logits whose first row is the clean run.

        logit               mean logit of the remaining answers' first tokens
        logit_difference    that less the mean logit of the previous answers'
        probability         total probability of the remaining answers' first tokens
        kl                  sum_t p_clean(t) (log p_clean(t) - log p(t)) in nats: 0 in the clean run, and without a sign

    Which metric is used decides which heads come first (Zhang & Nanda 2024, arXiv 2309.16042).

    Raises:
        InputError: an unknown metric, or a difference from previous answers where there are none.
    """
    if metric not in METRICS:
        raise InputError(f"metric {metric!r} is unknown; {nearest(metric, METRICS, listed=True)}")
    if metric == "kl":
        log_p = logits.float().log_softmax(-1)
        return (log_p[:1].exp() * (log_p[:1] - log_p)).sum(-1)
    result = answer_probabilities(logits, encoded)
    if metric == "probability":
        return result.target
    if metric == "logit":
        return result.logits["target"]
    if "previous" not in result.logits:
        raise InputError(
            f"metric logit_difference needs previous answers, and {encoded.example.prompt[:40]!r} has none; use another"
        )
    return result.logits["target"] - result.logits["previous"]


def ablation_effects(
    model: HeadModel, encoded: Encoded, max_rows: int | None = None, metric: Metric = "logit"
) -> dict[str, Array]:
    """What every head does to the answers at the last token, by silencing it: see `effects`, names `ablation.*`."""
    rows: list[list[Head]] = [[], *([head] for head in every_head(model))]
    return effects("ablation", model, silenced_logits(model, encoded.tokens, rows, max_rows), encoded, metric)


def patching_effects(
    method: str, model: HeadModel, encoded: Encoded, reference: Tensor, metric: Metric = "logit"
) -> dict[str, Array]:
    """What every head does to the answers at the last token, by putting `reference` (`[n_layers, n_heads, head_dim]`)
    in its place."""
    rows = [CLEAN, *(Intervention(outputs={head: reference[head]}) for head in every_head(model))]
    return effects(method, model, LastTokenRunner(model, encoded.tokens).run(rows).logits, encoded, metric)


def everywhere_effects(
    method: str, model: HeadModel, encoded: Encoded, reference: Tensor | None = None, metric: Metric = "logit"
) -> dict[str, Array]:
    """What every head does at all positions together.

    Args:
        reference: `[n_layers, n_heads, seq or 1, head_dim]` put in a head's place; None silences it.
    """
    pairs = every_head(model)
    rows = [{head: 0.0 if reference is None else reference[head]} for head in pairs]
    return effects(method, model, everywhere(model, encoded.tokens, [{}, *rows]), encoded, metric)


# --- path patching ----------------------------------------------------------------------------------------------------


def path_logits(model: HeadModel, encoded: Encoded, reference: Tensor) -> Tensor:
    """Logits with one head's output at the last token replaced while all other heads keep theirs; MLPs are recomputed.

    This is the path from a head to the logits, direct or through MLPs (Wang et al. 2023; Lv et al. 2024 freeze the
    other heads' queries, keys and values, which at the last token is the same as freezing their outputs).

    Args:
        reference: `[n_layers, n_heads, head_dim]`.

    Returns:
        `[1 + n_layers * n_heads, vocabulary]`: the clean run, then every head of `every_head`.
    """
    rows = [Intervention(outputs={head: reference[head]}, freeze="heads") for head in every_head(model)]
    return LastTokenRunner(model, encoded.tokens).run([CLEAN, *rows]).logits


def path_effects(
    method: str, model: HeadModel, encoded: Encoded, reference: Tensor, metric: Metric = "logit"
) -> dict[str, Array]:
    """What every head does to the answers on the path to the logits that passes no other head: see `effects`."""
    return effects(method, model, path_logits(model, encoded, reference), encoded, metric)


INPUTS = ("query", "key", "value")


def head_to_head_logits(
    model: HeadModel, encoded: Encoded, receiver: Head, through: str, reference: Tensor
) -> tuple[list[Head], Tensor]:
    """Logits when a receiver head hears, at the last token, what it would with one sender replaced; nothing else hears
    it.

    First each sender is replaced, all other heads' outputs frozen and MLPs recomputed, to see the receiver's query, key
    or value at the last token; then that alone is put into the clean run. Senders are the heads of earlier layers.
    Changes at the last token
    only: the last token's own key and value are read by the last token alone.

    Args:
        through: one of INPUTS.
        reference: `[n_layers, n_heads, head_dim]`, the senders' replacements.

    Returns:
        The senders, and `[1 + senders, vocabulary]` logits, the clean run first.
    """
    runner = LastTokenRunner(model, encoded.tokens)
    layer, head = receiver
    senders = [pair for pair in every_head(model) if pair[0] < layer]
    rows = [Intervention(outputs={pair: reference[pair]}, freeze="heads") for pair in senders]
    heard = torch.empty(0)
    if rows:
        result = runner.run(rows, record=[through], layers=[layer])  # type: ignore[list-item]
        heard = result.activations[through][:, 0, head]
    names = {"query": "queries", "key": "keys", "value": "values"}
    changed = [Intervention(**{names[through]: {receiver: value}}) for value in heard]  # type: ignore[arg-type]
    return senders, runner.run([CLEAN, *changed]).logits


def head_to_head_effects(
    model: HeadModel, encoded: Encoded, receiver: Head, through: str, reference: Tensor
) -> dict[str, Array]:
    """`effects` of each sender through one input of one receiver; 0 for heads that are not before it.

    Names `path_L<l>H<h>_<through>.target` and so on.
    """
    senders, logits = head_to_head_logits(model, encoded, receiver, through, reference)
    full = torch.cat([logits, logits[:1].expand(model.n_layers * model.n_heads - len(senders), -1)])
    return effects(f"path_L{receiver[0]}H{receiver[1]}_{through}", model, full, encoded)


def set_probabilities(model: HeadModel, encoded: Encoded, sets: Sequence[Sequence[Head]]) -> Array:
    """`[sets, 2]`: p(remaining) and p(previous) of one example, each set of heads silenced at the last token."""
    result = answer_probabilities(silenced_logits(model, encoded.tokens, sets), encoded)
    return torch.stack([result.target, result.previous], 1).cpu().numpy()
