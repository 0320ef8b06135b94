"""Which heads' attention a sequence of tasks depends on, and which heads lose it: SEEKR's importance (He et al. 2024).

    S_k[l, h] = E_rows ||dL/dA[l, h]||_F                       how much task k's loss feels the head's attention
    F_k[l, h] = E_rows ||A[l, h] after - A[l, h] before||_F    how far learning task k moved it
    I = S * F,  S = sum_k layer_normalised(S_k),  F = sum_k F_k

with A the post-softmax attention of all queries of a row over the keys they may see, L the row's loss, and rows those
of task k that will be replayed. Both norms (`sensitivity`, `forgetting`) are exact and no head's `[seq, seq]` is ever
whole: blocks of query rows are made, squared, summed and dropped. (Where a family caps its attention scores, its own
forward pass is not so frugal.)

    before = snapshot_attention(model, rows)        # the model that is about to learn task k
    ...                                             # it learns, in place
    moved = measure_forgetting(model, rows, before)
    importance = importance.add(measure_sensitivity(model, rows), moved)
    heads = top_heads(importance.value(), layers=24, heads=128)
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from headtune.analysis.utils.errors import CheckError, InputError
from headtune.analysis.utils.files import atomic_path


def layer_normalised(sensitivities: Tensor) -> Tensor:
    """`S[l, h] / sum over h' of S[l, h']`: every layer of every task weighs the same; a layer of zeros stays zero.

    The paper's "layer-normalised" sensitivity is read as its authors' code has it. Gradient norms differ by orders of
    magnitude between depths and between tasks, and a sum over tasks would otherwise be one task's, a ranking of layers
    one of depths. LayerNorm proper (less the mean, over the standard deviation) is no choice: half of a layer's heads
    would be negative, so that of two of them the one that moved less would be the more important, and the layers' sums,
    by which layers are chosen, would say nothing.

    Args:
        sensitivities: `[n_layers, n_heads]`, not negative.
    """
    total = sensitivities.sum(1, keepdim=True)
    return torch.where(total > 0, sensitivities / total, torch.zeros_like(sensitivities))


@dataclass(frozen=True)
class Importance:
    """Heads' importance over the tasks learnt so far.

    Attributes:
        sensitivity: `sum_k layer_normalised(S_k)`, `[n_layers, n_heads]` float32.
        forgetting: `sum_k F_k`, the same shape.
        tasks: how many were added.
    """

    sensitivity: Tensor
    forgetting: Tensor
    tasks: int = 0

    @classmethod
    def none(cls, n_layers: int, n_heads: int) -> Importance:
        """Before the first task."""
        return cls(torch.zeros(n_layers, n_heads), torch.zeros(n_layers, n_heads))

    def add(self, sensitivity: Tensor, forgetting: Tensor) -> Importance:
        """With one more task, whose sensitivity is given as measured: it is normalised here.

        Raises:
            InputError: other shapes.
        """
        if not sensitivity.shape == forgetting.shape == self.sensitivity.shape:
            raise InputError(
                f"sensitivity {list(sensitivity.shape)} and forgetting {list(forgetting.shape)} do not fit an "
                f"importance of {list(self.sensitivity.shape)} heads; measure them on the same model"
            )
        normalised = self.sensitivity + layer_normalised(sensitivity)
        return Importance(normalised, self.forgetting + forgetting, self.tasks + 1)

    def value(self) -> Tensor:
        """`S * F`, `[n_layers, n_heads]` float32, never negative; the authors' code sums `S_k * F_k` instead."""
        return self.sensitivity * self.forgetting

    def save(self, path: Path) -> None:
        """Write a safetensors file, whole or not at all."""
        tensors = {"sensitivity": self.sensitivity, "forgetting": self.forgetting, "tasks": torch.tensor(self.tasks)}
        with atomic_path(path) as temporary:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)

    @classmethod
    def load(cls, path: Path) -> Importance:
        """Read what `save` wrote.

        Raises:
            CheckError: there is no such file, or it is damaged.
        """
        try:
            tensors = load_file(path)
            return cls(tensors["sensitivity"], tensors["forgetting"], int(tensors["tasks"]))
        except (OSError, SafetensorError, KeyError) as error:
            raise CheckError(f"importance {path} cannot be read ({error}); measure it again") from None


def top_heads(importance: Tensor, layers: int, heads: int) -> list[tuple[int, int]]:
    """The `layers` layers with the highest `sum_h I[l, h]`, then the `heads` heads with the highest I in them.

    Args:
        importance: `[n_layers, n_heads]`.

    Returns:
        `(layer, head)`, best first; of equals, the lower layer and head.

    Raises:
        InputError: a budget that the model does not have, or an importance that is not finite.
    """
    n_layers, n_heads = importance.shape
    if not 1 <= layers <= n_layers:
        raise InputError(f"a budget of {layers} layers; expected 1 to {n_layers}, the layers of the model")
    if not 1 <= heads <= layers * n_heads:
        raise InputError(f"a budget of {heads} heads; expected 1 to {layers * n_heads}, those of {layers} layers")
    if not importance.isfinite().all():
        raise InputError("the importance holds values that are not finite; measure it again")
    values = importance.double()
    best = values.sum(1).argsort(descending=True, stable=True)[:layers]
    within = torch.full_like(values, -torch.inf)
    within[best] = values[best]
    flat = within.flatten().argsort(descending=True, stable=True)[:heads]
    return [divmod(int(index), n_heads) for index in flat]
