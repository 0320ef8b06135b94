"""What the documents say, taken apart: blocks of code, commands, links, anchors.

Pages are README.md, docs/**/*.md, the READMEs of packages and recipes, and the other Markdown files at the top.
"""

from __future__ import annotations

import functools
import importlib
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from helpers.paths import ROOT

PROGRAMS = ("headtune", "make", "accelerate", "python", "pip", "wandb", "vllm", "source", "cd", "git")
_FENCE = re.compile(r"^( *)```(\S*)([^\n]*)\n(.*?)^\1``` *$", re.M | re.S)
_INDENTED = re.compile(r"(?:\A|\n\s*\n)((?: {4}[^\n]*(?:\n|\Z)(?:[ \t]*\n(?= {4}))*)+)")
_LINK = re.compile(r"!?\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^()\s]+(?:\([^()]*\))?)(?: \"[^\"]*\")?\)")


def pages() -> list[Path]:
    """Every page, the front door first."""
    folders = [ROOT.glob("*.md"), (ROOT / "docs").rglob("*.md"), (ROOT / "recipes").rglob("*.md")]
    found = {path for paths in folders for path in paths} | {
        ROOT / room / "README.md" for room in ("analysis", "train")
    }
    return sorted(found, key=lambda path: (path != ROOT / "README.md", path.as_posix()))


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@dataclass(frozen=True)
class Block:
    """A block of code; the language of an indented one is empty, `head` is what stands behind a fenced one's."""

    language: str
    text: str
    head: str = ""


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    fenced = [Block(found[2], _outdent(found[4], len(found[1])), found[3]) for found in _FENCE.finditer(text)]
    indented = [Block("", _outdent(found[1], 4)) for found in _INDENTED.finditer(_FENCE.sub("\n", text))]
    return fenced + indented


def _outdent(text: str, by: int) -> str:
    return "\n".join(line[by:] if line[:by].isspace() else line for line in text.split("\n"))


def _prose(page: Path) -> str:
    return _INDENTED.sub("\n\n", _FENCE.sub("\n", page.read_text(encoding="utf-8")))


def commands(page: Path) -> Iterator[list[str]]:
    """The words of every command in a block of code."""
    for block in blocks(page):
        if block.language not in ("", "bash", "console", "shell"):
            continue
        for line in block.text.replace("\\\n", " ").split("\n"):
            if line.strip().split(" ")[0] in PROGRAMS:
                yield words(line.strip())


def mentions(page: Path) -> Iterator[list[str]]:
    """The words of every command inside a sentence, where placeholders and `...` may stand."""
    for found in re.finditer(r"(?<!`)`([^`]+)`(?!`)", _prose(page)):
        line = " ".join(found[1].split())
        if re.match(r"(headtune(?! *=)|python benchmarks/\S+|pip install|make)( |$)", line):
            yield words(line)


def words(line: str) -> list[str]:
    """As a shell splits it; `[optional words]` are taken, `...` and `[key=value ...]` are not."""
    line = re.sub(r"(?<=\s)\[key=value \.\.\.\]", "", line)
    line = re.sub(r"(?<=\s)\[(-[^\]]*|[A-Z_]+)\](?=\s|$)", r"\1", line)
    found = shlex.split(line, comments=True)
    while found and re.fullmatch(r"[A-Z_]+=.*", found[0]):
        found = found[1:]  # VARIABLE=value before the command
    for sign in (">", "|"):
        found = found[: found.index(sign)] if sign in found else found
    return [word for word in found if word != "..."]


def links(page: Path) -> list[str]:
    """Targets of links and pictures that are not addresses of the web."""
    prose = re.sub(r"(?<!`)`[^`]+`(?!`)", "", _prose(page))
    return [link for link in _LINK.findall(prose) if not re.match(r"[a-z]+:", link)]


def anchors(text: str) -> set[str]:
    """The anchors of headings, as GitHub and MkDocs make them from plain words."""
    headings = re.findall(r"^#{1,6} +(.+?) *$", _FENCE.sub("\n", text), re.M)
    given = re.findall(r"\{ *#([\w-]+) *\}", text) + re.findall(r'<a (?:id|name)="([^"]+)"', text)
    return {_slug(heading) for heading in headings} | set(given)


def _slug(heading: str) -> str:
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
    return re.sub(r"[\s]", "-", re.sub(r"[^\w\s-]", "", plain).strip().lower())


@functools.cache
def site_pages() -> ModuleType:
    """docs/site_pages.py, which makes pages."""
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        return importlib.import_module("site_pages")
    finally:
        sys.path.remove(str(ROOT / "docs"))
