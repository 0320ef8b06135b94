"""`headtune analyse`: a study of a model on a task.

headtune analyse promote_then_suppress MODEL --task TASK --out DIR
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

from headtune.analysis.utils.processes import world_size
from headtune.analysis.utils.verbosity import silence_model_libraries

from ..arguments import Add, load_model_for, load_task_for, model_and_task_arguments, volume_arguments


def add_parsers(add: Add) -> None:
    p = add(
        "analyse",
        "run a study of a model on a task",
        "analyse list",
        "analyse promote_then_suppress smollm2-135m --task country_cities --max-examples 20 --out runs/study",
    )
    p.add_argument("name", help="which study; 'list' shows them with their options")
    model_and_task_arguments(p, "new folder for analysis.json, figures/, report.html", optional=True)
    p.add_argument("-o", "--option", action="append", default=[], metavar="KEY=VALUE", help="an option of the study")
    volume_arguments(p)
    p.set_defaults(do=analyse_command)


def analyse_command(arguments: argparse.Namespace) -> int:
    from headtune.analysis.studies import base
    from headtune.analysis.utils.errors import InputError

    from .. import console

    if arguments.name == "list":
        _list_studies(arguments.json)
        return 0

    # What can be refused without a model.
    if world_size() > 1:
        raise InputError("headtune analyse runs in one process; start it without accelerate launch")
    options = _options(arguments.option)
    base.check_options(arguments.name, options)
    for name in ("model", "task", "out"):
        if getattr(arguments, name) is None:
            raise InputError(f"headtune analyse {arguments.name} needs {'a model' if name == 'model' else f'--{name}'}")
    if "seed" in base.options_of(arguments.name):
        options.setdefault("seed", arguments.seed)
    base.require_free(arguments.out)
    task = load_task_for(arguments)

    # The study, its folder, and its tables.
    silence_model_libraries()
    result = base.run(arguments.name, load_model_for(arguments), task, console.progress, **options)
    base.write(result, arguments.out)
    if arguments.json:
        print(json.dumps(result.data, ensure_ascii=False, indent=1))
    else:
        for part in result.parts:
            if isinstance(part, base.Table):
                console.console.print(console.plain_table(part.title, part.header, part.rows))
        files = ", ".join(sorted(path.name + "/" * path.is_dir() for path in arguments.out.iterdir()))
        console.console.print(f"{arguments.out}: {files}", markup=False)
    return 0


def _list_studies(as_json: bool) -> None:
    from headtune.analysis.studies import base

    defaults = {name: {k: p.default for k, p in base.options_of(name).items()} for name in base.STUDIES}
    if as_json:
        print(json.dumps(defaults, indent=1))
        return
    for name, study in base.STUDIES.items():
        takes = ", ".join(f"{key}={default!r}" for key, default in defaults[name].items())
        print(f"{name}: {study.summary}\n    options: {takes or 'none'}")


def _options(texts: Sequence[str]) -> dict[str, Any]:
    """`key=value` with values in YAML."""
    from yaml import YAMLError

    from headtune.analysis.utils.errors import InputError
    from headtune.train.config.recipe import read_yaml

    options: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise InputError(f"option {text!r} must look like key=value")
        try:
            options[key] = read_yaml(value)
        except YAMLError:
            raise InputError(f"option {text!r}: the value is not YAML") from None
    return options
