"""What is wrong with a recipe, and where that stands: a line of its file, or an override."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import yaml

from headtune.analysis.utils.errors import InputError

Keys = tuple[str | int, ...]


class Problem(NamedTuple):
    """One thing that is wrong.

    Attributes:
        path: of keys and positions in lists, from the top of the recipe.
        message: one line without the place.
    """

    path: Keys
    message: str
    unknown_key: bool = False


class RecipeError(InputError):
    """A recipe that is refused; the message tells the first problem and how many more there are.

    Attributes:
        lines: all problems, each with its place, in the order of the file.
    """

    def __init__(self, lines: Sequence[str], first: str) -> None:
        more = len(lines) - 1
        super().__init__(f"{first} (and {more} more: see headtune validate)" if more else first)
        self.lines = list(lines)


@dataclass(frozen=True)
class Source:
    """Where the keys of a recipe come from.

    Attributes:
        name: of the file or of the built-in recipe.
        root: the YAML as nodes, which know their lines; None where the recipe is no text.
        overrides: the keys that were overridden, in order.
    """

    name: str
    root: yaml.Node | None = None
    overrides: Sequence[tuple[str, ...]] = field(default=())

    def place(self, path: Keys, at_key: bool = False) -> tuple[tuple[int, int], str]:
        """For sorting and for reading: `FILE:LINE:COLUMN`, or `FILE: override key=...`."""
        words = tuple(str(part) for part in path)
        over = [key for key in self.overrides if key == words[: len(key)]]
        if not over and not self._has(path):  # an override may have made the key's block, or a part of it
            over = [key for key in self.overrides if words and words == key[: len(words)]]
        if over:
            return (1 << 30, list(self.overrides).index(over[-1])), f"{self.name}: override {'.'.join(over[-1])}=..."
        if self.root is None:
            return (0, 0), self.name
        mark = _mark(self.root, path, at_key)
        return (mark.line, mark.column), f"{self.name}:{mark.line + 1}:{mark.column + 1}"

    def _has(self, path: Keys) -> bool:
        return self.root is not None and bool(path) and _child(self.root, path[0]) is not None

    def refuse(self, problems: Sequence[Problem]) -> RecipeError:
        """All problems as one error. Unknown keys speak first: they are usually why another seems to be missing."""
        placed = [(*self.place(problem.path, problem.unknown_key), problem) for problem in problems]
        placed.sort(key=lambda one: one[0])
        lines = list(dict.fromkeys(f"{place}: {problem.message}" for _, place, problem in placed))
        _, place, first = min(placed, key=lambda one: not one[2].unknown_key)
        return RecipeError(lines, f"{place}: {first.message}")


def _child(node: yaml.Node, part: str | int) -> tuple[yaml.Node, yaml.Node] | None:
    """The key and the value of a mapping, or an item of a list twice; the last one where a key is given twice."""
    if isinstance(node, yaml.MappingNode):
        return next(((key, value) for key, value in reversed(node.value) if key.value == str(part)), None)
    if isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
        return node.value[part], node.value[part]
    return None


def _mark(root: yaml.Node, path: Keys, at_key: bool) -> Any:
    """Where a path stands, or as much of it as there is; parts that only a type has (`attention_kl`) are skipped.

    A value on the line of its key is pointed at itself, a block by its key; with `at_key` everything is.
    """
    node, mark = root, root.start_mark
    for part in path:
        mark_node = _child(node, part)
        if mark_node is None:
            continue
        key, node = mark_node
        beside = node.start_mark.line == key.start_mark.line and not at_key
        mark = node.start_mark if beside else key.start_mark
    return mark


def given_twice(root: yaml.Node | None) -> Iterator[Problem]:
    """Keys that stand twice in one block, of which YAML keeps the last without a word."""
    waiting: list[tuple[yaml.Node, Keys]] = [] if root is None else [(root, ())]
    seen: set[int] = set()  # an alias may lead back to where it stands
    while waiting:
        node, path = waiting.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            waiting += [(item, (*path, index)) for index, item in enumerate(node.value)]
        if not isinstance(node, yaml.MappingNode):
            continue
        keys: set[str] = set()
        for key, value in node.value:
            name = str(key.value)
            waiting.append((value, (*path, name)))
            if name in keys and name != "<<":
                yield Problem((*path, name), f"key {'.'.join(map(str, (*path, name)))!r} is given twice; keep one")
            keys.add(name)
