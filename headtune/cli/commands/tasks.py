"""`headtune task`: build, make, show and list task files."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..arguments import Add, adder, chat_arguments, chat_of, completed, positive, print_json, trust_argument

if TYPE_CHECKING:
    from headtune.analysis.tasks.task import Task

KINDS = ("needle", "passkey", "conflict", "fewshot", "antonyms", "ioi")  # of `generators.make`, which needs torch
_PAIRS = "pairs"  # of a model and itself with heads silenced
_MAKE_OPTIONS = (
    "lengths",
    "depths",
    "words",
    "needles",
    "filler",
    "facts",
    "relation",
    "template",
    "pairs",
    "shots",
    "labels",
    "task",
    "silence",
    "tokens",
)
_N_ITEMS = 3  # of a list that are scored, unless evaluation.n_items or --items says otherwise


def add_parsers(add: Add) -> None:
    p = add("task", "build and inspect task files", "task list", "task build facts.json --out my_task.jsonl")
    actions = adder(
        p.add_subparsers(dest="action", metavar="ACTION", required=True, help="build, make, convert, show or list"),
        "headtune task",
    )
    q = actions(
        "build",
        "make prompts of facts",
        "build facts.json --out my_task.jsonl",
        "build landmarks.json --invert --previous 1,2 --out my_task.jsonl",
    )
    completed(q.add_argument("source", help="facts file {subject: [answers]}"), "file")
    q.add_argument(
        "--templates", type=Path, help='[{"header": "List five cities in {subject}.", "item": "\\n{i}. {answer}"}]'
    )
    q.add_argument("--invert", action="store_true", help="the source is a many-to-one relation, to be turned round")
    q.add_argument("--previous", default="1,2,3,4", help="numbers of answers already given (default: 1,2,3,4)")
    q.add_argument("--seed", type=int, default=0)
    q.add_argument("--out", type=Path, required=True, help="a new file, such as my_task.jsonl")
    q.set_defaults(do=_build)
    _add_make(actions)
    q = actions(
        "convert",
        "make a task of data whose columns have other names",
        "convert qa.csv --column prompt=question --column answers=answer --out qa.jsonl",
    )
    completed(q.add_argument("source", help="JSONL, JSON or CSV file, or hub id; NAME:train takes a split"), "file")
    q.add_argument(
        "--column",
        dest="columns",
        action="append",
        required=True,
        metavar="KEY=COLUMN",
        help="prompt, subject, answers, previous or incorrect, and the column that holds it; may be given again",
    )
    q.add_argument("--out", type=Path, required=True, help="a new file, such as my_task.jsonl")
    q.set_defaults(do=_convert)
    q = actions(
        "show", "say what is in a task", "show my.jsonl --model smollm2-135m", "show relation:FOLDER --all > my.jsonl"
    )
    completed(q.add_argument("source", help="built-in name, JSONL file or hub id; NAME:train takes a split"), "task")
    model = q.add_argument("--model", help="say how many prompts identify could score on it, and why not the others")
    completed(model, "model")
    trust_argument(q)
    q.add_argument("--all", action="store_true", help="print every example, as JSONL (as does --json)")
    q.set_defaults(do=_show_task)
    actions("list", "list the built-in tasks", "list").set_defaults(do=_list_tasks)


def _add_make(actions: Add) -> None:
    q = actions(
        "make",
        "make prompts by a program: needles, conflicts, few-shot prompts, names",
        "make needle --tokenizer smollm2-135m --lengths 256,384 --n 64 --out needle.jsonl",
        "make conflict --model smollm2-135m --facts capitals.json --relation capital --out conflict.jsonl",
        "make fewshot --tokenizer smollm2-135m --pairs antonym.json --shots 5 --out antonyms.jsonl",
        "make ioi --tokenizer smollm2-135m --n 200 --out ioi.jsonl",
        "make pairs --model smollm2-135m --task needle.jsonl --silence runs/heads:retrieval:5 --out pairs.jsonl",
    )
    kinds = (*KINDS, _PAIRS)
    q.add_argument("kind", choices=kinds, metavar="KIND", help=f"one of {', '.join(kinds)}")
    group = q.add_mutually_exclusive_group(required=True)
    completed(group.add_argument("--tokenizer", metavar="MODEL", help="the model whose tokenizer counts"), "model")
    completed(group.add_argument("--model", help="the same, and conflict asks the model which facts it knows"), "model")
    trust_argument(q)
    q.add_argument("--n", type=positive, default=64, help="prompts (default: 64)")
    q.add_argument("--seed", type=int, default=0)
    q.add_argument("--out", type=Path, required=True, help="a new file, such as needle.jsonl")
    options = q.add_argument_group("options of a kind")
    options.add_argument("--lengths", type=_lengths, help="needle, passkey: tokens of a prompt, such as 256,384")
    options.add_argument("--depths", type=positive, help="needle: at so many depths (default: 5)")
    options.add_argument("--words", type=positive, help="needle, passkey: words of a code (default: 6, 8)")
    options.add_argument("--needles", type=positive, help="passkey: passkeys in a prompt (default: 10)")
    options.add_argument(
        "--filler", type=Path, help="needle, passkey: a text to hide codes in (default: a neutral one)"
    )
    options.add_argument("--facts", type=Path, help="conflict: {subject: [object]}, or a relation of LRE")
    options.add_argument("--relation", help="conflict: what the object is of the subject, such as capital")
    options.add_argument("--template", help="conflict: default 'The {relation} of {subject} is'")
    options.add_argument("--pairs", type=Path, help="fewshot: a file of input and output, see the format pairs")
    options.add_argument("--shots", type=positive, help="fewshot, antonyms: pairs before the input (default: 5)")
    options.add_argument("--labels", choices=("clean", "shuffled"), help="fewshot, antonyms: default clean")
    completed(options.add_argument("--task", help="pairs: the prompts to write answers for"), "task")
    options.add_argument(
        "--silence", metavar="HEADS:ROLE:TOP", help="pairs: heads without which the wrong answers are written"
    )
    options.add_argument("--tokens", type=positive, help="pairs: written at most (default: as many as the answer has)")
    chat_arguments(options, "pairs: of --task; in messages in any case")
    q.set_defaults(do=_make)


def _lengths(text: str) -> tuple[int, ...]:
    return tuple(positive(part) for part in text.split(","))


def _make(arguments: argparse.Namespace) -> int:
    from headtune.analysis.tasks.generators.make import GENERATORS, check_options, make_task, write_task
    from headtune.analysis.utils.errors import InputError

    # What can be refused before a model is loaded.
    if arguments.out.exists():
        raise InputError(f"task file {str(arguments.out)!r} exists; choose another --out")
    chosen = {name: value for name in _MAKE_OPTIONS if (value := getattr(arguments, name)) is not None}
    if chat_of(arguments) is not None and arguments.kind != _PAIRS:
        raise InputError(f"--chat-template is for task kind 'pairs', found {arguments.kind!r}; leave it out")
    if arguments.kind != _PAIRS:
        check_options(arguments.kind, chosen)
    elif unread := [name for name in chosen if name not in ("task", "silence", "tokens")]:
        raise InputError(f"task kind 'pairs' takes no {unread[0]!r}; it takes task, silence, tokens")
    # A kind that asks the model nothing needs its tokenizer alone.
    if arguments.kind == _PAIRS:
        task = _pairs(arguments)
    elif arguments.model and GENERATORS[arguments.kind].asks:
        from headtune.analysis.models.loading import load_model

        model = load_model(arguments.model, trust_remote_code=arguments.trust_remote_code)
        task = make_task(arguments.kind, model, arguments.n, arguments.seed, **chosen)
    else:
        from headtune.analysis.models.loading import load_tokenizer

        tokenizer = load_tokenizer(arguments.model or arguments.tokenizer, None, arguments.trust_remote_code)
        task = make_task(arguments.kind, tokenizer, arguments.n, arguments.seed, **chosen)
    task = replace(task, about={**task.about, "tokenizer": arguments.model or arguments.tokenizer})
    write_task(task, arguments.out)
    if arguments.json:
        print_json({"out": str(arguments.out), "n": len(task.examples), **task.about})
        return 0
    print(f"{arguments.out}: {len(task.examples)} examples, {len(task.subjects)} subjects")
    for reason, count in task.about.get("dropped", {}).items():
        print(f"left out: {count}, {reason}", file=sys.stderr)
    return 0


def _pairs(arguments: argparse.Namespace) -> Task:
    """What `make pairs` makes: see `self_contrast`."""
    from headtune.analysis.heads.head_set import HeadSet
    from headtune.analysis.heads.self_contrast import self_contrast
    from headtune.analysis.models.loading import load_model
    from headtune.analysis.tasks.chat import with_chat
    from headtune.analysis.tasks.loading import load_task
    from headtune.analysis.utils.errors import InputError

    from .. import console

    for name in ("model", "task", "silence"):
        if getattr(arguments, name) is None:
            raise InputError(f"task kind 'pairs' needs --{name}: a model writes the answers, whole and silenced")
    path, role, top = ["", "", *arguments.silence.rsplit(":", 2)][-3:]
    if not path or not top.isdecimal() or not int(top):
        raise InputError(
            f"--silence {arguments.silence!r} must look like runs/heads:retrieval:5, head set, role and top"
        )
    heads = HeadSet.load(path)
    chosen = heads.top(role, int(top))
    task = with_chat(load_task(arguments.task), chat_of(arguments)).limited(arguments.n, arguments.seed)
    model = load_model(arguments.model, trust_remote_code=arguments.trust_remote_code)
    for warning in heads.check_model(model.identity()):
        print(f"headtune: warning: {path}: {warning}", file=sys.stderr)
    return self_contrast(model, task, chosen, arguments.tokens, console.progress)


def _convert(arguments: argparse.Namespace) -> int:
    from headtune.analysis.tasks.generators.make import write_task
    from headtune.analysis.tasks.loading import load_task
    from headtune.analysis.utils.errors import InputError

    if arguments.out.exists():
        raise InputError(f"task file {str(arguments.out)!r} exists; choose another --out")
    columns: dict[str, str] = {}
    for text in arguments.columns:
        key, equals, column = text.partition("=")
        if not equals or key in columns:
            reason = "is given twice" if equals else "must read KEY=COLUMN, such as answers=answer"
            raise InputError(f"--column {text!r} {reason}")
        columns[key] = column.replace("\\n", "\n")  # as it is written on a command line
    task = load_task(arguments.source, columns=columns)
    write_task(task, arguments.out)
    if arguments.json:
        print_json({"out": str(arguments.out), "n": len(task.examples), **task.about})
        return 0
    print(f"{arguments.out}: {len(task.examples)} examples, {len(task.subjects)} subjects")
    return 0


def _list_tasks(arguments: argparse.Namespace) -> int:
    from headtune.analysis.tasks.loading import builtin_names

    if arguments.json:
        print_json(builtin_names())
    else:
        print("\n".join(builtin_names()))
    return 0


def _show_task(arguments: argparse.Namespace) -> int:
    from headtune.analysis.tasks.loading import load_task
    from headtune.analysis.tasks.task import scored, task_lines

    task = load_task(arguments.source)
    if arguments.all or arguments.json:
        print("".join(f"{line}\n" for line in task_lines(task)), end="")
        return 0
    print(f"{task.name}: {len(task.subjects)} subjects, {len(task.examples)} prompts, {scored(task.kind, _N_ITEMS)}")
    if task.split is None:
        print(_split_sizes(task))
    n_previous = Counter(len(example.previous) for example in task.examples)
    if set(n_previous) != {0}:
        print(
            "answers already given: " + ", ".join(f"{n} in {count} prompts" for n, count in sorted(n_previous.items()))
        )
    if hint := _too_few(task):
        print(hint)
    if arguments.model:
        print(f"{arguments.model}: {_scorable(task, arguments.model, arguments.trust_remote_code)}")
    if task.about:
        print("made by: " + ", ".join(f"{key} {json.dumps(value)}" for key, value in task.about.items()))
    spans = Counter(name for example in task.examples for name in example.spans)
    if spans:
        print("spans: " + ", ".join(f"{name} in {count} prompts" for name, count in sorted(spans.items())))
    shown = task_lines(replace(task.limited(3), about={}))
    print(f"\n{len(shown)} of {len(task.examples)} examples (--all prints them all):", *shown, sep="\n")
    return 0


def _scorable(task: Task, model: str, trust_remote_code: bool) -> str:
    """What `identify` would leave out with this model's tokenizer."""
    from headtune.analysis.models.loading import load_tokenizer, sizes_of
    from headtune.analysis.tasks.answer_starts import beginnings
    from headtune.analysis.tasks.tokenized import encode, reasons

    tokenizer = load_tokenizer(model, None, trust_remote_code)
    encoded = encode(task, tokenizer, *sizes_of(model, None, trust_remote_code))
    left_out = f"; left out: {reasons(encoded.dropped)}" if encoded.dropped else ""
    note = beginnings(encoded.summary())
    counts = f"{len(encoded.examples)} of {len(task.examples)} prompts can be scored on first tokens"
    return f"{counts}{left_out}" + (f"; {note}" if note else "")


