"""Causal head gating: learn, with the model frozen, which heads a task needs, which it can do without, which harm it.

Every head gets a gate `g = sigmoid(phi)` on its output, at all positions. With loss = -log p(answers), the total
probability of the first tokens at the last token, in nats, meaned over prompts, gates are fitted twice, from open
gates:

    g+     minimise   loss - weight * sum phi       pushed open: a head whose gate closes all the same does harm
    g-     minimise   loss + weight * sum phi       pushed shut: a head whose gate stays open is needed

    facilitating = g-      interfering = 1 - g+      irrelevant = g+ * (1 - g-)

(Nam et al. 2025, arXiv 2505.13737. They start both from a third fit, without a push; on models with known heads that
costs half as much again and finds the same ones.) The push is on phi, so a gate that is nearly open or shut feels it as
much as any; it ends where `|phi|` reaches BOUND. A gate rests in between where the loss pulls as hard as the push,
`g (1 - g) |dloss/dg| = weight`: roughly, a head is kept if its gate moves the loss by more than `4 * weight` nats. All
heads are gated at once, so a head's role is its role beside the others that are kept: of two that do the same, one is
enough.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from headtune.analysis.interventions.batches import rows_in_memory
from headtune.analysis.models import hooks
from headtune.analysis.models.head_model import HeadModel
from headtune.analysis.tasks.tokenized import Encoded
from headtune.analysis.utils.errors import InputError
from headtune.analysis.utils.progress import Progress, silent

from .patching import answer_probabilities
from .scores import Array

Quantity = Literal["target", "previous"]

BOUND = 5.0  # of |phi|: gates of 0.7 and 99.3 percent
OPEN = 2.0  # phi of a gate that is open but can still move: 88 percent


@dataclass(frozen=True)
class Gates:
    """What a task does with every head, `[n_layers, n_heads]` float32 each, in 0..1.

    Attributes:
        pushed_open: g+, the gates that were pushed open.
        pushed_shut: g-, those that were pushed shut.
    """

    pushed_open: Tensor
    pushed_shut: Tensor

    @property
    def facilitating(self) -> Tensor:
        return self.pushed_shut

    @property
    def interfering(self) -> Tensor:
        return 1 - self.pushed_open

    @property
    def irrelevant(self) -> Tensor:
        return self.pushed_open * (1 - self.pushed_shut)

    @property
    def signed(self) -> Tensor:
        """facilitating - interfering, in -1..1: positive = the head raises the answers."""
        return self.facilitating - self.interfering


def gate_scores(model: HeadModel, examples: Sequence[Encoded], seed: int, progress: Progress) -> dict[str, Array]:
    """Gates fitted to a whole task, with the defaults of `fit_gates`.

    Returns:
        `gates.facilitating`, `gates.interfering` and `gates.irrelevant` in 0..1, of the remaining answers;
        `gates.target` = facilitating - interfering; where any example has previous answers, `gates.previous`, the same
        of gates fitted to those. `[n_layers, n_heads]` float32.
    """
    target = fit_gates(model, examples, "target", seed=seed, progress=progress)
    scores = {
        "gates.facilitating": target.facilitating,
        "gates.interfering": target.interfering,
        "gates.irrelevant": target.irrelevant,
        "gates.target": target.signed,
    }
    if any(example.previous_tokens for example in examples):
        scores["gates.previous"] = fit_gates(model, examples, "previous", seed=seed, progress=progress).signed
    return {name: value.cpu().numpy() for name, value in scores.items()}


def fit_gates(
    model: HeadModel,
    examples: Sequence[Encoded],
    quantity: Quantity = "target",
    steps: int = 40,
    batch_size: int = 8,
    lr: float = 0.4,
    weight: float = 0.02,
    seed: int = 0,
    progress: Progress = silent,
) -> Gates:
    """Fit g+ and g- with Adam. The same seed gives the same gates.

    Args:
        examples: those without answers of the kind asked for are left aside.
        quantity: the answers whose probability is the task: remaining (`target`) or already given (`previous`).
        steps: of each of the two fits.
        batch_size: prompts a step.
        lr: step size on phi.
        weight: of the push, in nats of loss per unit of one head's phi.
        seed: of the order of the prompts.

    Raises:
        InputError: no example has such answers, or fewer than one step or prompt.
    """
    # Refuse what cannot be fitted.
    usable = [example for example in examples if getattr(example, f"{quantity}_tokens")]
    if not usable:
        raise InputError(f"none of {len(examples)} examples has {quantity} answers to fit gates to; add such examples")
    if min(steps, batch_size) < 1:
        raise InputError(f"gates with steps={steps}, batch_size={batch_size}; expected at least 1 of each")
    # Two fits from open gates: pushed open, pushed shut.
    fitted = []
    with _frozen(model.hf), torch.enable_grad():
        for push, direction in ((weight, "open"), (-weight, "shut")):
            phi = torch.full((model.n_layers, model.n_heads), OPEN, device=model.device, requires_grad=True)
            optimizer = torch.optim.Adam([phi], lr=lr)
            batches = _batches(len(usable), batch_size, seed)
            for _ in progress(range(steps), f"fitting gates pushed {direction} ({quantity} answers)"):
                batch = [usable[index] for index in next(batches)]
                optimizer.zero_grad()
                (-push * phi.sum()).backward()
                length = max(len(encoded.tokens) for encoded in batch)
                # `rows_in_memory` counts one layer at a time; with a graph, all layers' tensors are held together.
                size = max(1, rows_in_memory(model, length, positions=length) // model.n_layers)
                for start in range(0, len(batch), size):
                    part = answer_log_probability(model, batch[start : start + size], phi.sigmoid(), quantity)
                    (-part.sum() / len(batch)).backward()
                optimizer.step()
                phi.data.clamp_(-BOUND, BOUND)
            fitted.append(phi.detach().sigmoid())
    return Gates(*fitted)


def answer_log_probability(model: HeadModel, batch: Sequence[Encoded], gates: Tensor, quantity: Quantity) -> Tensor:
    """`[batch]` log of the answers' total probability (first tokens, at the last token), with heads' outputs times
    their gates.

    Prompts are padded on the left, so that the last token is the last position of all.

    Args:
        gates: `[n_layers, n_heads]`, for all positions.
    """
    tokens = nn.utils.rnn.pad_sequence([encoded.tokens for encoded in batch], batch_first=True, padding_side="left")
    lengths = torch.tensor([len(encoded.tokens) for encoded in batch])
    positions = torch.arange(tokens.shape[1]) - (tokens.shape[1] - lengths)[:, None]  # negative: padding

    def gate(layer: int) -> Callable[[Tensor], Tensor]:
        return lambda z: z * gates[layer, :, None].to(z)

    with hooks.at_projections(model, {layer: gate(layer) for layer in range(model.n_layers)}):
        logits = model.hf(
            tokens.to(model.device),
            attention_mask=(positions >= 0).long().to(model.device),
            position_ids=positions.clamp(min=0).to(model.device),
            use_cache=False,
            logits_to_keep=1,
        ).logits
    logs = [answer_probabilities(row[-1:], one).logs[quantity] for row, one in zip(logits, batch, strict=True)]
    return torch.cat(logs)


def _batches(n: int, size: int, seed: int) -> Iterator[list[int]]:
    """Batches of indices without end, from one random order of all after another."""
    generator = torch.Generator().manual_seed(seed)
    queue: list[int] = []
    while True:
        while len(queue) < min(size, n):
            queue += torch.randperm(n, generator=generator).tolist()
        yield queue[:size]
        queue = queue[size:]


@contextlib.contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No parameter asks for gradients inside the block; afterwards those do that did."""
    asking = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in asking:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)
