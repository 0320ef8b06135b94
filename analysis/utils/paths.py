"""Paths from files, checked: a name or a link must stay inside its folder.

A path that a user gives on the command line may be any path. Names in a file (an index, a manifest) and links in a
folder come from elsewhere: they stay inside the folder, or are refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath

from .errors import InputError

_LONGEST = 200  # bytes; file systems take 255, and temporary names beside it are longer


def check_file_name(name: str, what: str) -> None:
    """Refuse a name that is no single, printable part of a path.

    Raises:
        InputError: a slash, a backslash, a control character, `.`, `..`, spaces around it, nothing, or too long.
    """
    if name in ("", ".", "..") or name != name.strip() or not name.isprintable() or {"/", "\\"} & set(name):
        raise InputError(f"{what} {name!r} must be a plain name, without slashes, control characters or dots alone")
    if len(name.encode()) > _LONGEST:
        raise InputError(f"{what} {name[:20]!r}... has {len(name.encode())} bytes; use {_LONGEST} at most")


def safe_join(folder: Path, name: str, what: str) -> Path:
    """The path of `name` in `folder`, where `name` was read from a file.

    Raises:
        InputError: an absolute name, or one with `..`, a backslash or a control character.
    """
    path = PurePosixPath(name)
    odd = path.is_absolute() or ".." in path.parts or not path.parts
    if odd or "\\" in name or not name.isprintable() or PureWindowsPath(name).drive:
        raise InputError(f"{what} names {name!r}, which is not inside {str(folder)!r}; get the folder anew")
    return folder / path


def check_links_stay_inside(folder: Path, what: str, parts: Sequence[str] = ("",)) -> None:
    """Refuse a folder in which a link, at any depth, leads out of it. Links within it, and `folder` itself, may be.

    Args:
        parts: files and folders in it that are looked at, where that is not all.

    Raises:
        InputError: such a link, or one that leads nowhere.
    """
    top = folder.resolve()
    for part in parts:
        itself = [folder / part] if part else []
        # os.walk does not follow links.
        below = (Path(place) / name for place, *names in os.walk(folder / part) for name in names[0] + names[1])
        for path in (*itself, *below):
            if path.is_symlink() and not _within(path, top):
                raise InputError(
                    f"{what} {str(path)!r} is a link that leads out of {str(folder)!r}; put the file itself there"
                )


def _within(path: Path, top: Path) -> bool:
    try:
        return path.resolve(strict=True).is_relative_to(top)
    except (OSError, RuntimeError):  # leads nowhere, or in a circle
        return False


def check_weights_are_safe(folder: Path) -> None:
    """Refuse a model folder whose weights are a pickle, or whose index names shards elsewhere.

    Shards may be links, as they are in the hub cache; it is the index that may not name a way out.

    Raises:
        InputError: no safetensors beside a pickle, an index that cannot be read, or one that names a file outside the
            folder.
    """
    pickles = sorted(folder.glob("pytorch_model*.bin"))
    if pickles and not any(folder.glob("*.safetensors")):
        raise InputError(
            f"model folder {str(folder)!r} holds its weights as a pickle ({pickles[0].name}), which is not read; save "
            "it as safetensors: model.save_pretrained(FOLDER)"
        )
    for path in sorted([*folder.glob("*.safetensors.index.json"), *folder.glob("*.bin.index.json")]):
        source = f"index {str(path)!r}"
        try:
            names = set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError):
            raise InputError(f"{source} is not an index of weights; get the folder anew") from None
        for name in sorted(names, key=str):
            if not isinstance(name, str):
                raise InputError(f"{source} names {name!r}, which is no file; get the folder anew")
            safe_join(folder, name, source)
