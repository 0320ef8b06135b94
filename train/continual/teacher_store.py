"""What a teacher said about rows of text: attention of chosen heads at chosen queries, and logits at label positions.

    index.json              {"format": 1, "dtype", "logits_top", "shards": {name: sha256}, "keys": {key: [name, ...]}}
    shard-00000.safetensors
        positions/KEY       [T] query positions, sorted
        heads/KEY           [n, 2] (layer, head)
        attention/KEY       [n, sum_t (position_t + 1)]: a query sees itself and what is before it, nothing else is kept
        logits/KEY          [labels, vocabulary] raw, or with `logits_top` = k [labels, k], largest first, and
        tokens/KEY, rest/KEY    [labels, k] their tokens, [labels] log-sum-exp of all others

Heads added to a key later are in another shard than its first ones, without logits. Shards are written whole or not at
all, read memory-mapped, and checked against their SHA-256 when they are first opened.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from headtune.analysis.models.head_model import HeadModel
from headtune.analysis.utils.errors import CheckError, InputError
from headtune.analysis.utils.files import atomic_path, sha256_of, write_json
from headtune.analysis.utils.paths import inside
from headtune.train.losses.attention_distillation import RowRecorder, TopLogits, top_logits
from headtune.train.losses.label_logits import label_mask, positions_only
from headtune.train.trainer.rows import Row, filled, padded

Heads = Mapping[int, Sequence[int]]  # layer -> heads

_FORMAT = 1
_SHARD_BYTES = 64 << 20
_DTYPES = {"float32": torch.float32, "float16": torch.float16}


@dataclass(frozen=True, eq=False)
class Teacher:
    """What is kept of one row of text, in the row's own positions, without padding.

    Attributes:
        positions: query positions, sorted; empty where only logits are kept.
        heads: layer -> query heads.
        attention: layer -> `[len(heads[layer]), T, keys]` float32 probabilities, keys up to the last position.
        logits: `[labels, vocabulary]` raw float32 logits at the positions whose next token is a label (`label_mask`),
            or their `TopLogits`.
    """

    positions: list[int]
    heads: dict[int, list[int]]
    attention: dict[int, Tensor]
    logits: Tensor | TopLogits


@dataclass(frozen=True, eq=False)
class TeacherBatch:
    """Teachers of a batch padded on the right, in the layout that `attention_distillation` and `logit_kl` take.

    Attributes:
        positions: `[batch, T]` query positions, -1 where there is none.
        heads: layer -> query heads: those of any row.
        attention: layer -> `[batch, len(heads[layer]), T, keys]` float32 probabilities, 0 where there is none.
        present: layer -> `[batch, len(heads[layer]), T]` bool.
        logits: of the label positions of all rows that have a teacher, in order; None if no row has one.
    """

    positions: Tensor
    heads: dict[int, list[int]]
    attention: dict[int, Tensor]
    present: dict[int, Tensor]
    logits: Tensor | TopLogits | None


class TeacherStore:
    """Teachers by key, on disk.

    Args:
        folder: made if it does not exist; teachers of an earlier store are found.
        dtype: "float32" or "float16" of what is kept; rows are given back in float32.
        logits_top: keep only the largest logits of each position, and the log-mass of the others.

    Raises:
        InputError: the folder holds a store of another dtype or logits_top.
        CheckError: its index is damaged.
    """

    def __init__(
        self, folder: Path, dtype: Literal["float32", "float16"] = "float32", logits_top: int | None = None
    ) -> None:
        if dtype not in _DTYPES:
            raise InputError(f"teacher dtype {dtype!r}; expected float32 or float16")
        self.folder, self.dtype, self.logits_top = folder, dtype, logits_top
        self._shards: dict[str, str] = {}
        self._keys: dict[str, list[str]] = {}
        self._open: dict[str, Any] = {}
        self._pending: dict[str, Tensor] = {}  # the shard in the making
        if (folder / "index.json").exists():
            self._read_index()

    def _read_index(self) -> None:
        path = self.folder / "index.json"
        try:
            index = json.loads(path.read_text(encoding="utf-8"))
            own = index["format"], index["dtype"], index["logits_top"]
            self._shards, self._keys = dict(index["shards"]), {key: list(names) for key, names in index["keys"].items()}
            for name in self._shards:
                inside(self.folder, name, "index.json")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise self._damaged(path, error) from None
        if own != (_FORMAT, self.dtype, self.logits_top):
            raise InputError(
                f"teacher store {str(self.folder)!r} is of format, dtype and logits_top {own}, not "
                f"{(_FORMAT, self.dtype, self.logits_top)}; give those, or another folder"
            )

    def _damaged(self, path: Path, why: object) -> CheckError:
        return CheckError(f"{path} is damaged ({why}); delete {str(self.folder)!r} and compute its teachers again")

    def __contains__(self, key: str) -> bool:
        return key in self._keys or f"heads/{key}" in self._pending

    # --- writing ------------------------------------------------------------------------------------------------------

    def put(self, key: str, teacher: Teacher) -> None:
        """Keep a teacher; it is on disk after `flush`.

        Raises:
            InputError: the key has one already (see `add_heads`), or its positions are not sorted.
            CheckError: rows that are no probabilities, or logits that the dtype cannot hold.
        """
        if key in self:
            raise InputError(f"{key!r} has a teacher already; use add_heads, or another store")
        tensors = self._attention(key, teacher.positions, teacher.heads, teacher.attention)
        logits = teacher.logits
        if self.logits_top is not None:
            top = top_logits(logits, self.logits_top) if isinstance(logits, Tensor) else logits
            if top.logits.shape[-1] != self.logits_top:
                raise InputError(f"{key!r}: {top.logits.shape[-1]} top logits for a store of {self.logits_top}")
            tensors |= {"tokens": top.tokens.to("cpu", torch.int32), "rest": self._cast(key, top.rest)}
            logits = top.logits
        elif not isinstance(logits, Tensor):
            raise InputError(f"{key!r}: top logits for a store of all logits; set its logits_top")
        self._enqueue(key, tensors | {"logits": self._cast(key, logits)})

    def add_heads(self, key: str, heads: Heads, attention: Mapping[int, Tensor]) -> None:
        """Add rows of further heads, at the key's own positions: layer -> `[heads, T, keys]` probabilities.

        Raises:
            InputError: one of them is there already.
            CheckError: no such key, or rows that are no probabilities.
        """
        known = set(self.heads(key))
        if again := [pair for pair in _pairs(heads) if pair in known]:
            raise InputError(f"{key!r} has rows of head {again[0]} already; add the others alone")
        self._enqueue(key, self._attention(key, self.positions(key), heads, attention))

    def _attention(
        self, key: str, positions: list[int], heads: Heads, attention: Mapping[int, Tensor]
    ) -> dict[str, Tensor]:
        pairs = _pairs(heads)
        if positions != sorted(set(positions)) or (positions and positions[0] < 0) or (pairs and not positions):
            raise InputError(f"{key!r}: query positions {positions[:4]}...; expected some, sorted, without repeats")
        visible = _visible(positions)
        flat = [torch.empty(0, int(visible.sum()))]
        for layer, chosen in heads.items():
            rows = attention[layer].detach().float().cpu()
            if rows.shape != (len(chosen), *visible.shape):
                raise InputError(f"{key!r}: rows {tuple(rows.shape)}; expected {(len(chosen), *visible.shape)}")
            if not (rows.masked_fill(~visible, 0).sum(-1) - 1).abs().max().item() <= 1e-3:
                raise CheckError(f"{key!r}: attention rows of layer {layer} do not sum to 1 over the keys before them")
            flat.append(rows[:, visible])
        return {
            "positions": torch.tensor(positions, dtype=torch.int32),
            "heads": torch.tensor(pairs, dtype=torch.int32).reshape(-1, 2),
            "attention": self._cast(key, torch.cat(flat)),
        }

    def _cast(self, key: str, values: Tensor) -> Tensor:
        cast = values.detach().to("cpu", _DTYPES[self.dtype])
        if not torch.isfinite(cast).all():
            raise CheckError(f"{key!r}: a teacher's values are not finite in {self.dtype}; use float32")
        return cast

    def _enqueue(self, key: str, tensors: dict[str, Tensor]) -> None:
        if f"heads/{key}" in self._pending:  # a key is at most once in a shard
            self.flush()
        # Copies: what is put may be a view of a whole batch's tensor.
        self._pending |= {f"{kind}/{key}": tensor.clone() for kind, tensor in tensors.items()}
        if sum(tensor.nbytes for tensor in self._pending.values()) >= _SHARD_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what is only in memory; a store that is cut off before loses that, and nothing else."""
        if self._pending:
            path = self.folder / f"shard-{len(self._shards):05d}.safetensors"
            with atomic_path(path) as temporary:
                save_file(self._pending, temporary)
            self._shards[path.name] = sha256_of(path)
            for key in (name.removeprefix("heads/") for name in self._pending if name.startswith("heads/")):
                self._keys.setdefault(key, []).append(path.name)
            self._pending = {}
        index = {"format": _FORMAT, "dtype": self.dtype, "logits_top": self.logits_top}
        write_json(self.folder / "index.json", index | {"shards": self._shards, "keys": self._keys})

    # --- reading ------------------------------------------------------------------------------------------------------

    def _shard(self, name: str) -> Any:
        if name not in self._open:
            path = self.folder / name
            try:
                if sha256_of(path) != self._shards[name]:
                    raise SafetensorError("its SHA-256 is not the one in the index")
                self._open[name] = safe_open(path, framework="pt")
            except (OSError, KeyError, SafetensorError) as error:
                raise self._damaged(path, error) from None
        return self._open[name]

    def _tensors(self, kind: str, key: str) -> list[Tensor]:
        """A key's tensors of one kind, in the order in which they were put."""
        name = f"{kind}/{key}"
        found = []
        for shard in map(self._shard, self._keys.get(key, [])):
            if name in shard.keys():  # noqa: SIM118  an open file is no mapping
                found.append(shard.get_tensor(name))
        if name in self._pending:
            found.append(self._pending[name])
        if not found:
            raise CheckError(f"no teacher of {key!r} in {str(self.folder)!r}; compute it first (compute_teacher)")
        return found

    def positions(self, key: str) -> list[int]:
        """The key's query positions, sorted."""
        found: list[int] = self._tensors("positions", key)[0].tolist()
        return found

    def heads(self, key: str) -> list[tuple[int, int]]:
        """`(layer, head)` of every row that the key has, sorted."""
        return sorted((layer, head) for part in self._tensors("heads", key) for layer, head in part.tolist())

    def logits(self, key: str) -> Tensor | TopLogits:
        """`[labels, vocabulary]` raw float32 logits, or what the store keeps of them."""
        logits = self._tensors("logits", key)[0].float()
        if self.logits_top is None:
            return logits
        return TopLogits(self._tensors("tokens", key)[0].long(), logits, self._tensors("rest", key)[0].float())

    def get(self, key: str, heads: Heads | None = None) -> Teacher:
        """The key's teacher, with rows of `heads` or of all that it has.

        Raises:
            CheckError: there is none, or not of these heads, or its shard is missing or damaged.
        """
        chosen = {layer: list(some) for layer, some in (by_layer(self.heads(key)) if heads is None else heads).items()}
        where: dict[tuple[int, int], Tensor] = {}
        for pairs, kept in zip(self._tensors("heads", key), self._tensors("attention", key), strict=True):
            where |= {(layer, head): kept[at] for at, (layer, head) in enumerate(pairs.tolist())}
        if lacking := [pair for pair in _pairs(chosen) if pair not in where]:
            raise CheckError(
                f"the teacher of {key!r} has no rows of head {lacking[0]}; compute them first (compute_teacher)"
            )
        positions = self.positions(key)
        visible = _visible(positions)
        attention = {}
        for layer, some in chosen.items():
            attention[layer] = torch.zeros(len(some), *visible.shape)
            for at, head in enumerate(some):
                attention[layer][at, visible] = where[layer, head].float()
        return Teacher(positions, chosen, attention, self.logits(key))

    def batch(
        self,
        keys: Sequence[str | None],
        length: int,
        heads: Mapping[str, Heads] | None = None,
        device: torch.device | str = "cpu",
    ) -> TeacherBatch:
        """Teachers of a batch of rows padded on the right to `length` tokens.

        Args:
            keys: one of each row; None for a row that has no teacher.
            heads: key -> heads whose rows are wanted; None: all that each key has.
            device: where the tensors go.

        Raises:
            CheckError: see `get`.
            InputError: a row is longer than `length`.
        """
        teachers = [None if key is None else self.get(key, None if heads is None else heads[key]) for key in keys]
        given = [teacher for teacher in teachers if teacher is not None]
        if too_long := [at for teacher in given for at in teacher.positions[-1:] if at >= length]:
            raise InputError(f"a teacher's query position {too_long[0]} in a batch of {length} tokens")
        union = by_layer({pair for teacher in given for pair in _pairs(teacher.heads)})
        n_queries = max((len(teacher.positions) for teacher in given), default=0)
        positions = torch.full((len(keys), n_queries), -1)
        attention = {layer: torch.zeros(len(keys), len(some), n_queries, length) for layer, some in union.items()}
        present = {layer: torch.zeros(len(keys), len(some), n_queries).bool() for layer, some in union.items()}
        for row, teacher in enumerate(teachers):
            if teacher is None:
                continue
            n = len(teacher.positions)
            positions[row, :n] = torch.tensor(teacher.positions, dtype=torch.long)
            for layer, some in teacher.heads.items():
                at = [union[layer].index(head) for head in some]
                attention[layer][row, at, :n, : teacher.positions[-1] + 1] = teacher.attention[layer]
                present[layer][row, at, :n] = True
        return TeacherBatch(
            positions.to(device),
            union,
            {layer: rows.to(device) for layer, rows in attention.items()},
            {layer: rows.to(device) for layer, rows in present.items()},
            _concatenated([teacher.logits for teacher in given], device),
        )


