"""Counterfactual runs in batches: many small changes at the last token of one prompt, each exact.

Changes at the last token reach no earlier position. So the clean run's keys and values serve every row, and a row is
one decoding step, at a fraction of a forward pass. Keys and values are shared, never copied. The result is what one
full forward pass per row would give, to rounding. Changes at all positions are in `all_positions`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from headtune.analysis.models.attention import AttentionCall, attend_with, masked, softcapped
from headtune.analysis.models.head_model import HeadModel
from headtune.analysis.models.hooks import require_heads
from headtune.analysis.utils.errors import InputError

from .batches import entered, growing, rows_in_memory, spread
from .intervention import Activation, Intervention, InterventionResult


class LastTokenRunner:
    """The clean run of one prompt, with interventions tried at its last token.

    Holds `keys` and `values`, per layer `[n_kv_heads, seq - 1, head_dim]` float32, of the positions before the last
    token.

    Args:
        tokens: `[seq]` ids of one prompt.
    """

    @torch.no_grad()
    def __init__(self, model: HeadModel, tokens: Tensor) -> None:
        self.model = model
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
    def run(
        self,
        rows: Sequence[Intervention],
        record: Collection[Activation] = (),
        max_rows: int | None = None,
        layers: Collection[int] | None = None,
    ) -> InterventionResult:
        """Run rows.

        Args:
            record: what to return besides the logits (see `InterventionResult`).
            max_rows: rows at a time; default: as many as the view's `max_memory` allows.
            layers: whose values are kept, in rising order; None = all.

        Raises:
            InputError: no rows, or a row names a head that the model does not have.
        """
        if not rows:
            raise InputError("no rows to run; give at least one, such as CLEAN")
        for row in rows:
            require_heads(self.model, row.heads)
            if outside := [position for position in row.knocked_out if not 0 <= position < len(self.tokens)]:
                raise InputError(
                    f"position {outside[0]} cannot be knocked out: the prompt has positions 0-{len(self.tokens) - 1}"
                )
        n_layers = self.model.n_layers
        order = sorted(range(len(rows)), key=lambda index: rows[index].entry(n_layers))
        size = max_rows or rows_in_memory(self.model, len(self.tokens), positions=1)
        parts = [
            self._run_batch([rows[index] for index in order[start : start + size]], record, layers)
            for start in range(0, len(order), size)
        ]
        back = torch.tensor(order).argsort()
        return InterventionResult(
            torch.cat([part.logits for part in parts])[back.to(parts[0].logits.device)],
            {
                name: torch.cat([part.activations[name] for part in parts])[back.to(self.model.device)]
                for name in record
            },
        )

    def query_key_value(self, call: AttentionCall) -> tuple[Tensor, Tensor, Tensor]:
        """The last token's query, key and value in every row, one a query head: `[rows, n_heads, head_dim]` float32."""
        key, value = (part[:, :, 0].float().repeat_interleave(self._group, 1) for part in (call.key, call.value))
        return call.query[:, :, 0].float(), key, value

    def pattern(self, call: AttentionCall, query: Tensor, key: Tensor) -> Tensor:
        """Attention from the last token over the clean run's keys and its own: `[rows, n_heads, seq]` float32."""
        past = self.keys[call.layer].to(query.device)
        scores = self._by_group(query, past.transpose(1, 2))
        scores = torch.cat([scores, (query * key).sum(-1, keepdim=True)], -1) * call.scaling
        return masked(softcapped(scores, call.softcap), self._masks[call.layer]).softmax(-1)

    def read(self, layer: int, pattern: Tensor, value: Tensor) -> Tensor:
        """What `pattern` reads from the clean run's values and the last token's: `[rows, n_heads, head_dim]`."""
        past = self.values[layer].to(pattern.device)
        return self._by_group(pattern[..., :-1], past) + pattern[..., -1:] * value

    @property
    def _group(self) -> int:
        """Query heads that share a key and value head."""
        return self.model.n_heads // self.model.n_kv_heads

    def _by_group(self, left: Tensor, right: Tensor) -> Tensor:
        """`[rows, n_heads, n] @ [n_kv_heads, n, m] -> [rows, n_heads, m]`, one product a group over all rows."""
        rows, n_kv, group = len(left), self.model.n_kv_heads, self._group
        n, m = right.shape[1:]
        folded = left.reshape(rows, n_kv, group, n).transpose(0, 1).reshape(n_kv, rows * group, n)
        return (folded @ right).view(n_kv, rows, group, m).transpose(0, 1).reshape(rows, n_kv * group, m)

    def _run_batch(
        self, rows: Sequence[Intervention], record: Collection[Activation], layers: Collection[int] | None
    ) -> InterventionResult:
        """One decoding step; `rows` are sorted by entry. Row 0 of the batch is the clean run throughout."""
        model = self.model
        sizes = entered([row.entry(model.n_layers) for row in rows], model.n_layers)
        taken: dict[str, dict[int, Tensor]] = {name: {} for name in record}
        edits = _Edits(rows, model, self.tokens.device)

        # What hooks do: record activations, and change them where rows ask for it.
        def take(name: str, layer: int, value: Tensor) -> None:
            if name in taken and (layers is None or layer in layers or name == "residual"):
                taken[name][layer] = value

        def attend(call: AttentionCall) -> Tensor:
            layer = call.layer
            query, key, value = self.query_key_value(call)
            for name, tensor in (("query", query), ("key", key), ("value", value)):
                if name in taken or (name, layer) in edits.put:
                    take(name, layer, tensor.clone())
                    edits.replace(name, layer, tensor)
            pattern = edits.knock_out(layer, self.pattern(call, query, key))
            take("pattern", layer, pattern)
            return self.read(layer, pattern, value)[:, None].to(call.query.dtype)

        def at_projection(layer: int) -> Any:
            def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
                z = args[0].view(-1, model.n_heads, model.head_dim).clone()
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

        # The pass of the last token, in which rows join at the layers where they enter.
        with contextlib.ExitStack() as stack:
            stack.enter_context(attend_with(attend))
            stack.enter_context(growing(model, sizes))

            def on(handle: Any) -> None:
                stack.callback(handle.remove)

            for layer in range(model.n_layers):
                if "z" in taken or edits.at(layer):
                    on(model.projection(layer).register_forward_pre_hook(at_projection(layer)))
                on(model.mlp(layer).register_forward_hook(at_output("mlp", layer)))
                on(model.attention_added(layer).register_forward_hook(at_output("attention", layer)))
            if "residual" in taken:
                norm = model.hf.get_submodule(model.architecture.final_norm)
                on(norm.register_forward_pre_hook(lambda _module, args: take("residual", 0, args[0][:, -1])))
            position = torch.tensor([[len(self.tokens) - 1]], device=self.tokens.device)
            output = model.hf(self.tokens[None, -1:], position_ids=position, use_cache=False)
        # Rows that never entered are the clean run.
        logits = output.logits[:, -1]
        activations = {}
        for name, by_layer in taken.items():
            stacked = [spread(by_layer[layer], len(rows)).to(model.device) for layer in sorted(by_layer)]
            activations[name] = stacked[0] if name == "residual" else torch.stack(stacked, 1)
        return InterventionResult(spread(logits, len(rows)), activations)


