"""Tables in README files, between marks that name them, so that they are what the result files say."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def cell(value: dict | None, sign: str = "", scale: float = 100.0) -> str:
    """`mean [low, high]` in percent; empty for None."""
    if value is None:
        return ""
    low, high = value["ci"]
    return f"{scale * value['mean']:{sign}.1f} [{scale * low:{sign}.1f}, {scale * high:{sign}.1f}]"


def rows(columns: list[str], lines: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(line) + " |" for line in [columns, *lines]).replace(
        "\n", "\n|" + "---|" * len(columns) + "\n", 1
    )


def put(readme: str, name: str, table: str, check: bool = False) -> bool:
    """Write a table between `<!-- table NAME -->` and `<!-- end -->`; False where it was another one.

    Args:
        readme: relative to the repository.
        check: look, and leave the file as it is.
    """
    path = ROOT / readme
    text = path.read_text(encoding="utf-8")
    pattern = re.compile(rf"(<!-- table {re.escape(name)} -->\n).*?(<!-- end -->)", re.S)
    if not pattern.search(text):
        raise SystemExit(f"{readme} has no place for the table {name!r}")
    new = pattern.sub(lambda match: f"{match[1]}\n{table}\n\n{match[2]}", text)
    if new != text and not check:
        path.write_text(new, encoding="utf-8")
    return new == text