def by_layer(pairs: Iterable[tuple[int, int]]) -> dict[int, list[int]]:
    """Layer -> heads, both sorted."""
    heads: dict[int, list[int]] = {}
    for layer, head in sorted(pairs):
        heads.setdefault(layer, []).append(head)
    return heads


def _pairs(heads: Heads) -> list[tuple[int, int]]:
    return [(layer, head) for layer, chosen in heads.items() for head in chosen]


def _visible(positions: Sequence[int]) -> Tensor:
    """`[T, last position + 1]` bool: the keys that each query sees."""
    queries = torch.tensor(positions, dtype=torch.long)
    return torch.arange(max(positions, default=-1) + 1) <= queries[:, None]


def _concatenated(logits: Sequence[Tensor | TopLogits], device: torch.device | str) -> Tensor | TopLogits | None:
    whole = [part for part in logits if isinstance(part, Tensor)]
    if whole:
        return torch.cat(whole).to(device)
    top = [part for part in logits if isinstance(part, TopLogits)]
    if not top:
        return None
    tokens, largest, rest = (torch.cat([getattr(part, name) for part in top]) for name in ("tokens", "logits", "rest"))
    return TopLogits(tokens, largest, rest).to(device)


# --- filling it -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def compute_teacher(
    model: HeadModel,
    rows: Sequence[Row],
    heads: Heads,
    positions: Mapping[str, Sequence[int]],
    store: TeacherStore,
    batch_size: int,
) -> int:
    """Store what the model, as it is now, says about rows of text; returns how many rows were computed.

    A key that the store has keeps its positions, its logits and the rows that it has: only heads that it lacks are
    added, from the model as it is now, and nothing is run where it lacks none. The model is run in eval mode and left
    as it was found.

    Args:
        heads: layer -> query heads; empty: logits alone are kept.
        positions: key -> sorted query positions (see `query_positions`); not needed without heads.

    Raises:
        InputError: a row without positions, or of others than the store has for its key.
        CheckError: see `RowRecorder.record` and `TeacherStore.put`.
    """
    wanted = set(_pairs(heads))
    lacking: dict[str, dict[int, list[int]]] = {}
    for row in rows:
        own = list(positions.get(row.key, []))
        if wanted and not own:
            raise InputError(f"row {row.key!r} has no query positions; give some for every row")
        if wanted and row.key in store and store.positions(row.key) != own:
            raise InputError(f"row {row.key!r}: the store has other query positions; give those, or another store")
        lacking[row.key] = by_layer(wanted - set(store.heads(row.key) if row.key in store else []))
    todo = {row.key for row in rows if row.key not in store or lacking[row.key]}
    # Rows of about one length share a batch, so that little of it is padding. Batches are those of all rows, whatever
    # is there already: the last bits of a row depend on its batch, and a broken run is to end as an unbroken one.
    ordered = sorted(rows, key=lambda row: row.length)
    with model.measuring():
        for start in range(0, len(ordered), batch_size):
            batch = ordered[start : start + batch_size]
            if any(row.key in todo for row in batch):
                _teach(model, batch, todo, lacking, positions, store)
    store.flush()
    return len(todo)


