"""The command line.

    headtune identify smollm2-135m --task country_cities --out runs/heads
    headtune train lofit/one_to_many heads.from=runs/heads training.max_steps=20
    headtune evaluate runs/NAME --task one_to_many:test
    headtune export runs/NAME exported

Exit codes: 0 done; 1 a check failed; 2 bad usage or bad input. Heavy libraries are imported by the command that needs
them.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import io
import json
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .cli_analysis import add_parsers, analyse_command, identify_command, positive, report_command
from .cli_plan import add_parser as add_plan_parser
from .cli_plan import plan_command
from .ending import fail, fail_with_another, lost_another


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="headtune",
        description="Find the attention heads that recall and that suppress, tune exactly those, export and prove it.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=(__doc__ or "").split("\n\n")[1],
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, summary: str, example: str) -> argparse.ArgumentParser:
        parser = commands.add_parser(
            name,
            help=summary,
            description=summary[:1].upper() + summary[1:] + ".",
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        parser.add_argument("--json", action="store_true", help="print a machine-readable result")
        return parser

    add_parsers(add)

    p = add("train", "run a recipe", "headtune train lofit/one_to_many training.max_steps=20")
    p.add_argument("recipe", help="path, or name without the ending (see: headtune recipes)")
    p.add_argument("overrides", nargs="*", metavar="key.sub=value", help="override a key; the value is YAML")
    p.add_argument("--resume", action="store_true", help="continue the run in the recipe's output folder")
    p.add_argument("--config_file", type=Path, help="start it through accelerate launch with this configuration")

    add_plan_parser(add)

    p = add("evaluate", "measure a run or a model", "headtune evaluate runs/NAME --task one_to_many:test")
    p.add_argument("target", help="run folder, model folder, built-in name or hub id")
    p.add_argument(
        "--task", required=True, help="built-in name, JSONL file, hub id, or FORMAT:PATH such as truthfulqa:test.csv"
    )
    p.add_argument("--kind", choices=("lists", "exact_match", "multiple_choice"), help="how answers are scored")
    p.add_argument("--preamble", choices=("truthfulqa",), help="text before multiple-choice questions")
    p.add_argument("--items", type=positive, default=3, help="list items scored per prompt (default: 3)")
    p.add_argument("--batch-size", type=positive, default=16)
    p.add_argument("--max-examples", type=positive)
    p.add_argument(
        "--knob",
        action="append",
        default=[],
        metavar="NAME:KEY=VALUE,...",
        help="switch on, once or more: sink:tau=0.5,gamma=0.5 (scale last-layer heads that look at the first "
        "position), intercept:beta=0.5[,fit=TASK] (take away the last MLP's intercept)",
    )

    p = add("export", "write a stock checkpoint and prove it equal", "headtune export runs/NAME exported")
    p.add_argument("run", type=Path)
    p.add_argument("out", type=Path, help="new folder")
    p.add_argument("--dtype", default="float32", help="of the stored weights (default: float32)")
    p.add_argument("--prompts", type=positive, default=20, help="prompts compared (default: 20)")
    p.add_argument("--max-shard-size", default="5GB", help="of one file of weights (default: 5GB)")
    p.add_argument("--adapter", action="store_true", help="write the PEFT adapter alone, with a card, as it is")

    p = add(
        "sweep",
        "run or resume a grid of recipes and compare them",
        "headtune sweep lofit/relations --grid heads.top=4,8,16 --seeds 3 --out runs/top",
    )
    p.add_argument("recipe", help="path, or name without the ending (see: headtune recipes)")
    p.add_argument("overrides", nargs="*", metavar="key.sub=value", help="of every run")
    p.add_argument("--grid", action="append", default=[], metavar="KEY=V,V,...", help="an axis; may be given again")
    p.add_argument("--seeds", type=positive, default=1, help="seeds 0 to N-1 of every combination (default: 1)")
    p.add_argument("--out", type=Path, default=Path("runs/sweep"), help="folder of the runs (default: runs/sweep)")
    p.add_argument("--print", dest="printed", choices=("wandb", "slurm"), help="print the grid for others to run")

    p = add(
        "compare",
        "runs side by side: seeds grouped, intervals, differences, what was changed",
        "headtune compare runs --group study --against lofit-random --html study.html",
    )
    p.add_argument("folder", type=Path)
    p.add_argument("--group", help="only runs of this tracking.group")
    p.add_argument("--tag", action="append", default=[], help="only runs with this tag; may be given again")
    p.add_argument("--recipe", help="only runs of this recipe family, such as lofit")
    p.add_argument("--against", help="the run or group that differences are from (default: the model before training)")
    p.add_argument("--html", type=Path, help="write one self-contained page")
    p.add_argument("--csv", type=Path, help="write one line a group and metric")

    p = add("recipes", "list, show and check recipes", "headtune recipes show lofit/one_to_many")
    p.add_argument("action", nargs="?", choices=("list", "show", "validate", "schema"), default="list")
    p.add_argument("name", nargs="?")

    p = add("task", "build and inspect task files", "headtune task build facts.json --out my_task.jsonl")
    p.add_argument("action", choices=("build", "show", "list"))
    p.add_argument("source", nargs="?", help="facts file {subject: [answers]} (build), or a task (show)")
    p.add_argument(
        "--templates", type=Path, help='[{"header": "List five cities in {subject}.", "item": "\\n{i}. {answer}"}]'
    )
    p.add_argument("--invert", action="store_true", help="the source is a many-to-one relation, to be turned round")
    p.add_argument("--previous", default="1,2,3,4", help="numbers of answers already given (default: 1,2,3,4)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", type=Path)

    p = add("demo", "identify, train, evaluate and export on the embedded model", "headtune demo")
    p.add_argument("--out", type=Path, help="folder (default: the next free runs/demo, runs/demo-2, ...)")
    p.add_argument("--quick", action="store_true", help="a few steps on a few prompts, to see the machinery work")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if rest:
        # argparse takes a list of words in one piece only: `train R --resume seed=1` leaves the override over.
        if arguments.command not in ("train", "plan", "sweep") or any(word.startswith("-") for word in rest):
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        arguments.overrides += rest
    _quiet()
    from ..analysis.errors import CheckError, InputError

    try:
        return _COMMANDS[arguments.command](arguments) or 0
    except (InputError, CheckError) as error:
        return fail(str(error), error.exit_code)
    except OSError as error:
        if error.filename is None and error.errno is None:
            raise
        where = f" {error.filename!r}" if error.filename else ""
        return fail(f"cannot use{where}: {error.strerror}; check the path and its permissions", 2)
    except RuntimeError as error:
        if not lost_another(error):
            raise
        return fail_with_another(error)
    except KeyboardInterrupt as stop:  # a run's says by what and how to go on (see interruption)
        code = getattr(stop, "exit_code", 130)
        if code == 0 and os.environ.get("RANK", "0") != "0":
            return code
        return fail(str(stop) or "interrupted", code)


def _quiet() -> None:
    """Libraries' chatter off: telemetry, progress bars and advice meant for their developers."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")


