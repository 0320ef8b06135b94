"""Tasks made by programs, offline and seeded: `make_task("needle", tokenizer, n=32, lengths=(384,))`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from headtune.analysis.tasks.task import Task, task_lines
from headtune.analysis.utils.errors import InputError, nearest
from headtune.analysis.utils.files import write_text

from .base import Answerer, Draw, Generator
from .conflict import conflict
from .fewshot import antonyms, fewshot
from .names import ioi
from .needle import needle, passkey

GENERATORS: dict[str, Generator] = {
    generator.name: generator
    for generator in (
        Generator("needle", "a code said once in a long text and asked for at the end", needle),
        Generator("passkey", "several passkeys in a long text, one of them asked for", passkey),
        Generator(
            "conflict", "facts that the prompt contradicts: memory against context", conflict, "lists", asks=True
        ),
        Generator("fewshot", "pairs of a file, a few as shots, with clean or shuffled labels", fewshot),
        Generator("antonyms", "few-shot prompts of words and their opposites", antonyms),
        Generator("ioi", "indirect objects: two names, the one that was not said again is to follow", ioi, "lists"),
    )
}


def options_of(kind: str) -> dict[str, Any]:
    """The options of a kind and their defaults; `inspect.Parameter.empty` where one must be given.

    Raises:
        InputError: an unknown kind.
    """
    if kind not in GENERATORS:
        raise InputError(f"task kind {kind!r} is unknown; {nearest(kind, GENERATORS)}")
    parameters = list(inspect.signature(GENERATORS[kind].make).parameters.values())[1:]
    return {parameter.name: parameter.default for parameter in parameters}


def check_options(kind: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a kind and their defaults; refuses what it does not take, and that one is missing (InputError)."""
    parameters = options_of(kind)
    for option in options:
        if option not in parameters:
            takes = ", ".join(parameters) or "no options"
            raise InputError(f"task kind {kind!r} takes no {option!r}; it takes {takes}")
    for option, default in parameters.items():
        if default is inspect.Parameter.empty and options.get(option) is None:
            raise InputError(f"task kind {kind!r} needs {option!r}; see: headtune task make --help")
    return parameters


def make_task(
    kind: str,
    model: Answerer | PreTrainedTokenizerBase,
    n: int = 64,
    seed: int = 0,
    name: str | None = None,
    **options: Any,
) -> Task:
    """A task of `n` prompts of one of `GENERATORS`.

    Args:
        kind: which.
        model: a `HeadModel`, which some kinds ask what it knows, or a tokenizer alone.
        n: how many prompts.
        seed: of whatever is drawn: the same arguments make the same task.
        name: of the task; None: its kind.
        options: of the kind (see `options_of`).

    Returns:
        The task; `about` holds kind, seed, options and how many candidates were left out why.

    Raises:
        InputError: an unknown kind or option, one that is missing, or data that do not make as many prompts.
    """
    parameters = check_options(kind, options)
    if n < 1:
        raise InputError(f"n={n}; expected at least 1 prompt")
    # The generator itself, and what it was made with.
    asked = None if isinstance(model, PreTrainedTokenizerBase) else model
    tokenizer = model if isinstance(model, PreTrainedTokenizerBase) else model.tokenizer
    generator = GENERATORS[kind]
    draw = Draw(tokenizer, n, seed, asked if generator.asks else None)
    examples = generator.make(draw, **options)
    values = {option: _plain(options.get(option, default)) for option, default in parameters.items()}
    about = {"generator": kind, "seed": seed, "n": n, "options": values, **draw.about}
    if draw.dropped:
        about["dropped"] = dict(draw.dropped)
    return Task(name or kind, tuple(examples), kind=generator.kind, about=about)


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def write_task(task: Task, path: Path) -> None:
    """Write a task file that `load_task` reads back as it is.

    Raises:
        InputError: there is such a file.
    """
    if path.exists():
        raise InputError(f"task file {str(path)!r} exists; choose another --out")
    write_text(path, "".join(f"{line}\n" for line in task_lines(task)))
