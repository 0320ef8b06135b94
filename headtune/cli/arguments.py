"""What the commands share: arguments written once, sizes, a result as JSON, how much is said."""

from __future__ import annotations

import argparse
import difflib
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from headtune.analysis.models.head_model import HeadModel
    from headtune.analysis.tasks.messages import ChatTemplate
    from headtune.analysis.tasks.task import Task

# `add(name, summary, example, ...)` makes a command's parser, with its examples and --json.
Add = Callable[..., argparse.ArgumentParser]


def positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number, at least 1")
    return value


def memory(text: str) -> int:
    """`2GiB`, `500MB`, `1g` or a number of bytes."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(i?)b?", text.strip().lower())
    size = 0.0 if not match else float(match[1]) * 1024 ** " kmgt".index(match[2] or " ")
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size; write for example 2GiB or 500MB")
    return int(size)


class Parser(argparse.ArgumentParser):
    """A parser that refuses in one line, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}; see: {self.prog} --help\n")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """A word that is none of an argument's, with the one that was perhaps meant in place of them all."""
        from headtune.analysis.utils.errors import nearest

        if action.choices is not None and value not in action.choices:
            choices = [str(choice) for choice in action.choices]
            raise argparse.ArgumentError(action, f"invalid choice: {value!r}: {nearest(str(value), choices)}")

    def unknown(self, words: Sequence[str]) -> NoReturn:
        """Refuse words that no argument takes, with the option that was perhaps meant."""
        options = [word.partition("=")[0] for word in words if word.startswith("-")]
        valid_options = sorted(self._option_string_actions)
        close = [
            name for option in options for name in difflib.get_close_matches(option, valid_options, n=1, cutoff=0.6)
        ]
        meant = f"; did you mean {', '.join(close)}?" if close else ""
        self.error(f"unrecognized arguments: {' '.join(words)}{meant}")


def adder(commands: Any, prefix: str = "headtune") -> Add:
    """An `Add` for the subcommands of a parser; examples are given without the prefix."""

    def add(name: str, summary: str, *examples: str, **options: Any) -> argparse.ArgumentParser:
        parser: argparse.ArgumentParser = commands.add_parser(
            name,
            help=summary,
            description=summary[:1].upper() + summary[1:] + ".",
            epilog="\n  ".join([f"example{'s' * (len(examples) > 1)}:", *(f"{prefix} {line}" for line in examples)]),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            **options,
        )
        parser.set_defaults(own_parser=parser)
        # Of an action of a command: left to the command, unless it is given.
        default = False if prefix == "headtune" else argparse.SUPPRESS
        parser.add_argument("--json", action="store_true", default=default, help="print a machine-readable result")
        return parser

    return add


def recipe_arguments(p: argparse.ArgumentParser, overrides_help: str = "override a key; the value is YAML") -> None:
    """`RECIPE [key.sub=value ...]`."""
    name = p.add_argument("recipe", help="path, or name without the ending (see: headtune recipes)")
    completed(name, "recipe")
    p.add_argument("overrides", nargs="*", metavar="key.sub=value", help=overrides_help)


def model_and_task_arguments(p: argparse.ArgumentParser, out: str, optional: bool = False) -> None:
    """A model, a task, where results go, and how the model is loaded; for commands that look into a model."""
    model = p.add_argument("model", nargs="?" if optional else None, help="built-in name, model folder or hub id")
    completed(model, "model")
    task = p.add_argument(
        "--task", required=not optional, help="built-in name, JSONL file or hub id; NAME:train takes a split"
    )
    completed(task, "task")
    completed(p.add_argument("--out", required=not optional, type=Path, help=out), "folder")
    p.add_argument("--max-examples", type=positive, help="use at most this many prompts, spread over subjects")
    p.add_argument("--dtype", default="float32", help="float32, bfloat16 or float16")
    p.add_argument("--device-map", help="'auto' spreads the model over the devices there are")
    trust_argument(p)
    p.add_argument("--max-memory", type=memory, help="of batches of hypothetical runs, such as 4GiB (default: 1GiB)")
    chat_arguments(p, "a task of messages is a chat in any case")
    p.add_argument("--seed", type=int, default=0)


def trust_argument(p: argparse.ArgumentParser) -> None:
    """`--trust-remote-code`, as a recipe's model.trust_remote_code."""
    p.add_argument("--trust-remote-code", action="store_true", help="run the code that comes with the model")


def chat_arguments(p: argparse._ActionsContainer, default: str) -> None:
    """`--chat-template`, `--no-chat-template`, `--system` and `--enable-thinking`; `chat_of` reads them."""
    p.add_argument(
        "--chat-template",
        action=argparse.BooleanOptionalAction,
        help=f"wrap prompts with the tokenizer's own chat template ({default})",
    )
    p.add_argument("--system", metavar="TEXT", help="of a chat: a system turn before each conversation")
    p.add_argument(
        "--enable-thinking",
        action="store_true",
        help="of a chat: what the template is told by this name; a thought that it opens is closed, since answers come "
        "next",
    )


def chat_of(arguments: argparse.Namespace) -> bool | ChatTemplate | None:
    """What `chat_arguments` took; None where nothing was said."""
    from headtune.analysis.tasks.messages import ChatTemplate
    from headtune.analysis.utils.errors import InputError

    settings = ChatTemplate(arguments.system, arguments.enable_thinking)
    if settings == ChatTemplate():
        return arguments.chat_template
    option = "--system" if arguments.system is not None else "--enable-thinking"
    if not arguments.chat_template:
        raise InputError(f"{option} is of a chat; give --chat-template as well, or leave it out")
    if arguments.system is not None and not arguments.system.strip():
        raise InputError(f"--system {arguments.system!r} is empty; give the text of the system turn, or leave it out")
    return settings


def load_model_for(arguments: argparse.Namespace) -> HeadModel:
    """The model that `model_and_task_arguments` took."""
    from headtune.analysis.models.loading import load_model

    model = load_model(
        arguments.model,
        arguments.dtype,
        trust_remote_code=arguments.trust_remote_code,
        device_map=arguments.device_map,
    )
    if arguments.max_memory is not None:
        model.max_memory = arguments.max_memory
    return model


def load_task_for(arguments: argparse.Namespace) -> Task:
    """The task that `model_and_task_arguments` took, limited as they say."""
    from headtune.analysis.tasks.chat import with_chat
    from headtune.analysis.tasks.loading import load_task

    task = load_task(arguments.task).limited(arguments.max_examples, arguments.seed)
    return with_chat(task, chat_of(arguments))


def plugin_arguments(p: argparse.ArgumentParser) -> None:
    """`--plugin MODULE`, once or more; `main` imports them before the command runs."""
    p.add_argument(
        "--plugin",
        dest="plugins",
        action="append",
        default=[],
        metavar="MODULE",
        help="import a module that registers a method, an objective, a regulariser; may be given again",
    )


def completed(argument: argparse.Action, what: str) -> None:
    """Say what a shell completes an argument with: `recipe`, `task`, `model`, `file` or `folder`; see `completion`."""
    argument.complete_with = what  # type: ignore[attr-defined]


def volume_arguments(p: argparse.ArgumentParser) -> None:
    """`--quiet` and `--verbose`, for a command that works long."""
    group = p.add_mutually_exclusive_group()
    group.add_argument("-q", "--quiet", action="store_true", help="say nothing but the result, warnings and errors")
    group.add_argument(
        "-v", "--verbose", action="store_true", help="let the libraries speak, and show where an error came from"
    )


def print_json(result: Any) -> None:
    print(json.dumps(result, ensure_ascii=False, indent=1))
