"""Files that are either whole or absent: written beside the target, synced, renamed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import InputError


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _allowed(mode: int) -> int:
    """A mode less what the process's umask keeps from others, as `open` and `mkdir` give it."""
    umask = os.umask(0o077)  # it can only be read by setting it; another thread's file is private rather than open
    os.umask(umask)
    return mode & ~umask


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling of `path`; on success it is synced and renamed to `path`, else removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(_allowed(0o666))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, data: Any) -> None:
    """Write JSON that any parser reads: NaN and infinities are refused (ValueError)."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling folder, renamed to `path` on success; on any failure nothing is left behind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield temporary
        share_weights(temporary)
        temporary.chmod(_allowed(0o777))
        temporary.rename(path)
    finally:
        if temporary.exists():
            shutil.rmtree(temporary)


def share_weights(folder: Path) -> None:
    """Let others read a folder's weights as the process's umask says: safetensors lets their owner alone."""
    for file in folder.rglob("*.safetensors"):
        file.chmod(_allowed(0o666))


def leftovers(path: Path) -> list[Path]:
    """What processes that were killed while they wrote `path` left beside it."""
    return [each for each in path.parent.glob(f".{path.name}.????????") if each.is_file()]


def require_new_folder(path: Path, fix: str, first: str | None = None) -> None:
    """Refuse an output folder that holds something or cannot be written.

    Args:
        fix: says what the user can do.
        first: the file that is written there before all others; what a process that was killed while it wrote this one
            left behind (see `atomic_path`) counts as nothing.

    Raises:
        InputError: `path` is a file, a folder with contents, or in a place where nothing can be written.
    """
    if path.is_file():
        raise InputError(f"output folder {str(path)!r} is a file; {fix}")
    if path.is_dir() and set(path.iterdir()) - set(leftovers(path / first) if first else ()):
        raise InputError(f"output folder {str(path)!r} exists and is not empty; {fix}")
    existing = path
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir():
        raise InputError(f"cannot create {str(path)!r}: {str(existing)!r} is a file; {fix}")
    try:
        # Trying is the only test that also holds for root and for read-only file systems.
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise InputError(f"cannot write to {str(path)!r}: {error.strerror}; choose a folder you can write to") from None
