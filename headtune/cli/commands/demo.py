"""The whole road in one command, on the embedded model: identify, train beside random heads, evaluate, export."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from headtune.analysis.utils.verbosity import silence_model_libraries

from ..arguments import Add, print_json, volume_arguments

# recipe, role, top: one number on each of three heads; a scale and an offset on all that were confirmed.
FEW, FULL = ("gain/one_to_many", "suppression", 3), ("lofit/one_to_many", "both", 16)


def add_parsers(add: Add) -> None:
    p = add(
        "demo",
        "identify, train, evaluate and export on the embedded model",
        "demo",
        "demo --quick --out runs/look",
        "demo --full",
    )
    p.add_argument("--out", type=Path, help="folder (default: the next free runs/demo, runs/demo-2, ...)")
    p.add_argument("--quick", action="store_true", help="a few steps on a few prompts, to see the machinery work")
    p.add_argument(
        "--full", action="store_true", help="a scale and an offset on all confirmed heads, not a number on three"
    )
    volume_arguments(p)
    p.set_defaults(do=demo_command)


def demo_command(arguments: argparse.Namespace) -> int:
    result = demo(arguments.out, arguments.quick, arguments.full)
    if arguments.json:
        print_json(result)
    return 0


def demo(out: Path | None = None, quick: bool = False, full: bool = False) -> dict[str, Any]:
    """Identify heads, train on them and on random ones, compare on held-out subjects, export and prove.

    Args:
        out: a new folder; default: the next free one of runs/demo, runs/demo-2, ...
        quick: a few steps on a few prompts; shows the machinery, not the effect.
        full: a scale and an offset on all confirmed heads of both roles, in place of a number on three.

    Returns:
        Paths, the evaluation, that of the random heads, and the export's measured difference.
    """
    from headtune.analysis.identify.pipeline import identify
    from headtune.analysis.models.loading import EMBEDDED, load_model
    from headtune.analysis.tasks.loading import load_task
    from headtune.analysis.utils.files import require_new_folder
    from headtune.train.config.recipe import load_recipe
    from headtune.train.evaluation.compare import compare_runs
    from headtune.train.export import checkpoint
    from headtune.train.runs.run import run_recipe
    from headtune.train.tracking.identify_run import track_identify

    from .. import console
    from ..tables import comparison_tables, identification_text, print_evaluation
    from .identify import print_heads

    folder = out or _next_free(Path("runs/demo"))
    require_new_folder(folder, "choose another --out")
    start = time.monotonic()

    console.notify(f"1/4 identify: which heads of {EMBEDDED} recall answers, which suppress those already given")
    task = load_task("one_to_many:train").limited(48 if quick else 96)
    silence_model_libraries()
    result = identify(load_model(EMBEDDED), task, top=8 if quick else 16, progress=console.progress)
    heads = folder / "heads"
    result.save(heads)
    track_identify(result, heads, group=folder.name)
    print_heads(result)

    name, role, top = FULL if full else FEW
    top = min(top, 8) if quick else top
    chosen = {"role": role, "top": top}
    settings = [f"tracking.group={json.dumps(folder.name)}"]
    if quick:
        settings += ["training.max_steps=2", "task.max_train_examples=32", "task.max_eval_examples=8"]

    def train(run: str, source: dict[str, Any], *more: str) -> dict[str, Any]:
        places = [f"heads={json.dumps({**source, **chosen})}", f"name={run}", *more]
        places.append(f"output_dir={json.dumps(str(folder / run))}")
        return run_recipe(load_recipe(name, [*settings, *places]), progress=console.progress, notify=console.notify)

    what = "a scale and an offset on those heads" if full else "one number on each of three suppression heads"
    console.notify(f"2/4 train: {what}, evaluated on subjects never trained on")
    evaluation = train("run", {"from": str(heads)})
    console.notify("3/4 the same on random heads of the same layers, which could do as well")
    like = {"random": {"like": str(heads)}} if full else {"control": {"like": str(heads), "kind": "random"}}
    control = train("random", like, f"evaluation.before={json.dumps(str(folder / 'run' / 'evaluation.json'))}")

    console.notify("4/4 export: folded into a stock checkpoint, reloaded by plain transformers and compared")
    exported = checkpoint.export_run(
        folder / "run", folder / "export", progress=console.progress, notify=console.notify
    )
    print_evaluation(folder / "run", evaluation)
    comparison = compare_runs(folder)
    console.console.print(*comparison_tables(comparison, console.console.width))
    if words := identification_text(comparison):
        console.console.print(words)
    console.console.print(
        f"export: {folder / 'export'} (largest logit difference {exported['max_logit_difference']:.2g}, "
        f"{exported['identical_generations']} of {exported['prompts']} generations identical)",
        markup=False,
    )
    console.notify(f"done in {time.monotonic() - start:.0f} s")
    return {
        "folder": str(folder),
        "heads": str(folder / "heads" / "heads.json"),
        "report": str(folder / "run" / "report.html"),
        "export": str(folder / "export"),
        "evaluation": {"before": evaluation["before"], "after": evaluation["after"], "random": control["after"]},
        "max_logit_difference": exported["max_logit_difference"],
    }


def _next_free(base: Path) -> Path:
    candidate, number = base, 1
    while candidate.exists():
        number += 1
        candidate = base.with_name(f"{base.name}-{number}")
    return candidate
