"""The study `faithfulness`: what the best heads carry alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from headtune.analysis.interventions.counterfactuals import Counterfactuals
from headtune.analysis.interventions.intervention import Head, Intervention
from headtune.analysis.interventions.last_token import LastTokenRunner
from headtune.analysis.methods.patching import answer_probabilities, every_head
from headtune.analysis.methods.registry import parse_method_names, score_examples
from headtune.analysis.models.head_model import HeadModel
from headtune.analysis.tasks.tokenized import Encoded
from headtune.analysis.utils.errors import InputError
from headtune.analysis.utils.progress import Progress

from .base import Analysis, Figure, Table
from .curves import curve_png
from .ranked_heads import order

# Proportions of heads at which faithfulness is measured (Mueller et al. 2025, MIB).
PROPORTIONS = (0.0, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


def behaviour(logits: torch.Tensor, encoded: Encoded) -> torch.Tensor:
    """The metric of faithfulness, `[rows]`: mean logit of the remaining answers less that of the whole vocabulary.

    The second part takes out what moves all logits together. Not less the previous answers: heads that recall raise
    both, others lower the previous ones, and the difference is near zero, or of either sign.
    """
    return answer_probabilities(logits, encoded).logits["target"] - logits.float().mean(-1)


def faithfulness_curves(
    model: HeadModel,
    references: Counterfactuals,
    rankings: Mapping[str, Sequence[Head]],
    progress: Progress,
    proportions: Sequence[float] = PROPORTIONS,
) -> dict[str, NDArray[np.float64]]:
    """f(C) = (m(C) - m(empty)) / (m(N) - m(empty)) by ranking and proportion of heads kept.

    C keeps the best k heads at END; every other head is set to its mean over other subjects there. m is `behaviour`,
    averaged over examples before the ratio (a ratio of means: single examples can have a denominator near zero).

    Returns:
        ranking -> `[examples, len(proportions)]` m(C); use `faithfulness_of` for f.
    """
    pairs = every_head(model)
    counts = [round(share * len(pairs)) for share in proportions]
    result: dict[str, list[NDArray[np.float64]]] = {name: [] for name in rankings}
    for index in progress(range(len(references.examples)), "keeping the best heads"):
        encoded, reference = references.examples[index], references.mean(index)
        runner = LastTokenRunner(model, encoded.tokens)
        for name, ranking in rankings.items():
            rows = []
            for count in counts:
                best = set(ranking[:count])
                rows.append(Intervention(outputs={head: reference[head] for head in pairs if head not in best}))
            result[name].append(behaviour(runner.run(rows).logits, encoded).double().cpu().numpy())
    return {name: np.stack(values) for name, values in result.items()}


def faithfulness_of(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """f by proportion, from `[examples, proportions]` m(C) whose first column keeps nothing and whose last keeps
    all."""
    mean = values.mean(0)
    gap = mean[-1] - mean[0]
    if abs(gap) < 1e-6:
        raise InputError("replacing all heads at END by their means changes nothing here, so faithfulness is undefined")
    return (mean - mean[0]) / gap


def area(proportions: Sequence[float], values: NDArray[np.float64]) -> float:
    """Trapezoidal area over the proportion of heads kept."""
    return float(np.trapezoid(values, proportions))


def faithfulness(
    model: HeadModel, examples: Sequence[Encoded], progress: Progress, *, methods: str = "dla,ablation", seed: int = 0
) -> Analysis:
    """How much of the behaviour the best k heads carry while all others are set to their means at END.

    CPR is the area under f with heads ranked by signed score, CMD the area of |1 - f| with heads ranked by absolute
    score (0 is best; lead with CMD, CPR is not bounded by 1). After Mueller et al. 2025 (MIB), on heads, at END.
    """
    names = [method.name for method in parse_method_names(methods)]
    if other := [name for name in names if "@" in name]:
        raise InputError(f"method {other[0]!r} ranks by another metric than logits, which f is not; leave the @ out")
    scores = score_examples(model, examples, methods, seed, progress)
    references = Counterfactuals(model, examples, seed)
    rankings: dict[str, list[Head]] = {}
    for name in names:
        values = scores.mean(f"{name}.target")
        rankings[f"{name} signed"] = order(values)
        rankings[f"{name} absolute"] = order(np.abs(values))
    shuffled = np.random.default_rng(seed).permutation(len(every_head(model)))
    rankings["random"] = [every_head(model)[i] for i in shuffled]
    curves = faithfulness_curves(model, references, rankings, progress)
    data: dict[str, Any] = {"proportions": list(PROPORTIONS), "methods": {}}
    rows: list[list[str | float | None]] = []
    shown = {}
    for name in [*names, "random"]:
        signed = faithfulness_of(curves["random" if name == "random" else f"{name} signed"])
        absolute = faithfulness_of(curves["random" if name == "random" else f"{name} absolute"])
        cpr, cmd = area(PROPORTIONS, signed), area(PROPORTIONS, np.abs(1 - absolute))
        data["methods"][name] = {"CMD": cmd, "CPR": cpr, "signed": signed.tolist(), "absolute": absolute.tolist()}
        rows.append([name, cmd, cpr])
        shown[name] = [{"mean": value, "ci": [value, value]} for value in absolute]
    parts: list[str | Table | Figure] = [
        "The best heads are kept at END and all others set to their means over other subjects. f is the share of the "
        "behaviour (mean logit of the remaining answers less that of the vocabulary) that is left: 0 with no head "
        "kept, 1 with all. "
        "Heads are ranked and judged on the same prompts here.",
        Table("Areas", ["ranking", "CMD (0 is best)", "CPR"], rows),
        Figure(
            "faithfulness",
            "f by proportion of heads kept, ranked by absolute score.",
            curve_png(PROPORTIONS, shown, "proportion of heads kept", "f", log=True),
        ),
    ]
    return Analysis("faithfulness", data, parts)
