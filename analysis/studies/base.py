"""`headtune analyse NAME`: studies of a model on a task that tell more than one number per head.

    from headtune import load_model, load_task
    from headtune.analysis.studies import base

    model, task = load_model("smollm2-135m"), load_task("country_cities").limited(20)
    result = base.run("promote_then_suppress", model, task, trace_examples=3)
    base.write(result, Path("runs/study"))  # result.data holds every number

Each study is a function `(model, examples, progress, **options) -> Analysis`; its options are its keyword arguments.
"""

from __future__ import annotations

import importlib
import inspect
import math
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from headtune.analysis.heads.head_set import provenance
from headtune.analysis.models.head_model import HeadModel
from headtune.analysis.reports.html import render_page
from headtune.analysis.tasks.answer_starts import beginnings
from headtune.analysis.tasks.task import Task
from headtune.analysis.tasks.tokenized import EncodedTask, encode
from headtune.analysis.utils.errors import InputError, nearest
from headtune.analysis.utils.files import require_new_folder, write_json
from headtune.analysis.utils.progress import Progress, silent


@dataclass(frozen=True)
class Figure:
    """A picture with its reading guide. `name` is its file name without the ending."""

    name: str
    caption: str
    png: bytes


@dataclass(frozen=True)
class Table:
    """Rows of numbers and words; the first column heads its row. None shows as a dash."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str | float | None]]
    note: str = ""


@dataclass(frozen=True)
class Analysis:
    """What a study found.

    Attributes:
        name: of the study.
        data: every number, JSON-able; NaN is None.
        parts: what the page shows, in order: plain paragraphs, tables, figures.
        about: filled in by `run`: model, task, options.
    """

    name: str
    data: dict[str, Any]
    parts: Sequence[str | Table | Figure]
    about: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Study:
    """An entry of STUDIES: where its function is (imported when used), and one line for people."""

    module: str
    function: str
    summary: str

    def load(self) -> Any:
        return getattr(importlib.import_module(f".{self.module}", __package__), self.function)


STUDIES = {
    "promote_then_suppress": Study(
        "promote_suppress",
        "promote_then_suppress",
        "Yan & Jia: early decoding, Token Lens, attention knockout, causal tracing",
    ),
    "factual_recall": Study(
        "factual_recall", "factual_recall", "Lv et al.: argument-passing heads, MLP decomposition, anti-overconfidence"
    ),
    "path_patching": Study(
        "path_patching", "path_patching", "heads -> logits and heads -> one head's query, key or value"
    ),
    "faithfulness": Study(
        "faithfulness", "faithfulness", "how much of the behaviour the best k heads carry alone (CMD, CPR)"
    ),
    "elbow": Study(
        "elbow", "elbow_study", "cumulative effect of silencing the best 1, 2, 3, ... heads, and where it bends"
    ),
}


def options_of(name: str) -> dict[str, inspect.Parameter]:
    """The keyword options of a study, by name."""
    signature = inspect.signature(_study(name).load())
    return {key: p for key, p in signature.parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}


def _study(name: str) -> Study:
    if name not in STUDIES:
        raise InputError(f"analysis {name!r} is unknown; {nearest(name, STUDIES)}")
    return STUDIES[name]


def check_options(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as the study takes them.

    Raises:
        InputError: an unknown option, or a value of another type than the study's.
    """
    accepted_options = options_of(name)
    hints = typing.get_type_hints(_study(name).load())
    for key, value in options.items():
        if key not in accepted_options:
            meant = nearest(key, accepted_options) if accepted_options else "it has none"
            raise InputError(f"analysis {name!r} has no option {key!r}; {meant}")
        kinds = typing.get_args(hints[key]) or (hints[key],)
        accepted = tuple({float: (int, float)}.get(kind, kind) for kind in kinds)
        flat = tuple(k for kind in accepted for k in (kind if isinstance(kind, tuple) else (kind,)))
        wrong = not isinstance(value, flat) or (isinstance(value, bool) and bool not in flat)
        if wrong or (isinstance(value, float) and not math.isfinite(value)):
            expected = " or ".join("null" if k is type(None) else k.__name__ for k in kinds)
            raise InputError(f"option {key!r} of {name!r} is {value!r}; expected {expected}")
    return dict(options)


def run(name: str, model: HeadModel, task: Task | EncodedTask, progress: Progress = silent, **options: Any) -> Analysis:
    """Run a study.

    Raises:
        InputError: an unknown study or option, or a task that cannot be scored on this model.
    """
    options = check_options(name, options)
    encoded = (
        task if isinstance(task, EncodedTask) else encode(task, model.tokenizer, model.positions, model.vocabulary)
    )
    analysis: Analysis = _study(name).load()(model, encoded.examples, progress, **options)
    defaults = {key: parameter.default for key, parameter in options_of(name).items()}
    about = {"model": model.identity(), "task": encoded.summary(), "options": defaults | options}
    return Analysis(name, analysis.data, analysis.parts, about)


def require_free(folder: Path) -> None:
    """Refuse an output folder that holds something or cannot be written (InputError)."""
    require_new_folder(folder, "choose another --out")


def write(analysis: Analysis, folder: Path) -> None:
    """Write `analysis.json`, `figures/*.png` and `report.html` into a new folder.

    Raises:
        InputError: the folder exists with contents or cannot be written.
    """
    require_free(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(
        folder / "analysis.json", {"name": analysis.name, **analysis.about, **provenance(), "data": analysis.data}
    )
    for part in analysis.parts:
        if isinstance(part, Figure):
            (folder / "figures").mkdir(exist_ok=True)
            (folder / "figures" / f"{part.name}.png").write_bytes(part.png)
    render_page(
        folder / "report.html", "study.html.j2", title=analysis.name, about=_facts(analysis.about), parts=analysis.parts
    )


def _facts(about: Mapping[str, Any]) -> dict[str, str]:
    """What the page says of model, task and options."""
    if not about:
        return {}
    task = about["task"]
    return {
        "Model": about["model"]["name"],
        "Task": f"{task['name']}, {task['n_examples']} examples ({task['n_dropped']} left out)",
        **({"Answers": note} if (note := beginnings(task)) else {}),
        "Options": ", ".join(f"{key} {value}" for key, value in about["options"].items()) or "none",
    }
