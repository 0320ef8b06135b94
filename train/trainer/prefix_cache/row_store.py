"""Tensors by key, in memory up to a limit and beyond it in checked, memory-mapped files."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from headtune.analysis.utils.files import atomic_path, sha256_of, write_json
from headtune.analysis.utils.paths import safe_join

log = logging.getLogger(__name__)

_SHARD_BYTES = 64 << 20


class RowStore:
    """Rows by key: in memory up to a limit, beyond it in shards of up to 64 MiB, which are read memory-mapped.

    `index.json` names each shard's rows and SHA-256; a shard is checked when it is first opened, and one that is
    damaged is forgotten, so that its rows are computed again.

    Args:
        limit: bytes of rows in memory; what is gathered for the next shard comes on top.
        folder: where shards stay, and rows of an earlier store are found; None: a temporary folder.
    """

    def __init__(self, limit: int, folder: Path | None) -> None:
        self.limit = limit
        self.memory_bytes = self.disk_bytes = self.lost = self.unkept = 0
        self._folder = folder
        self._temporary: Path | None = None
        self._memory: dict[str, Tensor] = {}
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._shards: dict[str, dict[str, Any]] = {}  # name -> {"sha256", "rows"}
        self._where: dict[str, str] = {}  # row -> shard
        self._open: dict[str, Any] = {}
        self._writable = True
        if folder is not None and (folder / "index.json").is_file():
            self._read_index(folder / "index.json")

    def _read_index(self, path: Path) -> None:
        try:
            shards = json.loads(path.read_text(encoding="utf-8"))["shards"]
            for name in shards:
                safe_join(path.parent, name, f"index {str(path)!r}")
            self._where = {row: name for name, shard in shards.items() for row in shard["rows"]}
            self.disk_bytes = sum(shard["bytes"] for shard in shards.values())
            self._shards = shards
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            log.warning("%s cannot be read (%s); its rows are computed again", path, error)
            self._where = {}

    def get(self, key: str) -> Tensor | None:
        """`[tokens, d_model]` on the CPU, or None."""
        row = self._memory.get(key)
        if row is None:
            row = self._pending.get(key)
        if row is None and key in self._where:
            row = self._from_disk(key)
        return row

    def put(self, key: str, row: Tensor) -> None:
        size = row.numel() * row.element_size()
        if self.memory_bytes + size <= self.limit:
            self._memory[key] = row
            self.memory_bytes += size
        elif self._writable:
            self._pending[key] = row
            self._pending_bytes += size
            if self._pending_bytes >= _SHARD_BYTES:
                self.flush()
        else:
            self.unkept += 1

    def flush(self) -> None:
        """Write what waits for a shard."""
        if not self._pending:
            return
        try:
            self._write()
        except OSError as error:
            log.warning("cannot write rows (%s); those beyond %d bytes are not kept", error, self.limit)
            self._writable = False
            self.unkept += len(self._pending)
        self._pending, self._pending_bytes = {}, 0

    def _write(self) -> None:
        if self._folder is None:
            self._folder = self._temporary = Path(tempfile.mkdtemp(prefix="headtune-prefix-"))
        number = 1 + max((int(path.stem.rpartition("-")[2]) for path in self._folder.glob("shard-*")), default=-1)
        path = self._folder / f"shard-{number:05d}.safetensors"
        with atomic_path(path) as temporary:
            save_file(self._pending, temporary)
        shard = {"sha256": sha256_of(path), "bytes": self._pending_bytes, "rows": list(self._pending)}
        self._shards[path.name] = shard
        write_json(self._folder / "index.json", {"shards": self._shards})
        self._where |= dict.fromkeys(self._pending, path.name)
        self.disk_bytes += self._pending_bytes

    def _from_disk(self, key: str) -> Tensor | None:
        assert self._folder is not None
        name = self._where[key]
        if name not in self._open:
            path = self._folder / name
            try:
                if sha256_of(path) != self._shards[name]["sha256"]:
                    raise SafetensorError("its SHA-256 is not the one in the index")
                self._open[name] = safe_open(path, framework="pt")
            except (OSError, SafetensorError) as error:
                log.warning("%s is damaged (%s); its rows are computed again", path, error)
                self.lost += 1
                self.disk_bytes -= self._shards[name]["bytes"]
                for lost in self._shards.pop(name)["rows"]:
                    del self._where[lost]
                return None
        row: Tensor = self._open[name].get_tensor(key)
        return row

    def close(self) -> None:
        """Write what is left where it is to stay; remove what is not."""
        if self._temporary is None and self._folder is not None:
            self.flush()
        self._open.clear()
        if self._temporary is not None:
            shutil.rmtree(self._temporary, ignore_errors=True)
