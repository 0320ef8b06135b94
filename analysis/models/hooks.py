"""Read and change heads for the length of a `with` block, at the input of the attention output projection.

Every block removes its hooks however it ends. `positions` limits a change to one position per example.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from headtune.analysis.utils.errors import InputError

from .head_model import HeadModel

Heads = Iterable[tuple[int, int]]  # (layer, head)


def require_heads(model: HeadModel, chosen: Heads) -> None:
    """Refuse heads that the model does not have (InputError)."""
    for layer, head in chosen:
        if not (0 <= layer < model.n_layers and 0 <= head < model.n_heads):
            raise InputError(
                f"head L{layer}H{head} is out of range: {model.name} has layers 0-{model.n_layers - 1} "
                f"and heads 0-{model.n_heads - 1}"
            )


@contextlib.contextmanager
def at_projections(model: HeadModel, edits: Mapping[int, Callable[[Tensor], Tensor | None]]) -> Iterator[None]:
    """Run `edit(z)` on layers' `z`, `[batch, seq, n_heads, head_dim]`; what it returns (if not None) replaces `z`."""

    def hook_for(edit: Callable[[Tensor], Tensor | None]) -> Any:
        def hook(_module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            z = args[0].unflatten(-1, (model.n_heads, model.head_dim))
            changed = edit(z)
            return None if changed is None else (changed.flatten(-2), *args[1:])

        return hook

    handles = [model.projection(layer).register_forward_pre_hook(hook_for(edit)) for layer, edit in edits.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def capture(
    model: HeadModel, layers: Iterable[int] | None = None, positions: Tensor | None = None
) -> Iterator[dict[int, Tensor]]:
    """Collect `z` by layer while the block runs.

    Yields:
        layer -> `[batch, seq, n_heads, head_dim]`, or `[batch, n_heads, head_dim]` at `positions` (`[batch]`).
        The last forward pass wins.
    """
    taken: dict[int, Tensor] = {}

    def keep(layer: int) -> Callable[[Tensor], None]:
        def edit(z: Tensor) -> None:
            taken[layer] = z if positions is None else z[torch.arange(len(z), device=z.device), positions.to(z.device)]

        return edit

    chosen = range(model.n_layers) if layers is None else layers
    with at_projections(model, {layer: keep(layer) for layer in chosen}):
        yield taken


@contextlib.contextmanager
def watch(modules: Iterable[nn.Module]) -> Iterator[dict[nn.Module, tuple[Tensor, Tensor]]]:
    """Collect what modules get and give while the block runs.

    Yields:
        module -> (hidden states given to it, its output or the output's first item). The last pass wins.
    """
    seen: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        seen[module] = (hidden, output[0] if isinstance(output, tuple) else output)

    handles = [module.register_forward_hook(keep, with_kwargs=True) for module in modules]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _edit_heads(
    model: HeadModel, edits: Mapping[tuple[int, int], Callable[[Tensor], Tensor]], positions: Tensor | None
) -> Iterator[None]:
    """Apply `edit(z_h)` (`[..., head_dim]`) to chosen heads, everywhere or at `positions`."""
    require_heads(model, edits)
    by_layer: dict[int, dict[int, Callable[[Tensor], Tensor]]] = {}
    for (layer, head), edit in edits.items():
        by_layer.setdefault(layer, {})[head] = edit

    def layer_edit(of_heads: dict[int, Callable[[Tensor], Tensor]]) -> Callable[[Tensor], Tensor]:
        def edit(z: Tensor) -> Tensor:
            z = z.clone()
            for head, change in of_heads.items():
                if positions is None:
                    z[:, :, head] = change(z[:, :, head])
                else:
                    rows, columns = torch.arange(len(z), device=z.device), positions.to(z.device)
                    z[rows, columns, head] = change(z[rows, columns, head])
            return z

        return edit

    with at_projections(model, {layer: layer_edit(of_heads) for layer, of_heads in by_layer.items()}):
        yield


@contextlib.contextmanager
def replace(
    model: HeadModel, values: Mapping[tuple[int, int], Tensor], positions: Tensor | None = None
) -> Iterator[None]:
    """Put given outputs in place of heads': `z[l, h] := values[l, h]`, broadcastable to `[batch, (seq,) head_dim]`."""

    def put(value: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda z: value.to(z).expand_as(z)

    edits = {key: put(value) for key, value in values.items()}
    with _edit_heads(model, edits, positions):
        yield


@contextlib.contextmanager
def scale(
    model: HeadModel, factors: Mapping[tuple[int, int], float], positions: Tensor | None = None
) -> Iterator[None]:
    """Multiply heads' outputs: `z[l, h] := factors[l, h] * z[l, h]`."""

    def times(factor: float) -> Callable[[Tensor], Tensor]:
        return lambda z: z * factor

    with _edit_heads(model, {key: times(factor) for key, factor in factors.items()}, positions):
        yield


@contextlib.contextmanager
def ablate(model: HeadModel, chosen: Heads, positions: Tensor | None = None) -> Iterator[None]:
    """Silence heads: `z[l, h] := 0`."""
    with scale(model, dict.fromkeys(chosen, 0.0), positions):
        yield
