"""The whole road in one command, on the embedded model: identify, train, evaluate, export."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from headtune.analysis.utils.verbosity import silence_model_libraries

from ..arguments import Add, print_json, volume_arguments

RECIPE = "lofit/one_to_many"


def add_parsers(add: Add) -> None:
    p = add(
        "demo", "identify, train, evaluate and export on the embedded model", "demo", "demo --quick --out runs/look"
    )
    p.add_argument("--out", type=Path, help="folder (default: the next free runs/demo, runs/demo-2, ...)")
    p.add_argument("--quick", action="store_true", help="a few steps on a few prompts, to see the machinery work")
    volume_arguments(p)
    p.set_defaults(do=demo_command)


def demo_command(arguments: argparse.Namespace) -> int:
    result = demo(arguments.out, arguments.quick)
    if arguments.json:
        print_json(result)
    return 0


def demo(out: Path | None = None, quick: bool = False) -> dict[str, Any]:
    """Identify heads, train on them, compare before and after on held-out subjects, export and prove.

    Args:
        out: a new folder; default: the next free one of runs/demo, runs/demo-2, ...
        quick: a few steps on a few prompts; shows the machinery, not the effect.

    Returns:
        Paths, the evaluation, and the export's measured difference.
    """
    from headtune.analysis.identify.pipeline import identify
    from headtune.analysis.models.loading import EMBEDDED, load_model
    from headtune.analysis.tasks.loading import load_task
    from headtune.analysis.utils.files import require_new_folder
    from headtune.train.config.recipe import load_recipe
    from headtune.train.export import checkpoint
    from headtune.train.runs.run import run_recipe
    from headtune.train.tracking.identify_run import track_identify

    from .. import console
    from ..tables import print_evaluation
    from .identify import print_heads

    folder = out or _next_free(Path("runs/demo"))
    require_new_folder(folder, "choose another --out")
    start = time.monotonic()

    console.notify(f"1/3 identify: which heads of {EMBEDDED} recall answers, which suppress those already given")
    task = load_task("one_to_many:train").limited(32 if quick else 96)
    top = 8 if quick else 16
    silence_model_libraries()
    result = identify(load_model(EMBEDDED), task, top=top, progress=console.progress)
    result.save(folder / "heads")
    track_identify(result, folder / "heads", group=folder.name)
    print_heads(result)

    console.notify("2/3 train: scale and offset on those heads alone, evaluated on subjects never trained on")
    overrides = [
        f"heads={{from: {folder / 'heads'}, role: both, top: {top}}}",
        f"output_dir={folder / 'run'}",
        "name=demo",
        f"tracking.group={folder.name}",
    ]
    if quick:
        overrides += ["training.max_steps=2", "task.max_train_examples=32", "task.max_eval_examples=8"]
    recipe = load_recipe(RECIPE, overrides)
    evaluation = run_recipe(recipe, progress=console.progress, notify=console.notify)

    console.notify("3/3 export: folded into a stock checkpoint, reloaded by plain transformers and compared")
    exported = checkpoint.export_run(
        folder / "run", folder / "export", progress=console.progress, notify=console.notify
    )
    print_evaluation(folder / "run", evaluation)
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
        "evaluation": {"before": evaluation["before"], "after": evaluation["after"]},
        "max_logit_difference": exported["max_logit_difference"],
    }


def _next_free(base: Path) -> Path:
    candidate, number = base, 1
    while candidate.exists():
        number += 1
        candidate = base.with_name(f"{base.name}-{number}")
    return candidate
