"""Tasks: prompts whose next words are known answers, with the answers already given and where everything stands.

A task is a JSONL file, a `datasets` hub id or a built-in name, with an optional split: `one_to_many:test`. One example
a line: `{"prompt", "subject", "answers", "previous", "corrupt", "incorrect", "spans"}`; see the README for the format.
`messages` may stand in place of `prompt` (see `messages`).
The first line may say where they come from instead: `{"about": {"kind", ...}}`. Data of other layouts is named with its
format: `truthfulqa:fold_0_test.csv` (see `formats`).
"""

from __future__ import annotations

import importlib.resources
import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from headtune.analysis.utils.errors import InputError, nearest

from . import formats
from .build import Template, build
from .columns import check_columns, in_our_keys
from .readers import _utf8, hub_rows, json_lines
from .task import Example, Kind, Task, header, parse_example, take_split

log = logging.getLogger(__name__)


def builtin_names() -> list[str]:
    return list(_builtin_table()["tasks"])


def _builtin_table() -> dict[str, Any]:
    data = importlib.resources.files("headtune.recipes") / "data"
    table: dict[str, Any] = json.loads((data / "tasks.json").read_text(encoding="utf-8"))
    return table


def _builtin(name: str) -> list[Example]:
    table = _builtin_table()
    data = importlib.resources.files("headtune.recipes") / "data"
    relations = json.loads((data / "one_to_many.json").read_text(encoding="utf-8"))["relations"]
    entry = table["tasks"][name]
    examples = []
    for relation in entry["relations"]:
        phrase = table["phrases"][relation]
        templates = [Template(row["header"].replace("{things}", phrase), row["item"]) for row in entry["templates"]]
        examples += build(
            relations[relation]["facts"], templates, entry["previous"], seed=0, familiar=entry["familiar"]
        )
    return examples


def load_task(name: str, split_seed: int = 0, columns: Mapping[str, str] | None = None) -> Task:
    """Load a task by built-in name, JSONL path, `datasets` hub id or `FORMAT:PATH`, each with an optional `:split`.

    The formats, and what `PATH` may be in each, are those of `formats`; a built-in task is one of lists. So are JSONL
    and hub data where any row has `previous`, be it empty; else each row is a single fact, and `kind` is `exact_match`;
    the `about` line of a generated file says its kind itself.

    Args:
        columns: for files (JSONL, JSON, CSV) and hub data whose columns have other names (see `columns`).

    Raises:
        InputError: no such task or format, or a malformed line (named by its number).
    """
    if columns is not None:
        return _with_columns(name, split_seed, columns)
    shape, colon, source = name.partition(":")
    if colon and shape in formats.FORMATS:
        base, colon, split = _parts(source)
        if colon and formats.has_files(shape, base):
            return formats.read(shape, base, split)
        task = formats.read(shape, base)
        return take_split(task, split, split_seed) if colon else task
    base, colon, split = _parts(name)
    if base in builtin_names():
        task = Task(base, tuple(_builtin(base)))
    elif ":" in base and len(shape) > 1 and not {"/", "\\", "."} & set(shape) and not Path(base).exists():
        raise InputError(f"task format {shape!r} of {name!r} is unknown; {nearest(shape, formats.FORMATS)}")
    elif base.endswith((".jsonl", ".json")) or Path(base).exists():
        _require_lines(Path(base))
        task = _of_rows(Path(base).stem, json_lines(Path(base)))
        if not task.examples:
            raise InputError(f"task file {base!r} holds no examples; write one JSON object a line")
    elif base.count("/") == 1:
        task = _of_rows(base, hub_rows(base, "train"))
    else:
        sources = [*builtin_names(), *formats.FORMATS]
        raise InputError(f"task {base!r} is neither a file, a hub id nor built in; {nearest(base, sources)}")
    return take_split(task, split, split_seed) if colon else task


def _with_columns(name: str, split_seed: int, columns: Mapping[str, str]) -> Task:
    check_columns(columns)
    base, colon, split = _parts(name)
    path = Path(base)
    if base in builtin_names() or name.partition(":")[0] in formats.FORMATS:
        raise InputError(f"columns are for files and hub data, and task {name!r} has its own; leave columns out")
    if path.suffix in (".jsonl", ".json", ".csv") or path.exists():
        rows, title = formats._rows(path, "task"), path.stem
    elif base.count("/") == 1:
        rows, title = hub_rows(base, "train"), base
    else:
        raise InputError(f"task {base!r} is neither a file nor a hub id, which columns are for; check the name")
    task = replace(_of_rows(title, in_our_keys(rows, columns)), about={"columns": dict(columns)})
    if not task.examples:
        raise InputError(f"task {base!r} holds no rows; check the file")
    return take_split(task, split, split_seed) if colon else task


def _parts(name: str) -> tuple[str, str, str]:
    """`base`, `:` and the split of `base:split`; what follows a colon inside a path is no split."""
    base, colon, split = name.rpartition(":")
    return (name, "", "") if not colon or "/" in split or "\\" in split else (base, colon, split)


def _of_rows(name: str, rows: Iterable[tuple[str, Any]]) -> Task:
    examples: list[Example] = []
    kind: Kind = "exact_match"
    about: dict[str, Any] = {}
    for number, (place, row) in enumerate(rows):
        if number == 0 and (first := header(row, place)) is not None:
            about = dict(first)
            continue
        examples.append(parse_example(row, place))
        if bool(examples[-1].messages) != bool(examples[0].messages):
            raise InputError(
                f"{place}: lines with 'messages' and with 'prompt' in one task; write all of them one way (a prompt is "
                'the turn {"role": "user", "content": PROMPT})'
            )
        if row.get("previous") is not None:
            kind = "lists"
    kind = about.pop("kind", kind)
    chat = bool(examples and examples[0].messages)  # conversations are chats, whether asked for or not
    return Task(name, tuple(examples), chat, kind=kind, about=about)


def _require_lines(path: Path) -> None:
    """Refuse what is no file, and a whole JSON document, by the kind of file that it looks like."""
    if not path.is_file():
        raise InputError(
            f"task file {str(path)!r} does not exist; check the path or build it with: headtune task build"
        )
    try:
        whole = json.loads(_utf8(path, "task"))
    except json.JSONDecodeError:
        return  # as it should be, if there is more than one line; what else is wrong has its line named later
    if isinstance(whole, list):
        raise InputError(f"task file {str(path)!r} is one JSON list; write one JSON object a line")
    if not isinstance(whole, dict) or "prompt" in whole or "messages" in whole:
        return
    if isinstance(whole.get("samples"), list):
        raise InputError(f"task file {str(path)!r} looks like a relation; name its format: relation:{path}")
    if whole and all(isinstance(answers, list) for answers in whole.values()):
        raise InputError(
            f"task file {str(path)!r} looks like a facts file; make a task of it: "
            f"headtune task build {path} --out {path.with_suffix('.jsonl').name}"
        )
