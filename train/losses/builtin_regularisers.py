"""The penalties on heads that come with headtune: what each needs of a pass, and its term.

    attention_kl          KL(A_base || A) at sampled query rows
    output_drift          ||z - z_base||^2, relative to ||z_base||^2
    weight_drift          1/2 sum F (theta - theta_0)^2 on the heads' slices of W_Q, W_K, W_V, W_O
    attribution_hinge     relu(-margin - c) for suppression heads, relu(c_base - margin - c) for recall heads, with
                          c = (z_h W_O[h]) . u(right token) where the first label is predicted
    negative_attention    (mean NAS)^2 over prompts that name two options

Their settings are in `headtune.train.config.regularisers`, their formulas as plain functions in `head_penalties`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from headtune.analysis.models.attention import head_log_rows
from headtune.analysis.models.head_model import HeadModel
from headtune.train import distributed
from headtune.train.config import regularisers as configs
from headtune.train.tuners.head_weights import head_weights

from . import head_penalties
from .activation_capture import FINAL, Captures, head_contributions, option_tokens, rows_read
from .attention_distillation import attention_distillation
from .registry import HeadPenalty, Pairs, TrainingBatch, register_regulariser
from .weight_penalties import SliceAnchor, slice_anchor


@register_regulariser("attention_kl", configs.AttentionKl)
class AttentionKlPenalty(HeadPenalty[configs.AttentionKl]):
    """Mean KL(A_base || A) over samples, heads and `rows` query rows a sample, drawn anew at every pass.

    The draw depends on torch's initial seed and the share of the training done, and leaves torch's own generator alone:
    dropout, gates and the objective draw what they would draw without it, also after a resume.
    """

    compares_with_base = True

    def captures(self) -> Captures:
        return Captures(attention=self.layers)

    def loss(self, batch: TrainingBatch) -> Tensor:
        assert batch.base is not None
        queries = batch.queries(self.config.rows)
        rows, base = {}, {}
        for layer, heads in self.by_layer.items():
            rows[layer] = head_log_rows(batch.training_pass.attention[layer], heads, queries)
            with torch.no_grad():
                base[layer] = head_log_rows(batch.base.attention[layer], heads, queries).exp()
        n_rows = (queries >= 0).sum().float()
        share = n_rows / distributed.all_reduce_mean(n_rows).clamp(min=1)  # of the rows that a process reads
        return share * attention_distillation(rows, base, queries >= 0)


@register_regulariser("output_drift", configs.OutputDrift)
class OutputDriftPenalty(HeadPenalty[configs.OutputDrift]):
    """Mean squared distance of z from the base's; `relative`: in units of the base's mean square."""

    compares_with_base = True

    def captures(self) -> Captures:
        return Captures(z=self.layers)

    def loss(self, batch: TrainingBatch) -> Tensor:
        z = [batch.z(self.model, layer, heads) for layer, heads in self.by_layer.items()]
        base = [batch.z(self.model, layer, heads, base=True) for layer, heads in self.by_layer.items()]
        return head_penalties.output_drift(
            z, base, batch.training_pass.present, self.config.relative, distributed.all_reduce_mean
        )


@register_regulariser("weight_drift", configs.WeightDrift)
class WeightDriftPenalty(HeadPenalty[configs.WeightDrift]):
    """Half the squared distance of the heads' weight slices from the base's, `fisher`: weighted by its diagonal."""

    _anchor: SliceAnchor | None = None

    @property
    def needs_fisher(self) -> bool:
        return self.config.fisher

    def weights_read(self) -> list[Module]:
        slices = head_weights(self.model, self.pairs, self.config.parts)
        return [module for each in slices for module in each.module(self.model).modules()]

    def start(self, reference: HeadModel | None, adapted: bool, fisher: Mapping[str, Tensor] | None) -> None:
        """Raises InputError where nothing that is trained can move the slices."""
        diagonal = fisher if self.config.fisher else None
        self._anchor = slice_anchor(self.model, self.pairs, self.config.parts, diagonal, reference, adapted)
        self._anchor.term(self.model)  # refuses what cannot move

    def finish(self) -> None:
        self._anchor = None

    def loss(self, batch: TrainingBatch) -> Tensor:
        assert self._anchor is not None
        return self._anchor.term(self.model)


@register_regulariser("attribution_hinge", configs.AttributionHinge)
class AttributionHingePenalty(HeadPenalty[configs.AttributionHinge]):
    """What heads contribute to right answers' logits: suppression heads take no more than `margin` away from them,
    recall heads give at most `margin` less than the base model's do."""

    _base: dict[int, Tensor] | None = None  # by layer, of the batch that is being looked at

    def captures(self) -> Captures:
        normed = {layer for layer in self.layers if self.model.post_attention_norm(layer) is not None}
        return Captures(z=self.layers, norms=frozenset(normed | {FINAL}))

    @property
    def compares_with_base(self) -> bool:
        return self.config.role == "recall"

    def weights_read(self) -> list[Module]:
        norms = [self.model.final_norm, *(self.model.post_attention_norm(layer) for layer in self.by_layer)]
        tops = [self.model.hf.get_output_embeddings(), *norms]
        projections = [self.model.projection(layer) for layer in self.by_layer]
        return [module for top in [*projections, *tops] if top is not None for module in top.modules()]

    def _contributions(self, model: HeadModel, head_pass: Any, batch: TrainingBatch) -> dict[int, Tensor]:
        return head_contributions(model, head_pass, self.by_layer, *batch.predicting(self.config.kind))

    def read_base(self, base: HeadModel, batch: TrainingBatch) -> None:
        if self.compares_with_base:
            with distributed.gathered_parameters(self.weights_read()):
                self._base = self._contributions(base, batch.base, batch)

    def finish(self) -> None:
        self._base = None

    def loss(self, batch: TrainingBatch) -> Tensor:
        ends, tokens = batch.predicting(self.config.kind)
        contributions = self._contributions(self.model, batch.training_pass, batch)
        right = ((tokens >= 0) & (ends >= 0)[:, None])[rows_read(ends, tokens)]
        device = batch.training_pass.present.device
        c = torch.cat([values.to(device) for values in contributions.values()], 1)
        floor: Tensor | float = -self.config.margin
        if self._base is not None:
            floor = torch.cat([self._base[layer].to(device) for layer in contributions], 1) - self.config.margin
        self._base = None
        return head_penalties.hinge(c, floor, right, distributed.all_reduce_mean)


