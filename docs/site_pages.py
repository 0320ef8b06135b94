"""The pages that are made by code, and MkDocs' hooks that put those of the site there when it is built.

The recipes' and packages' READMEs are taken in as they are, the notebook as it was run. Links are written for the
repository: where they lead to a page of the site they are turned, where they lead to another file its words stay.
The reference of recipes is read from the types, that of commands from the parsers; both are files of the repository,
written anew by `make reference`.
"""

from __future__ import annotations

import argparse
import json
import os
import posixpath
import re
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FAMILIES = ("gain", "lofit", "jola", "masked", "steer", "seekr", "regularise", "lora", "ln", "full")
# Place in the site -> file of the repository.
TAKEN = {f"recipes/{family}.md": f"recipes/{family}/README.md" for family in FAMILIES} | {
    "reference/analysis.md": "analysis/README.md",
    "reference/train.md": "train/README.md",
    "about/security.md": "SECURITY.md",
    "about/contributing.md": "CONTRIBUTING.md",
}
NOTEBOOK = "quickstart.ipynb"
_LINK = re.compile(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s:]+?)(#[^()\s]*)?\)")


def pages() -> dict[str, str]:
    """Markdown by place in the site."""
    taken = {place: (ROOT / source).read_text(encoding="utf-8") for place, source in TAKEN.items()}
    return taken | {"quickstart.md": notebook()[0]}


def reference() -> dict[str, str]:
    """Markdown by place in docs/, of the pages that the repository keeps."""
    return {"reference/recipe.md": recipe_reference(), "reference/commands.md": command_reference()}


# --- recipes, from their types ----------------------------------------------------------------------------------------


def recipe_reference() -> str:
    from headtune.plugins import TUNING_METHODS
    from headtune.train.config import methods
    from headtune.train.config.method_registry import method_rules
    from headtune.train.config.regularisers import REGULARISERS
    from headtune.train.config.schema import Recipe

    parts = [
        "# Recipe keys\n",
        "Read from the types by `make reference`. Every level is strict: an unknown key is an error that names the "
        "nearest known one. A default of – means that the key may be left out and then does nothing.\n",
        _table(
            Recipe,
            "",
            {"method": "what the family takes, below", "training": "keys of TRL's SFTConfig (DPOConfig for dpo)"},
        ),
    ]
    for key in ("model", "heads", "task", "evaluation", "tracking"):
        (block,) = _blocks(Recipe.model_fields[key].annotation)
        parts += [f"## {key}\n", *_described(block, f"{key}.")]
    parts.append("## method\n\nWhich keys there are depends on `recipe`.\n")
    shared = frozenset(methods.ObjectiveConfig.model_fields)
    parts += ["### What every trained family takes\n", "All but `steer` and `seekr`.\n"]
    parts += _described(methods.ObjectiveConfig, "method.")
    for family in TUNING_METHODS:
        rules = method_rules(family)
        without = shared if issubclass(rules.config, methods.ObjectiveConfig) else frozenset()
        for kind, each in (rules.kinds or {"": rules.config}).items():
            parts += [f"### {family}{f', kind {kind}' if kind else ''}\n", *_described(each, "method.", without)]
    parts.append("## method.regularisers\n\nA list; each entry has a `kind` and the keys of all of them:\n")
    parts += _described(methods.Regulariser, "")
    for block in REGULARISERS.values():
        (kind,) = typing.get_args(block.model_fields["kind"].annotation)
        parts += [
            f"### {kind}\n",
            *_described(block, "", without=frozenset({*methods.Regulariser.model_fields, "kind"})),
        ]
    return "\n".join(parts)


def _described(block: Any, prefix: str, without: frozenset[str] = frozenset()) -> Iterator[str]:
    yield _words(block)[0] + "\n"
    yield _table(block, prefix, {}, without)


def _words(block: Any) -> tuple[str, dict[str, str]]:
    """A docstring as Markdown, and what it says of each attribute."""
    text = re.sub(r"(?m)^ {4}", "", block.__doc__ or "")
    intro, _, rest = text.partition("Attributes:\n")
    found = re.findall(r"^ {4}([\w, ]+): (.*(?:\n {8}.*)*)", rest, re.M)
    notes = {name: " ".join(note.split()) for names, note in found for name in names.split(", ")}
    return intro.strip(), notes


def _table(block: Any, prefix: str, own: Mapping[str, str], without: frozenset[str] = frozenset()) -> str:
    lines = list(_lines(block, prefix, own, without))
    return "\n".join(["| key | takes | default | |", "|---|---|---|---|", *lines, ""]) if lines else ""


def _lines(block: Any, prefix: str, own: Mapping[str, str], without: frozenset[str] = frozenset()) -> Iterator[str]:
    notes = _words(block)[1] | dict(own)
    for base in block.__mro__[1:]:
        if hasattr(base, "model_fields"):
            notes = _words(base)[1] | notes
    for name, field in block.model_fields.items():
        if name in without:
            continue
        key = f"{prefix}{field.alias or name}"
        inner = [kind for kind in _blocks(field.annotation) if prefix and len(_blocks(field.annotation)) == 1]
        if inner and name not in ("regularisers", "heads"):
            note = notes.get(name) or _words(inner[0])[0].split("\n\n")[0].replace("\n", " ")
            yield f"| `{key}` | a block{' or nothing' if field.default is None else ''} | | {_cell(note)} |"
            default = field.get_default(call_default_factory=True)
            where = f"{key}.0." if "list[" in str(field.annotation) else f"{key}."
            yield from _lines(inner[0], where, _set(default))
            continue
        takes = "see [its keys](#methodregularisers)" if name == "regularisers" else _type(field)
        yield f"| `{key}` | {_cell(takes)} | {_default(field)} | {_cell(notes.get(name, ''))} |"


def _set(default: Any) -> dict[str, str]:
    """Notes on keys whose default in this place is not that of their block."""
    if not hasattr(type(default), "model_fields"):
        return {}
    changed = {name: getattr(default, name) for name, field in type(default).model_fields.items()}
    return {
        name: f"here `{value}`"
        for name, value in changed.items()
        if value != type(default).model_fields[name].get_default(call_default_factory=True)
    }


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _default(field: Any) -> str:
    if field.is_required():
        return "needed"
    value = field.get_default(call_default_factory=True)
    if hasattr(type(value), "model_fields"):
        return ""
    return "–" if value is None or value == "" else f"`{json.dumps(value, ensure_ascii=False)}`"


def _type(field: Any) -> str:
    limits = {"ge": "from {} up", "gt": "above {}", "le": "at most {}", "lt": "below {}", "min_length": "at least {}"}
    said = []
    for limit in (*field.metadata, *_metadata(field.annotation)):
        said += [words.format(getattr(limit, name)) for name, words in limits.items() if hasattr(limit, name)]
    name = _type_name(field.annotation)
    if callable(field.json_schema_extra):  # names that are registered
        schema: dict[str, Any] = {}
        field.json_schema_extra(schema)
        name = ", ".join(f"`{value}`" for value in schema["enum"])
    return f"{name}, {', '.join(dict.fromkeys(said))}" if said else name


def _metadata(annotation: Any) -> list[Any]:
    own = [limit for each in getattr(annotation, "__metadata__", ()) for limit in getattr(each, "metadata", [each])]
    return own + [
        limit for inner in typing.get_args(annotation) for limit in _metadata(inner) if inner is not annotation
    ]


def _type_name(annotation: Any) -> str:
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _type_name(inner[0])
    if origin is typing.Literal:
        return ", ".join(f"`{json.dumps(value) if not isinstance(value, str) else value}`" for value in inner)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(_type_name(each) for each in inner if each is not type(None)))
    if origin is list:
        return f"list of {_type_name(inner[0])}"
    if origin is dict:
        return "keys and values"
    if origin is tuple:
        return "[layer, head]"
    if hasattr(annotation, "model_fields"):
        return "a block"
    names = {Any: "a block", str: "text", int: "whole number", float: "number", bool: "true or false"}
    return names.get(annotation, str(annotation))


