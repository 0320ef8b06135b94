"""Prune heads while anything else is trained: a HardConcrete gate on each chosen head, and a price on open gates.

On the input of the attention output projection, for each chosen head h of layer l,

    z[l, h] <- g[l, h] * z[l, h]                 g in 0..1, drawn at every forward pass in training mode,
                                                 without noise in eval mode
    loss    <- loss + weight * mean P(g > 0)     the expected share of heads that are open

(Voita et al. 2019, arXiv 1905.09418, with the gates of Louizos et al. 2018; see `hard_concrete`.) Gates start open, so
nothing changes at first; those whose heads the loss does not need close, and are exactly 0 then. `fold` multiplies each
head's part of W_O by its gate: the result is a plain model.

    gates = attach(trainer.model, heads)         after PEFT has put its adapter around the model
    trainer.rates = {NAME: 0.1}                  log alpha learns at its own, larger rate
    trainer.penalty = l0_penalty(gates, weight=0.05, warmup=0.2)
    trainer.add_callback(GatesInCheckpoints())
    trainer.train()
    merged = trainer.model.merge_and_unload()    where there is an adapter
    fold(merged, gates)

The gates are one module, `head_gates`, of the outermost model, with one parameter. A plain model's own checkpoints hold
it; PEFT's hold adapters alone, which is why the callback keeps it in `trainer_state.json`. Where an adapter is switched
off (`disable_adapter`), so are the gates: what is left is the base model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.pytorch_utils import Conv1D
from transformers.trainer_callback import ExportableState

from headtune.analysis.models.structure import architecture_for
from headtune.analysis.utils.errors import CheckError, InputError
from headtune.train import distributed

from . import hard_concrete
from .base import require_heads_in_range

if TYPE_CHECKING:
    from headtune.train.types import Penalty

NAME = "head_gates"  # of the module, and so in the parameter's name
Pairs = Sequence[tuple[int, int]]  # (layer, head)


class HeadGates(nn.Module):
    """One gate for each chosen head; made by `attach`.

    Attributes:
        heads: the chosen heads, by layer and head.
        n_layers, n_heads, n_kv_heads, head_dim: of the model.
        log_alpha: `[n_chosen]` float32, in the order of `heads`; starts at `hard_concrete.OPEN`.
    """

    def __init__(self, heads: Pairs, n_layers: int, n_heads: int, n_kv_heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads = tuple(sorted((int(layer), int(head)) for layer, head in heads))
        self.n_layers, self.n_heads, self.n_kv_heads, self.head_dim = n_layers, n_heads, n_kv_heads, head_dim
        self.log_alpha = nn.Parameter(torch.full((len(self.heads),), hard_concrete.OPEN))
        self._rows: dict[int, list[int]] = {}  # of log_alpha, by layer
        for row, (layer, _) in enumerate(self.heads):
            self._rows.setdefault(layer, []).append(row)
        self._handles: list[Any] = []
        self._tuner: tuple[Any, ...] = ()  # one layer of the model's adapter, in a tuple so as not to be a child

    @property
    def layers(self) -> list[int]:
        return list(self._rows)

    def forward(self, layer: int, sample: bool) -> Tensor:
        """`factors` as a forward pass, for which engines that split weights put this module's together."""
        return self.factors(layer, sample)

    def factors(self, layer: int, sample: bool = False) -> Tensor:
        """What a layer's heads are multiplied by: `[n_heads]` float32, 1 where a head has no gate."""
        rows = self._rows[layer]
        log_alpha = self.log_alpha[rows[0] : rows[-1] + 1]
        gates = hard_concrete.sampled(log_alpha) if sample else hard_concrete.without_noise(log_alpha)
        chosen = torch.tensor([self.heads[row][1] for row in rows], device=gates.device)
        return gates.new_ones(self.n_heads).index_copy(0, chosen, gates)

    @torch.no_grad()
    def values(self) -> dict[tuple[int, int], float]:
        """The gates as they are evaluated and folded, in 0..1."""
        return dict(zip(self.heads, hard_concrete.without_noise(self.log_alpha).tolist(), strict=True))

    def _gate(self, layer: int, _projection: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """The hook on a projection's input, `[..., n_heads * head_dim]`.

        Drawn here and not once for all layers: a checkpointed layer that runs again restores the random state and
        draws the same gates.
        """
        if any(layer_of_adapter.disable_adapters for layer_of_adapter in self._tuner):
            return None
        z = args[0].unflatten(-1, (self.n_heads, self.head_dim))
        factors: Tensor = self(layer, self.training).to(z.device, z.dtype)
        return (z * factors[:, None]).flatten(-2), *args[1:]


# --- on a model -------------------------------------------------------------------------------------------------------


def attach(model: Any, heads: Pairs) -> HeadGates:
    """Put open gates on heads of a model; what it computes in eval mode stays the same to the bit.

    Args:
        model: a transformers model or a PeftModel, of a supported family. An adapter has to be there before the gates.
        heads: `(layer, head)`, at least one, each once.

    Raises:
        InputError: heads that the model does not have, repeats or none, or a model that has gates already.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    projections, n_heads, n_kv_heads = _projections(model)
    if not heads:
        raise InputError("no heads to gate; name at least one (layer, head)")
    if len({(int(layer), int(head)) for layer, head in heads}) < len(heads):
        raise InputError(f"heads {list(heads)} name a head twice; remove the repeats")
    require_heads_in_range(heads, len(projections), n_heads)
    if any(isinstance(module, HeadGates) for module in model.modules()):
        raise InputError("the model has gates on its heads already; fold them before attaching others")
    in_features = _in_out(projections[0]).shape[0]
    gates = HeadGates(heads, len(projections), n_heads, n_kv_heads, in_features // n_heads)
    gates.to(_in_out(projections[0]).device).train(model.training)
    gates._tuner = tuple(module for module in model.modules() if isinstance(module, BaseTunerLayer))[:1]
    for layer in gates.layers:
        # A bound method and not a closure: a deep copy of the model gets gates of its own.
        hook: Any = partial(gates._gate, layer)
        gates._handles.append(projections[layer].register_forward_pre_hook(hook))
    model.add_module(NAME, gates)
    return gates


def gates_of(model: nn.Module) -> HeadGates:
    """The gates that a model carries.

    Raises:
        InputError: it carries none.
    """
    for module in model.modules():
        if isinstance(module, HeadGates):
            return module
    raise InputError("the model has no gates on its heads; attach them first")


@torch.no_grad()
def fold(model: Any, gates: HeadGates) -> None:
    """Multiply the chosen heads' parts of the output projections by their gates without noise; the gates are removed.

    Args:
        model: the plain model that carries the gates, or the one that its adapter was merged into
            (`merge_and_unload`); changed in place.

    Raises:
        InputError: a model that still has an adapter, another size than the gates', or weights that are quantised.
        CheckError: gates that are not finite.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise InputError("the model still has its adapter, which gates act on too; merge_and_unload() it first")
    projections, n_heads, _ = _projections(model)
    if (len(projections), n_heads) != (gates.n_layers, gates.n_heads):
        raise InputError(
            f"the gates are those of a model with {gates.n_layers} x {gates.n_heads} heads, and this one has "
            f"{len(projections)} x {n_heads}; give the model that was trained"
        )
    if not gates.log_alpha.isfinite().all():
        raise CheckError("the gates hold numbers that are not finite; train with a lower rate")
    for layer in gates.layers:
        weight = _in_out(projections[layer])
        if not weight.is_floating_point():
            raise InputError(f"weights of type {weight.dtype} cannot be folded into; load the model unquantised")
    for layer in gates.layers:
        weight = _in_out(projections[layer])
        rows = gates.factors(layer).to(weight.device).repeat_interleave(gates.head_dim)
        weight.copy_(weight.float() * rows[:, None])  # a view, so the module's own weight
    _detach(model, gates)


def _detach(model: nn.Module, gates: HeadGates) -> None:
    for handle in gates._handles:
        handle.remove()
    gates._handles.clear()
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if child is gates:
                delattr(module, name)


def _projections(model: Any) -> tuple[list[nn.Module], int, int]:
    """The output projections by layer, adapters around them included; query heads and KV groups of a layer."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    sizes = base.config.get_text_config()
    row = architecture_for(base)
    path = f"{row.attention}.{row.output_projection}"
    projections = [layer.get_submodule(path) for layer in base.get_submodule(row.layers)]
    n_heads = int(sizes.num_attention_heads)
    return projections, n_heads, int(getattr(sizes, "num_key_value_heads", None) or n_heads)


def _in_out(projection: Any) -> Tensor:
    """A view of a projection's own weight as `[n_heads * head_dim, d_model]`."""
    base = projection.get_base_layer() if hasattr(projection, "get_base_layer") else projection
    weight: Tensor = base.weight.data
    return weight if isinstance(base, Conv1D) else weight.T


# --- the price of open gates ------------------------------------------------------------------------------------------


def l0(gates: HeadGates) -> Tensor:
    """The mean probability that a gate is open, in 0..1, with a gradient to every gate's log alpha."""
    return hard_concrete.probability_open(gates.log_alpha).mean()


def l0_penalty(gates: HeadGates, weight: float, warmup: float = 0.0, sparsity: float | None = None) -> Penalty:
    """The trainer's penalty on open gates.

    Without a target `{"l0": (l0, w)}`: w grows linearly from 0 to `weight` over the share `warmup` of the training.
    With one, the share that is to be closed grows from 0 to `sparsity` over that share, and what costs is the distance
    from it, either way: `{"l0": (l0, 0), "l0_gap": (|1 - l0 - share|, weight)}`.

    Args:
        weight: at least 0.
        warmup: in 0..1.
        sparsity: in 0..1, or None.

    Raises:
        InputError: a number outside its range.
    """
    for name, value, high in (("weight", weight, float("inf")), ("warmup", warmup, 1), ("sparsity", sparsity, 1)):
        if value is not None and not 0 <= value <= high:
            raise InputError(f"{name} of the penalty on gates is {value}; expected 0{f'-{high}' * (high == 1)} or more")

    def penalty(_model: Any, progress: float) -> dict[str, tuple[Tensor, float]]:
        grown = min(1.0, progress / warmup) if warmup else 1.0
        with distributed.gathered_parameters([gates]):
            share_open = l0(gates)
        if sparsity is None:
            return {"l0": (share_open, weight * grown)}
        return {"l0": (share_open, 0.0), "l0_gap": ((1 - share_open - sparsity * grown).abs(), weight)}

    return penalty


# --- what came of it --------------------------------------------------------------------------------------------------


def open_heads(gates: HeadGates) -> list[tuple[int, int]]:
    """The chosen heads whose gate without noise is above 0."""
    return [head for head, value in gates.values().items() if value > 0]


def closed_heads(gates: HeadGates) -> list[tuple[int, int]]:
    """The chosen heads whose gate without noise is 0: after `fold` they write nothing."""
    return [head for head, value in gates.values().items() if value == 0]


def summary(gates: HeadGates) -> dict[str, Any]:
    """How many heads closed, where, and which share of the attention weights nothing depends on any more.

    A closed head's query rows of W_Q and its columns of W_O are dead; rows of W_K and W_V only where all heads of their
    KV group are closed. The file keeps its size: dead weights of W_O are zeros, the others are still there.

    Returns:
        `{"gated", "open", "closed", "between": [[layer, head, gate], ...] of gates that are neither 0 nor 1,
        "by_layer": [[layer, gated, closed], ...] of layers with gates, "closed_heads": [[layer, head], ...],
        "dead_share": {"q", "k", "v", "o": of the whole model's W_Q, W_K, W_V, W_O}}`.
    """
    values = gates.values()
    closed = set(closed_heads(gates))
    size = gates.n_heads // gates.n_kv_heads
    groups = [(layer, start) for layer in range(gates.n_layers) for start in range(0, gates.n_heads, size)]
    dead = [all((layer, start + i) in closed for i in range(size)) for layer, start in groups]
    by_head, by_group = len(closed) / (gates.n_layers * gates.n_heads), sum(dead) / len(dead)
    return {
        "gated": len(values),
        "open": len(values) - len(closed),
        "closed": len(closed),
        "between": [[*head, value] for head, value in values.items() if 0 < value < 1],
        "by_layer": [
            [layer, *(sum(at == layer for at, _ in heads) for heads in (values, closed))] for layer in gates.layers
        ],
        "closed_heads": [list(head) for head in sorted(closed)],
        "dead_share": {"q": by_head, "k": by_group, "v": by_group, "o": by_head},
    }


# --- files ------------------------------------------------------------------------------------------------------------


def state_of(gates: HeadGates) -> dict[str, Any]:
    """`{"heads": [[layer, head], ...], "log_alpha": [...]}`; JSON gives float32 back to the bit."""
    return {"heads": [list(head) for head in gates.heads], "log_alpha": gates.log_alpha.detach().tolist()}


def whole_state(model: nn.Module) -> dict[str, Any]:
    """`state_of` a model's gates under any engine; every process has to call it."""
    gates = gates_of(model)
    with torch.no_grad(), distributed.gathered_parameters([gates]):
        return state_of(gates)


def attach_state(model: Any, state: Mapping[str, Any]) -> HeadGates:
    """`attach` the gates that `state_of` described."""
    gates = attach(model, [(int(layer), int(head)) for layer, head in state["heads"]])
    restore(gates, state)
    return gates


@torch.no_grad()
def restore(gates: HeadGates, state: Mapping[str, Any]) -> None:
    """Set gates to what `state_of` gave.

    Raises:
        CheckError: a state of other heads, or none.
    """
    heads, log_alpha = state.get("heads"), state.get("log_alpha")
    if heads != [list(head) for head in gates.heads] or not log_alpha or len(log_alpha) != len(heads):
        raise CheckError(f"the saved gates are of heads {heads}, and the model's of {[list(h) for h in gates.heads]}")
    distributed.scatter_into(gates.log_alpha, torch.tensor(log_alpha))


def restore_checkpoint(gates: HeadGates, checkpoint: Path) -> None:
    """Set gates to what they were at a `checkpoint-N`; `Trainer.train(resume_from_checkpoint=...)` does it by itself.

    Raises:
        CheckError: the checkpoint was written without `GatesInCheckpoints`, or for other heads.
    """
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    restore(gates, _saved_in(state["stateful_callbacks"], str(checkpoint)))


class GatesInCheckpoints(TrainerCallback, ExportableState):
    """Keeps the gates of the trainer's model in its checkpoints, and sets them when a training resumes.

    They are part of `trainer_state.json`, which is written last: a checkpoint that is whole has its gates. Rank 0 alone
    writes it, and each process may have a part of them: all put them together after every step.
    """

    def __init__(self) -> None:
        self._noted: dict[str, Any] = {}

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"saved": self._noted} if self._noted else {}}

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if args.load_best_model_at_end:
            raise InputError("load_best_model_at_end would not bring the gates of that step back; set it to false")
        if state.global_step:
            source = f"the checkpoint of step {state.global_step}"
            restore(gates_of(model), _saved_in(state.stateful_callbacks, source))
        self._noted = whole_state(model)

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self._noted = whole_state(model)


def _saved_in(callbacks: Mapping[str, Any], source: str) -> dict[str, Any]:
    saved = callbacks.get(GatesInCheckpoints.__name__, {}).get("attributes", {}).get("saved")
    if saved is None:
        raise CheckError(f"{source} holds no gates; it is not from a training with gates on heads, start anew")
    state: dict[str, Any] = saved
    return state