@register_regulariser("negative_attention", configs.NegativeAttention)
class NegativeAttentionPenalty(HeadPenalty[configs.NegativeAttention]):
    """Even attention to two options that the prompt names, each one token.

    Counts `rows`, and `skipped`: prompts that do not name both options.
    """

    def __init__(self, config: configs.NegativeAttention, pairs: Pairs, model: HeadModel) -> None:
        super().__init__(config, pairs, model)
        self._options = option_tokens(model, config.positive, config.negative)

    def captures(self) -> Captures:
        return Captures(attention=self.layers)

    def loss(self, batch: TrainingBatch) -> Tensor:
        ends, _ = batch.predicting(self.config.kind)
        tokens = batch.training_pass.arguments["input_ids"].masked_fill(~batch.training_pass.present, -1)
        keys, queries = head_penalties.option_queries(tokens, ends, *self._options)
        named = (queries >= 0).any(-1)
        self.counts["rows"] += len(named)
        self.counts["skipped"] += int((~named).sum())
        scores = []
        for layer, heads in self.by_layer.items():
            rows = head_log_rows(batch.training_pass.attention[layer], heads, queries)
            of_layer = head_penalties.negative_attention_scores(rows, keys.to(rows.device), queries.to(rows.device))
            scores.append(of_layer.to(named.device))
        return head_penalties.alignment(torch.cat(scores, 1), named, distributed.all_reduce_mean)