def _split_sizes(task: Task) -> str:
    from headtune.analysis.tasks.task import split_subjects

    parts = split_subjects(task.subjects)
    counts = Counter(example.subject for example in task.examples)
    words = (f"{part} {len(names)} ({sum(counts[name] for name in names)})" for part, names in parts.items())
    return f"subjects (prompts) of the split with seed 0: {', '.join(words)}"


def _too_few(task: Task) -> str:
    """Which prompts leave fewer answers than items are scored: some of these are then always wrong. Empty if none."""
    if task.kind != "lists":
        return ""
    short = [example for example in task.examples if len(example.remaining) < _N_ITEMS]
    if not short:
        return ""
    worst = min(short, key=lambda example: (len(example.remaining), -len(example.previous)))
    left, n_previous = len(worst.remaining), len(worst.previous)
    fits = sorted({len(example.previous) for example in task.examples} - {len(example.previous) for example in short})
    instead = f", or --previous {','.join(map(str, fits))}" if fits else ""
    return (
        f"{_N_ITEMS} items are scored and only {left} answer{'s' * (left != 1)} remain{'s' * (left == 1)} for prompts "
        f"with {n_previous} given (such as {worst.subject!r}): give more answers{instead}"
    )


def _build(arguments: argparse.Namespace) -> int:
    from headtune.analysis.tasks.build import build_files
    from headtune.analysis.utils.errors import InputError

    if arguments.out.exists():
        raise InputError(f"task file {str(arguments.out)!r} exists; choose another --out")
    try:
        previous = tuple(int(part) for part in arguments.previous.split(","))
    except ValueError:
        raise InputError(
            f"--previous {arguments.previous!r} must be whole numbers with commas, such as 1,2,3"
        ) from None
    if min(previous) < 0:
        raise InputError(f"--previous {arguments.previous!r} must not be negative")
    options = {"previous": previous, "seed": arguments.seed}
    task = build_files(Path(arguments.source), arguments.templates, arguments.out, arguments.invert, **options)
    print(f"{arguments.out}: {len(task.examples)} examples, {len(task.subjects)} subjects")
    if hint := _too_few(task):
        print(hint, file=sys.stderr)
    return 0