def model_quiet() -> None:
    """Quiet what only commands that load a model bring in."""
    import torch
    import transformers

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed, once imported, would warn about having to guess
    if os.environ.get("WANDB_MODE") == "offline":  # transformers prints so on import, into what --json prints
        with contextlib.redirect_stdout(io.StringIO()):
            importlib.import_module("transformers.integrations.integration_utils")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("headtune").setLevel(logging.INFO)


def _print_json(result: Any) -> None:
    print(json.dumps(result, ensure_ascii=False, indent=1))


def _train(arguments: argparse.Namespace) -> int:
    if arguments.config_file is not None:
        from . import launch

        words = [*(["--resume"] if arguments.resume else []), *(["--json"] if arguments.json else [])]
        return launch.launch(arguments.config_file, arguments.recipe, arguments.overrides, words)
    from .recipe import load

    recipe = load(arguments.recipe, arguments.overrides)
    model_quiet()
    from . import console
    from .run import run

    main_rank = int(os.environ.get("RANK", "0")) == 0
    evaluation = run(
        recipe,
        arguments.resume,
        console.progress if main_rank else (lambda items, _what: iter(items)),
        console.say if main_rank else (lambda _line: None),
    )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from accelerate import PartialState

        PartialState().destroy_process_group()
    if not main_rank:
        return 0
    if arguments.json:
        _print_json(evaluation)
    elif evaluation:
        _print_evaluation(recipe.folder, evaluation)
    else:
        console.say(f"heads chosen: {recipe.folder / 'heads.json'}; tune them with heads='{{from: {recipe.folder}}}'")
    return 0


