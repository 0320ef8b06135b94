"""Named parts of a prompt: `"spans": {"needle": ["apple river"], "question": [[40, 75]]}`.

A span is a list of pieces. A piece is a text that the prompt holds exactly once, or `[start, end]`, its characters. The
words that readings of a prompt use by themselves (`subject`, `previous_1`, `end`, ...) name no span.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from headtune.analysis.utils.errors import InputError

Piece = str | tuple[int, int]
Spans = Mapping[str, tuple[Piece, ...]]
Ranges = dict[str, tuple[tuple[int, int], ...]]  # span -> (start, end) of each piece, in characters

RESERVED = ("subject", "previous", "end", "first", "rest")  # see `Encoded.sources`


def parse_spans(value: Any, prompt: str, place: str) -> dict[str, tuple[Piece, ...]]:
    """The `spans` of a line, checked; None means none.

    Raises:
        InputError: not an object of lists, a reserved or unusable name, no pieces, a piece that the prompt does not
            hold or holds twice, or characters outside the prompt.
    """
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise InputError(f"{place}: 'spans' must be {{\"name\": [piece, ...]}}, found {value!r}"[:300])
    spans: dict[str, tuple[Piece, ...]] = {}
    for name, pieces in value.items():
        if pieces is None:  # a table of the hub holds every name in every row
            continue
        if not re.fullmatch(r"[A-Za-z]\w*", name):
            raise InputError(f"{place}: span {name!r} must be a name of letters, digits and underscores")
        if re.fullmatch(rf"({'|'.join(RESERVED)})(_\d+)?", name):
            raise InputError(f"{place}: span {name!r} has a reserved name ({', '.join(RESERVED)}); choose another")
        if not isinstance(pieces, list | tuple) or not pieces:
            raise InputError(f"{place}: span {name!r} must be a list of at least one piece, found {pieces!r}"[:300])
        spans[name] = tuple(_piece(piece, prompt, f"{place}: span {name!r}") for piece in pieces)
    return spans


def _piece(piece: Any, prompt: str, what: str) -> Piece:
    if isinstance(piece, str):
        if not piece.strip():
            raise InputError(f"{what} has an empty piece; write a text of the prompt or [start, end]")
        _once(piece, prompt, what)
        return piece
    ends = isinstance(piece, list | tuple) and len(piece) == 2 and all(type(end) is int for end in piece)
    if not ends:
        raise InputError(f"{what}: a piece is a text of the prompt or [start, end], found {piece!r}"[:300])
    start, end = piece
    if not 0 <= start < end <= len(prompt):
        raise InputError(f"{what}: [{start}, {end}] are no characters of the prompt, which has {len(prompt)}")
    return start, end


def _once(piece: str, prompt: str, what: str) -> int:
    """Where the prompt holds a text that it must hold exactly once."""
    start = prompt.find(piece)
    if start < 0:
        raise InputError(f"{what}: the prompt does not contain {piece!r}"[:300])
    if prompt.find(piece, start + 1) >= 0:
        raise InputError(f"{what}: the prompt contains {piece!r} more than once; give its characters, [start, end]")
    return start


def ranges(spans: Spans, prompt: str, what: str) -> Ranges:
    """The characters of every piece.

    Raises:
        InputError: a text that the prompt does not hold exactly once.
    """

    def characters(piece: Piece, span: str) -> tuple[int, int]:
        if not isinstance(piece, str):
            return piece
        start = _once(piece, prompt, f"{what}: span {span!r}")
        return start, start + len(piece)

    return {name: tuple(characters(piece, name) for piece in pieces) for name, pieces in spans.items()}


def subject_start(prompt: str, subject: str, begin: int = 0) -> int:
    """Where the subject first stands as a word of its own, from `begin` on; else where its letters first stand.

    The latter is for scripts without spaces between words.
    """
    before = r"(?<!\w)" if re.match(r"\w", subject) else ""
    after = r"(?!\w)" if re.search(r"\w$", subject) else ""
    match = re.compile(before + re.escape(subject) + after).search(prompt, begin)
    return match.start() if match else prompt.index(subject, begin)