def _teach(
    model: HeadModel,
    rows: Sequence[Row],
    todo: set[str],
    lacking: Mapping[str, dict[int, list[int]]],
    positions: Mapping[str, Sequence[int]],
    store: TeacherStore,
) -> None:
    """One batch; what is kept is that of the rows of `todo`."""
    recorder = RowRecorder(by_layer({pair for row in rows for pair in _pairs(lacking[row.key])}))
    queries = [list(positions.get(row.key, [])) for row in rows]
    inputs = padded(rows, 0, model.device)
    mask = label_mask(inputs.pop("labels"))
    with recorder.record(filled(queries, -1)) as recorded, positions_only(model.hf, mask):
        logits = model.hf(**inputs, use_cache=False).logits[0].float()
    for at, (row, own, of_row) in enumerate(zip(rows, queries, logits.split(mask.sum(1).tolist()), strict=True)):
        if row.key not in todo:
            continue
        attention = {}
        for layer, chosen in lacking[row.key].items():
            places = [recorder.heads[layer].index(head) for head in chosen]
            attention[layer] = recorded[layer][at, places, : len(own), : own[-1] + 1].exp()
        if row.key in store:
            store.add_heads(row.key, lacking[row.key], attention)
        else:
            store.put(row.key, Teacher(own, lacking[row.key], attention, of_row))