def _print_evaluation(folder: Path, evaluation: dict[str, Any]) -> None:
    from .console import console, generations_table, metrics_table, sequence_table

    columns = {name: evaluation[name] for name in ("before", "after")}
    console.print(metrics_table(columns, f"{evaluation['task']}, {evaluation['before']['n']['examples']} prompts"))
    if (folder / "sequence.json").is_file():
        sequence = json.loads((folder / "sequence.json").read_text(encoding="utf-8"))
        console.print(sequence_table(list(evaluation["before"]["n"]["by_task"]), sequence))
    # Those that changed say more than those that did not; failures are as likely to be among them as successes.
    changed = [example for example in evaluation["examples"] if example["before"] != example["after"]]
    console.print(generations_table((changed or evaluation["examples"])[:3]))
    console.print(f"run: {folder}", markup=False)
    if (folder / "report.html").is_file():
        console.print(f"report: {folder}/report.html", markup=False)


def _evaluate(arguments: argparse.Namespace) -> int:
    from ..analysis import knobs
    from ..analysis.tasks import load_task
    from .recipe import load

    is_run = (Path(arguments.target) / "recipe.yaml").is_file()
    seed, kind = 0, arguments.kind
    if is_run:  # a split of the task is the one that the run was trained on
        own = load(str(Path(arguments.target) / "recipe.yaml")).task
        seed, kind = own.split.seed, kind or own.kind
    task = load_task(arguments.task, seed).limited(arguments.max_examples)
    if kind:
        task = dataclasses.replace(task, kind=kind)
    chosen = knobs.parse(arguments.knob)
    model_quiet()
    from ..analysis.model import load_plain, view
    from . import console
    from .evaluate import evaluate
    from .multiple_choice import truthfulqa_preamble
    from .run import load_run

    if is_run:
        model, tokenizer, _ = load_run(Path(arguments.target))
        if chosen:  # knobs need a view of the model's heads, which an adapter around the projection would hide
            model = model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
    else:
        model, tokenizer = load_plain(arguments.target)
    turned: Any = contextlib.nullcontext([])
    if chosen:
        turned = knobs.turned(view(model, tokenizer, arguments.target), chosen, console.progress)
    with turned as notes:
        console.say(f"evaluating on {len(task.examples)} prompts")
        preamble = truthfulqa_preamble() if arguments.preamble else ""
        metrics, lists = evaluate(model, tokenizer, task, arguments.items, arguments.batch_size, preamble)
    if arguments.json:
        generations = [
            {"prompt": s.example.prompt, "text": s.text, "kinds": s.kinds, "values": s.values} for s in lists
        ]
        _print_json({"task": task.name, "knobs": notes, "metrics": metrics, "generations": generations})
    else:
        column = " ".join([arguments.target, *arguments.knob])
        console.console.print(console.metrics_table({column: metrics}, task.name))
    return 0


def _export(arguments: argparse.Namespace) -> int:
    model_quiet()
    from . import export
    from .console import console

    if arguments.adapter:
        result = export.export_adapter(arguments.run, arguments.out)
        line = f"{arguments.out}: the {result['adapter']} adapter alone"
        if result["import_first"]:
            line += f"; import {result['import_first']} before loading it with PEFT"
    else:
        result = export.export_run(
            arguments.run, arguments.out, arguments.dtype, arguments.prompts, arguments.max_shard_size
        )
        line = (
            f"{arguments.out}: {result['dtype']}, largest logit difference {result['max_logit_difference']:.2g} on a "
            f"scale of {result['logit_scale']:.3g}, {result['identical_generations']} of {result['prompts']} greedy "
            "generations identical"
        )
    if arguments.json:
        _print_json(result)
    else:
        console.print(line, markup=False)
    return 0


