"""Tensors in safetensors files that are whole or absent, and checked before they are believed.

save_tensors(path, tensors); load_tensors(path)         one file

store = TensorStore(folder, checksums)                  many tensors, in shards of about 64 MiB
if store.add({"a": tensor}):                            gathered in memory until a shard is full
    name = store.write()                                then written; the caller's index says what is in it
store.get(name, "a")                                    read memory-mapped
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from .errors import InputError
from .files import atomic_path, sha256_of
from .paths import safe_join

T = TypeVar("T")

SHARD_BYTES = 64 << 20


class DamagedFile(Exception):
    """A file that is missing, cut short or changed since it was written."""

    def __init__(self, path: Path, reason: object) -> None:
        super().__init__(f"{path} is damaged ({reason})")


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file, whole or not at all."""
    with atomic_path(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        DamagedFile: it is missing, or no safetensors file.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise DamagedFile(path, error) from None


def read_index(folder: Path, parse: Callable[[Any], T]) -> T:
    """What `parse` makes of the folder's `index.json`.

    Raises:
        DamagedFile: it cannot be read, or `parse` fails on what it holds.
    """
    path = folder / "index.json"
    try:
        return parse(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedFile(path, error) from None


class TensorStore:
    """Shards of named tensors in a folder, each checked against its SHA-256 when it is first opened.

    Which tensor is in which shard is for the caller's `index.json` to say, with `checksums`: a shard that no index
    names does not count, and its file is written over.

    Args:
        folder: where shards are; None: a temporary folder, made when it is needed and removed by `close`.
        checksums: the shards of an earlier store, name -> SHA-256.

    Raises:
        DamagedFile: the index names a shard that is not inside the folder.
    """

    def __init__(self, folder: Path | None, checksums: Mapping[str, str] | None = None) -> None:
        self.folder, self.checksums = folder, dict(checksums or {})
        if folder is not None:
            for name in self.checksums:
                try:
                    safe_join(folder, name, "index.json")
                except InputError as error:
                    raise DamagedFile(folder / "index.json", error) from None
        self.pending: dict[str, Tensor] = {}  # the shard in the making
        self.pending_bytes = 0
        self._temporary: Path | None = None
        self._open: dict[str, tuple[Any, frozenset[str]]] = {}  # shard -> the file and its tensors' names

    def add(self, tensors: Mapping[str, Tensor]) -> bool:
        """Put tensors into the next shard; returns whether it is full, so that it should be written."""
        self.pending |= tensors
        self.pending_bytes += sum(tensor.nbytes for tensor in tensors.values())
        return self.pending_bytes >= SHARD_BYTES

    def write(self) -> str:
        """Write the shard in the making, whole or not at all; returns its name, which `checksums` has from then on."""
        if self.folder is None:
            self.folder = self._temporary = Path(tempfile.mkdtemp(prefix="headtune-tensors-"))
        number = len(self.checksums)
        while (path := self.folder / f"shard-{number:05d}.safetensors").name in self.checksums:
            number += 1
        save_tensors(path, self.pending)
        self.checksums[path.name] = sha256_of(path)
        self.drop_pending()
        return path.name

    def drop_pending(self) -> None:
        """Empty the shard in the making."""
        self.pending, self.pending_bytes = {}, 0

    def get(self, shard: str, name: str) -> Tensor | None:
        """A tensor of a shard, or None where the shard has no such tensor.

        Raises:
            DamagedFile: the shard is missing, or not what was written.
        """
        if shard not in self._open:
            assert self.folder is not None
            path = self.folder / shard
            try:
                if sha256_of(path) != self.checksums[shard]:
                    raise SafetensorError("its SHA-256 is not the one in the index")
                file = safe_open(path, framework="pt")
                self._open[shard] = file, frozenset(file.keys())
            except (OSError, KeyError, SafetensorError) as error:
                raise DamagedFile(path, error) from None
        file, names = self._open[shard]
        return file.get_tensor(name) if name in names else None

    def close(self) -> None:
        """Close the shards, and remove them where they are temporary."""
        self._open.clear()
        if self._temporary is not None:
            shutil.rmtree(self._temporary, ignore_errors=True)
