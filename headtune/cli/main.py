"""The command line.

    headtune identify smollm2-135m --task country_cities --out runs/heads
    headtune train lofit/one_to_many heads='{from: runs/heads}' training.max_steps=20
    headtune evaluate runs/NAME --task one_to_many:test
    headtune export runs/NAME exported

Exit codes: 0 done; 1 a check failed; 2 bad usage or bad input. Each module of `commands` adds its parser and names
the function that carries it out (`do`). Heavy libraries are imported by the command that needs them.
"""

from __future__ import annotations

import argparse
import os
import select
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from headtune import plugins
from headtune.analysis.utils.processes import is_lost_peer, is_main
from headtune.analysis.utils.verbosity import set_verbosity

from .arguments import Parser, adder
from .commands import (
    analyse,
    compare,
    completion,
    demo,
    doctor,
    evaluate,
    export,
    identify,
    plan,
    recipes,
    report,
    sweep,
    tasks,
    track,
    train,
)
from .exits import exit_for_lost_peer, exit_with

# In the order of --help.
COMMANDS = (
    identify,
    analyse,
    report,
    train,
    demo,
    plan,
    evaluate,
    export,
    sweep,
    compare,
    track,
    recipes,
    tasks,
    doctor,
    completion,
)


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from importlib.metadata import version  # costs as much as the rest of --help

        print(f"headtune {version('headtune')}")
        parser.exit()


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="headtune",
        description="Find the attention heads that recall and that suppress, tune exactly those, export and prove it.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=(__doc__ or "").split("\n\n")[1],
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    add = adder(parser.add_subparsers(dest="command", required=True, metavar="COMMAND"))
    for command in COMMANDS:
        command.add_parsers(add)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if rest:
        # argparse takes a list of words in one piece only: `train R --resume seed=1` leaves the override over.
        if not hasattr(arguments, "overrides") or any(word.startswith("-") for word in rest):
            arguments.own_parser.unknown(rest)
        arguments.overrides += rest
    set_verbosity(getattr(arguments, "quiet", False), getattr(arguments, "verbose", False))
    arguments.parser = parser  # which completion writes down
    from headtune.analysis.utils.errors import CheckError, InputError
    from headtune.analysis.utils.secrets import redact

    try:
        for name in getattr(arguments, "plugins", []):
            plugins.load_plugin(name)
        code = int(arguments.do(arguments) or 0)
        sys.stdout.flush()  # here, where a reader that has gone is noticed, and not when Python ends
        return code
    except (InputError, CheckError) as error:
        if getattr(arguments, "verbose", False):
            print(redact(traceback.format_exc()), file=sys.stderr, end="")
        return exit_with(str(error), error.exit_code)
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _reader_has_gone():
            return 1  # quietly, as rich does where a table was being printed
        if error.filename is None and error.errno is None:
            raise
        name = f" {error.filename!r}" if error.filename else ""
        return exit_with(f"cannot use{name}: {error.strerror}; check the path and its permissions", 2)
    except RuntimeError as error:
        if not is_lost_peer(error):
            raise
        return exit_for_lost_peer(error)
    except KeyboardInterrupt as stop:  # a run's says by what and how to go on (see interruption)
        code = getattr(stop, "exit_code", 130)
        if code == 0 and not is_main():
            return code
        return exit_with(str(stop) or "interrupted; run the same command again", code)


def _reader_has_gone() -> bool:
    """Whether what stdout was piped into has ended, as `| head` does; what is left to print then goes nowhere."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    gone = bool(poll.poll(0))  # asked for nothing, a pipe tells of its other end being closed
    if gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return gone
