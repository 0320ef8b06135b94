"""The study `elbow`: how heads add up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from headtune.analysis.heads.ranking import SIGNS, elbow, rank
from headtune.analysis.interventions.intervention import Head
from headtune.analysis.methods.patching import set_probabilities
from headtune.analysis.methods.registry import score_examples
from headtune.analysis.models.head_model import HeadModel
from headtune.analysis.tasks.tokenized import Encoded
from headtune.analysis.utils.progress import Progress
from headtune.analysis.utils.stats import mean_interval

from .base import Analysis, Figure, Table
from .curves import curve_png, with_bounds
from .ranked_heads import head_name, require_top


def cumulative(
    model: HeadModel, examples: Sequence[Encoded], ranked: Sequence[Head], progress: Progress
) -> dict[str, NDArray[np.float64]]:
    """p(remaining), p(previous) with the best 0, 1, 2, ... of `ranked` silenced at END: `[examples, 1 + ranked]`
    each."""
    sets = [ranked[:k] for k in range(len(ranked) + 1)]
    values = np.array([set_probabilities(model, encoded, sets) for encoded in progress(examples, "silencing sets")])
    return {"p_remaining": values[..., 0].astype(float), "p_previous": values[..., 1].astype(float)}


def elbow_study(
    model: HeadModel,
    examples: Sequence[Encoded],
    progress: Progress,
    *,
    methods: str = "all",
    top: int = 16,
    seed: int = 0,
) -> Analysis:
    """Silence the best 1, 2, 3, ... heads of each role together, and find where the effect bends."""
    require_top(top)
    scores = score_examples(model, examples, methods, seed, progress)
    subjects = [encoded.example.subject for encoded in examples]
    listing = [index for index, encoded in enumerate(examples) if encoded.previous_tokens]
    data: dict[str, Any] = {}
    parts: list[str | Table | Figure] = [
        "Each step silences one more head, best first, together with those before it. The elbow is the number of heads "
        "farthest from the straight line between none and all: beyond it, a head adds less than average."
    ]
    for role in SIGNS:
        ranked = [(entry.layer, entry.head) for entry in rank(scores, role, top)]
        if not ranked:
            data[role] = {"heads": [], "reason": "no confirmed heads"}
            parts.append(f"No {role} heads were confirmed.")
            continue
        # The curve, its intervals and its bend.
        values = cumulative(model, examples, ranked, progress)
        quantity = "p_previous" if role == "suppression" and listing else "p_remaining"
        rows = listing if quantity == "p_previous" else range(len(examples))
        of_rows = values[quantity][list(rows)]
        curve = of_rows.mean(0)
        intervals = [mean_interval(column.tolist(), [subjects[i] for i in rows]) for column in of_rows.T]
        bend = elbow(curve.tolist())
        data[role] = {
            "heads": [list(head) for head in ranked],
            "quantity": quantity,
            "curve": intervals,
            "elbow": bend,
        }
        # What the page shows.
        table: list[list[str | float | None]] = [
            [str(k), "nothing" if k == 0 else head_name(ranked[k - 1]), *with_bounds(intervals[k])]
            for k in range(len(ranked) + 1)
        ]
        parts.append(
            Table(f"{role.capitalize()}: elbow at {bend}", ["k", "head added", quantity, "low", "high"], table)
        )
        parts.append(
            Figure(
                f"elbow_{role}",
                f"{quantity} with the best k {role} heads silenced at END; band: 95% interval over subjects; dashed: "
                f"the elbow, k = {bend}.",
                curve_png(range(len(curve)), {role: intervals}, "heads silenced", quantity, bend),
            )
        )
    return Analysis("elbow", data, parts)
