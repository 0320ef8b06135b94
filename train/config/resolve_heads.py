"""Which heads a run tunes: from a head set, identified now, learnt in a first stage, random, all, or listed."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headtune.analysis.heads.controls import best_in_layers, random_anywhere, random_like, random_sets
from headtune.analysis.heads.head_set import ROLES, HeadSet, RankedHead, provenance
from headtune.analysis.identify import pipeline
from headtune.analysis.identify.verification import output_norms
from headtune.analysis.methods.scores import Scores, load_means
from headtune.analysis.models.head_model import HeadModel
from headtune.analysis.reports.head_profiles import read_profiles, write_profiles
from headtune.analysis.tasks.messages import chat_as_json, chat_from_json, chat_in_words
from headtune.analysis.tasks.task import Task
from headtune.analysis.tasks.tokenized import encode
from headtune.analysis.utils.errors import CheckError, InputError
from headtune.analysis.utils.progress import Notify
from headtune.train.types import ProbeResult

from .methods import ControlConfig, HeadsConfig

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ResolvedHeads:
    """The heads of a run.

    Attributes:
        pairs: (layer, head), sorted.
        head_set: the one they come from, if any.
        means: its scores, if any, `name -> [n_layers, n_heads]`.
        probed: what probes read from the heads to choose them, of use to steering along the same directions.
        scores: of every example, where the heads were identified now.
        portraits: the file of the head set's profiles, if any.
    """

    pairs: list[tuple[int, int]]
    head_set: HeadSet | None = None
    means: Mapping[str, Any] | None = None
    probed: ProbeResult | None = None
    scores: Scores | None = None
    portraits: Path | None = None


def resolve_heads(
    block: HeadsConfig,
    model: HeadModel,
    task: Task,
    progress: pipeline.Progress = pipeline.silent,
    notify: Notify = log.info,
) -> ResolvedHeads:
    """Resolve a recipe's `heads` block on a model; nothing is written.

    Raises:
        InputError: heads that do not exist on this model, a head set of another model, more heads than it could hold.
    """
    from headtune.analysis.models.hooks import require_heads

    if block.every:
        return ResolvedHeads([(layer, head) for layer in range(model.n_layers) for head in range(model.n_heads)])
    if block.pairs:
        require_heads(model, block.pairs)
        if len(set(block.pairs)) < len(block.pairs):
            raise InputError(
                f"heads.list {[list(pair) for pair in block.pairs]} names a head twice; remove the repeats"
            )
        return ResolvedHeads(sorted(block.pairs))
    if block.identify is not None:
        part = task.limited(block.identify.max_examples)
        # Roles beyond the two that every head set has are ranked where the recipe asks for one.
        roles = None if block.role in ("both", *ROLES) else [block.role]
        result = pipeline.identify(model, part, block.identify.method, top=block.top, progress=progress, roles=roles)
        pairs = result.heads.top_heads(block.role, block.top, notify=notify)
        return ResolvedHeads(pairs, result.heads, result.scores.means(), scores=result.scores)
    source = block.random or block.control
    path = Path(block.source or (source.like if source else ""))
    heads = HeadSet.load(path)
    for warning in heads.check_model(model.identity()):
        log.warning(warning)
    before = chat_from_json(heads.task.get("chat_template"))
    if chat_as_json(before) != chat_as_json(task.chat_template):
        here = chat_in_words(task.chat_template)
        notify(f"heads of {path} were chosen on {chat_in_words(before)}, and task {task.name} gives {here}")
    pairs = heads.top_heads(block.role, block.top, str(path), notify)
    if block.random is not None:
        like = set(pairs)
        pairs = sorted(random_like(pairs, model.n_heads, block.random.seed))
        if shared := [f"L{layer}H{head}" for layer, head in pairs if (layer, head) in like]:
            notify(
                f"{len(shared)} of {len(pairs)} random heads are chosen ones, for want of others: {', '.join(shared)}"
            )
    if block.control is not None:
        chosen, kind = pairs, block.control.kind
        pairs = control_heads(block.control, chosen, heads, path, model, task)
        if kind != "anywhere" and (moved := _moved(chosen, pairs)):
            notify(f"heads to compare with: the layers of the chosen ones have too few others, so {moved}")
    scores = path.parent / "scores.safetensors" if path.is_file() else path / "scores.safetensors"
    portraits = scores.with_name("portraits.json")
    return ResolvedHeads(
        pairs,
        heads,
        load_means(scores, heads.shape) if scores.is_file() else None,
        portraits=portraits if portraits.is_file() else None,
    )


def control_heads(
    control: ControlConfig,
    chosen: Sequence[tuple[int, int]],
    heads: HeadSet,
    path: Path,
    model: HeadModel,
    task: Task,
) -> list[tuple[int, int]]:
    """Heads to compare `chosen` with, sorted; see `ControlConfig`.

    Raises:
        InputError: the model has too few other heads, or a head set without scores for `nearest_zero`.
    """
    roles = [(entry.layer, entry.head) for entries in heads.roles.values() for entry in entries]
    shape = (model.n_layers, model.n_heads)
    if control.kind == "anywhere":
        return random_anywhere(chosen, shape, control.seed, roles)
    pairs: Sequence[tuple[int, int]]
    if control.kind == "random":
        pairs = next(iter(random_sets(chosen, shape, 1, control.seed, roles)), ())
    elif control.kind == "largest":
        examples = encode(task, model.tokenizer, model.positions, model.vocabulary).examples
        pairs = best_in_layers(-output_norms(model, examples), chosen, roles, neighbours=True)
    else:
        pairs = best_in_layers(np.abs(_ranking_scores(heads, path)), chosen, roles, neighbours=True)
    if len(pairs) < len(chosen):
        raise InputError(
            f"heads.control {control.kind}: {len(chosen)} heads that share none with the roles of {str(path)!r} are "
            f"asked for, and the model has {len(pairs)}; lower heads.top"
        )
    return sorted(pairs)


def _ranking_scores(heads: HeadSet, path: Path) -> Any:
    """`[n_layers, n_heads]`: the largest of the roles' ranking scores, each `|score| / max |score|` over all heads."""
    file = (path.parent if path.is_file() else path) / "scores.safetensors"
    if not file.is_file():
        raise InputError(
            f"heads.control nearest_zero needs the scores of all heads, and {str(file)!r} does not exist; "
            "run headtune identify again, or choose another kind"
        )
    means = load_means(file, heads.shape)
    rules = heads.method.get("parameters", {}).get("rules", {})
    names = [rule["rank"] for rule in rules.values() if rule.get("rank") in means] or sorted(means)[:1]
    sizes = [np.abs(np.asarray(means[name])) for name in names]
    # Roles may be ranked by quantities of different scales (a logit and an attention weight).
    return np.max([size / max(float(size.max()), np.finfo(float).tiny) for size in sizes], axis=0)


