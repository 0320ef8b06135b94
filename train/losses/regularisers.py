"""Penalties on chosen heads, added to any loss: what they attend to, put out, weigh and contribute may not drift.

    penalties = Regularisers(heads, [AttentionKl(pairs, weight=1.0), WeightDrift(pairs, weight=0.1)])
    with penalties.installed():                    # after the adapter, if any, is on the model
        trainer.penalty = penalties                # (model, progress) -> {name: (term, weight now)}
        trainer.train()

    attention_kl          KL(A_base || A) at sampled query rows
    output_drift          ||z - z_base||^2, relative to ||z_base||^2
    weight_drift          1/2 sum F (theta - theta_0)^2 on the heads' slices of W_Q, W_K, W_V, W_O
    attribution_hinge     relu(-margin - c) for suppression heads, relu(c_base - margin - c) for recall heads, with
                          c = (z_h W_O[h]) . u(right token) where the first label is predicted
    negative_attention    (mean NAS)^2 over prompts that name two options

Each term reads the training pass just made (see `head_passes`), whatever the loss made of it: SFT, DPO, answer sets;
accumulated batches; padding on either side. The base is the model with its adapter switched off; in full fine-tuning a
frozen copy, made when the block is entered and only if a term compares activations. It runs the same inputs once more,
without gradient, dropout or unembedding. A trainer's `see(inputs)` tells, before the pass, which tokens are right.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn import Module
from transformers import PreTrainedModel

from headtune.analysis.models.attention import head_log_rows
from headtune.analysis.models.head_model import HeadModel
from headtune.analysis.models.hooks import require_heads
from headtune.analysis.utils.errors import CheckError, InputError
from headtune.train import distributed
from headtune.train.tuners.head_slices import PARTS
from headtune.train.tuners.head_weights import held_slices

from . import head_penalties
from .activation_capture import (
    FINAL,
    HeadPass,
    PassWatcher,
    Wanted,
    alike,
    carries_adapter,
    head_contributions,
    layers_of,
    of_heads,
    option_tokens,
    rows_read,
)
from .attention_distillation import attention_distillation
from .weight_penalties import SliceAnchor, slice_anchor

log = logging.getLogger(__name__)

Pairs = Sequence[tuple[int, int]]


# --- what is asked for ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spec:
    """A penalty on heads.

    Attributes:
        heads: (layer, head) pairs.
        weight: of the term in the loss.
        schedule: `constant`, or `linear`: from 0 to `weight` over the share `warmup` of the steps.
    """

    kind: ClassVar[str]

    heads: Pairs
    weight: float = 1.0
    schedule: Literal["constant", "linear"] = "constant"
    warmup: float = 0.0

    def __post_init__(self) -> None:
        if not self.heads:
            raise InputError(f"{self.kind} names no heads; give (layer, head) pairs")
        if len(set(self.heads)) < len(self.heads):
            raise InputError(f"{self.kind} names a head twice in {list(self.heads)}; remove the repeats")
        if not (math.isfinite(self.weight) and self.weight >= 0):
            raise InputError(f"{self.kind} has weight {self.weight}; expected a number from 0 up")
        if self.schedule not in ("constant", "linear") or (self.schedule == "linear") != (0 < self.warmup <= 1):
            raise InputError(
                f"{self.kind} has schedule {self.schedule!r} and warmup {self.warmup}; expected 'linear' with a share "
                "of the steps above 0, or 'constant' with 0"
            )

    def weight_at(self, progress: float) -> float:
        """The weight when the share `progress` of the steps is done."""
        return self.weight * min(1.0, progress / self.warmup) if self.warmup else self.weight

    @property
    def by_layer(self) -> dict[int, list[int]]:
        layers = sorted(layers_of(self.heads))
        return {layer: sorted(head for of_layer, head in self.heads if of_layer == layer) for layer in layers}


@dataclass(frozen=True)
class AttentionKl(Spec):
    """Mean KL(A_base || A) over samples, heads and `rows` query rows a sample, drawn anew at every pass.

    The draw depends on torch's initial seed and the share of the training done, and leaves torch's own generator alone:
    dropout, gates and the objective draw what they would draw without it, also after a resume.
    """

    kind = "attention_kl"
    rows: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rows < 1:
            raise InputError(f"attention_kl has rows {self.rows}; expected 1 query row a sample or more")


@dataclass(frozen=True)
class OutputDrift(Spec):
    """Mean squared distance of z from the base's; `relative`: in units of the base's mean square."""

    kind = "output_drift"
    relative: bool = True


@dataclass(frozen=True)
class WeightDrift(Spec):
    """Half the squared distance of the heads' weight slices from the base's, `fisher`: weighted by its diagonal."""

    kind = "weight_drift"
    fisher: bool = False
    parts: Sequence[str] = PARTS


@dataclass(frozen=True)
class AttributionHinge(Spec):
    """What heads contribute to right answers' logits: suppression heads take no more than `margin` away from them,
    recall heads give at most `margin` less than the base model's do."""

    kind = "attribution_hinge"
    role: Literal["suppression", "recall"] = "suppression"
    margin: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.role not in ("suppression", "recall"):
            raise InputError(f"attribution_hinge has role {self.role!r}; choose suppression or recall")


