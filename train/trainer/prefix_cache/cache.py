"""The cache itself: passes of a model are served from rows that are kept (see the package's docstring)."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import inspect
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from headtune.analysis.utils.errors import CheckError, InputError
from headtune.analysis.utils.processes import rank

from .eligibility import lowest_trained, model_parts, refusal
from .release_pages import release_pages
from .row_store import RowStore

log = logging.getLogger(__name__)

_TOLERANCE, _HALF_TOLERANCE = 1e-3, 5e-2  # of a position's norm, when a row is computed again
_QUIET_PASSES = 8  # without an unknown row, after which the skipped layers' memory is given back
_ROW_ARGUMENTS = ("input_ids", "attention_mask", "position_ids")
_UNUSED = frozenset({"return_dict", "use_cache", "num_items_in_batch"})  # arguments that no layer looks at


@dataclass
class CacheStats:
    """What a cache did, counted in rows and passes of the model.

    Attributes:
        layers: how many layers are skipped.
        hits, misses: rows that were known, and rows that were computed.
        served: passes that skipped the layers; `plain`: passes that could not, by reason.
        checked: rows computed again and found equal.
        memory_bytes, disk_bytes: size of the rows kept.
        lost: shards on disk found damaged and dropped; `unkept`: rows that could not be written.
    """

    layers: int
    hits: int = 0
    misses: int = 0
    served: int = 0
    plain: Counter[str] = field(default_factory=Counter)
    checked: int = 0
    memory_bytes: int = 0
    disk_bytes: int = 0
    lost: int = 0
    unkept: int = 0

    def summary(self) -> dict[str, int]:
        """Flat numbers for a log; `plain` summed."""
        return {**vars(self), "plain": self.plain.total()}

    def __str__(self) -> str:
        size = f"{self.memory_bytes / 2**20:.1f} MiB in memory, {self.disk_bytes / 2**20:.1f} MiB on disk"
        plain = "".join(f"; {count} passes as usual: {reason}" for reason, count in self.plain.items())
        return f"layers 0-{self.layers - 1} kept: {self.hits} rows reused, {self.misses} computed, {size}{plain}"


@dataclass(frozen=True)
class _CachedRow:
    """One row of a batch: its present tokens are the columns from `start` to `end`."""

    key: str
    start: int
    end: int


class _Reached(Exception):
    """Carries the last cached layer's output out of a pass that needs to go no further."""

    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