def _blocks(annotation: Any) -> list[Any]:
    if hasattr(annotation, "model_fields"):
        return [annotation]
    return [block for inner in typing.get_args(annotation) for block in _blocks(inner)]


# --- commands, from their parsers -------------------------------------------------------------------------------------


def command_reference() -> str:
    from headtune.cli import main

    os.environ["COLUMNS"] = "100"  # what argparse wraps its help to
    text = "# Commands\n\nWhat `--help` prints. Exit codes: 0 done; 1 a check failed; 2 bad usage or bad input.\n"
    return text + "".join(_helps("headtune", main._parser(), 2))


def _helps(name: str, parser: argparse.ArgumentParser, level: int) -> Iterator[str]:
    help_text = parser.format_help().replace(str(Path.home()), "~")
    yield f"\n{'#' * level} {name}\n\n```text\n{help_text.rstrip()}\n```\n"
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for own, inner in action.choices.items():
                yield from _helps(f"{name} {own}", inner, min(level + (name != "headtune"), 4))


# --- the notebook -----------------------------------------------------------------------------------------------------


def notebook() -> tuple[str, dict[str, bytes]]:
    """The notebook with its outputs as Markdown, and its pictures by name."""
    from nbconvert import MarkdownExporter

    text, resources = MarkdownExporter().from_filename(str(ROOT / "docs" / NOTEBOOK))
    return text, {f"quickstart_{name}": data for name, data in resources["outputs"].items()}


# --- MkDocs' hooks ----------------------------------------------------------------------------------------------------


def on_files(files: Any, config: Any) -> Any:
    from mkdocs.structure.files import File

    for place, text in pages().items():
        files.append(File.generated(config, place, content=text))
    for place, data in notebook()[1].items():
        files.append(File.generated(config, place, content=data))
    for place, source in PICTURES.items():
        files.append(File.generated(config, place, abs_src_path=str(ROOT / source)))
    return files


# Pictures outside docs/ that pages show: place in the site -> file of the repository.
PICTURES = {"images/speed_analysis.png": "benchmarks/results/speed_analysis.png"}


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    if page.file.src_uri == "quickstart.md":
        return re.sub(r"!\[([^\]]*)\]\((output_[^)]*)\)", r"![\1](quickstart_\2)", markdown)
    return turned(markdown, page.file.src_uri)


def turned(markdown: str, place: str) -> str:
    """Links of the page at `place` that were written for the repository, for the site."""
    source = TAKEN.get(place, f"docs/{place}")
    places = {source: place for place, source in (TAKEN | PICTURES).items()}
    places |= {"README.md": "index.md", f"docs/{NOTEBOOK}": "quickstart.md"}

    def turn(found: re.Match[str]) -> str:
        mark, words, path, anchor = found[1], found[2], found[3], found[4] or ""
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        if target == "README.md":
            anchor = ""
        there = places.get(target) or (target.removeprefix("docs/") if target.startswith("docs/") else None)
        if there is None:
            return words
        return f"{mark}[{words}]({posixpath.relpath(there, posixpath.dirname(place) or '.')}{anchor})"

    return _LINK.sub(turn, markdown)


if __name__ == "__main__":
    for place, text in reference().items():
        (ROOT / "docs" / place).write_text(text, encoding="utf-8")
