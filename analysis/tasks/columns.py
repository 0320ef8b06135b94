"""Data with columns of other names as a task: `load_task("qa.jsonl", columns={"prompt": "Q: {question}\\nA:", ...})`.

A column mapping says for a key of an example (`prompt`, `subject`, `answers`, ...) which column holds it; a text with
`{column}` in it is filled in, and `a.b` is `b` inside `a`. A key that is not named is read from the column of its own
name; other columns are not read. One answer may stand for a list of one; white space around answers is taken away.
Without a `subject`, each row is a subject of its own: its whole prompt.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from headtune.analysis.utils.errors import InputError, nearest

KEYS = ("prompt", "subject", "answers", "previous", "corrupt", "incorrect")
_LISTS = ("answers", "previous", "incorrect")
_PLACEHOLDER = re.compile(r"\{([^{}]+)\}")


def check_columns(columns: Mapping[str, str]) -> None:
    """Refuse a mapping that names no key, or one that an example does not have (InputError)."""
    if not columns:
        raise InputError("columns names none; give such as {prompt: question, answers: answer}")
    for key, column in columns.items():
        if key not in KEYS:
            raise InputError(f"columns: an example has no key {key!r}; {nearest(key, KEYS)}")
        if not isinstance(column, str) or not column.strip():
            raise InputError(f"columns.{key} must name a column, found {column!r}")
        if "{" in column and (key in _LISTS or not _PLACEHOLDER.search(column)):
            raise InputError(f"columns.{key}: {column!r} is no column; text with {{column}} is for prompt and subject")


def in_our_keys(rows: Iterable[tuple[str, Any]], columns: Mapping[str, str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of a table, each with its place, as rows of a task.

    Raises:
        InputError: a row that is no object, lacks a column, or holds no text (or, of answers, no list of texts) in it.
    """
    for place, row in rows:
        if not isinstance(row, Mapping):
            raise InputError(f"{place}: expected a row with columns, found {type(row).__name__}")
        result: dict[str, Any] = {}
        for key in KEYS:
            source = columns.get(key, key)
            if key not in columns and row.get(key) is None:
                continue
            value = _filled(row, source, place) if "{" in source else _value(row, source, place)
            if key in _LISTS:
                value = _texts(value, key, source, place)
            elif not isinstance(value, str):
                raise InputError(f"{place}: column {source!r} must hold text for {key!r}, found {value!r}"[:300])
            result[key] = value
        for key in ("prompt", "answers"):
            if key not in result:
                raise InputError(f"{place}: no column {key!r}; name the one that holds it: columns.{key}")
        result.setdefault("subject", result["prompt"])
        yield place, result


def _value(row: Mapping[str, Any], path: str, place: str) -> Any:
    """The value of a column; `a.b` is `b` inside the column `a`, unless there is a column of that name."""
    if path in row:
        return row[path]
    value: Any = row
    for part in path.split("."):
        if not isinstance(value, Mapping) or part not in value:
            raise InputError(f"{place}: no column {path!r}; {nearest(path, [str(name) for name in row])}")
        value = value[part]
    return value


def _filled(row: Mapping[str, Any], template: str, place: str) -> str:
    def fill(match: re.Match[str]) -> str:
        value = _value(row, match[1], place)
        if not isinstance(value, str):
            raise InputError(f"{place}: column {match[1]!r} must hold text, found {value!r}"[:300])
        return value

    return _PLACEHOLDER.sub(fill, template)


def _texts(value: Any, key: str, column: str, place: str) -> list[str]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) and text.strip() for text in texts):
        expected = f"{place}: column {column!r} must hold text, or a list of texts, for {key!r}"
        raise InputError(f"{expected}, found {value!r}"[:300])
    return [text.strip() for text in texts]