class PrefixCache:
    """Hidden states at the input of the lowest trained layer, kept by row.

    Args:
        model: a causal language model, with or without a PEFT adapter.
        memory_gb: GiB of rows in memory; more go to disk.
        folder: where rows beyond memory are kept for later runs, under a digest of the frozen weights, the
            configuration, the depth and the library versions: another model's rows are never used. For one run at a
            time. None: a temporary folder.

    Raises:
        InputError: `refusal(model)` has a reason.
    """

    def __init__(self, model: Any, memory_gb: float = 2.0, folder: Path | None = None) -> None:
        if reason := refusal(model):
            raise InputError(f"layers below the trained ones cannot be kept: {reason}")
        if not memory_gb >= 0:
            raise InputError(f"memory_gb is {memory_gb}; expected 0 or more, such as 2")
        self._parts = model_parts(model)
        self._limit = int(memory_gb * 2**30)
        self._top = folder
        self._signature = inspect.signature(self._parts.backbone.forward)
        self.stats = CacheStats(lowest_trained(model))
        self._store: RowStore | None = None
        self._known_passes = self._since_unknown = (
            0  # passes made of known rows alone: all, and since there was another one
        )
        self._resident = True  # the real layers ran since their weights were last paged out
        self._ready: Tensor | None = None  # of the running pass: what the last skipped layer gives
        self._computing = False

    @contextlib.contextmanager
    def installed(self) -> Iterator[CacheStats]:
        """Serve every pass of the model inside the block; afterwards the model is what it was.

        Raises:
            CheckError: inside the block: a row computed again is not the row that was kept.
        """
        if self._store is not None:
            raise InputError("this prefix cache is installed already; leave the first block before entering another")
        backbone, layers = self._parts.backbone, self._parts.layers[: self.stats.layers]
        folder = None if self._top is None else self._top / self._digest() / f"rank-{rank()}"
        self._store = store = RowStore(self._limit, folder)
        self._known_passes = self._since_unknown = 0
        replaced = [layer.__dict__.get("forward") for layer in layers]
        handles = [
            backbone.register_forward_pre_hook(self._before, with_kwargs=True),
            backbone.register_forward_hook(self._after, always_call=True),
        ]
        try:
            for layer in layers:
                layer.forward = self._skipping(layer.forward, last=layer is layers[-1])
            yield self.stats
        finally:
            for layer, forward in zip(layers, replaced, strict=True):
                layer.__dict__.pop("forward", None)
                if forward is not None:
                    layer.forward = forward
            for handle in handles:
                handle.remove()
            store.close()
            self._count(store)
            self._store = None

    def _skipping(self, real: Callable[..., Any], last: bool) -> Callable[..., Any]:
        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            if self._ready is None:
                self._resident = True
                output = real(hidden_states, *args, **kwargs)
                if last and self._computing:
                    raise _Reached(output)
                return output
            if not last:
                return hidden_states
            hidden, self._ready = self._ready.to(hidden_states.device), None
            # Re-entrant checkpointing gives no gradients where no input of a layer asks for one.
            return hidden.requires_grad_() if hidden_states.requires_grad else hidden

        return forward

    def _before(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._computing:
            return
        assert self._store is not None
        arguments: dict[str, Any] = {}
        for name, value in self._signature.bind_partial(*args, **kwargs).arguments.items():
            rest = self._signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD
            arguments |= value if rest else {name: value}
        rows = self._rows(arguments)
        if isinstance(rows, str):
            self._leave(rows)
            return
        cached = {row.key: self._store.get(row.key) for row in rows}
        unknown = {row.key: index for index, row in enumerate(rows) if cached[row.key] is None}
        if unknown:
            for key, hidden in self._compute(arguments, rows, list(unknown.values())).items():
                cached[key] = hidden
                self._store.put(key, hidden)
        stats = self.stats
        stats.served += 1
        stats.misses += len(unknown)
        stats.hits += len(rows) - len(unknown)
        if not unknown:
            self._known_passes += 1
            if self._known_passes & (self._known_passes - 1) == 0:
                self._check(arguments, rows, self._known_passes % len(rows), cached)
        self._since_unknown = 0 if unknown else self._since_unknown + 1
        if self._resident and self._since_unknown >= _QUIET_PASSES:
            self._resident = False
            release_pages(p for layer in self._parts.layers[: stats.layers] for p in layer.parameters())
        self._count(self._store)
        self._ready = _assembled(rows, cached, arguments["input_ids"])

    def _count(self, store: RowStore) -> None:
        for name in ("memory_bytes", "disk_bytes", "lost", "unkept"):
            setattr(self.stats, name, getattr(store, name))

    def _after(self, *_: Any) -> None:
        if not self._computing:
            self._ready = None

    def _leave(self, reason: str) -> None:
        if reason not in self.stats.plain:
            log.info("prefix cache: a pass runs every layer: %s", reason)
        self.stats.plain[reason] += 1

    def _rows(self, arguments: dict[str, Any]) -> list[_CachedRow] | str:
        """The rows of a pass, or why it cannot be served."""
        config = self._parts.config.get_text_config()
        use_cache = arguments.get("use_cache")
        if arguments.get("past_key_values") is not None or (config.use_cache if use_cache is None else use_cache):
            return "a key-value cache is in use"
        tokens, mask, positions = (arguments.get(name) for name in _ROW_ARGUMENTS)
        if tokens is None:
            return "no input_ids"
        for name, value in arguments.items():
            if name not in (*_ROW_ARGUMENTS, *_UNUSED) and value is not None and value is not False:
                return f"argument {name} is given"
        for name in ("output_hidden_states", "output_attentions"):
            if getattr(config, name, False):
                return f"the configuration asks for {name}"
        if mask is not None and (not isinstance(mask, Tensor) or mask.shape != tokens.shape):
            return "an attention mask that is not [batch, positions]"
        if positions is not None and (positions.ndim != 2 or positions.shape[1] != tokens.shape[1]):
            return "position_ids that are not [batch, positions]"
        return self._keyed(tokens, mask, positions)

    def _keyed(self, tokens: Tensor, mask: Tensor | None, positions: Tensor | None) -> list[_CachedRow] | str:
        tokens = tokens.cpu()
        columns = torch.arange(tokens.shape[1])
        present = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.cpu() != 0
        starts = present.int().argmax(1)
        ends = starts + present.sum(1)
        if not torch.equal(present, (columns >= starts[:, None]) & (columns < ends[:, None])):
            return "rows with padding between tokens"
        places = columns.expand_as(tokens) if positions is None else positions.cpu().expand_as(tokens)
        # Tokens side by side whose positions are not successive are several documents in one row.
        if ((places.diff(dim=1) != 1) & present[:, 1:] & present[:, :-1]).any():
            return "packed rows"
        device = self._device.type
        kind = [positions is not None, torch.is_autocast_enabled(device), str(torch.get_autocast_dtype(device))]
        rows = []
        for index, (start, end) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True)):
            if start == end:
                return "a row without tokens"
            digest = hashlib.blake2b(json.dumps([*kind, int(places[index, start])]).encode(), digest_size=16)
            digest.update(tokens[index, start:end].long().numpy().tobytes())
            rows.append(_CachedRow(digest.hexdigest(), start, end))
        return rows

    @property
    def _device(self) -> torch.device:
        return next(self._parts.backbone.parameters()).device

    def _compute(
        self, arguments: dict[str, Any], rows: Sequence[_CachedRow], which: Sequence[int]
    ) -> dict[str, Tensor]:
        """`key -> [tokens, d_model]` on the CPU, of the rows `which`, from the real layers."""
        backbone, batch = self._parts.backbone, len(rows)
        chosen = {
            name: value.expand(batch, -1)[list(which)]
            for name in _ROW_ARGUMENTS
            if (value := arguments.get(name)) is not None
        }
        training = [module for module in backbone.modules() if module.training]
        self._computing = True
        try:
            backbone.eval()  # so that nothing is checkpointed
            with torch.no_grad():
                backbone(**chosen, use_cache=False)
        except _Reached as reached:
            hidden = reached.hidden
        else:
            raise CheckError(f"a forward pass did not reach layer {self.stats.layers - 1}; its forward was replaced")
        finally:
            self._computing = False
            for module in training:
                module.training = True
        return {
            rows[index].key: row[rows[index].start : rows[index].end].to("cpu", copy=True)
            for index, row in zip(which, hidden, strict=True)
        }

    def _check(self, arguments: dict[str, Any], rows: Sequence[_CachedRow], index: int, cached: dict[str, Any]) -> None:
        row = rows[index]
        again = self._compute(arguments, rows, [index])[row.key]
        expected = cached[row.key].float()
        gap = ((again.float() - expected).norm(dim=-1) / expected.norm(dim=-1).clamp(min=1e-6)).max().item()
        half = again.dtype in (torch.float16, torch.bfloat16) or torch.is_autocast_enabled(self._device.type)
        if not gap <= (_HALF_TOLERANCE if half else _TOLERANCE):
            raise CheckError(
                f"layers 0-{self.stats.layers - 1} give something else for a row than before (relative difference "
                f"{gap:.2g}): something below the trained layers changes; train without the prefix cache"
            )
        self.stats.checked += 1

    def _digest(self) -> str:
        """What kept rows depend on: frozen weights and buffers, configuration, depth, library versions, device."""
        digest = hashlib.sha256()
        modules = [*self._parts.front.values(), *self._parts.layers[: self.stats.layers]]
        for index, module in enumerate(modules):
            for name, tensor in sorted([*module.named_parameters(), *module.named_buffers()]):
                digest.update(f"{index} {name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                stored: Any = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
                digest.update(stored)
        config = self._parts.config.to_dict()
        config.pop("_name_or_path", None)
        versions = [importlib.metadata.version(name) for name in ("headtune", "torch", "transformers")]
        facts = [config, self.stats.layers, versions, self._device.type, self._parts.config._attn_implementation]
        digest.update(json.dumps(facts, sort_keys=True, default=str).encode())
        return digest.hexdigest()[:24]


def _assembled(rows: Sequence[_CachedRow], cached: dict[str, Any], like: Tensor) -> Tensor:
    """`[batch, seq, d_model]` on the device of `like`; padding is 0."""
    first = cached[rows[0].key]
    whole = torch.zeros(*like.shape, first.shape[-1], dtype=first.dtype)
    for into, row in zip(whole, rows, strict=True):
        into[row.start : row.end] = cached[row.key]
    return whole.to(like.device)
