"""The study `path_patching`: through whom heads act."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from headtune.analysis.interventions.counterfactuals import Counterfactuals
from headtune.analysis.interventions.intervention import Head
from headtune.analysis.methods.patching import INPUTS, head_to_head_effects, path_effects
from headtune.analysis.methods.scores import Array, Scores, stack
from headtune.analysis.models.head_model import HeadModel
from headtune.analysis.tasks.tokenized import Encoded
from headtune.analysis.utils.errors import InputError
from headtune.analysis.utils.progress import Progress

from .base import Analysis, Figure, Table
from .ranked_heads import head_name, order, require_top


def path_patching(
    model: HeadModel,
    examples: Sequence[Encoded],
    progress: Progress,
    *,
    receivers: str = "",
    top: int = 8,
    seed: int = 0,
) -> Analysis:
    """Paths from every head to the logits, and to single heads' queries, keys and values at END.

    A sender is set to its mean over other subjects; all other heads keep their outputs, MLPs are recomputed.

    Args:
        receivers: such as `L23H3:query,L23H4:value`; default: query, key and value of the two strongest heads on the
            path to the logits (the one that raises the remaining answers most, the one that lowers the previous answers
            most).
        top: senders shown for each receiver.
    """
    require_top(top)
    asked = parse_receivers(receivers, model) if receivers else []
    references = Counterfactuals(model, examples, seed)
    subjects = [encoded.example.subject for encoded in examples]
    rows = [
        path_effects("path", model, examples[index], references.mean(index))
        for index in progress(range(len(examples)), "paths to the logits")
    ]
    scores = stack(rows, subjects)
    paths_to = asked or _strongest(scores)
    rows = []
    for index in progress(range(len(examples)), "paths to heads"):
        row: dict[str, Array] = {}
        for receiver, through in paths_to:
            row |= head_to_head_effects(model, examples[index], receiver, through, references.mean(index))
        rows.append(row)
    through_heads = stack(rows, subjects)
    scores = Scores(scores.by_example | through_heads.by_example, subjects)
    data: dict[str, Any] = {"scores": {name: mean.tolist() for name, mean in scores.means().items()}}
    parts: list[str | Table | Figure] = [
        "Positive: the sender, as it is, raises the quantity on this path. Effects are in logits of the answers' first "
        "tokens, the means over the examples with 95% intervals over subjects; END only."
    ]
    paths = ["path", *(f"path_{head_name(receiver)}_{through}" for receiver, through in paths_to)]
    for path in paths:
        for quantity in ("target", "previous"):
            if f"{path}.{quantity}" in scores:
                parts.append(_senders(scores, path, quantity, top))
    data["receivers"] = [[*receiver, through] for receiver, through in paths_to]
    return Analysis("path_patching", data, parts)


def _senders(scores: Scores, path: str, quantity: str, top: int) -> Table:
    name = f"{path}.{quantity}"
    mean = scores.mean(name)
    low, high = scores.interval(name)
    senders = [head for head in order(np.abs(mean)) if mean[head] != 0][:top]
    rows: list[list[str | float | None]] = [
        [head_name(head), float(mean[head]), float(low[head]), float(high[head])] for head in senders
    ]
    receiver = "the logits" if path == "path" else path.removeprefix("path_").replace("_", "'s ")
    what = "remaining answers" if quantity == "target" else "previous answers"
    return Table(f"To {receiver}: {what}", ["sender", "effect", "low", "high"], rows)


def parse_receivers(text: str, model: HeadModel) -> list[tuple[Head, str]]:
    """`L23H3:query,L23H4:value` -> `[((23, 3), "query"), ((23, 4), "value")]`.

    Raises:
        InputError: another form, or a head that the model does not have.
    """
    from headtune.analysis.models.hooks import require_heads

    receivers = []
    for part in text.split(","):
        match = re.fullmatch(r"L(\d+)H(\d+):(\w+)", part.strip())
        if not match or match[3] not in INPUTS:
            raise InputError(f"receiver {part.strip()!r} must look like L23H3:query, with one of {', '.join(INPUTS)}")
        head = (int(match[1]), int(match[2]))
        require_heads(model, [head])
        receivers.append((head, match[3]))
    return receivers


def _strongest(scores: Scores) -> list[tuple[Head, str]]:
    strongest = [order(scores.mean("path.target"))[0]]
    if "path.previous" in scores:
        strongest.append(order(-scores.mean("path.previous"))[0])
    return [(head, through) for head in dict.fromkeys(strongest) for through in INPUTS]