def _sweep(arguments: argparse.Namespace) -> int:
    from . import compare, console, sweep
    from .finished import read_runs

    grid = sweep.cells(arguments.recipe, arguments.grid, arguments.seeds, arguments.out, arguments.overrides)
    if arguments.printed == "wandb":
        print(sweep.wandb_sweep(arguments.recipe, arguments.grid, arguments.seeds, arguments.overrides), end="")
        return 0
    if arguments.printed == "slurm":
        print(sweep.slurm_array(arguments.recipe, grid), end="")
        return 0
    failed = sweep.carry_out(arguments.recipe, grid, console.say)
    if len(failed) < len(grid):
        found = compare.compare(read_runs(arguments.out, group=arguments.out.name))
        if arguments.json:
            _print_json(compare.as_json(found))
        else:
            console.console.print(compare.table(found))
    return 1 if failed else 0


def _compare(arguments: argparse.Namespace) -> int:
    from ..analysis.files import write_text
    from . import compare, compare_page
    from .console import console
    from .finished import read_runs

    written = [path for path in (arguments.html, arguments.csv) if path is not None]
    runs = read_runs(arguments.folder, arguments.group, arguments.tag, arguments.recipe)
    found = compare.compare(runs, arguments.against)
    if arguments.html:
        compare_page.write(found, arguments.html)
    if arguments.csv:
        write_text(arguments.csv, compare.as_csv(found))
    if arguments.json:
        _print_json(compare.as_json(found))
    else:
        console.print(compare.table(found))
        for path in written:
            console.print(str(path), markup=False)
    return 0


def _recipes(arguments: argparse.Namespace) -> int:
    from ..analysis.errors import InputError
    from . import recipe as recipes

    if arguments.action == "schema":
        _print_json(recipes.Recipe.model_json_schema())
        return 0
    if arguments.action == "list":
        names = recipes.recipe_names()
        if arguments.json:
            _print_json(names)
        else:
            print("\n".join(names))
        return 0
    if arguments.name is None:
        raise InputError(f"headtune recipes {arguments.action} needs the name or path of a recipe")
    if arguments.action == "show":
        print(recipes.read_source(arguments.name), end="")
    else:
        loaded = recipes.load(arguments.name)
        print(f"{arguments.name}: valid ({loaded.recipe}, {loaded.name})")
    return 0


def _task(arguments: argparse.Namespace) -> int:
    from ..analysis import tasks
    from ..analysis.errors import InputError

    if arguments.action == "list":
        print("\n".join(tasks.builtin_names()))
        return 0
    if arguments.source is None:
        raise InputError(
            f"headtune task {arguments.action} needs a {'facts file' if arguments.action == 'build' else 'task'}"
        )
    if arguments.action == "show":
        task = tasks.load_task(arguments.source)
        print(tasks.to_jsonl(task.examples), end="")
        return 0
    if arguments.out is None:
        raise InputError("headtune task build needs --out FILE.jsonl")
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
    task = tasks.build_files(Path(arguments.source), arguments.templates, arguments.out, arguments.invert, **options)
    print(f"{arguments.out}: {len(task.examples)} examples, {len(task.subjects)} subjects")
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    from .demo import demo

    result = demo(arguments.out, arguments.quick)
    if arguments.json:
        _print_json(result)
    return 0


_COMMANDS = {
    "identify": identify_command,
    "analyse": analyse_command,
    "train": _train,
    "plan": plan_command,
    "evaluate": _evaluate,
    "export": _export,
    "compare": _compare,
    "sweep": _sweep,
    "report": report_command,
    "recipes": _recipes,
    "task": _task,
    "demo": _demo,
}


if __name__ == "__main__":
    sys.exit(main())
