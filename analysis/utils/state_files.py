"""Files that a run keeps about itself: read with a message, mended after a full disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .errors import InputError


def read_state(path: Path) -> dict[str, Any]:
    """A JSON object that a run keeps about itself.

    Raises:
        InputError: the file cannot be read, or is damaged.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{str(path)!r} is damaged ({type(error).__name__}); put back a copy of it, or start the run anew in "
            "another output_dir"
        ) from None
    if not isinstance(content, dict):
        raise InputError(f"{str(path)!r} is damaged (no JSON object); put back a copy, or start the run anew")
    return content


def mend_lines(path: Path) -> None:
    """Cut off a last line that is not whole, as a full disk leaves one: what is appended next begins a line."""
    if not path.is_file():
        return
    with path.open("rb+") as file:
        content = file.read()
        if content and not content.endswith(b"\n"):
            file.truncate(content.rfind(b"\n") + 1)
