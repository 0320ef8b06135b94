"""JSON, JSON lines and hub data sets, read with the place of what is wrong."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from headtune.analysis.utils.errors import InputError


def read_relation(path: Path) -> list[tuple[str, str]]:
    """Read `{"samples": [{"subject", "object"}, ...]}` (the layout of the LRE relations) or the bare list."""
    data = read_json(path, "relation", object)
    samples = data.get("samples") if isinstance(data, dict) else data
    if not isinstance(samples, list) or not all(
        isinstance(row, dict) and isinstance(row.get("subject"), str) and isinstance(row.get("object"), str)
        for row in samples
    ):
        raise InputError(f'relation file {str(path)!r} must hold a list of {{"subject": ..., "object": ...}}')
    return [(row["subject"], row["object"]) for row in samples]


# What files of a user's own hold, as messages show it.
_SHAPES = {
    "facts": '{"subject": ["answer", ...], ...}',
    "templates": '[{"header": "... {subject} ...", "item": "... {answer}"}, ...]',
}


_JSON_KINDS = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}


def read_json(path: Path, what: str, kind: type) -> Any:
    """What a JSON file holds, which must be a `kind`; `what` names it in messages.

    Raises:
        InputError: not there, not UTF-8, not JSON, a task's lines, or another kind.
    """
    file = f"{what} file {str(path)!r}"
    try:
        text = _utf8(path, what)
    except FileNotFoundError:
        raise InputError(f"{file} does not exist; check the path") from None
    if _is_task(text):
        raise InputError(
            f"{file} looks like a task (JSONL), which needs no building; look at it with: headtune task show {path}"
        )
    try:
        data = _strict(text, file)
    except json.JSONDecodeError as error:
        raise InputError(f"{file} is not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from None
    if not isinstance(data, kind):
        actual, expected = _JSON_KINDS.get(type(data), "a number"), _JSON_KINDS[kind]
        shape = f", {_SHAPES[what]}" if what in _SHAPES else ""
        fix = "; put it in [ ]" if kind is list and isinstance(data, dict) and what in _SHAPES else ""
        raise InputError(f"{file} holds {actual}; expected {expected}{shape}{fix}")
    return data


def _strict(text: str, place: str) -> Any:
    """`json.loads` without what it lets pass.

    Raises:
        InputError: a key that stands twice in an object, half a surrogate pair, or nesting or numbers beyond measure.
        JSONDecodeError: no JSON.
    """

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in items:
            if key in result:
                raise InputError(f"{place}: key {key!r} stands twice; only the last would count: join or rename them")
            result[key] = value
        return result

    try:
        data = json.loads(text, object_pairs_hook=pairs)
    except RecursionError:
        raise InputError(f"{place}: nested too deeply; write one object with texts and lists of texts") from None
    except ValueError as error:
        if isinstance(error, (json.JSONDecodeError, InputError)):
            raise
        raise InputError(f"{place}: {error}") from None  # a whole number with thousands of digits
    if "\\ud" in text.lower() and (half := re.search("[\ud800-\udfff]", json.dumps(data, ensure_ascii=False))):
        raise InputError(
            f"{place}: holds \\u{ord(half.group(0)):x}, half of a character that is written as two such codes; write "
            "both, or the character itself"
        )
    return data


def _utf8(path: Path, what: str) -> str:
    """A file's text; the mark that Windows editors put before it (BOM) is no part of it."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{what} file {str(path)!r} is not UTF-8 text: {error.reason} at byte {error.start}; save it as UTF-8"
        ) from None


def _is_task(text: str) -> bool:
    """Whether the first line is an example by itself, or what a generated task file begins with."""
    try:
        row = json.loads(text.lstrip().split("\n", 1)[0])
    except json.JSONDecodeError:
        return False
    return isinstance(row, dict) and ({"prompt", "subject", "answers"} <= set(row) or set(row) == {"about"})


def json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """What each line of a JSONL file holds, with its place (`file:line`); empty lines are passed over."""
    # Not splitlines: JSON strings may hold U+2028 and the like, which end no JSONL line.
    for number, line in enumerate(_utf8(path, "task").split("\n"), start=1):
        if line.strip():
            place = f"{path}:{number}"
            try:
                row = _strict(line, place)
            except json.JSONDecodeError as error:
                raise InputError(f"{place}: not a JSON object ({error.msg} at column {error.colno})") from None
            yield place, row


def hub_rows(name: str, split: str, config: str | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a `datasets` hub data set, with their places."""
    import datasets

    try:
        rows = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # the hub client raises many kinds; every one means the same to the user
        reason = str(error).strip().splitlines()[0][:200]
        raise InputError(f"task {name!r} is not a file and cannot be loaded from the hub: {reason}") from error
    for number, row in enumerate(rows):
        yield f"{name} row {number}", dict(row)