def _moved(chosen: Sequence[tuple[int, int]], pairs: Sequence[tuple[int, int]]) -> str:
    layers, others = ([layer for layer, _ in each] for each in (chosen, pairs))
    extra = sorted((Counter(others) - Counter(layers)).elements())
    return f"layers {', '.join(str(layer) for layer in extra)} stand in" if extra else ""


def write_head_set(resolved: ResolvedHeads, folder: Path) -> None:
    """Write the head set that the heads come from, where there is one, to a run's folder."""
    if resolved.scores is not None:
        resolved.scores.save(folder / "scores.safetensors")
    if resolved.head_set is not None:
        resolved.head_set.save(folder)
    if resolved.portraits is not None:
        write_profiles(read_profiles(resolved.portraits), folder / "portraits.json")


def selected(
    name: str,
    scores: dict[str, Tensor],
    ranked: tuple[RankedHead, ...],
    seed: int,
    model: HeadModel,
    data: dict[str, Any],
    method: dict[str, Any],
) -> ResolvedHeads:
    """Ranked heads as a head set with the one role `selected`."""
    ranking = HeadSet(
        model=model.identity(),
        task=data,
        method={"name": name, "seed": seed, **method},
        roles={"selected": ranked},
        **provenance(),
    )
    means = {quantity: np.ascontiguousarray(values.float().numpy()) for quantity, values in scores.items()}
    return ResolvedHeads(sorted((entry.layer, entry.head) for entry in ranked), ranking, means)


def ranked_heads(scores: Tensor, top: int, rate: str) -> tuple[RankedHead, ...]:
    """The `top` heads by score, best first; CheckError where training has left no numbers."""
    if not torch.isfinite(scores).all():
        raise CheckError(f"a head's score is not finite after training; lower {rate}")
    order = scores.flatten().argsort(descending=True, stable=True)[:top].tolist()
    pairs = (divmod(index, scores.shape[1]) for index in order)
    return tuple(RankedHead(layer, head, float(scores[layer, head]), None) for layer, head in pairs)


def keep_heads(resolved: ResolvedHeads, folder: Path) -> None:
    """Write a run's own head set and its scores."""
    assert resolved.head_set is not None and resolved.means is not None
    Scores({}, [], dict(resolved.means)).save(folder / "scores.safetensors")
    resolved.head_set.save(folder)
