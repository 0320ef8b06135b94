"""Rows by key, in memory up to a limit and beyond it in checked, memory-mapped files."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from torch import Tensor

from headtune.analysis.utils.files import write_json
from headtune.analysis.utils.tensor_store import DamagedFile, TensorStore, read_index

log = logging.getLogger(__name__)


class RowStore:
    """Rows by key: in memory up to a limit, beyond it in the shards of a `TensorStore`.

    A shard that is damaged is forgotten, so that its rows are computed again.

        index.json      {"shards": {name: {"sha256", "bytes", "rows": [key, ...]}}}

    Args:
        limit: bytes of rows in memory; what is gathered for the next shard comes on top.
        folder: where shards stay, and rows of an earlier store are found; None: a temporary folder.
    """

    def __init__(self, limit: int, folder: Path | None) -> None:
        self.limit = limit
        self.memory_bytes = self.lost = self.unkept = 0
        self._memory: dict[str, Tensor] = {}
        self._shards: dict[str, dict[str, Any]] = {}
        self._disk = TensorStore(folder)
        self._temporary = folder is None
        self._writable = True
        if folder is not None and (folder / "index.json").is_file():
            try:
                shards = read_index(folder, _shards)
                self._disk = TensorStore(folder, {name: shard["sha256"] for name, shard in shards.items()})
                self._shards = shards
            except DamagedFile as error:
                log.warning("%s; its rows are computed again", error)
        self._shard_of = {row: name for name, shard in self._shards.items() for row in shard["rows"]}

    @property
    def disk_bytes(self) -> int:
        return sum(shard["bytes"] for shard in self._shards.values())

    def get(self, key: str) -> Tensor | None:
        """`[tokens, d_model]` on the CPU, or None."""
        row = self._memory.get(key)
        if row is None:
            row = self._disk.pending.get(key)
        if row is None and key in self._shard_of:
            row = self._from_disk(key)
        return row

    def put(self, key: str, row: Tensor) -> None:
        if self.memory_bytes + row.nbytes <= self.limit:
            self._memory[key] = row
            self.memory_bytes += row.nbytes
        elif not self._writable:
            self.unkept += 1
        elif self._disk.add({key: row}):
            self.flush()

    def flush(self) -> None:
        """Write what waits for a shard."""
        rows, size = list(self._disk.pending), self._disk.pending_bytes
        if not rows:
            return
        try:
            name = self._disk.write()
            assert self._disk.folder is not None
            self._shards[name] = {"sha256": self._disk.checksums[name], "bytes": size, "rows": rows}
            self._shard_of |= dict.fromkeys(rows, name)
            write_json(self._disk.folder / "index.json", {"shards": self._shards})
        except OSError as error:
            log.warning("cannot write rows (%s); those beyond %d bytes are not kept", error, self.limit)
            self._writable = False
            self.unkept += len(self._disk.pending)
            self._disk.drop_pending()

    def _from_disk(self, key: str) -> Tensor | None:
        name = self._shard_of[key]
        try:
            return self._disk.get(name, key)
        except DamagedFile as error:
            log.warning("%s; its rows are computed again", error)
            self.lost += 1
            del self._disk.checksums[name]
            for row in self._shards.pop(name)["rows"]:
                del self._shard_of[row]
            return None

    def close(self) -> None:
        """Write what is left where it is to stay; remove what is not."""
        if not self._temporary:
            self.flush()
        self._disk.close()


def _shards(index: Any) -> dict[str, dict[str, Any]]:
    return {
        name: {"sha256": shard["sha256"], "bytes": int(shard["bytes"]), "rows": list(shard["rows"])}
        for name, shard in index["shards"].items()
    }
