"""`headtune report`: the report page of a run or a head set, made anew."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..arguments import Add, completed


def add_parsers(add: Add) -> None:
    p = add("report", "rebuild the report page of a run or a head set", "report runs/NAME")
    completed(p.add_argument("folder", type=Path), "folder")
    p.set_defaults(do=report_command)


def report_command(arguments: argparse.Namespace) -> int:
    from headtune.train.runs.rebuild_report import rebuild_report

    print(rebuild_report(arguments.folder))
    return 0
