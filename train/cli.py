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
import json
import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..analysis.identify import Identified


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="headtune",
        description="Find the attention heads that recall and that suppress, tune exactly those, export and prove it.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=(__doc__ or "").split("\n\n")[1],
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, summary: str, example: str) -> argparse.ArgumentParser:
        return commands.add_parser(
            name,
            help=summary,
            description=summary[:1].upper() + summary[1:] + ".",
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    p = add(
        "identify", "find and verify heads", "headtune identify smollm2-135m --task country_cities --out runs/heads"
    )
    p.add_argument("model", help="built-in name, model folder or hub id")
    p.add_argument("--task", required=True, help="built-in name, JSONL file or hub id; NAME:train takes a split")
    p.add_argument("--out", required=True, type=Path, help="new folder for heads.json, scores.safetensors, report.html")
    p.add_argument("--method", default="all", help="all, dla or ablation (default: all)")
    p.add_argument("--top", type=_positive, default=8, help="heads kept per role (default: 8)")
    p.add_argument("--verify-top", type=_positive, default=4, help="heads silenced together (default: 4)")
    p.add_argument("--max-examples", type=_positive, help="use at most this many prompts, spread over subjects")
    p.add_argument("--dtype", default="float32", help="float32, bfloat16 or float16")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--project", default="headtune", help="W&B project")
    p.add_argument("--group", help="W&B group")
    p.add_argument("--wandb", choices=("online", "offline", "disabled"), help="default: online where a key is present")
    _common(p)

    p = add("train", "run a recipe", "headtune train lofit/one_to_many training.max_steps=20")
    p.add_argument("recipe", help="path, or name without the ending (see: headtune recipes)")
    p.add_argument("overrides", nargs="*", metavar="key.sub=value", help="override a key; the value is YAML")
    p.add_argument("--resume", action="store_true", help="continue the run in the recipe's output folder")
    p.add_argument("--config_file", type=Path, help="start it through accelerate launch with this configuration")
    _common(p)

    p = add("evaluate", "measure a run or a model", "headtune evaluate runs/NAME --task one_to_many:test")
    p.add_argument("target", help="run folder, model folder, built-in name or hub id")
    p.add_argument("--task", required=True)
    p.add_argument("--items", type=_positive, default=3, help="list items scored per prompt (default: 3)")
    p.add_argument("--batch-size", type=_positive, default=16)
    p.add_argument("--max-examples", type=_positive)
    _common(p)

    p = add("export", "write a stock checkpoint and prove it equal", "headtune export runs/NAME exported")
    p.add_argument("run", type=Path)
    p.add_argument("out", type=Path, help="new folder")
    p.add_argument("--dtype", default="float32", help="of the stored weights (default: float32)")
    p.add_argument("--prompts", type=_positive, default=20, help="prompts compared (default: 20)")
    _common(p)

    p = add("compare", "tabulate runs side by side", "headtune compare runs")
    p.add_argument("folder", type=Path)
    _common(p)

    p = add("report", "rebuild the report page of a run or a head set", "headtune report runs/NAME")
    p.add_argument("folder", type=Path)
    _common(p)

    p = add("recipes", "list, show and check recipes", "headtune recipes show lofit/one_to_many")
    p.add_argument("action", nargs="?", choices=("list", "show", "validate", "schema"), default="list")
    p.add_argument("name", nargs="?")
    _common(p)

    p = add("task", "build and inspect task files", "headtune task build facts.json --out my_task.jsonl")
    p.add_argument("action", choices=("build", "show", "list"))
    p.add_argument("source", nargs="?", help="facts file {subject: [answers]} (build), or a task (show)")
    p.add_argument(
        "--templates", type=Path, help='[{"header": "List five cities in {subject}.", "item": "\\n{i}. {answer}"}]'
    )
    p.add_argument("--previous", default="1,2,3,4", help="numbers of answers already given (default: 1,2,3,4)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--out", type=Path)
    _common(p)

    p = add("demo", "identify, train, evaluate and export on the embedded model", "headtune demo")
    p.add_argument("--out", type=Path, help="folder (default: the next free runs/demo, runs/demo-2, ...)")
    p.add_argument("--quick", action="store_true", help="a few steps on a few prompts, to see the machinery work")
    _common(p)
    return parser


def _common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print a machine-readable result")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return value


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if rest:
        # argparse takes a list of words in one piece only: `train R --resume seed=1` leaves the override over.
        if arguments.command != "train" or any(word.startswith("-") for word in rest):
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        arguments.overrides += rest
    _quiet()
    from ..analysis.errors import CheckError, InputError
    from . import console

    silent = int(os.environ.get("RANK", "0")) != 0  # one message, not one per rank
    try:
        return _COMMANDS[arguments.command](arguments) or 0
    except (InputError, CheckError) as error:
        return error.exit_code if silent else console.fail(str(error), error.exit_code)
    except OSError as error:
        if error.filename is None and error.errno is None:
            raise
        where = f" {error.filename!r}" if error.filename else ""
        return (
            2 if silent else console.fail(f"cannot use{where}: {error.strerror}; check the path and its permissions", 2)
        )
    except KeyboardInterrupt:
        return 130 if silent else console.fail("interrupted", 130)


def _quiet() -> None:
    """Libraries' chatter off: telemetry, progress bars and advice meant for their developers."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")


def _model_quiet() -> None:
    import torch
    import transformers

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed, once imported, would warn about having to guess
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("headtune").setLevel(logging.INFO)


def _print_json(result: Any) -> None:
    print(json.dumps(result, ensure_ascii=False, indent=1))


def _identify(arguments: argparse.Namespace) -> int:
    from ..analysis.files import require_new_folder
    from ..analysis.tasks import load_task

    require_new_folder(arguments.out, "choose another --out")
    task = load_task(arguments.task).limited(arguments.max_examples, arguments.seed)
    found = identify_into(
        arguments.model,
        task,
        arguments.out,
        wandb={"project": arguments.project, "group": arguments.group, "wandb_mode": arguments.wandb},
        dtype=arguments.dtype,
        method=arguments.method,
        top=arguments.top,
        verify_top=arguments.verify_top,
        seed=arguments.seed,
    )
    from dataclasses import asdict

    if arguments.json:
        _print_json(asdict(found.heads))
    else:
        print_heads(found)
        from . import console

        console.console.print(f"\n{arguments.out}/heads.json, scores.safetensors, report.html", markup=False)
    return 0


def identify_into(
    model: str, task: Any, out: Path, wandb: dict[str, Any], dtype: str = "float32", **options: Any
) -> Identified:
    """Identify and write everything a person or a recipe needs into `out`."""
    _model_quiet()
    from ..analysis import identify, report
    from ..analysis.model import load
    from . import console
    from .tracking import Tracker

    heads = load(model, dtype)
    found = identify.identify(heads, task, progress=console.progress, **options)
    identify.write(found, out)
    means = found.scores.means()
    with Tracker(
        out,
        out.name,
        {"model": found.heads.model, "task": found.heads.task, "method": found.heads.method},
        job_type="identify",
        tags=["identify"],
        **wandb,
    ) as tracker:
        for name, path in report.heat_maps(means, found.heads, out).items():
            tracker.image(f"heads/{name}", path)
        rows = [
            [role, entry.name, entry.score, *entry.ci] for role, ranked in found.heads.roles.items() for entry in ranked
        ]
        tracker.table("heads/ranked", ["role", "head", "score", "low", "high"], rows)
        tracker.artifact(out / "heads.json", f"{out.name}-heads", "heads")
        tracker.log({f"stability/{role}": float(found.heads.stability[role]) for role in found.heads.roles}, step=0)
    report.write_report(out / "report.html", found.heads, means)
    return found


def print_heads(found: Identified) -> None:
    """The dissociation table, what it says, and the ranked heads."""
    from rich.table import Table

    from ..analysis import report
    from .console import console

    heads = found.heads
    task = heads.task
    console.print(
        f"{task['n_examples']} prompts of {task['name']}, {task['n_dropped']} left out {task['dropped'] or ''}",
        markup=False,
    )
    for role, ranked in heads.roles.items():
        table = Table(title=f"{role} heads (bootstrap Jaccard {heads.stability[role]:.2f})", title_justify="left")
        for name in ("head", "attribution [95%]", "ablation: target", "ablation: previous"):
            table.add_column(name)
        for entry in ranked:
            effects = (entry.effect.get(f"ablation.{name}") for name in ("target", "previous"))
            table.add_row(
                entry.name,
                f"{entry.score:.3f} [{entry.ci[0]:.3f}, {entry.ci[1]:.3f}]",
                *("" if effect is None else f"{effect:+.3f}" for effect in effects),
            )
        console.print(table)
    console.print(report.render_dissociation(heads))
    console.print(report.verdict(heads), markup=False)


def _train(arguments: argparse.Namespace) -> int:
    if arguments.config_file is not None:
        from ..analysis.errors import InputError

        if not arguments.config_file.is_file():
            raise InputError(
                f"launch configuration {str(arguments.config_file)!r} does not exist; see accelerate_configs/"
            )
        launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(arguments.config_file)]
        rest = [arguments.recipe, *arguments.overrides, *(["--resume"] if arguments.resume else [])]
        rest += ["--json"] if arguments.json else []
        return subprocess.run([*launch, "-m", "headtune.train", *rest], check=False).returncode
    from .recipe import load

    recipe = load(arguments.recipe, arguments.overrides)
    _model_quiet()
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
    else:
        _print_evaluation(recipe.folder, evaluation)
    return 0


def _print_evaluation(folder: Path, evaluation: dict[str, Any]) -> None:
    from .console import console, generations_table, metrics_table

    columns = {name: evaluation[name] for name in ("before", "after")}
    console.print(metrics_table(columns, f"{evaluation['task']}, {evaluation['before']['n']['examples']} prompts"))
    # Those that changed say more than those that did not; failures are as likely to be among them as successes.
    changed = [example for example in evaluation["examples"] if example["before"] != example["after"]]
    console.print(generations_table((changed or evaluation["examples"])[:3]))
    console.print(f"run: {folder}", markup=False)
    if (folder / "report.html").is_file():
        console.print(f"report: {folder}/report.html", markup=False)


def _evaluate(arguments: argparse.Namespace) -> int:
    from ..analysis.tasks import load_task

    task = load_task(arguments.task).limited(arguments.max_examples)
    _model_quiet()
    from ..analysis.model import load_plain
    from . import console
    from .evaluate import evaluate
    from .run import load_run

    if (Path(arguments.target) / "recipe.yaml").is_file():
        model, tokenizer, _ = load_run(Path(arguments.target))
    else:
        model, tokenizer = load_plain(arguments.target)
    console.say(f"evaluating on {len(task.examples)} prompts")
    metrics, lists = evaluate(model, tokenizer, task, arguments.items, arguments.batch_size)
    if arguments.json:
        generations = [{"prompt": s.example.prompt, "text": s.text, "kinds": s.kinds} for s in lists]
        _print_json({"task": task.name, "metrics": metrics, "generations": generations})
    else:
        console.console.print(console.metrics_table({arguments.target: metrics}, task.name))
    return 0


def _export(arguments: argparse.Namespace) -> int:
    from ..analysis.files import require_new_folder
    from ..analysis.model import parse_dtype

    parse_dtype(arguments.dtype)
    require_new_folder(arguments.out, "choose another folder")
    result = export_run(arguments.run, arguments.out, arguments.dtype, arguments.prompts)
    if arguments.json:
        _print_json(result)
    else:
        from .console import console

        console.print(
            f"{arguments.out}: {result['dtype']}, largest logit difference {result['max_logit_difference']:.2g} on a "
            f"scale of {result['logit_scale']:.3g}, {result['identical_generations']} of {result['prompts']} greedy "
            "generations identical",
            markup=False,
        )
    return 0


def export_run(run: Path, out: Path, dtype: str = "float32", prompts: int = 20) -> dict[str, Any]:
    """Export a finished run; see `headtune.train.export`."""
    _model_quiet()
    from .export import export, model_card
    from .run import load_run, tasks_of

    model, tokenizer, recipe = load_run(run)
    state = json.loads((run / "run.json").read_text(encoding="utf-8"))
    evaluation = json.loads((run / "evaluation.json").read_text(encoding="utf-8"))
    card = model_card(recipe.dump(), state.get("heads", []), evaluation)
    # All held-out prompts to choose from, however few the run was evaluated on.
    held_out = tasks_of(recipe.task.model_copy(update={"max_eval_examples": None}))[1]
    return export(model, tokenizer, held_out, out, dtype, card, prompts)


def _compare(arguments: argparse.Namespace) -> int:
    from .compare import read_runs, table

    runs = read_runs(arguments.folder)
    if arguments.json:
        _print_json(runs)
    else:
        from .console import console

        console.print(table(runs))
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from ..analysis import headset, report
    from ..analysis.scores import load_means

    folder: Path = arguments.folder
    heads = headset.read(folder / "heads.json")
    means = load_means(folder / "scores.safetensors") if (folder / "scores.safetensors").is_file() else {}
    path = folder / "evaluation.json"
    evaluation = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    if evaluation is not None and evaluation.get("after") is None:
        evaluation = None  # a run that has not finished has nothing to compare yet
    report.write_report(folder / "report.html", heads, means, evaluation)
    print(folder / "report.html")
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
    task = tasks.build_files(
        Path(arguments.source), arguments.templates, arguments.out, previous=previous, seed=arguments.seed
    )
    print(f"{arguments.out}: {len(task.examples)} examples, {len(task.subjects)} subjects")
    return 0


def _demo(arguments: argparse.Namespace) -> int:
    from .demo import demo

    result = demo(arguments.out, arguments.quick)
    if arguments.json:
        _print_json(result)
    return 0


_COMMANDS = {
    "identify": _identify,
    "train": _train,
    "evaluate": _evaluate,
    "export": _export,
    "compare": _compare,
    "report": _report,
    "recipes": _recipes,
    "task": _task,
    "demo": _demo,
}


if __name__ == "__main__":
    sys.exit(main())