@dataclass(frozen=True)
class NegativeAttention(Spec):
    """Even attention to two options that the prompt names, each one token."""

    kind = "negative_attention"
    positive: str = " Yes"
    negative: str = " No"


@dataclass(eq=False)
class _Batch:
    """What one call looks at: the pass, the base's pass, and the batch that the trainer showed."""

    made: HeadPass
    base: HeadPass | None
    shown: Mapping[str, Tensor] | None
    seed: int
    queries: dict[int, Tensor] = field(default_factory=dict)  # by the number of rows asked for
    floors: dict[str, dict[int, Tensor]] = field(default_factory=dict)  # by term, then layer

    def predicting(self, kind: str) -> tuple[Tensor, Tensor]:
        if self.shown is None:
            raise CheckError(f"{kind} was not shown the trainer's batch; call see(inputs) before every pass")
        if not self.shown.keys() & {"remaining", "completion_mask", "labels"}:
            raise CheckError(f"{kind} finds no labels in a batch of {', '.join(sorted(self.shown))}")
        return head_penalties.predicting(self.shown, self.made.present)


class Regularisers:
    """Named penalty terms on heads; a trainer's `penalty`.

    Attributes:
        counts: rows looked at and rows skipped by name, such as `negative_attention.skipped`: prompts that do not name
            both options.

    Args:
        model: the model to be trained, with or without an adapter by the time `installed` is entered.
        specs: which terms; of several of one kind the later ones are named `kind_2`, `kind_3`.
        reference: the base, frozen, where it is not the model under its adapter or as `installed` finds it.
        fisher: for `WeightDrift(fisher=True)`: `fisher_diagonal` of the model without adapter, by weight name.

    Raises:
        InputError: a head that the model does not have, an option that is not one token, no Fisher diagonal where one
            is needed.
    """

    def __init__(
        self,
        model: HeadModel,
        specs: Sequence[Spec],
        reference: PreTrainedModel | None = None,
        fisher: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.model = model
        self.specs: dict[str, Spec] = {}
        for spec in specs:
            require_heads(model, spec.heads)
            if isinstance(spec, WeightDrift) and spec.fisher and fisher is None:
                raise InputError(
                    "weight_drift with fisher=true needs a Fisher diagonal; give the rows it is taken from"
                )
            n_alike = sum(other.kind == spec.kind for other in self.specs.values())
            self.specs[f"{spec.kind}_{n_alike + 1}" if n_alike else spec.kind] = spec
        self._options = {
            name: option_tokens(model, spec.positive, spec.negative)
            for name, spec in self.specs.items()
            if isinstance(spec, NegativeAttention)
        }
        self.counts: Counter[str] = Counter()
        self._fisher = fisher
        self._given = reference
        self._base: HeadModel | None = None  # another model; None: this one without its adapter
        self._anchors: dict[str, SliceAnchor] = {}
        self._shown: Mapping[str, Tensor] | None = None
        self._calls = (-1.0, 0)  # the share of the training done, and how many calls came before at the same
        self._own, self._compared = _wanted(model, self.specs.values())
        self._watcher = PassWatcher(model, self._own)
        self._read: list[Module] = []

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Watch the model's training passes inside the block; afterwards it is what it was.

        Raises:
            InputError: nothing that is trained can move what a weight_drift holds.
        """
        adapted = carries_adapter(self.model.hf)
        given = None if self._given is None else alike(self.model, self._given)
        for name, spec in self.specs.items():
            if isinstance(spec, WeightDrift):
                fisher = self._fisher if spec.fisher else None
                anchor = slice_anchor(self.model, spec.heads, spec.parts, fisher, given, adapted)
                anchor.term(self.model)  # refuses what cannot move
                self._anchors[name] = anchor
        self._base = given
        self._read = self._modules_read()
        if self._compared is not None and given is None and not adapted:
            self._base = alike(self.model, copy.deepcopy(self.model.hf).requires_grad_(False))
        try:
            with self._watcher.installed(self._base):
                yield
        finally:
            self._anchors, self._base, self._shown, self._read = {}, None, None, []
            if self.counts:
                log.info("regularisers: %s", ", ".join(f"{name} {count}" for name, count in self.counts.items()))

    def see(self, inputs: Mapping[str, Any]) -> None:
        """Look at a trainer's batch, as collated, before its loss is computed: it says which tokens are right."""
        wanted = ("input_ids", "labels", "completion_mask", "remaining")
        self._shown = {name: inputs[name] for name in wanted if isinstance(inputs.get(name), Tensor)}

    def __call__(self, model: Any, progress: float) -> dict[str, tuple[Tensor, float]]:
        """The terms of the training pass just made, unweighted, each with its weight now.

        Args:
            model: what was trained, unwrapped: the PeftModel where there is an adapter.
            progress: share of the steps done.

        Raises:
            CheckError: no pass was made since the last call, or not with what the terms need.
        """
        made, shown = self._watcher.last, self._shown
        self._watcher.last = self._shown = None
        if made is None:
            raise CheckError("penalties on heads were asked for without a training pass inside their installed() block")
        made.require(self._own)
        batch = _Batch(made, None, shown, self._seed(progress))
        if self._compared is not None:
            self._run_base(model, batch, self._compared)
        with torch.autocast(made.present.device.type, enabled=False), distributed.whole(self._read):
            return {
                name: (self._term(name, spec, batch), spec.weight_at(progress)) for name, spec in self.specs.items()
            }

    def _seed(self, progress: float) -> int:
        """Another one for each batch of each step."""
        self._calls = (progress, self._calls[1] + 1 if self._calls[0] == progress else 0)
        return zlib.crc32(f"{torch.initial_seed()}/{self._calls}".encode())

    def _run_base(self, model: Any, batch: _Batch, wanted: Wanted) -> None:
        """One pass of the base, and what its heads contributed, which depends on its weights."""
        off: Any = contextlib.nullcontext()
        if self._base is None:
            if not isinstance(model, PeftModel):
                raise CheckError(f"the model carries an adapter, and a {type(model).__name__} cannot switch it off")
            off = model.disable_adapter()
        view = self._base or self.model
        with torch.no_grad(), off:
            batch.base = self._watcher.again(view, batch.made, wanted)
            with torch.autocast(batch.made.present.device.type, enabled=False):
                for name, spec in self.specs.items():
                    if isinstance(spec, AttributionHinge) and spec.role == "recall":
                        ends, tokens = batch.predicting(spec.kind)
                        with distributed.whole(self._read):
                            batch.floors[name] = head_contributions(view, batch.base, spec.by_layer, ends, tokens)

    def _modules_read(self) -> list[Module]:
        """The modules whose weights the terms look at."""
        view = self.model
        found: list[Module] = []
        for spec in self.specs.values():
            if isinstance(spec, WeightDrift):
                for held in held_slices(view, spec.heads, spec.parts):
                    found += held.module(view).modules()
            elif isinstance(spec, AttributionHinge):
                found += [of for layer in spec.by_layer for of in view.projection(layer).modules()]
                norms = [view.final_norm, *(view.post_attention_norm(layer) for layer in spec.by_layer)]
                tops = [view.hf.get_output_embeddings(), *norms]
                found += [of for top in tops if top is not None for of in top.modules()]
        return found

    def _term(self, name: str, spec: Spec, batch: _Batch) -> Tensor:
        match spec:
            case WeightDrift():
                return self._anchors[name].term(self.model)
            case AttentionKl():
                return _attention_kl(spec, batch)
            case OutputDrift():
                return _output_drift(self.model, spec, batch)
            case AttributionHinge():
                return _attribution_hinge(self.model, spec, batch, batch.floors.get(name))
            case NegativeAttention():
                return self._negative_attention(name, spec, batch)
        raise InputError(f"{type(spec).__name__} is no known penalty on heads")

    def _negative_attention(self, name: str, spec: NegativeAttention, batch: _Batch) -> Tensor:
        ends, _ = batch.predicting(spec.kind)
        tokens = batch.made.arguments["input_ids"].masked_fill(~batch.made.present, -1)
        keys, queries = head_penalties.option_queries(tokens, ends, *self._options[name])
        named = (queries >= 0).any(-1)
        self.counts[f"{name}.rows"] += len(named)
        self.counts[f"{name}.skipped"] += int((~named).sum())
        scores = []
        for layer, heads in spec.by_layer.items():
            call = batch.made.attention[layer]
            rows = head_log_rows(call, heads, queries)
            own = head_penalties.negative_attention_scores(rows, keys.to(rows.device), queries.to(rows.device))
            scores.append(own.to(named.device))
        return head_penalties.alignment(torch.cat(scores, 1), named, distributed.pooled)


# --- from a pass to a term --------------------------------------------------------------------------------------------


def _wanted(model: HeadModel, specs: Sequence[Spec] | Any) -> tuple[Wanted, Wanted | None]:
    """What to keep of a training pass, and of the base's pass; None where no term compares with the base."""
    own: dict[str, set[int]] = {"z": set(), "attention": set(), "norms": set()}
    base: dict[str, set[int]] = {"z": set(), "attention": set(), "norms": set()}
    for spec in specs:
        layers = layers_of(spec.heads)
        needs: dict[str, set[int]] = {}
        match spec:
            case AttentionKl() | NegativeAttention():
                needs = {"attention": set(layers)}
            case OutputDrift():
                needs = {"z": set(layers)}
            case AttributionHinge():
                normed = {layer for layer in layers if model.post_attention_norm(layer) is not None}
                needs = {"z": set(layers), "norms": normed | {FINAL}}
        compares = isinstance(spec, AttentionKl | OutputDrift) or getattr(spec, "role", None) == "recall"
        for kind, found in needs.items():
            own[kind] |= found
            if compares:
                base[kind] |= found
    compared = Wanted(**{kind: frozenset(found) for kind, found in base.items()})
    return Wanted(**{kind: frozenset(found) for kind, found in own.items()}), None if compared == Wanted() else compared


def _attention_kl(spec: AttentionKl, batch: _Batch) -> Tensor:
    assert batch.base is not None
    if spec.rows not in batch.queries:
        generator = torch.Generator().manual_seed(batch.seed)
        batch.queries[spec.rows] = head_penalties.draw_queries(batch.made.present, spec.rows, generator)
    queries = batch.queries[spec.rows]
    rows, base = {}, {}
    for layer, heads in spec.by_layer.items():
        rows[layer] = head_log_rows(batch.made.attention[layer], heads, queries)
        with torch.no_grad():
            base[layer] = head_log_rows(batch.base.attention[layer], heads, queries).exp()
    own = (queries >= 0).sum().float()
    share = own / distributed.pooled(own).clamp(min=1)  # of the rows that a process reads
    return share * attention_distillation(rows, base, queries >= 0)


def _output_drift(model: HeadModel, spec: OutputDrift, batch: _Batch) -> Tensor:
    assert batch.base is not None
    made = [of_heads(model, batch.made.z[layer], heads) for layer, heads in spec.by_layer.items()]
    base = [of_heads(model, batch.base.z[layer], heads) for layer, heads in spec.by_layer.items()]
    return head_penalties.output_drift(made, base, batch.made.present, spec.relative, distributed.pooled)


def _attribution_hinge(
    model: HeadModel, spec: AttributionHinge, batch: _Batch, base: Mapping[int, Tensor] | None
) -> Tensor:
    ends, tokens = batch.predicting(spec.kind)
    found = head_contributions(model, batch.made, spec.by_layer, ends, tokens)
    right = ((tokens >= 0) & (ends >= 0)[:, None])[rows_read(ends, tokens)]
    device = batch.made.present.device
    c = torch.cat([of_layer.to(device) for of_layer in found.values()], 1)
    floor: Tensor | float = -spec.margin
    if base is not None:
        floor = torch.cat([base[layer].to(device) for layer in found], 1) - spec.margin
    return head_penalties.hinge(c, floor, right, distributed.pooled)
