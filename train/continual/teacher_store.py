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

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from headtune.analysis.utils.errors import CheckError, InputError
from headtune.analysis.utils.files import write_json
from headtune.analysis.utils.tensor_store import DamagedFile, TensorStore, read_index
from headtune.train.losses.attention_distillation import TopLogits, top_logits

from .teachers import Heads, Teacher, TeacherBatch, by_layer, collate_teachers, pairs_of, visible_keys

_FORMAT = 1
_DTYPES = {"float32": torch.float32, "float16": torch.float16}


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
        self._keys: dict[str, list[str]] = {}  # key -> the shards that hold some of it
        self._disk = TensorStore(folder)
        if (folder / "index.json").exists():
            self._read_index()

    def _read_index(self) -> None:
        settings = _FORMAT, self.dtype, self.logits_top
        try:
            stored, shards, self._keys = read_index(self.folder, _parse)
            self._disk = TensorStore(self.folder, shards)
        except DamagedFile as error:
            raise self._error(error) from None
        if stored != settings:
            raise InputError(
                f"teacher store {str(self.folder)!r} is of format, dtype and logits_top {stored}, not {settings}; give "
                "those, or another folder"
            )

    def _error(self, damaged: DamagedFile) -> CheckError:
        return CheckError(f"{damaged}; delete {str(self.folder)!r} and compute its teachers again")

    def __contains__(self, key: str) -> bool:
        return key in self._keys or f"heads/{key}" in self._disk.pending

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
        stored = set(self.heads(key))
        if again := [pair for pair in pairs_of(heads) if pair in stored]:
            raise InputError(f"{key!r} has rows of head {again[0]} already; add the others alone")
        self._enqueue(key, self._attention(key, self.positions(key), heads, attention))

    def _attention(
        self, key: str, positions: list[int], heads: Heads, attention: Mapping[int, Tensor]
    ) -> dict[str, Tensor]:
        pairs = pairs_of(heads)
        if positions != sorted(set(positions)) or (positions and positions[0] < 0) or (pairs and not positions):
            raise InputError(f"{key!r}: query positions {positions[:4]}...; expected some, sorted, without repeats")
        visible = visible_keys(positions)
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
        if f"heads/{key}" in self._disk.pending:  # a key is at most once in a shard
            self.flush()
        # Copies: what is put may be a view of a whole batch's tensor.
        if self._disk.add({f"{kind}/{key}": tensor.clone() for kind, tensor in tensors.items()}):
            self.flush()

    def flush(self) -> None:
        """Write what is only in memory; a store that is cut off before loses that, and nothing else."""
        keys = [name.removeprefix("heads/") for name in self._disk.pending if name.startswith("heads/")]
        if keys:
            shard = self._disk.write()
            for key in keys:
                self._keys.setdefault(key, []).append(shard)
        index = {"format": _FORMAT, "dtype": self.dtype, "logits_top": self.logits_top}
        write_json(self.folder / "index.json", index | {"shards": self._disk.checksums, "keys": self._keys})

    # --- reading ------------------------------------------------------------------------------------------------------

    def _tensors(self, kind: str, key: str) -> list[Tensor]:
        """A key's tensors of one kind, in the order in which they were put."""
        name = f"{kind}/{key}"
        try:
            stored = [self._disk.get(shard, name) for shard in self._keys.get(key, [])]
        except DamagedFile as error:
            raise self._error(error) from None
        tensors = [tensor for tensor in (*stored, self._disk.pending.get(name)) if tensor is not None]
        if not tensors:
            raise CheckError(f"no teacher of {key!r} in {str(self.folder)!r}; compute it first (compute_teacher)")
        return tensors

    def positions(self, key: str) -> list[int]:
        """The key's query positions, sorted."""
        positions: list[int] = self._tensors("positions", key)[0].tolist()
        return positions

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
        rows: dict[tuple[int, int], Tensor] = {}
        for pairs, attention_rows in zip(self._tensors("heads", key), self._tensors("attention", key), strict=True):
            rows |= {(layer, head): attention_rows[at] for at, (layer, head) in enumerate(pairs.tolist())}
        if lacking := [pair for pair in pairs_of(chosen) if pair not in rows]:
            raise CheckError(
                f"the teacher of {key!r} has no rows of head {lacking[0]}; compute them first (compute_teacher)"
            )
        positions = self.positions(key)
        visible = visible_keys(positions)
        attention = {}
        for layer, some in chosen.items():
            attention[layer] = torch.zeros(len(some), *visible.shape)
            for at, head in enumerate(some):
                attention[layer][at, visible] = rows[layer, head].float()
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
        return collate_teachers(teachers, length, device)


def _parse(index: Any) -> tuple[tuple[Any, ...], dict[str, str], dict[str, list[str]]]:
    """What index.json says: the store's settings, its shards and its keys."""
    keys = {key: list(names) for key, names in index["keys"].items()}
    return (index["format"], index["dtype"], index["logits_top"]), dict(index["shards"]), keys
