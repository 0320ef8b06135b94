"""`headtune compare`: finished runs side by side."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..arguments import Add, completed, plugin_arguments, print_json


def add_parsers(add: Add) -> None:
    p = add(
        "compare",
        "runs side by side: seeds grouped, intervals, differences, what was changed",
        "compare runs --group study --against lofit-random --html study.html",
        "compare runs --recipe lofit --csv lofit.csv",
    )
    completed(p.add_argument("folder", type=Path, help="holds the runs, or folders of runs"), "folder")
    p.add_argument("--group", help="only runs of this tracking.group")
    p.add_argument("--tag", action="append", default=[], help="only runs with this tag; may be given again")
    p.add_argument("--recipe", help="only runs of this recipe family, such as lofit")
    p.add_argument("--against", help="the run or group that differences are from (default: the model before training)")
    p.add_argument("--html", type=Path, help="write one self-contained page")
    p.add_argument("--csv", type=Path, help="write one line a group and metric")
    plugin_arguments(p)
    p.set_defaults(do=compare_command)


def compare_command(arguments: argparse.Namespace) -> int:
    from headtune.analysis.utils.files import write_text
    from headtune.train.evaluation import compare, compare_report

    from ..console import console
    from ..tables import comparison_json, comparison_tables, identification_text

    written = [path for path in (arguments.html, arguments.csv) if path is not None]
    comparison = compare.compare_runs(
        arguments.folder, arguments.against, arguments.group, arguments.tag, arguments.recipe
    )
    if arguments.html:
        compare_report.write(comparison, arguments.html)
    if arguments.csv:
        write_text(arguments.csv, compare.as_csv(comparison))
    if arguments.json:
        print_json(comparison_json(comparison))
    else:
        console.print(*comparison_tables(comparison, console.width))
        if words := identification_text(comparison):
            console.print(words)
        for path in written:
            console.print(str(path), markup=False)
    return 0
