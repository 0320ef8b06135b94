"""Hypothetical runs in batches: many small changes to one prompt, each exact, at a fraction of a forward pass each.

Two engines, one idea: a row of the batch enters at the first layer where it differs from the clean run.

- `EndRun`: changes at END, the last position. They reach no earlier position, so the clean run's keys and values serve
  every row, and a row is one decoding step. Keys and values are shared, never copied.
- `everywhere`: a head's output changed at all positions. Rows are whole prompts.

Both return what one full forward pass per row would, to rounding.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from headtune.analysis.models.attention import AttentionCall, attend_with, softcapped
from headtune.analysis.models.head_model import HeadModel
from headtune.analysis.models.hooks import require_heads
from headtune.analysis.utils.errors import InputError

Head = tuple[int, int]  # (layer, head)
Kept = Literal["attention", "mlp", "residual", "z", "pattern", "query", "key", "value"]


@dataclass(frozen=True)
class Row:
    """What one row changes at END; all that follows from it is recomputed, unless frozen.

    Attributes:
        factors: head -> factor on its output z, 0 silences it.
        outputs: head -> `[head_dim]` its output z instead.
        queries, keys, values: head -> `[head_dim]` instead of END's own, after the rotary embedding. A key or value is
            changed for this one query head, also where a group of heads shares it.
        knocked_out: positions whose attention weight from END is set to 0 after the softmax, for all heads in `layers`.
        renormalise: let the weights that are left sum to 1 again.
        layers: where `knocked_out` holds; None = in all.
        freeze: `heads` holds the output of every head that the row does not name at its clean value (path patching),
            `heads and mlps` also the MLPs' outputs.
    """

    factors: Mapping[Head, float] = field(default_factory=dict)
    outputs: Mapping[Head, Tensor] = field(default_factory=dict)
    queries: Mapping[Head, Tensor] = field(default_factory=dict)
    keys: Mapping[Head, Tensor] = field(default_factory=dict)
    values: Mapping[Head, Tensor] = field(default_factory=dict)
    knocked_out: Sequence[int] = ()
    renormalise: bool = False
    layers: Collection[int] | None = None
    freeze: Literal["nothing", "heads", "heads and mlps"] = "nothing"

    @property
    def heads(self) -> list[Head]:
        return [head for part in (self.factors, self.outputs, self.queries, self.keys, self.values) for head in part]

    def entry(self, n_layers: int) -> int:
        """The first layer where the row can differ from the clean run; `n_layers` for a row that changes nothing."""
        layers = [layer for layer, _ in self.heads]
        if self.knocked_out:
            layers += [0] if self.layers is None else list(self.layers)
        return min(layers, default=n_layers)


CLEAN = Row()


def silenced(heads: Collection[Head]) -> Row:
    """The row in which `heads` are silenced together."""
    return Row(factors=dict.fromkeys(heads, 0.0))


@dataclass(frozen=True)
class Step:
    """What rows came to.

    Attributes:
        logits: `[rows, vocabulary]` next-token logits in the model's dtype.
        kept: what was asked for, at END: `attention`, `mlp` `[rows, n_layers, d_model]` (as added to the residual
            stream), `residual` `[rows, d_model]` (the final norm's input), `z`, `query`, `key`, `value`
            `[rows, n_layers, n_heads, head_dim]` (z after the row's changes; the others before), `pattern`
            `[rows, n_layers, n_heads, seq]` float32 (after knock-out).
    """

    logits: Tensor
    kept: dict[str, Tensor]


class EndRun:
    """The clean run of one prompt, on which END steps are tried.

    Holds `keys` and `values`, per layer `[n_kv_heads, seq - 1, head_dim]` float32, of the positions before END.

    Args:
        tokens: `[seq]` ids of one prompt.
    """

    @torch.no_grad()
    def __init__(self, model: HeadModel, tokens: Tensor) -> None:
        self.heads = model
        self.tokens = tokens.to(model.device)
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        self._masks: dict[int, Tensor | None] = {}

        def look(call: AttentionCall) -> None:
            self.keys[call.layer] = call.key[0, :, :-1].float()
            self.values[call.layer] = call.value[0, :, :-1].float()
            self._masks[call.layer] = None if call.mask is None else call.mask[0, :, -1, : call.key.shape[2]]

        with attend_with(look):
            model.hf(self.tokens[None], use_cache=False, logits_to_keep=1)

    @torch.no_grad()
    def step(
        self,
        rows: Sequence[Row],
        keep: Collection[Kept] = (),
        max_rows: int | None = None,
        layers: Collection[int] | None = None,
    ) -> Step:
        """Run rows.

        Args:
            keep: what to keep besides the logits (see `Step`).
            max_rows: rows at a time; default: as many as the view's `max_memory` allows.
            layers: whose values are kept, in rising order; None = all.

        Raises:
            InputError: no rows, or a row names a head that the model does not have.
        """
        if not rows:
            raise InputError("no rows to run; give at least one, such as CLEAN")
        for row in rows:
            require_heads(self.heads, row.heads)
            if outside := [position for position in row.knocked_out if not 0 <= position < len(self.tokens)]:
                raise InputError(
                    f"position {outside[0]} cannot be knocked out: the prompt has positions 0-{len(self.tokens) - 1}"
                )
        n_layers = self.heads.n_layers
        order = sorted(range(len(rows)), key=lambda index: rows[index].entry(n_layers))
        size = max_rows or rows_in_memory(self.heads, len(self.tokens), positions=1)
        parts = [
            self._chunk([rows[index] for index in order[start : start + size]], keep, layers)
            for start in range(0, len(order), size)
        ]
        back = torch.tensor(order).argsort()
        return Step(
            torch.cat([part.logits for part in parts])[back.to(parts[0].logits.device)],
            {name: torch.cat([part.kept[name] for part in parts])[back.to(self.heads.device)] for name in keep},
        )

    def own(self, call: AttentionCall) -> tuple[Tensor, Tensor, Tensor]:
        """END's own query, key and value in every row, one a query head: `[rows, n_heads, head_dim]` float32 each."""
        key, value = (part[:, :, 0].float().repeat_interleave(self._group, 1) for part in (call.key, call.value))
        return call.query[:, :, 0].float(), key, value

    def pattern(self, call: AttentionCall, query: Tensor, key: Tensor) -> Tensor:
        """Attention from END over the clean run's keys and its own: `[rows, n_heads, seq]` float32."""
        past = self.keys[call.layer].to(query.device)
        scores = self._by_group(query, past.transpose(1, 2))
        scores = torch.cat([scores, (query * key).sum(-1, keepdim=True)], -1) * call.scaling
        return masked(softcapped(scores, call.softcap), self._masks[call.layer]).softmax(-1)

    def read(self, layer: int, pattern: Tensor, value: Tensor) -> Tensor:
        """What attention `pattern` reads from the clean run's values and END's own: `[rows, n_heads, head_dim]`."""
        past = self.values[layer].to(pattern.device)
        return self._by_group(pattern[..., :-1], past) + pattern[..., -1:] * value

    @property
    def _group(self) -> int:
        """Query heads that share a key and value head."""
        return self.heads.n_heads // self.heads.n_kv_heads

    def _by_group(self, left: Tensor, right: Tensor) -> Tensor:
        """`[rows, n_heads, n] @ [n_kv_heads, n, m] -> [rows, n_heads, m]`, one product a group over all rows."""
        rows, n_kv, group = len(left), self.heads.n_kv_heads, self._group
        n, m = right.shape[1:]
        folded = left.reshape(rows, n_kv, group, n).transpose(0, 1).reshape(n_kv, rows * group, n)
        return (folded @ right).view(n_kv, rows, group, m).transpose(0, 1).reshape(rows, n_kv * group, m)

    def _chunk(self, rows: Sequence[Row], keep: Collection[Kept], layers: Collection[int] | None) -> Step:
        """One decoding step; `rows` are sorted by entry. Row 0 of the batch is the clean run throughout."""
        heads = self.heads
        sizes = entered([row.entry(heads.n_layers) for row in rows], heads.n_layers)
        taken: dict[str, dict[int, Tensor]] = {name: {} for name in keep}
        edits = _Edits(rows, heads, self.tokens.device)

        def take(name: str, layer: int, value: Tensor) -> None:
            if name in taken and (layers is None or layer in layers or name == "residual"):
                taken[name][layer] = value

        def attend(call: AttentionCall) -> Tensor:
            layer = call.layer
            query, key, value = self.own(call)
            for name, tensor in (("query", query), ("key", key), ("value", value)):
                if name in taken or (name, layer) in edits.put:
                    take(name, layer, tensor.clone())
                    edits.replace(name, layer, tensor)
            pattern = edits.knock_out(layer, self.pattern(call, query, key))
            take("pattern", layer, pattern)
            return self.read(layer, pattern, value)[:, None].to(call.query.dtype)

        def at_projection(layer: int) -> Any:
            def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
                z = args[0].view(-1, heads.n_heads, heads.head_dim).clone()
                edits.change_z(layer, z)
                take("z", layer, z)
                return (z.view_as(args[0]), *args[1:])

            return hook

        def at_output(name: str, layer: int) -> Any:
            def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
                tensor = output[0] if isinstance(output, tuple) else output
                frozen = edits.frozen_mlps(layer) if name == "mlp" else None
                if frozen is not None:
                    tensor = tensor.clone()
                    tensor[frozen] = tensor[0].clone()
                    output = (tensor, *output[1:]) if isinstance(output, tuple) else tensor
                take(name, layer, tensor.reshape(len(tensor), -1))
                return output

            return hook

        with contextlib.ExitStack() as stack:
            stack.enter_context(attend_with(attend))
            stack.enter_context(growing(heads, sizes))

            def on(handle: Any) -> None:
                stack.callback(handle.remove)

            for layer in range(heads.n_layers):
                if "z" in taken or edits.at(layer):
                    on(heads.projection(layer).register_forward_pre_hook(at_projection(layer)))
                on(heads.mlp(layer).register_forward_hook(at_output("mlp", layer)))
                on(heads.attention_added(layer).register_forward_hook(at_output("attention", layer)))
            if "residual" in taken:
                norm = heads.hf.get_submodule(heads.architecture.final_norm)
                on(norm.register_forward_pre_hook(lambda _module, args: take("residual", 0, args[0][:, -1])))
            position = torch.tensor([[len(self.tokens) - 1]], device=self.tokens.device)
            output = heads.hf(self.tokens[None, -1:], position_ids=position, use_cache=False)
        logits = output.logits[:, -1]
        kept = {}
        for name, by_layer in taken.items():
            stacked = [_spread(by_layer[layer], len(rows)).to(heads.device) for layer in sorted(by_layer)]
            kept[name] = stacked[0] if name == "residual" else torch.stack(stacked, 1)
        return Step(_spread(logits, len(rows)), kept)


def _spread(tensor: Tensor, n_rows: int) -> Tensor:
    """`[1 + entered, ...]` -> `[n_rows, ...]`: the clean run stands for rows that have not entered."""
    entered_rows = tensor[1:]
    return torch.cat([entered_rows, tensor[:1].expand(n_rows - len(entered_rows), *tensor.shape[1:])])


class _Edits:
    """The rows' changes by layer. Batch index = row index + 1; rows that have not entered yet have no changes."""

    def __init__(self, rows: Sequence[Row], model: HeadModel, device: torch.device) -> None:
        self.n_rows = len(rows)
        self.put: dict[tuple[str, int], list[tuple[int, int, Tensor]]] = {}
        self.factors: dict[int, list[tuple[int, int, float]]] = {}
        self.own: dict[int, list[tuple[int, int]]] = {}  # heads that rows name: not frozen
        self.knocked: list[tuple[int, Row]] = []
        self.entries = [row.entry(model.n_layers) for row in rows]
        self.frozen = {
            kind: [i for i, row in enumerate(rows, 1) if row.freeze in kinds] for kind, kinds in _FROZEN.items()
        }
        for index, row in enumerate(rows, start=1):
            for name, values in (("z", row.outputs), ("query", row.queries), ("key", row.keys), ("value", row.values)):
                for (layer, head), value in values.items():
                    self.put.setdefault((name, layer), []).append((index, head, value))
            for (layer, head), factor in row.factors.items():
                self.factors.setdefault(layer, []).append((index, head, factor))
            for layer, head in row.heads:
                self.own.setdefault(layer, []).append((index, head))
            if row.knocked_out:
                self.knocked.append((index, row))

    def at(self, layer: int) -> bool:
        """Whether any row changes z in this layer."""
        return ("z", layer) in self.put or layer in self.factors or bool(self._in(layer, "heads"))

    def _in(self, layer: int, kind: str) -> list[int]:
        return [index for index in self.frozen[kind] if self.entries[index - 1] <= layer]

    def replace(self, name: str, layer: int, tensor: Tensor) -> None:
        """Put rows' values into `[rows, n_heads, head_dim]`, in place."""
        if found := self.put.get((name, layer)):
            index = torch.tensor([(row, head) for row, head, _ in found], device=tensor.device)
            tensor[index[:, 0], index[:, 1]] = torch.stack([value for *_, value in found]).to(tensor)

    def change_z(self, layer: int, z: Tensor) -> None:
        if frozen := self._in(layer, "heads"):
            own = torch.tensor(self.own.get(layer, []), dtype=torch.long, device=z.device).view(-1, 2)
            free = z[own[:, 0], own[:, 1]]
            z[torch.tensor(frozen, device=z.device)] = z[0].clone()
            z[own[:, 0], own[:, 1]] = free
        if found := self.factors.get(layer):
            index = torch.tensor([(row, head) for row, head, _ in found], device=z.device)
            factor = torch.tensor([factor for *_, factor in found], device=z.device, dtype=z.dtype)
            z[index[:, 0], index[:, 1]] *= factor[:, None]
        self.replace("z", layer, z)

    def frozen_mlps(self, layer: int) -> Tensor | None:
        found = self._in(layer, "mlps")
        return torch.tensor(found) if found else None

    def knock_out(self, layer: int, pattern: Tensor) -> Tensor:
        for index, row in self.knocked:
            if index < len(pattern) and (row.layers is None or layer in row.layers):
                pattern[index][:, list(row.knocked_out)] = 0
                if row.renormalise:
                    left = pattern[index].sum(-1, keepdim=True)
                    pattern[index] /= left.clamp(min=torch.finfo(left.dtype).tiny)  # nothing left: no output, not NaN
        return pattern


_FROZEN = {"heads": ("heads", "heads and mlps"), "mlps": ("heads and mlps",)}


# --- all positions ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def everywhere(
    model: HeadModel, tokens: Tensor, rows: Sequence[Mapping[Head, Tensor | float]], max_rows: int | None = None
) -> Tensor:
    """Next-token logits with heads' outputs changed at every position.

    Args:
        tokens: `[seq]` ids of one prompt.
        rows: per row, head -> a factor on its output (0 silences it), or `[seq, head_dim]` or `[head_dim]` in its
            place.

    Returns:
        `[len(rows), vocabulary]` in the model's dtype.
    """
    if not rows:
        raise InputError("no rows to run; give at least one, such as {}")
    for row in rows:
        require_heads(model, row)
    tokens = tokens.to(model.device)
    order = sorted(range(len(rows)), key=lambda index: _first(rows[index], model.n_layers))
    size = max_rows or rows_in_memory(model, len(tokens), positions=len(tokens))
    parts = []
    for start in range(0, len(order), size):
        chunk = [rows[index] for index in order[start : start + size]]
        sizes = entered([_first(row, model.n_layers) for row in chunk], model.n_layers)
        with contextlib.ExitStack() as stack:
            stack.enter_context(growing(model, sizes))
            for layer in {layer for row in chunk for layer, _ in row}:
                hook = _changed_everywhere(model, layer, chunk)
                stack.callback(model.projection(layer).register_forward_pre_hook(hook).remove)
            logits = model.hf(tokens[None], use_cache=False, logits_to_keep=1).logits[:, -1]
        parts.append(_spread(logits, len(chunk)))
    stacked = torch.cat(parts)
    return stacked[torch.tensor(order, device=stacked.device).argsort()]


def _first(row: Mapping[Head, Any], n_layers: int) -> int:
    return min((layer for layer, _ in row), default=n_layers)


def _changed_everywhere(model: HeadModel, layer: int, rows: Sequence[Mapping[Head, Tensor | float]]) -> Any:
    changes = [(i, head, value) for i, row in enumerate(rows, 1) for (of, head), value in row.items() if of == layer]

    def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        z = args[0].unflatten(-1, (model.n_heads, model.head_dim)).clone()  # [rows, seq, heads, head_dim]
        for index, head, value in changes:
            z[index, :, head] = value.to(z) if isinstance(value, Tensor) else z[index, :, head] * value
        return (z.flatten(-2), *args[1:])

    return hook


# --- shared -----------------------------------------------------------------------------------------------------------


def entered(entries: Sequence[int], n_layers: int) -> list[int]:
    """Batch size by layer for rows sorted by entry: the clean run, and the rows that have entered by then."""
    return [1 + sum(entry <= layer for entry in entries) for layer in range(n_layers)]


@contextlib.contextmanager
def growing(model: HeadModel, sizes: Sequence[int]) -> Iterator[None]:
    """Let the batch grow to `sizes[layer]` as it enters each layer, by copies of row 0, the clean run."""

    def hook_for(layer: int) -> Callable[..., Any]:
        new = sizes[layer] - (sizes[layer - 1] if layer else 1)

        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            hidden = torch.cat([hidden, hidden[:1].expand(new, *hidden.shape[1:])])
            return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})

        return hook

    growth = [layer for layer in range(model.n_layers) if sizes[layer] > (sizes[layer - 1] if layer else 1)]
    handles = [model.layers[layer].register_forward_pre_hook(hook_for(layer), with_kwargs=True) for layer in growth]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def rows_in_memory(model: HeadModel, seq: int, positions: int, copied: int = 0) -> int:
    """How many rows of `positions` tokens, in a prompt of `seq`, fit into the view's `max_memory`; at least one.

    An estimate of the widest moment, in float32: the MLP's intermediate activations, the attention scores and, once per
    row, the logits and their float32 copy.

    Args:
        copied: keys (and as many values) that each row holds for itself.
    """
    config = model.hf.config.get_text_config()
    wide = getattr(config, "intermediate_size", None) or getattr(config, "ffn_dim", None) or 4 * model.d_model
    per_position = 6 * model.d_model + 3 * wide + 6 * model.n_heads * model.head_dim + 2 * model.n_heads * seq
    own = 2 * copied * model.n_kv_heads * model.head_dim
    per_row = 4 * (positions * per_position + 2 * config.vocab_size + own)
    return max(1, model.max_memory // per_row)


def masked(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Attention scores `[..., keys]` with a row of a mask: None, bool (True = attend) or additive."""
    if mask is None:
        return scores
    mask = mask.to(scores.device)
    return scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask.float()
