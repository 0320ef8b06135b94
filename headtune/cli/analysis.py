"""The commands of the analysis stage: identify, analyse, report.

headtune identify MODEL --task TASK --out DIR
headtune analyse promote_then_suppress MODEL --task TASK --out DIR
accelerate launch --config_file accelerate_configs/ddp.yaml -m headtune.analysis identify MODEL --task TASK ...
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import Add, completed, memory, model_quiet, positive, volume_arguments

if TYPE_CHECKING:
    from headtune.analysis.identify.head_set import HeadSet
    from headtune.analysis.identify.pipeline import IdentifyResult

PORTRAITS = 64  # heads drawn in the report, best of the roles first: about 10 kB each


def _top(text: str) -> int | str:
    try:
        return text if text == "elbow" else positive(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}, or 'elbow'") from None


def add_parsers(add: Add) -> None:
    p = add(
        "identify",
        "find and verify heads",
        "identify smollm2-135m --task country_cities --out runs/heads",
        "identify smollm2-135m --task my_task.jsonl:train --max-examples 64 --top elbow --out runs/mine",
    )
    _model_and_task(p, "new folder for heads.json, scores.safetensors, report.html")
    p.add_argument("--method", default="all", help="all (dla and ablation) or names with commas; see --list-methods")
    p.add_argument("--list-methods", action=_ListMethods, nargs=0, help="print the methods and exit")
    p.add_argument("--top", type=_top, default=8, help="heads kept per role, or 'elbow' (default: 8)")
    p.add_argument("--threshold", type=float, help="keep only heads whose ranking score is at least this far from zero")
    p.add_argument("--verify-top", type=positive, default=4, help="heads silenced together (default: 4)")
    p.add_argument(
        "--control", action="append", default=[], metavar="NAME=HEADS", help="silence another task's heads too"
    )
    p.add_argument("--project", default="headtune", help="W&B project")
    p.add_argument("--group", help="W&B group")
    p.add_argument("--wandb", choices=("online", "offline", "disabled"), help="default: online where a key is present")
    volume_arguments(p)
    p.set_defaults(do=identify_command)

    p = add(
        "analyse",
        "run a study of a model on a task",
        "analyse list",
        "analyse promote_then_suppress smollm2-135m --task country_cities --max-examples 20 --out runs/study",
    )
    p.add_argument("name", help="which study; 'list' shows them with their options")
    _model_and_task(p, "new folder for analysis.json, figures/, report.html", optional=True)
    p.add_argument("-o", "--option", action="append", default=[], metavar="KEY=VALUE", help="an option of the study")
    volume_arguments(p)
    p.set_defaults(do=analyse_command)

    p = add("report", "rebuild the report page of a run or a head set", "report runs/NAME")
    completed(p.add_argument("folder", type=Path), "folder")
    p.set_defaults(do=report_command)


def _model_and_task(p: argparse.ArgumentParser, out: str, optional: bool = False) -> None:
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
    p.add_argument("--max-memory", type=memory, help="of batches of hypothetical runs, such as 4GiB (default: 1GiB)")
    p.add_argument("--chat-template", action="store_true", help="wrap prompts with the tokenizer's own chat template")
    p.add_argument("--seed", type=int, default=0)


class _ListMethods(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from headtune.analysis.methods.registry import METHODS

        width = max(map(len, METHODS))
        print("\n".join(f"{method.name:{width}}  {method.summary}" for method in METHODS.values()))
        parser.exit()


def _load(arguments: argparse.Namespace) -> Any:
    from headtune.analysis.models.loading import load_model

    heads = load_model(arguments.model, arguments.dtype, device_map=arguments.device_map)
    if arguments.max_memory is not None:
        heads.max_memory = arguments.max_memory
    return heads


def _task(arguments: argparse.Namespace) -> Any:
    from dataclasses import replace

    from headtune.analysis.tasks.loading import load_task

    task = load_task(arguments.task).limited(arguments.max_examples, arguments.seed)
    return replace(task, chat_template=True) if arguments.chat_template else task


def _main_rank() -> bool:
    return int(os.environ.get("RANK", "0")) == 0


def _leave_group() -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from accelerate import PartialState

        PartialState().destroy_process_group()


def identify_command(arguments: argparse.Namespace) -> int:
    from dataclasses import asdict

    from headtune.analysis.utils.files import require_new_folder

    from . import console

    require_new_folder(arguments.out, "choose another --out")
    controls = _controls(arguments.control)
    try:
        found = identify_into(
            arguments.model,
            _task(arguments),
            arguments.out,
            wandb={"project": arguments.project, "group": arguments.group, "wandb_mode": arguments.wandb},
            dtype=arguments.dtype,
            device_map=arguments.device_map,
            max_memory=arguments.max_memory,
            method=arguments.method,
            top=arguments.top,
            threshold=arguments.threshold,
            verify_top=arguments.verify_top,
            controls=controls,
            seed=arguments.seed,
        )
    except KeyboardInterrupt:
        if not _main_rank() or not partial_folder(arguments.out).exists():
            raise
        return console.fail("interrupted; run the same command again to go on", 130)
    _leave_group()
    if not _main_rank():
        return 0
    if arguments.json:
        print(json.dumps(asdict(found.heads), ensure_ascii=False, indent=1))
    else:
        print_heads(found)
        console.console.print(f"\n{arguments.out}/heads.json, scores.safetensors, report.html", markup=False)
    return 0


def _controls(given: Sequence[str]) -> dict[str, HeadSet]:
    from headtune.analysis.identify import head_set
    from headtune.analysis.utils.errors import InputError

    controls = {}
    for text in given:
        name, equals, path = text.partition("=")
        if not equals or not re.fullmatch(r"\w+", name):
            raise InputError(f"--control {text!r} must look like capitals=runs/capitals/heads.json")
        if name in controls:
            raise InputError(f"--control {text!r} names {name!r} a second time; give each control its own name")
        file = Path(path)
        controls[name] = head_set.read(file / "heads.json" if file.is_dir() else file)
    return controls


def identify_into(
    model: str,
    task: Any,
    out: Path,
    wandb: dict[str, Any],
    dtype: str = "float32",
    device_map: str | None = None,
    max_memory: int | None = None,
    **options: Any,
) -> IdentifyResult:
    """Identify and write everything a person or a recipe needs into `out`.

    Finished examples are kept beside `out` until then, in `.<name>.partial`, so that the same call goes on after a
    break. Under a launcher the examples are shared, and the first process writes.
    """
    from . import console

    model_quiet()
    from headtune.analysis.identify import pipeline
    from headtune.analysis.methods.registry import chosen
    from headtune.analysis.models.loading import load_model
    from headtune.analysis.reports import head_cards, head_profiles, head_report
    from headtune.analysis.utils.errors import InputError
    from headtune.analysis.utils.progress import silent
    from headtune.train.tracking import media
    from headtune.train.tracking.lineage import artifact_name, pinned
    from headtune.train.tracking.tracker import Tracker

    chosen(options.get("method", "all"))  # before the model is loaded
    if device_map and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError(
            f"--device-map {device_map} spreads one model over all devices; with several processes leave it out, or "
            "start one process"
        )
    heads = load_model(model, dtype, device_map=device_map)
    if max_memory is not None:
        heads.max_memory = max_memory
    found = pipeline.identify(
        heads,
        task,
        progress=console.progress if _main_rank() else silent,
        partial=partial_folder(out),
        share=True,
        **options,
    )
    if not _main_rank():
        return found
    means = found.scores.means()
    ranked = list(dict.fromkeys(head for role in found.heads.roles for head in found.heads.top(role)))
    portraits = head_profiles.portrait(heads, found.examples, ranked[:PORTRAITS]) if ranked else []
    pipeline.write(found, out)
    head_cards.write(portraits, out / "portraits.json")
    head_report.write_report(out / "report.html", found.heads, means, portraits=portraits)
    with Tracker(
        out,
        out.name,
        pinned("identify", ranked, " ".join(found.heads.roles), None)
        | {"model": found.heads.model, "task": found.heads.task, "method": found.heads.method},
        job_type="identify",
        tags=["identify"],
        **wandb,
    ) as tracker:
        media.show_heads(tracker, found.heads, means, out, artifact_name(f"{out.resolve().name}-heads"))
        stability = {role: found.heads.stability[role] for role in found.heads.roles}
        tracker.log({f"stability/{role}": float(v) for role, v in stability.items() if v is not None}, step=0)
    return found


def partial_folder(out: Path) -> Path:
    """Where an unfinished `identify` keeps its finished examples: beside `out`, so that `out` is whole or absent."""
    whole = out.resolve()
    return whole.parent / f".{whole.name}.partial"


def print_heads(found: IdentifyResult) -> None:
    """The dissociation table, what it says, and the ranked heads."""
    from rich.table import Table

    from headtune.analysis.reports import head_report
    from headtune.analysis.tasks.tokenized import reasons

    from .console import console, print_titled

    heads = found.heads
    task = heads.task
    console.print(
        f"{task['n_examples']} prompts of {task['name']}, {task['n_dropped']} left out"
        + (f": {reasons(task['dropped'])}" if task["dropped"] else ""),
        markup=False,
    )
    for role, ranked in heads.roles.items():
        rule = heads.method["parameters"]["rules"][role]
        stable = heads.stability[role]
        how = "no stability: one fit for the whole task" if stable is None else f"bootstrap Jaccard {stable:.2f}"
        table = Table()
        confirms = [f"{rule['confirm'].split('.')[0]}.{quantity}" for quantity in ("target", "previous")]
        # Without ablation the ranking confirms itself; single facts have no previous answers.
        confirms = [name for name in confirms if name != rule["rank"] and any(name in head.effect for head in ranked)]
        for name in ("head", f"{rule['rank']} [95%]", *confirms):
            table.add_column(name)
        for entry in ranked:
            score = f"{entry.score:.3f}" + (f" [{entry.ci[0]:.3f}, {entry.ci[1]:.3f}]" if entry.ci else "")
            effects = (entry.effect.get(name) for name in confirms)
            table.add_row(entry.name, score, *("" if effect is None else f"{effect:+.3f}" for effect in effects))
        print_titled(f"{role} heads ({how})", table)
    for method, count in heads.method["parameters"]["examples_scored"].items():
        if count < task["n_examples"]:
            console.print(
                f"{method}: {count} of {task['n_examples']} prompts; the others have no counterpart of their length",
                markup=False,
            )
    console.print(head_report.render_dissociation(heads))
    console.print(head_report.verdict(heads), markup=False)
    if advice := head_report.next_step(heads):
        console.print(advice, markup=False)


def analyse_command(arguments: argparse.Namespace) -> int:
    from yaml import YAMLError

    from headtune.analysis.studies import base
    from headtune.analysis.utils.errors import InputError
    from headtune.train.config.recipe import read_yaml

    from . import console

    if arguments.name == "list":
        defaults = {name: {k: p.default for k, p in base.options_of(name).items()} for name in base.STUDIES}
        if arguments.json:
            print(json.dumps(defaults, indent=1))
            return 0
        for name, study in base.STUDIES.items():
            takes = ", ".join(f"{key}={default!r}" for key, default in defaults[name].items())
            print(f"{name}: {study.summary}\n    options: {takes or 'none'}")
        return 0
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("headtune analyse runs in one process; start it without accelerate launch")
    options: dict[str, Any] = {}
    for text in arguments.option:
        key, equals, value = text.partition("=")
        if not equals:
            raise InputError(f"option {text!r} must look like key=value")
        try:
            options[key] = read_yaml(value)
        except YAMLError:
            raise InputError(f"option {text!r}: the value is not YAML") from None
    base.check_options(arguments.name, options)
    for name in ("model", "task", "out"):
        if getattr(arguments, name) is None:
            raise InputError(f"headtune analyse {arguments.name} needs {'a model' if name == 'model' else f'--{name}'}")
    if "seed" in base.options_of(arguments.name):
        options.setdefault("seed", arguments.seed)
    base.require_free(arguments.out)
    task = _task(arguments)
    model_quiet()
    result = base.run(arguments.name, _load(arguments), task, console.progress, **options)
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


def report_command(arguments: argparse.Namespace) -> int:
    from headtune.analysis.identify import head_set
    from headtune.analysis.methods.scores import load_means
    from headtune.analysis.reports import head_cards, head_report
    from headtune.analysis.utils.errors import InputError
    from headtune.analysis.utils.state_files import read_state

    folder: Path = arguments.folder
    path = folder / "evaluation.json"
    evaluation = read_state(path) if path.is_file() else None
    if evaluation is not None and evaluation.get("after") is None:
        evaluation = None  # a run that has not finished has nothing to compare yet
    if (folder / "recipe.yaml").is_file() and not (folder / "heads.json").is_file():
        if evaluation is None:
            raise InputError(f"run {str(folder)!r} is not finished; finish it with: headtune train RECIPE --resume")
        from headtune.train.config.recipe import load_recipe
        from headtune.train.tracking.media import write_run_page

        write_run_page(load_recipe(str(folder / "recipe.yaml")), folder, evaluation)
        print(folder / "report.html")
        return 0
    if not (folder / "heads.json").is_file():
        raise InputError(
            f"{str(folder)!r} is neither a run (recipe.yaml) nor a head set (heads.json); give a folder that headtune "
            "train or headtune identify wrote"
        )
    heads = head_set.read(folder / "heads.json")
    means = load_means(folder / "scores.safetensors", heads.shape) if (folder / "scores.safetensors").is_file() else {}
    portraits = head_cards.read(folder / "portraits.json") if (folder / "portraits.json").is_file() else []
    head_report.write_report(folder / "report.html", heads, means, evaluation, portraits=portraits)
    print(folder / "report.html")
    return 0
