"""`headtune doctor`: what of this machine headtune works with, and what to mend."""

from __future__ import annotations

import argparse

from headtune.analysis.utils.verbosity import silence_model_libraries

from ..arguments import Add, print_json

STYLES = (("ok", "green"), ("lacks", "yellow"), ("wrong", "bold red"))


def add_parsers(add: Add) -> None:
    p = add("doctor", "look at this machine and the installation, and say what to mend", "doctor", "doctor --json")
    p.set_defaults(do=doctor_command)


def doctor_command(arguments: argparse.Namespace) -> int:
    import importlib.util

    if all(importlib.util.find_spec(name) for name in ("torch", "transformers")):
        silence_model_libraries()
    from ..installation import examine

    findings = examine()
    broken = any(finding.broken for finding in findings)
    if arguments.json:
        rows = [{"name": f.name, "found": f.status, "fix": f.fix, "broken": f.broken} for f in findings]
        print_json({"works": not broken, "findings": rows})
        return int(broken)
    from rich.text import Text

    from ..console import console

    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        word, style = STYLES[2 if finding.broken else 1 if finding.fix else 0]
        line = Text.assemble((f"{word:5}", style), f"  {finding.name:{width}}  {finding.status}")
        if finding.fix:
            line.append("; fix: ").append(finding.fix, "bold")
        console.print(line, soft_wrap=True)
    return int(broken)
