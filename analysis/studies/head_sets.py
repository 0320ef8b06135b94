"""Studies of sets and paths of heads: how they add up, what they carry alone, and through whom they act."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from headtune.analysis.heads.ranking import SIGNS, elbow, rank
from headtune.analysis.interventions.counterfactuals import Counterfactuals
from headtune.analysis.interventions.intervention import Head, Intervention
from headtune.analysis.interventions.last_token import LastTokenRunner
from headtune.analysis.methods.patching import (
    INPUTS,
    answer_probabilities,
    every_head,
    head_to_head_effects,
    path_effects,
    set_probabilities,
)
from headtune.analysis.methods.registry import parse_method_names, score_examples
from headtune.analysis.methods.scores import Array, Scores, stack
from headtune.analysis.models.head_model import HeadModel
from headtune.analysis.reports.html import png_of
from headtune.analysis.tasks.tokenized import Encoded
from headtune.analysis.utils.errors import InputError
from headtune.analysis.utils.progress import Progress
from headtune.analysis.utils.stats import mean_interval

from .base import Analysis, Figure, Table

# Proportions of heads at which faithfulness is measured (Mueller et al. 2025, MIB).
PROPORTIONS = (0.0, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)


def _name(head: Head) -> str:
    return f"L{head[0]}H{head[1]}"


def _require_top(top: int) -> None:
    if top < 1:
        raise InputError(f"option 'top' is {top}; expected at least 1 head")


# --- how heads add up -------------------------------------------------------------------------------------------------


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
    _require_top(top)
    scores = score_examples(model, examples, methods, seed, progress)
    subjects = [encoded.example.subject for encoded in examples]
    listing = [index for index, encoded in enumerate(examples) if encoded.previous_tokens]
    data: dict[str, Any] = {}
    parts: list[str | Table | Figure] = [
        "Each step silences one more head, best first, together with those before it. The elbow is the number of heads "
        "farthest from the straight line between none and all: beyond it, a head adds less than average."
    ]
    for role in SIGNS:
        ranked = [(entry.layer, entry.head) for entry in rank(scores, role, top, seed=seed)]
        if not ranked:
            data[role] = {"heads": [], "reason": "no confirmed heads"}
            parts.append(f"No {role} heads were confirmed.")
            continue
        values = cumulative(model, examples, ranked, progress)
        quantity = "p_previous" if role == "suppression" and listing else "p_remaining"
        rows = listing if quantity == "p_previous" else range(len(examples))
        of_rows = values[quantity][list(rows)]
        curve = of_rows.mean(0)
        intervals = [mean_interval(column.tolist(), [subjects[i] for i in rows], seed=seed) for column in of_rows.T]
        bend = elbow(curve.tolist())
        data[role] = {
            "heads": [list(head) for head in ranked],
            "quantity": quantity,
            "curve": intervals,
            "elbow": bend,
        }
        table: list[list[str | float | None]] = [
            [str(k), "nothing" if k == 0 else _name(ranked[k - 1]), *_with(intervals[k])]
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
                _curve_png(range(len(curve)), {role: intervals}, "heads silenced", quantity, bend),
            )
        )
    return Analysis("elbow", data, parts)


def _with(interval: Mapping[str, Any]) -> list[float]:
    return [interval["mean"], *interval["ci"]]


def _curve_png(
    x: Sequence[float] | range,
    curves: Mapping[str, Sequence[Mapping[str, Any]]],
    xlabel: str,
    ylabel: str,
    mark: float | None = None,
    log: bool = False,
) -> bytes:
    from matplotlib.figure import Figure as Plot

    figure = Plot(figsize=(6, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for name, values in curves.items():
        mean, low, high = (np.array(part) for part in zip(*(_with(value) for value in values), strict=True))
        axes.plot(list(x), mean, marker="o", markersize=3, label=name)
        axes.fill_between(list(x), low, high, alpha=0.2)
    if mark is not None:
        axes.axvline(mark, linestyle="--", color="#666666")
    if log:
        axes.set_xscale("symlog", linthresh=0.001)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    if len(curves) > 1:
        axes.legend(frameon=False)
    return png_of(figure)


# --- what heads carry alone -------------------------------------------------------------------------------------------


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
                kept = set(ranking[:count])
                rows.append(Intervention(outputs={head: reference[head] for head in pairs if head not in kept}))
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
    scores = score_examples(model, examples, methods, seed, progress)
    references = Counterfactuals(model, examples, seed)
    rankings: dict[str, list[Head]] = {}
    names = [method.name for method in parse_method_names(methods)]
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
            _curve_png(PROPORTIONS, shown, "proportion of heads kept", "f", log=True),
        ),
    ]
    return Analysis("faithfulness", data, parts)


def order(values: NDArray[np.float32]) -> list[Head]:
    """All heads, highest value first."""
    n_heads = values.shape[1]
    return [divmod(int(index), n_heads) for index in np.argsort(-values, axis=None, kind="stable")]


# --- through whom heads act -------------------------------------------------------------------------------------------


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
    _require_top(top)
    asked = parse_receivers(receivers, model) if receivers else []
    references = Counterfactuals(model, examples, seed)
    subjects = [encoded.example.subject for encoded in examples]
    rows = [
        path_effects("path", model, examples[index], references.mean(index))
        for index in progress(range(len(examples)), "paths to the logits")
    ]
    scores = stack(rows, subjects)
    wanted = asked or _strongest(scores)
    rows = []
    for index in progress(range(len(examples)), "paths to heads"):
        row: dict[str, Array] = {}
        for receiver, through in wanted:
            row |= head_to_head_effects(model, examples[index], receiver, through, references.mean(index))
        rows.append(row)
    through_heads = stack(rows, subjects)
    scores = Scores(scores.by_example | through_heads.by_example, subjects)
    data: dict[str, Any] = {"scores": {name: mean.tolist() for name, mean in scores.means().items()}}
    parts: list[str | Table | Figure] = [
        "Positive: the sender, as it is, raises the quantity on this path. Effects are in logits of the answers' first "
        "tokens, the means over the examples with 95% intervals over subjects; END only."
    ]
    paths = ["path", *(f"path_{_name(receiver)}_{through}" for receiver, through in wanted)]
    for path in paths:
        for quantity in ("target", "previous"):
            if f"{path}.{quantity}" in scores:
                parts.append(_senders(scores, path, quantity, top))
    data["receivers"] = [[*receiver, through] for receiver, through in wanted]
    return Analysis("path_patching", data, parts)


def _senders(scores: Scores, path: str, quantity: str, top: int) -> Table:
    name = f"{path}.{quantity}"
    mean = scores.mean(name)
    low, high = scores.interval(name)
    senders = [head for head in order(np.abs(mean)) if mean[head] != 0][:top]
    rows: list[list[str | float | None]] = [
        [_name(head), float(mean[head]), float(low[head]), float(high[head])] for head in senders
    ]
    where = "the logits" if path == "path" else path.removeprefix("path_").replace("_", "'s ")
    what = "remaining answers" if quantity == "target" else "previous answers"
    return Table(f"To {where}: {what}", ["sender", "effect", "low", "high"], rows)


def parse_receivers(text: str, model: HeadModel) -> list[tuple[Head, str]]:
    """`L23H3:query,L23H4:value` -> `[((23, 3), "query"), ((23, 4), "value")]`.

    Raises:
        InputError: another form, or a head that the model does not have.
    """
    from headtune.analysis.models.hooks import require_heads

    found = []
    for part in text.split(","):
        match = re.fullmatch(r"L(\d+)H(\d+):(\w+)", part.strip())
        if not match or match[3] not in INPUTS:
            raise InputError(f"receiver {part.strip()!r} must look like L23H3:query, with one of {', '.join(INPUTS)}")
        head = (int(match[1]), int(match[2]))
        require_heads(model, [head])
        found.append((head, match[3]))
    return found


def _strongest(scores: Scores) -> list[tuple[Head, str]]:
    parse_method_names = [order(scores.mean("path.target"))[0]]
    if "path.previous" in scores:
        parse_method_names.append(order(-scores.mean("path.previous"))[0])
    return [(head, through) for head in dict.fromkeys(parse_method_names) for through in INPUTS]