class _Edits:
    """The rows' changes by layer. Batch index = row index + 1; rows that have not entered yet have no changes."""

    def __init__(self, rows: Sequence[Intervention], model: HeadModel, device: torch.device) -> None:
        self.n_rows = len(rows)
        self.put: dict[tuple[str, int], list[tuple[int, int, Tensor]]] = {}
        self.factors: dict[int, list[tuple[int, int, float]]] = {}
        self.named: dict[int, list[tuple[int, int]]] = {}  # heads that rows name: not frozen
        self.knocked: list[tuple[int, Intervention]] = []
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
                self.named.setdefault(layer, []).append((index, head))
            if row.knocked_out:
                self.knocked.append((index, row))

    def at(self, layer: int) -> bool:
        """Whether any row changes z in this layer."""
        return ("z", layer) in self.put or layer in self.factors or bool(self._in(layer, "heads"))

    def _in(self, layer: int, kind: str) -> list[int]:
        return [index for index in self.frozen[kind] if self.entries[index - 1] <= layer]

    def replace(self, name: str, layer: int, tensor: Tensor) -> None:
        """Put rows' values into `[rows, n_heads, head_dim]`, in place."""
        if changes := self.put.get((name, layer)):
            index = torch.tensor([(row, head) for row, head, _ in changes], device=tensor.device)
            tensor[index[:, 0], index[:, 1]] = torch.stack([value for *_, value in changes]).to(tensor)

    def change_z(self, layer: int, z: Tensor) -> None:
        if frozen := self._in(layer, "heads"):
            named = torch.tensor(self.named.get(layer, []), dtype=torch.long, device=z.device).view(-1, 2)
            free = z[named[:, 0], named[:, 1]]
            z[torch.tensor(frozen, device=z.device)] = z[0].clone()
            z[named[:, 0], named[:, 1]] = free
        if changes := self.factors.get(layer):
            index = torch.tensor([(row, head) for row, head, _ in changes], device=z.device)
            factor = torch.tensor([factor for *_, factor in changes], device=z.device, dtype=z.dtype)
            z[index[:, 0], index[:, 1]] *= factor[:, None]
        self.replace("z", layer, z)

    def frozen_mlps(self, layer: int) -> Tensor | None:
        indices = self._in(layer, "mlps")
        return torch.tensor(indices) if indices else None

    def knock_out(self, layer: int, pattern: Tensor) -> Tensor:
        for index, row in self.knocked:
            if index < len(pattern) and (row.layers is None or layer in row.layers):
                pattern[index][:, list(row.knocked_out)] = 0
                if row.renormalise:
                    left = pattern[index].sum(-1, keepdim=True)
                    pattern[index] /= left.clamp(min=torch.finfo(left.dtype).tiny)  # nothing left: no output, not NaN
        return pattern


_FROZEN = {"heads": ("heads", "heads and mlps"), "mlps": ("heads and mlps",)}
