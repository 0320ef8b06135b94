"""How far weights have moved, and what that costs: L2-SP and elastic weight consolidation.

    penalty = 1/2 sum_i F_i (theta_i - theta*_i)^2

with F = 1 half the squared distance from the starting point (L2-SP, Li et al. 2018), with F the Fisher diagonal elastic
weight consolidation (EWC, Kirkpatrick et al. 2017). On the weight slices of chosen heads (`SliceAnchor`), or on all
that is trained (`WeightAnchor`, one quadratic per task, summed).
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from headtune.analysis.models.head_model import HeadModel
from headtune.analysis.utils.errors import CheckError, InputError
from headtune.analysis.utils.files import atomic_path
from headtune.train.tuners.head_slices import PARTS
from headtune.train.tuners.head_weights import HeadWeights, head_weights

Rows = Sequence[Mapping[str, Sequence[int]]]  # input_ids and labels, -100 where nothing is learnt


def quadratic(drifts: Sequence[Tensor], fisher: Sequence[Tensor] | None = None) -> Tensor:
    """`1/2 sum F d^2` over all entries of all tensors, F = 1 without `fisher`."""
    weights: Sequence[Tensor | None] = [None] * len(drifts) if fisher is None else fisher
    parts = [d.pow(2).sum() if f is None else (f * d.pow(2)).sum() for d, f in zip(drifts, weights, strict=True)]
    return torch.stack([part.to(parts[0].device) for part in parts]).sum() / 2


@dataclass(frozen=True)
class SliceAnchor:
    """Where the slices of chosen heads are held, and how stiffly.

    Attributes:
        slices: which.
        start: shaped as `HeadWeights.base`, one a slice; None holds them to the weights under the adapter, which do not
            move.
        fisher: shaped alike, or None for 1.
    """

    slices: list[HeadWeights]
    start: list[Tensor] | None
    fisher: list[Tensor] | None

    def term(self, model: HeadModel) -> Tensor:
        """`1/2 sum F (theta - theta0)^2`, with gradient to whatever is trained.

        Raises:
            InputError: nothing that is trained can move these slices.
        """
        if self.start is None:
            changes = [weights.delta(model) for weights in self.slices]
            moved = [i for i, change in enumerate(changes) if change is not None]
            drifts = [change for change in changes if change is not None]
        else:
            moved = list(range(len(self.slices)))
            pairs = zip(self.slices, self.start, strict=True)
            drifts = [weights.effective(model) - start for weights, start in pairs]
        if not any(drift.requires_grad for drift in drifts):
            names = ", ".join(sorted({weights.projection for weights in self.slices}))
            raise InputError(
                f"weight_drift holds {names}, and nothing that "
                "is trained moves the chosen heads' part of them; use output_drift or attention_kl, or other parts"
            )
        return quadratic(drifts, None if self.fisher is None else [self.fisher[i] for i in moved])


def slice_anchor(
    model: HeadModel,
    pairs: Collection[tuple[int, int]],
    parts: Sequence[str] = PARTS,
    fisher: Mapping[str, Tensor] | None = None,
    reference: HeadModel | None = None,
    adapted: bool = False,
) -> SliceAnchor:
    """Hold the slices of heads where they are now, or to another model's.

    Args:
        fisher: by weight name (`fisher_diagonal` of the model without an adapter); None for L2-SP.
        reference: the model whose weights count; None: this one's as they are now, copied unless `adapted`.
        adapted: the model carries an adapter and its own weights stay what they are.

    Raises:
        InputError: a head or part that does not exist, or a Fisher diagonal that lacks one of the weights.
    """
    slices = head_weights(model, pairs, parts)
    if fisher is not None and (missing := [weights.weight for weights in slices if weights.weight not in fisher]):
        raise InputError(f"the Fisher diagonal has no {missing[0]}; compute it with these names")
    in_out = model.architecture.in_out_weight
    stiffness = None if fisher is None else [_fisher_of(model, each, fisher[each.weight], in_out) for each in slices]
    start: list[Tensor] | None = None
    with torch.no_grad():
        if reference is not None:
            start = [weights.effective(reference) for weights in slices]
        elif not adapted:
            start = [weights.base(model) for weights in slices]
    return SliceAnchor(slices, start, stiffness)


def _fisher_of(model: HeadModel, weights: HeadWeights, fisher: Tensor, in_out: bool) -> Tensor:
    base = weights.base(model)
    of_slices = weights.slice_of(fisher, in_out).to(base.device)
    if of_slices.shape != base.shape:
        raise InputError(f"the Fisher diagonal of {weights.weight} is {list(fisher.shape)}, which is not this model's")
    return of_slices


# --- the Fisher diagonal ----------------------------------------------------------------------------------------------


def fisher_diagonal(model: nn.Module, rows: Rows, names: Collection[str] | None = None) -> dict[str, Tensor]:
    """Empirical Fisher diagonal `F = mean over rows of (d log p(labels | row) / d theta)^2`, in eval mode.

    `log p(labels | row)` is the sum over the row's labels. One backward pass a row: squares of per-row gradients cannot
    be had from the gradient of a batch.

    Args:
        model: with or without a PEFT adapter.
        rows: `input_ids` and `labels` each; -100 where nothing is learnt.
        names: parameters as `model.named_parameters()` calls them, whether trained or not; None: those trained.

    Returns:
        name -> float32, shaped as the parameter, on its device. Kirkpatrick et al. 2017, section 2.

    Raises:
        InputError: no rows, a row without a label, or an unknown name.
    """
    parameters = dict(model.named_parameters())
    if names is None:
        names = [name for name, parameter in parameters.items() if parameter.requires_grad]
    if unknown := sorted(set(names) - set(parameters)):
        raise InputError(f"the model has no parameter {unknown[0]!r}; give names of model.named_parameters()")
    if not rows or not names:
        raise InputError(f"a Fisher diagonal of {len(rows)} rows and {len(names)} parameters; expected some of each")
    chosen = [parameters[name] for name in names]
    training = {module for module in model.modules() if module.training}
    required = {parameter: parameter.requires_grad for parameter in parameters.values()}
    totals = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in chosen]
    model.eval()
    try:
        for parameter in parameters.values():
            parameter.requires_grad_(False)
        for parameter in chosen:
            parameter.requires_grad_(True)
        for number, row in enumerate(rows):
            gradients = torch.autograd.grad(_log_likelihood(model, row, number), chosen, allow_unused=True)
            for total, gradient in zip(totals, gradients, strict=True):
                if gradient is not None:
                    total.add_(gradient.float().pow(2))
    finally:
        for parameter, flag in required.items():
            parameter.requires_grad_(flag)
        for module in training:
            module.training = True
    return {name: total / len(rows) for name, total in zip(names, totals, strict=True)}


def _log_likelihood(model: Any, row: Mapping[str, Sequence[int]], number: int) -> Tensor:
    device = model.get_input_embeddings().weight.device
    tokens = torch.tensor(list(row["input_ids"]), device=device)
    labels = torch.tensor(list(row["labels"]), device=device)[1:]
    columns = (labels != -100).nonzero().flatten()
    if not len(columns):
        raise InputError(f"row {number} has no label to predict; leave it out")
    logits = model(tokens[None], use_cache=False, logits_to_keep=columns).logits[0]
    log_p = logits.float().log_softmax(-1)
    total: Tensor = log_p.gather(-1, labels[columns].to(log_p.device)[:, None]).sum()
    return total


# --- everything that is trained ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WeightAnchor:
    """Elastic weight consolidation over a sequence of tasks: `1/2 sum_t sum_i F_t,i (theta_i - theta_t,i)^2`.

    A sum of quadratics is a quadratic, so all tasks together take the memory of one: their summed Fisher F, the mean
    m of their weights weighted by it, and what is left over at m.

    Attributes:
        weights: m by parameter name, float32; where F is 0, the last task's.
        fisher: F by parameter name, float32.
        constant: `1/2 sum_t sum_i F_t,i (m_i - theta_t,i)^2`.
        tasks: how many were added.
    """

    weights: dict[str, Tensor]
    fisher: dict[str, Tensor]
    constant: float = 0.0
    tasks: int = 0

    @staticmethod
    def empty() -> WeightAnchor:
        return WeightAnchor({}, {})

    def with_task(self, model: nn.Module, fisher: Mapping[str, Tensor]) -> WeightAnchor:
        """This anchor and one more task, whose trained weights are the model's now.

        Args:
            fisher: of the task by parameter name; ones give L2-SP to where each task ended.

        Raises:
            InputError: a name that the model does not have, or other names than those of earlier tasks.
        """
        parameters = _named(model, fisher)
        if self.tasks and set(fisher) != set(self.fisher):
            odd = sorted(set(fisher) ^ set(self.fisher))[0]
            raise InputError(f"parameter {odd!r} is in one task's Fisher diagonal and not in another's")
        weights, summed, constant = {}, {}, self.constant
        for name, value in sorted(fisher.items()):  # any order, the same sum
            new, now = value.detach().float(), parameters[name].detach().float()
            if new.shape != now.shape:
                raise InputError(f"the Fisher diagonal of {name} is {list(new.shape)}, the weight {list(now.shape)}")
            old = self.fisher[name].to(new.device) if self.tasks else torch.zeros_like(new)
            mean = self.weights[name].to(new.device) if self.tasks else now.clone()
            total = old + new
            share = torch.where(total > 0, new / total.clamp(min=torch.finfo(total.dtype).tiny), 1.0)
            constant += float((old * share * (now - mean).pow(2)).sum(dtype=torch.float64)) / 2
            summed[name], weights[name] = total, mean + share * (now - mean)
        return WeightAnchor(weights, summed, constant, self.tasks + 1)

    def penalty(self, model: nn.Module) -> Tensor:
        """The sum over tasks, with gradient to the model's weights; 0, without a gradient, before the first task."""
        if not self.tasks:
            return torch.zeros(())
        parameters = _named(model, self.weights)
        drifts = [
            parameters[name].float() - anchor.to(parameters[name].device) for name, anchor in self.weights.items()
        ]
        stiffness = [self.fisher[name].to(drift) for name, drift in zip(self.weights, drifts, strict=True)]
        return quadratic(drifts, stiffness) + self.constant

    def save(self, path: Path) -> None:
        """Write as safetensors: `weights/<name>`, `fisher/<name>`."""
        tensors = {f"weights/{name}": value.contiguous() for name, value in self.weights.items()}
        tensors |= {f"fisher/{name}": value.contiguous() for name, value in self.fisher.items()}
        about = {"anchor": json.dumps({"constant": self.constant, "tasks": self.tasks})}
        with atomic_path(path) as temporary:
            save_file(tensors, temporary, metadata=about)

    @staticmethod
    def load(path: Path) -> WeightAnchor:
        """Read what `save` wrote.

        Raises:
            CheckError: the file is missing, damaged, or another kind of file.
        """
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                about = json.loads(file.metadata()["anchor"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dict
            groups: dict[str, dict[str, Tensor]] = {"weights": {}, "fisher": {}}
            for key, value in tensors.items():
                kind, _, name = key.partition("/")
                groups[kind][name] = value
            return WeightAnchor(
                dict(sorted(groups["weights"].items())), groups["fisher"], float(about["constant"]), int(about["tasks"])
            )
        except (OSError, safetensors.SafetensorError, KeyError, TypeError, ValueError) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise CheckError(
                f"{path} is no readable weight anchor ({reason}); run the tasks before it again"
            ) from error


def _named(model: nn.Module, names: Collection[str]) -> dict[str, nn.Parameter]:
    parameters = dict(model.named_parameters())
    if missing := sorted(set(names) - set(parameters)):
        raise InputError(f"the model has no parameter {missing[0]!r}; use the model that the anchor was made with")
    return parameters
