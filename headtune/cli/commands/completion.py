"""`headtune completion`: what a shell completes, by shtab: commands, options, recipes, built-in tasks and models."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import Any

from ..arguments import Add

SHELLS = ("bash", "zsh")


def add_parsers(add: Add) -> None:
    p = add(
        "completion",
        "print what completes headtune's commands in a shell",
        "completion bash > ~/.local/share/bash-completion/completions/headtune",
        'completion zsh > "${fpath[1]}/_headtune"',
    )
    p.add_argument("shell", choices=SHELLS)
    p.set_defaults(do=completion_command)


def completion_command(arguments: argparse.Namespace) -> int:
    print(script(arguments.parser, arguments.shell))
    return 0


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    """The completion script of a shell. The names in it are those of this version of headtune."""
    import shtab  # here, so that the parser of all commands is quick to make

    text: str = shtab.complete(_marked(parser, _names(shell)), shell)
    return text


def _marked(parser: argparse.ArgumentParser, names: dict[str, Any]) -> argparse.ArgumentParser:
    """With shtab's own mark on each argument that says what it is completed with, or takes a path."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                _marked(below, names)
            continue
        what = getattr(action, "complete_with", "file" if action.type is Path else None)
        if what is not None:
            action.complete = names[what]  # type: ignore[attr-defined]
    return parser


def _names(shell: str) -> dict[str, Any]:
    """What shtab wants for each mark: a function of the shell's, which is written before the script."""
    import shtab

    from headtune.analysis.models.builtin import BUILT_IN
    from headtune.analysis.tasks.loading import builtin_names
    from headtune.train.config.recipe import recipe_names

    lists = {
        "recipe": (recipe_names(), "*.yaml"),
        "task": (builtin_names(), "*.jsonl"),
        "model": (list(BUILT_IN), None),
    }
    functions = {
        what: {shell: f"_headtune_{what}", "preamble": {shell: _function(shell, f"_headtune_{what}", words, ending)}}
        for what, (words, ending) in lists.items()
    }
    return {"file": shtab.FILE, "folder": shtab.DIRECTORY, **functions}


def _function(shell: str, name: str, words: list[str], ending: str | None) -> str:
    """Names, folders and files of an ending: what a user may mean."""
    if shell == "zsh":
        files = "_files -/" if ending is None else f"_files -g {shlex.quote(ending)}"
        return f"{name}() {{ compadd -- {shlex.join(words)}; {files}; }}"
    files = "" if ending is None else f' compgen -f -X {shlex.quote("!" + ending)} -- "$1";'
    return f'{name}() {{ compgen -W {shlex.quote(" ".join(words))} -- "$1"; compgen -d -- "$1";{files} }}'
