"""A recipe with its identified heads beside every control: `headtune sweep RECIPE --controls`.

| arm | heads |
|---|---|
| `identified` | the recipe's own, from a head set |
| `random` | as many of the same layers at random, sharing none with any role's heads; a draw a run |
| `anywhere` | as many of the whole model at random; a draw a run |
| `nearest_zero` | those of the same layers with scores nearest to zero |
| `largest` | the other heads of the same layers that write most |
| `role_NAME` | another role's heads |
| `lora_smallest` | rank 1 on the output projection of one layer: the nearest to as few numbers |
| `lora`, `norms` | LoRA r=8 on all linear layers, and the gains of all norms, each at a rate of its own |
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from headtune.analysis.heads.controls import random_sets
from headtune.analysis.heads.head_set import HeadSet
from headtune.analysis.models.loading import load_architecture, load_model
from headtune.analysis.utils.errors import InputError
from headtune.analysis.utils.progress import Notify
from headtune.train.config import recipe as recipes
from headtune.train.config.heads import HeadsConfig
from headtune.train.config.method_registry import method_rules
from headtune.train.config.resolve_heads import resolve_heads, write_head_set
from headtune.train.config.resolve_tasks import tasks_of
from headtune.train.config.schema import Recipe

from .sweep import Cell, cells

DRAWS = 3
_MEASURED = ("model", "task", "evaluation")  # blocks of a recipe that the base model's numbers depend on
_SHARED = ("model", "task", "evaluation", "training", "tracking", "plugins")  # blocks of LoRA's and norms' recipes
# Those of recipes lora/one_to_many and ln/relations; ten times LoRA's for the smallest one. Not searched.
RATES = {"lora": 5e-4, "lora_smallest": 5e-3, "norms": 3e-3}


@dataclass(frozen=True)
class Arm:
    """What is run beside the identified heads.

    Attributes:
        overrides: seed -> what makes an arm of the recipe.
        recipe: a recipe in its place, written to this file.
    """

    name: str
    overrides: Callable[[int], list[str]]
    drawn: bool = False
    recipe: Path | None = None
    content: dict[str, Any] | None = None


def head_set_of(recipe: Recipe, out: Path, notify: Notify) -> Path:
    """The head set of a recipe's heads: the one it names, or identified now on its training task, into `out`/heads.

    Raises:
        InputError: heads of another source; `out`/heads holds heads of another model, method or role.
    """
    block = recipe.heads
    if block is not None and block.source is not None:
        return Path(block.source)
    if block is None or block.identify is None:
        raise InputError("--controls compares identified heads; give heads: {from: ...} or heads: {identify: ...}")
    folder = out / "heads"
    if (folder / "heads.json").is_file():
        _require_asked(HeadSet.load(folder), recipe, block, folder)
    else:
        notify(f"identifying heads once for all runs, into {folder}")
        named = recipe.model
        model = load_model(named.name, named.dtype, None, named.revision, named.trust_remote_code)
        write_head_set(resolve_heads(block, model, tasks_of(recipe.task)[0], notify=notify), folder)
    return folder


def _require_asked(heads: HeadSet, recipe: Recipe, block: HeadsConfig, folder: Path) -> None:
    """Refuse heads that an earlier call identified otherwise (InputError)."""
    assert block.identify is not None
    task = tasks_of(recipe.task)[0].limited(block.identify.max_examples)
    settings = {
        "model": (heads.model.get("name"), recipe.model.name),
        "method": (heads.method.get("name"), block.identify.method),
        "training task or max_examples": (heads.task.get("sha256"), task.sha256),
    }
    changed = [name for name, (old, new) in settings.items() if old != new]
    if block.role not in ("both", *heads.roles):
        changed.append("role")
    if changed:
        raise InputError(
            f"{str(folder)!r} holds heads that were identified with another {', '.join(changed)}; choose another "
            "--out, or remove it"
        )


def _tell_equal_draws(block: HeadsConfig, path: Path, n_draws: int, notify: Notify) -> None:
    """Say so where the layers of the chosen heads hold fewer random sets than are drawn."""
    heads = HeadSet.load(path)
    chosen = heads.top_heads(block.role, block.top, notify=lambda _: None)
    roles = [(entry.layer, entry.head) for entries in heads.roles.values() for entry in entries]
    draws = [tuple(random_sets(chosen, heads.shape, 1, draw, roles)) for draw in range(n_draws)]
    if (different := len({*draws})) < n_draws:
        notify(
            f"{n_draws} draws of random heads are only {different} different: these layers hold few other heads; "
            "the interval over draws is too narrow, so choose fewer heads or look at anywhere"
        )


def control_cells(
    name: str,
    grid: Sequence[str],
    n_seeds: int,
    out: Path,
    overrides: Sequence[str] = (),
    n_draws: int = DRAWS,
    notify: Notify = print,
    in_turn: bool = True,
) -> list[Cell]:
    """The runs of a recipe and of its controls, all checked.

    Args:
        n_seeds: seeds of every arm; of a recipe that does not train, one.
        n_draws: of the random heads: run i of an arm has draw i and seed i modulo `n_seeds`.
        in_turn: they are run one after the other, and the first one measures the base model for all that measure it
            alike; else each measures it.

    Raises:
        InputError: as `sweep.cells`; heads that are not identified; a grid over the heads themselves.
    """
    recipe = recipes.load_recipe(name, overrides)
    if any(axis.partition("=")[0] == "heads" for axis in grid):
        raise InputError("--controls sets heads itself; give --grid heads.top=... or heads.role=...")
    path = head_set_of(recipe, out, notify)
    assert recipe.heads is not None
    _tell_equal_draws(recipe.heads, path, max(n_seeds, n_draws), notify)
    trains = method_rules(recipe.recipe).trains
    result: list[Cell] = []
    for arm in _arms(recipe, recipe.heads, path, out):
        if arm.content is not None and arm.recipe is not None:
            arm.recipe.parent.mkdir(parents=True, exist_ok=True)
            arm.recipe.write_text(yaml.safe_dump(arm.content, sort_keys=False), encoding="utf-8")
        seeds = n_seeds if trains else 1
        axes = [axis for axis in grid if arm.recipe is None or not axis.startswith(("heads.", "method."))]
        for run in range(max(seeds, n_draws) if arm.drawn else seeds):
            settings = [*([] if arm.recipe else overrides), *arm.overrides(run)]
            label = f"{arm.name}-d{run}" if arm.drawn else arm.name
            source = name if arm.recipe is None else str(arm.recipe)
            made = cells(source, axes, 1, out, settings, seeds=[run % seeds], prefix=label)
            result += [replace(cell, recipe=source) for cell in made]
    return _measured_once(result) if in_turn else result


def _measured_once(every: Sequence[Cell]) -> list[Cell]:
    """The first of each model, task and way of measuring measures the base model for the others."""
    first: dict[str, Cell] = {}
    result = []
    for cell in every:
        varied = {key: value for key, value in cell.values.items() if key.partition(".")[0] in _MEASURED}
        other = first.setdefault(json.dumps(varied, sort_keys=True), cell)
        before = f"evaluation.before={json.dumps(str(other.folder / 'evaluation.json'))}"
        result.append(cell if other is cell else replace(cell, overrides=(*cell.overrides, before)))
    return result


def _arms(recipe: Recipe, block: HeadsConfig, path: Path, out: Path) -> Iterator[Arm]:
    chosen = {"role": block.role, "top": block.top}

    def heads(**source: Any) -> list[str]:
        return [f"heads={json.dumps({**source, **chosen})}"]

    def control(kind: str) -> Callable[[int], list[str]]:
        return lambda draw: heads(control={"like": str(path), "kind": kind, "seed": draw})

    yield Arm("identified", lambda _: heads(**{"from": str(path)}))
    yield Arm("random", control("random"), drawn=True)
    yield Arm("anywhere", control("anywhere"), drawn=True)
    yield Arm("nearest_zero", lambda _: control("nearest_zero")(0))
    yield Arm("largest", lambda _: control("largest")(0))
    head_set = HeadSet.load(path)
    for role, entries in head_set.roles.items():
        if role != block.role and block.role != "both" and entries:
            other = {"from": str(path), "role": role, "top": block.top}
            yield Arm(f"role_{role}", lambda _, other=other: [f"heads={json.dumps(other)}"])  # type: ignore[misc]
    if method_rules(recipe.recipe).trains:
        yield from _without_heads(recipe, head_set, block, out)


def _without_heads(recipe: Recipe, head_set: HeadSet, block: HeadsConfig, out: Path) -> Iterator[Arm]:
    """LoRA and norms, with the same objective, data and steps."""
    data = recipe.dump()
    method = {key: data["method"][key] for key in ("objective", "answer_set", "dpo") if key in data["method"]}
    layer = max(layer for layer, _ in head_set.top_heads(block.role, block.top, notify=lambda _: None))
    named = recipe.model
    projection = load_architecture(named.name, named.revision, named.trust_remote_code).output_projection
    sizes: dict[str, dict[str, Any]] = {
        "lora_smallest": {"r": 1, "alpha": 2, "target_modules": [projection], "layers": [layer]},
        "lora": {"r": 8, "alpha": 16},
        "norms": {},
    }
    for name, size in sizes.items():
        content: dict[str, Any] = {key: data[key] for key in _SHARED if key in data}
        content["training"] = {**content.get("training", {}), "learning_rate": RATES[name]}
        content |= {"recipe": "ln" if name == "norms" else "lora", "method": {**method, **size}}
        yield Arm(name, lambda _: [], recipe=out / "recipes" / f"{name}.yaml", content=content)
