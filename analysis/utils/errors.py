"""The two ways in which a command ends badly, each with its exit code.

Library code raises these; the command line prints the message as one line on stderr and exits.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """The user's input is wrong. The message is one line: the value, what was expected, the fix. Exit code 2."""

    exit_code = 2


class CheckError(RuntimeError):
    """A check that headtune makes of itself failed, such as an export whose logits differ. Exit code 1."""

    exit_code = 1


def nearest(word: str, choices: Iterable[str], listed: bool = False) -> str:
    """`", did you mean 'x'?"` with the closest of `choices`, or the sorted list of all of them (`listed`: both)."""
    names = sorted(choices)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    every = "known: " + (", ".join(names) or "none")
    if not close:
        return every
    return f"did you mean {close[0]!r}?" + (f" ({every})" if listed else "")
