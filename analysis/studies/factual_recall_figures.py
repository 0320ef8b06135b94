"""What `factual_recall` shows: its tables and figures, each with how to read it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from headtune.analysis.reports.html import number, png_of, with_interval

from .base import Figure, Table
from .token_frequency import Frequencies

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

_BLUE, _RED, _GREY = "#2a6f97", "#b3261e", "#8a8a8a"


def page(data: dict[str, Any], table: Frequencies, intercept_logits: ArrayLike) -> list[str | Table | Figure]:
    """The parts of the report.

    Args:
        data: what the study found, `Analysis.data`.
        table: the token frequencies used.
        intercept_logits: `[vocabulary]` the last MLP's intercept, decoded.
    """
    return [
        _in_words(data),
        _arguments(data["argument"]),
        _argument_map(data["argument"]),
        _mlp_table(data["mlp"]),
        _r2(data["mlp"]),
        _coefficients(data["mlp"]),
        _by_layer(data["overconfidence"]),
        _to_first(data["overconfidence"]),
        _correlations(data["frequency"]),
        _scatter(table, intercept_logits),
        _knobs(data["knobs"]),
    ]


def _in_words(data: dict[str, Any]) -> str:
    late, n = data["overconfidence"], data["n"]
    low, high = late["fall"]["ci"]
    judged = "it falls" if low > 0 else "it rises" if high < 0 else "no fall shows"
    looking = sum(entry["mean"] > data["knobs"]["tau"] for entry in late["attention_to_first"])
    return (
        f"{n['examples']} prompts about {n['subjects']} subjects, of which {len(n['held_out_subjects'])} were held "
        "out for MLP fits and knobs. Decoded layer by layer, the answers' probability is highest after layer "
        f"{late['peak_layer']} and {number(late['p_by_layer'][-1]['mean'])} at the end; from the highest layer "
        f"(chosen on other subjects) to the last the difference is {_interval(late['fall'])}: {judged}. {looking} of "
        f"{len(late['attention_to_first'])} last-layer heads give the first position more than "
        f"{number(data['knobs']['tau'])} of their attention."
    )


def _interval(value: dict[str, Any]) -> str:
    return with_interval(value["mean"], value["ci"])


def _canvas(width: float, height: float) -> tuple[Canvas, Axes]:
    # Not pyplot: it chooses a backend for the whole process and keeps every figure.
    from matplotlib.figure import Figure as Canvas
    from matplotlib.ticker import MaxNLocator

    canvas = Canvas(figsize=(width, height), layout="constrained")
    axes = canvas.add_subplot()
    axes.xaxis.set_major_locator(MaxNLocator(nbins=20, integer=True))
    return canvas, axes


def _heat(name: str, values: ArrayLike, title: str, limit: float, caption: str) -> Figure:
    """One number per head: layers down, heads across, zero white; beyond `limit` the colour is full."""
    from matplotlib.ticker import MaxNLocator

    matrix = np.asarray(values, dtype=np.float64)
    n_layers, n_heads = matrix.shape
    canvas, axes = _canvas(min(max(2.5 + 0.3 * n_heads, 4.5), 16), min(max(1.6 + 0.2 * n_layers, 3), 20))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=20, integer=True))
    image = axes.imshow(matrix, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
    axes.set(title=title, xlabel="head", ylabel="layer")
    canvas.colorbar(image, ax=axes, extend="both" if np.abs(matrix).max() > limit else "neither")
    return Figure(name, caption, png_of(canvas))


# --- argument-passing heads -------------------------------------------------------------------------------------------


def _arguments(block: dict[str, Any]) -> Table:
    rows = [
        [
            f"L{row['layer']}H{row['head']}",
            _interval(row["ratio_of_means"]),
            _interval(row["mean_of_ratios"]),
            row["attention_to_subject"],
            row["mlp_coefficient"],
        ]
        for row in block["top"]
    ]
    return Table(
        "Argument-passing heads",
        [
            "head",
            "ratio of means, % [95%]",
            "mean of ratios, % [95%]",
            "attention from END to the subject",
            "c of its layer's MLP",
        ],
        rows,
        "How far the answers' logit, against the vocabulary's mean, falls, in percent, when the head at END is set "
        "to its mean over other subjects, other heads frozen, MLPs recomputed; positive = the head raises the answer. "
        "Ratio of means: the mean fall over the prompts, in percent of the mean logit difference (the negative of the "
        "authors' score; heads are in its order). Mean of ratios: each prompt's fall in percent of its own difference, "
        "meaned. A head that passes the argument has an interval above 0 and looks at "
        "the subject, or at a place that knows it. c: see the MLPs below.",
    )


def _argument_map(block: dict[str, Any]) -> Figure:
    limit = float(np.abs(block["ratio_of_means"]).max()) or 1.0
    return _heat(
        "argument_heads",
        block["ratio_of_means"],
        "fall of the mean LD, %",
        limit,
        "Red: the answer rests on what this head knows of the subject. Blue: the head's knowledge of the subject "
        "lowers the answer. White: the answer does not pass here, or passes elsewhere as well.",
    )


# --- MLPs -------------------------------------------------------------------------------------------------------------


def _mlp_table(block: dict[str, Any]) -> Table:
    rows: list[list[str | float | None]] = []
    for layer, c in enumerate(np.asarray(block["heads"])):
        up, down = int(c.argmax()), int(c.argmin())
        tokens = ", ".join(repr(token) for token in block["tokens"][layer])
        rows.append(
            [
                str(layer),
                block["held_out_r2"][layer],
                f"H{up} {number(c[up])}",
                f"H{down} {number(c[down])}",
                block["residual"][layer],
                tokens,
            ]
        )
    return Table(
        "MLPs as a linear function of what they are given",
        [
            "layer",
            "R² on held-out subjects",
            "largest c",
            "smallest c",
            "c of the residual stream",
            "the intercept's top tokens",
        ],
        rows,
        "MLP output at END = sum of c times head outputs + c times the residual stream + intercept. c above 0 "
        "amplifies what the head brought, c near -1 erases it; the intercept is what the MLP adds for every subject, "
        "decoded: in a middle or late layer, the function that is applied. Trust a row as far as its R² is above 0 "
        "(0: no better than the mean; 1: complete). Inputs that do not vary have c = 0 and are part of the intercept.",
    )


def _r2(block: dict[str, Any]) -> Figure:
    canvas, axes = _canvas(7, 3.5)
    layers = np.arange(len(block["r2"]))
    for key, colour, style, label in (
        ("r2", _GREY, "--", "fitted subjects"),
        ("held_out_r2", _BLUE, "-", "held-out subjects"),
    ):
        values = np.array([np.nan if value is None else value for value in block[key]])
        axes.plot(layers, values, style, color=colour, marker=".", label=label)
    axes.axhline(0, color="black", linewidth=0.6)
    axes.set(title="MLP decomposition", xlabel="layer", ylabel="R²", ylim=(max(-1.0, axes.get_ylim()[0]), 1.02))
    axes.legend(frameon=False)
    return Figure(
        "mlp_r2",
        "How much of each MLP's output at END the linear decomposition describes, on the subjects it was fitted on "
        "and on others (values below -1 are cut off). Where the two part, the fit has learnt its subjects by heart; "
        "a gap in the line is an MLP whose output is the same in every example.",
        png_of(canvas),
    )


def _coefficients(block: dict[str, Any]) -> Figure:
    values = np.asarray(block["heads"])
    limit = max(1.0, float(np.quantile(np.abs(values), 0.95)))
    return _heat(
        "mlp_coefficients",
        values,
        "c: what MLPs do with heads",
        limit,
        "Red: the MLP of the layer amplifies what the head brought to END; blue: it counters it, and at -1 erases "
        f"it. Colours are full at {number(limit)} (95% of the values lie within, or 1). Read only layers whose R² on "
        "held-out subjects is well above 0.",
    )


# --- the last layers --------------------------------------------------------------------------------------------------


def _by_layer(block: dict[str, Any]) -> Figure:
    canvas, axes = _canvas(7, 3.5)
    mean = np.array([entry["mean"] for entry in block["p_by_layer"]])
    band = np.array([entry["ci"] for entry in block["p_by_layer"]])
    axes.plot(mean, color=_BLUE, marker=".")
    axes.fill_between(np.arange(len(mean)), band[:, 0], band[:, 1], color=_BLUE, alpha=0.2, linewidth=0)
    axes.axvline(block["peak_layer"], color=_GREY, linewidth=0.8, linestyle=":")
    axes.set(title="p(answer) by layer", xlabel="decoded after layer", ylabel="p(answer)", ylim=(0, None))
    return Figure(
        "p_by_layer",
        "Total probability of the remaining answers' first tokens if the model ended after each layer (its own final "
        "norm and unembedding), with 95% intervals over subjects; dotted: the highest layer. A fall at the right end "
        "is anti-overconfidence: the last layers take back what the model already had.",
        png_of(canvas),
    )


def _to_first(block: dict[str, Any]) -> Figure:
    canvas, axes = _canvas(max(4.5, 0.25 * len(block["attention_to_first"])), 3.2)
    mean = np.array([entry["mean"] for entry in block["attention_to_first"]])
    band = np.array([entry["ci"] for entry in block["attention_to_first"]])
    error = np.maximum(0, [mean - band[:, 0], band[:, 1] - mean])
    axes.bar(np.arange(len(mean)), mean, color=_BLUE, yerr=error, ecolor=_GREY, capsize=2)
    axes.set(title="Last-layer heads: attention to the first position", xlabel="head", ylabel="A[END, 0]", ylim=(0, 1))
    return Figure(
        "attention_to_first",
        "Mean attention from END to the first position, with 95% intervals over subjects. Heads near 1 look at "
        "nothing that the prompt is about: what they bring is the same for every prompt that begins alike.",
        png_of(canvas),
    )


def _correlations(block: dict[str, Any]) -> Table:
    keys = ("pearson_seen", "spearman_seen", "pearson_all", "spearman_all")
    return Table(
        "Who follows token frequency",
        ["decoded", "Pearson, tokens seen", "Spearman, tokens seen", "Pearson, all tokens", "Spearman, all tokens"],
        [[row["what"], *(row[key] for key in keys)] for row in block["correlations"]],
        "Correlation over the vocabulary between the logits that a vector writes (means over the prompts) and log "
        f"token frequency, add-one smoothed, counted in {block['source']}; {block['tokens_seen']} tokens were seen at "
        "all. Above 0: it raises frequent tokens. Compare with the last two rows: any logits of a language model "
        "follow frequency to some degree, so only a larger correlation than theirs says something about the last "
        "layer.",
    )


def _scatter(table: Frequencies, intercept_logits: ArrayLike) -> Figure:
    canvas, axes = _canvas(6, 4)
    logits, log_p = table.pairs(intercept_logits, "seen")
    axes.scatter(log_p, logits, s=5, alpha=0.35, color=_BLUE, linewidths=0)
    axes.set(title="The last MLP's intercept and token frequency", xlabel="log p(token)", ylabel="logit it writes")
    return Figure(
        "intercept_frequency",
        "One dot a token that the text holds. A cloud that rises to the right: the last MLP raises frequent tokens "
        "whatever is asked; the table above has the correlation.",
        png_of(canvas),
    )


def _knobs(block: dict[str, Any]) -> Table:
    rows: Sequence[Sequence[str | float | None]] = [
        [row["setting"], *(_interval(row[key]) for key in ("p", "p_change", "accuracy", "accuracy_change"))]
        for row in block["settings"]
    ]
    return Table(
        "Two knobs on the last layer",
        ["setting", "p(answer) [95%]", "change", "top-1 accuracy [95%]", "change"],
        rows,
        f"On the {block['examples']} prompts of held-out subjects. sink: last-layer heads that give the first "
        f"position more than {number(block['tau'])} of their attention are multiplied by gamma; intercept: beta times "
        "the last MLP's intercept, fitted on the other subjects, is taken away. Changes are against both off, prompt "
        "by prompt. p(answer) and accuracy can part ways: a knob that raises p(answer) is an improvement only where "
        "accuracy does not fall.",
    )
