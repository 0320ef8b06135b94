"""Regularisers by kind: what a recipe says of one, and the penalty that it means. Packages can add theirs:

    class SmallOutputs(Regulariser):
        kind: Literal["small_outputs"] = "small_outputs"
        margin: float = 0.0

    @register_regulariser("small_outputs", SmallOutputs)
    class SmallOutputsPenalty(HeadPenalty[SmallOutputs]):
        def captures(self) -> Captures:
            return Captures(z=self.layers)

        def loss(self, batch: TrainingBatch) -> Tensor:
            sizes = [batch.z(self.model, layer, heads).norm(dim=-1).mean() for layer, heads in self.by_layer.items()]
            return (torch.stack(sizes) - self.config.margin).relu().mean()

With that imported, recipes take `regularisers: [{kind: small_outputs, margin: 2.0, weight: 0.1}]`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.nn import Module

from headtune.analysis.models.head_model import HeadModel
from headtune.analysis.models.hooks import require_heads
from headtune.analysis.utils.errors import CheckError, InputError
from headtune.train.config.regularisers import Regulariser, register_config

from . import head_penalties
from .activation_capture import Captures, HeadPass, layers_of, of_heads

ConfigT = TypeVar("ConfigT", bound=Regulariser)
PenaltyT = TypeVar("PenaltyT", bound="type[HeadPenalty[Any]]")

Pairs = Sequence[tuple[int, int]]  # (layer, head)


@dataclass(eq=False)
class TrainingBatch:
    """What a penalty looks at: one training pass, the base's pass on the same inputs, and the trainer's batch.

    Attributes:
        training_pass: the model's pass, with gradient.
        base: the base model's pass, without gradient; None where no penalty compares with the base.
        inputs: the batch as collated, as far as it says which tokens are right; None where the trainer showed none.
        seed: another one for each batch, the same after a resume.
    """

    training_pass: HeadPass
    base: HeadPass | None
    inputs: Mapping[str, Tensor] | None
    seed: int
    _queries: dict[int, Tensor] = field(default_factory=dict)  # by the number of rows asked for

    def z(self, model: HeadModel, layer: int, heads: Sequence[int], base: bool = False) -> Tensor:
        """`[batch, seq, len(heads), head_dim]` heads' outputs, where `captures` asked for them; `base`: the base's."""
        source = self.base if base else self.training_pass
        assert source is not None
        return of_heads(model, source.z[layer], heads)

    def predicting(self, kind: str) -> tuple[Tensor, Tensor]:
        """Where the first label is predicted and which tokens are right there: see `head_penalties.predicting`.

        Raises:
            CheckError: the trainer showed no batch, or one without labels; `kind` is the penalty that wants them.
        """
        if self.inputs is None:
            raise CheckError(f"{kind} was not shown the trainer's batch; call see(inputs) before every pass")
        if not self.inputs.keys() & {"remaining", "completion_mask", "labels"}:
            raise CheckError(f"{kind} finds no labels in a batch of {', '.join(sorted(self.inputs))}")
        return head_penalties.predicting(self.inputs, self.training_pass.present)

    def queries(self, rows: int) -> Tensor:
        """`[batch, rows]` query positions drawn from `seed` among those that are not padding, padded with -1."""
        if rows not in self._queries:
            generator = torch.Generator().manual_seed(self.seed)
            self._queries[rows] = head_penalties.draw_queries(self.training_pass.present, rows, generator)
        return self._queries[rows]


class HeadPenalty(Generic[ConfigT]):
    """One penalty on heads of a model. A subclass says what it needs of a training pass, and computes its loss.

    Attributes:
        config: what the recipe says.
        pairs: (layer, head), each once.
        model: the model that is trained, with or without an adapter.
        counts: what is logged at the end, by name, such as rows that were skipped.

    Raises:
        InputError: no heads, a head twice, or one that the model does not have.
    """

    def __init__(self, config: ConfigT, pairs: Pairs, model: HeadModel) -> None:
        if not pairs:
            raise InputError(f"{config.kind} names no heads; give (layer, head) pairs")
        if len(set(pairs)) < len(pairs):
            raise InputError(f"{config.kind} names a head twice in {list(pairs)}; remove the repeats")
        require_heads(model, pairs)
        self.config = config
        self.pairs = pairs
        self.model = model
        self.counts: Counter[str] = Counter()

    @property
    def layers(self) -> frozenset[int]:
        return layers_of(self.pairs)

    @property
    def by_layer(self) -> dict[int, list[int]]:
        return {layer: sorted(head for at, head in self.pairs if at == layer) for layer in sorted(self.layers)}

    def captures(self) -> Captures:
        """What has to be captured of every training pass."""
        return Captures()

    @property
    def compares_with_base(self) -> bool:
        """Whether the same has to be captured of the base model's pass on the same inputs."""
        return False

    @property
    def needs_fisher(self) -> bool:
        """Whether `start` has to be given Fisher information."""
        return False

    def weights_read(self) -> list[Module]:
        """The modules whose own weights `loss` reads, for engines that split weights over processes."""
        return []

    def start(self, reference: HeadModel | None, adapted: bool, fisher: Mapping[str, Tensor] | None) -> None:
        """Called when the training begins.

        Args:
            reference: the base, where it is another model.
            adapted: the model carries an adapter; without it, it is the base.
            fisher: Fisher information by weight name, if any was computed.
        """

    def finish(self) -> None:
        """Called when the training has ended: let go of tensors."""

    def read_base(self, base: HeadModel, batch: TrainingBatch) -> None:
        """Called after the base's pass, without gradient and with the base's weights in `base`, before `loss`."""

    def loss(self, batch: TrainingBatch) -> Tensor:
        """The term, unweighted, a scalar with gradient."""
        raise NotImplementedError


PENALTIES: dict[str, type[HeadPenalty[Any]]] = {}


def register_regulariser(kind: str, config: type[Regulariser]) -> Callable[[PenaltyT], PenaltyT]:
    """Make a penalty known by its kind, so that recipes and `Regularisers` take its configuration.

    Raises:
        InputError: the kind is taken, or the configuration's field `kind` is not it.
    """

    def register(penalty: PenaltyT) -> PenaltyT:
        if kind in PENALTIES:
            raise InputError(f"regulariser {kind!r} is {PENALTIES[kind].__qualname__}'s kind already; choose another")
        register_config(kind, config)
        PENALTIES[kind] = penalty
        return penalty

    return register


def head_penalties_of(model: HeadModel, terms: Collection[tuple[Regulariser, Pairs]]) -> dict[str, HeadPenalty[Any]]:
    """The penalties that configurations mean, by name; of several of one kind the later are named `kind_2`, `kind_3`.

    Raises:
        InputError: a kind that no penalty is registered for, or what the penalty refuses.
    """
    penalties: dict[str, HeadPenalty[Any]] = {}
    for config, pairs in terms:
        if config.kind not in PENALTIES:
            raise InputError(f"regulariser {config.kind!r} is no penalty on what heads compute")
        n_alike = sum(other.config.kind == config.kind for other in penalties.values())
        name = f"{config.kind}_{n_alike + 1}" if n_alike else config.kind
        penalties[name] = PENALTIES[config.kind](config, pairs, model)
    return penalties
