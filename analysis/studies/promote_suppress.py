"""The study `promote_then_suppress`: how a model recalls all answers, then suppresses those already given.

    result = base.run("promote_then_suppress", load_model("smollm2-135m"), load_task("country_cities:test"))
    base.write(result, Path("runs/promote"))

After Yan & Jia 2025: attention carries the subject to END and MLPs promote all its answers; later attention reads the
previous answers and suppresses them, and MLPs amplify that. Everything is measured at END, toward the subject, the
previous answers o1, o2, ... in their order, the model's next answer (the likeliest of those that remain; the paper's
o3) and the mean over all that remain. Logits are those of first tokens; a previous answer that shares its first token
with a remaining one is left out there and counted. Answers as whole strings have a table of their own.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from headtune.analysis.interventions.causal_tracing import KINDS
from headtune.analysis.models.head_model import HeadModel
from headtune.analysis.reports.html import with_interval
from headtune.analysis.tasks.tokenized import Encoded
from headtune.analysis.utils.errors import InputError
from headtune.analysis.utils.progress import Progress
from headtune.analysis.utils.stats import rate_interval, t_interval

from .base import Analysis, Figure, Table
from .head_roles import head_roles
from .promote_suppress_example import NOISE, Values, measured, noise_deviations, traced
from .promote_suppress_figures import lines, maps, shown, traces

Band = dict[str, Any]  # {"n": examples, "mean", "low", "high": a number or a list of them by layer}
Part = str | Table | Figure
Section = tuple[dict[str, Any], list[Part]]  # for `data`, and for the page

OFTEN = 0.5  # the share of examples from which on a head has a role
SHOWN_HEADS = 10
CONDITIONS = {
    "baseline": "nothing knocked out",
    "without_subject": "subject knocked out",
    "without_previous": "previous answers knocked out",
}
COUNTS = {
    "left_out": "previous answers that share their first token with a remaining one, left out of first-token logits",
    "alike": "previous answers that share their first token with the subject or an earlier answer, kept",
    "merged": "answers whose tokens merge with the prompt's, not scored",
}


def _spread(examples: Sequence[Encoded], n: int, seed: int) -> list[Encoded]:
    """`n` examples drawn at random, as many subjects as there are first."""
    order = random.Random(seed).sample(range(len(examples)), len(examples))
    met: Counter[str] = Counter()
    rounds: list[tuple[int, int, int]] = []
    for index in order:
        subject = examples[index].example.subject
        rounds.append((met[subject], len(rounds), index))
        met[subject] += 1
    return [examples[index] for *_, index in sorted(rounds)[:n]]


@dataclass(frozen=True)
class _Study:
    """Rows of measurements, one an example, and how they are summed up.

    Attributes:
        names: subject, o1, o2, ..., next, remaining: the last axis of every measurement but the strings'.
        subjects: of each example.
        rows: see `promote_example`.
    """

    names: list[str]
    subjects: list[str]
    rows: list[dict[str, Values]]

    @property
    def n_previous(self) -> int:
        return len(self.names) - 3

    def has(self, quantity: str) -> bool:
        return any(quantity in row for row in self.rows)

    def stacked(self, quantity: str) -> Values:
        """`[n_examples, ...]`, NaN for examples without."""
        shape = next(row[quantity].shape for row in self.rows if quantity in row)
        return np.stack([row.get(quantity, np.full(shape, np.nan)) for row in self.rows])

    def bands(self, quantity: str, names: Sequence[str] | None = None) -> dict[str, Band]:
        """name -> mean over the examples that have it, with its 95% interval over subjects (Student's, Wilson's
        for probabilities; the range of the values where one subject alone has it)."""
        values = self.stacked(quantity)
        return {name: self._band(values[..., i]) for i, name in enumerate(names or self.names)}

    def _band(self, values: Values) -> Band:
        present = [i for i, row in enumerate(values) if not np.isnan(row).any()]
        if not present:
            return {"n": 0, "mean": None, "low": None, "high": None}
        mean = values[present].mean(0)
        rates = bool(((values[present] >= 0) & (values[present] <= 1)).all())
        interval = rate_interval if rates else t_interval
        low, high = interval(values[present], [self.subjects[i] for i in present])
        low = np.where(np.isfinite(low), low, values[present].min(0))
        high = np.where(np.isfinite(high), high, values[present].max(0))
        return {"n": len(present), "mean": mean.tolist(), "low": low.tolist(), "high": high.tolist()}


def promote_then_suppress(
    model: HeadModel,
    examples: Sequence[Encoded],
    progress: Progress,
    *,
    trace_examples: int = 5,
    n_noise: int = 10,
    window: int = 10,
    stride: int | None = None,
    renormalise: bool = False,
    seed: int = 0,
) -> Analysis:
    """Yan & Jia's study: early decoding, Token Lens, attention knockouts, causal tracing, head roles, whole strings.

    Args:
        trace_examples: examples for causal tracing, by far the most expensive part; 0 leaves it out.
        n_noise: noisy copies of each.
        window: layers restored together.
        stride: a window at every how many layers; None = about ten windows.
        renormalise: let the attention left by a knockout sum to 1 again.
        seed: of the choice of examples and the noise.

    Raises:
        InputError: a count that is too small.
    """
    least = {"trace_examples": (trace_examples, 0), "n_noise": (n_noise, 1), "window": (window, 1)}
    if stride is not None:
        least["stride"] = (stride, 1)
    for option, (value, lowest) in least.items():
        if value < lowest:
            raise InputError(f"{option}={value} is too small; expected {lowest} or more")
    # Measure every example.
    depth = max(len(encoded.previous) for encoded in examples)
    names = ["subject", *(f"o{i}" for i in range(1, depth + 1)), "next", "remaining"]
    rows = [measured(model, e, depth, renormalise) for e in progress(examples, "decoding and knocking out")]
    study = _Study(names, [encoded.example.subject for encoded in examples], rows)
    of_length = Counter(len(encoded.previous) for encoded in examples)
    data: dict[str, Any] = {
        "n_examples": len(examples),
        "n_subjects": len(set(study.subjects)),
        "examples_by_previous_answers": {str(k): of_length[k] for k in sorted(of_length)},
        "counts": {name: int(study.stacked(f"count.{name}").sum()) for name in COUNTS},
        "names": names,
    }
    # Sum up, section by section; the traces come last.
    parts = [_introduction(data)]
    for section in (_early_decoding, _lenses, _knockouts, _whole_answers, _roles):
        numbers, page = section(study)
        data |= numbers
        parts += page
    if trace_examples == 0:
        data["tracing"] = None
        parts.append("Causal tracing was left out (trace_examples 0).")
    else:
        centres = range(0, model.n_layers, stride or max(1, model.n_layers // 10))
        chosen = _spread(examples, trace_examples, seed)
        deviations = noise_deviations(model, examples)
        numbers, page = _tracing(model, chosen, names, deviations, progress, n_noise, window, centres, seed)
        data |= numbers
        parts += page
    return Analysis("promote_then_suppress", _plain(data), parts)


def _introduction(data: Mapping[str, Any]) -> Part:
    lengths = ", ".join(f"{n} with {k}" for k, n in data["examples_by_previous_answers"].items())
    counts = "; ".join(f"{COUNTS[what]}: {n}" for what, n in data["counts"].items() if n)
    return (
        f"{data['n_examples']} prompts about {data['n_subjects']} subjects; by number of previous answers: {lengths}. "
        "o1, o2, ... are the previous answers in their order, each averaged over the prompts that have it; next is the "
        "likeliest of the answers still to be given, remaining the mean over all of these. Logits are those of first "
        "tokens, everything is read at the last position of the prompt (END), and bands and brackets are 95% intervals "
        "over subjects. Where all lines of a picture move together, much of the vocabulary does: what counts is the "
        "distance between them." + (f" Counted: {counts}." if counts else "")
    )


def _early_decoding(study: _Study) -> Section:
    bands = {part: study.bands(part) for part in ("attention", "mlp")}
    caption = (
        "What each layer's attention and MLP write at END, decoded as logits of the subject and of the answers. Above "
        "zero they promote, below zero they suppress: previous answers that rise, and fall in later layers, are "
        "recalled first and suppressed then."
    )
    panels = {"attention outputs": bands["attention"], "MLP outputs": bands["mlp"]}
    return {"early_decoding": bands}, [Figure("early_decoding", caption, lines(panels, "logit"))]


def _lenses(study: _Study) -> Section:
    drawn = ["subject", *(f"previous_{i}" for i in range(1, study.n_previous + 1)), "end"]
    bands = {source: study.bands(f"lens.{source}") for source in (*drawn, "first", "rest")}
    heads = {source: _by_name(study.names, _nanmean(study.stacked(f"heads.{source}"))) for source in bands}
    caption = (
        "Token Lens: what each layer's attention writes at END out of what it reads at one place, decoded. What is "
        "read at the subject should promote; where the line of a previous answer falls below zero in the panel of that "
        "very answer, attention suppresses it."
    )
    panels = {f"from {shown(source)}": bands[source] for source in drawn}
    return {"token_lens": bands, "token_lens_heads": heads}, [Figure("token_lens", caption, lines(panels, "logit"))]


def _knockouts(study: _Study) -> Section:
    spans = ["subject", "previous", *(f"previous_{i}" for i in range(1, study.n_previous + 1)), "end"]
    parts = ("attention", "mlp", "logits")
    bands = {
        span: {part: study.bands(f"knockout.{span}.{part}") for part in parts}
        for span in spans
        if study.has(f"knockout.{span}.mlp")
    }
    caption = (
        "What each layer's MLP owes to END's looking at one place: decoded MLP output, less the same with that "
        "attention knocked out in all layers. Above zero the MLP promotes because of what was read there, below zero "
        "it suppresses."
    )
    panels = {f"looking at {shown(span)}": bands[span]["mlp"] for span in bands if span != "previous"}
    rows = [[shown(span), *(_cell(of_span["logits"][name]) for name in study.names)] for span, of_span in bands.items()]
    note = (
        "Final logits of the full run less those of the run in which END cannot look there: positive = it raises them."
    )
    return {"knockout": bands}, [
        Figure("knockout", caption, lines(panels, "effect on MLP output, logit")),
        Table("What END owes to looking at each place", ["looking at", *study.names], rows, note),
    ]


def _whole_answers(study: _Study) -> Section:
    names = [*study.names[1:-2], "best remaining"]
    bands = {name: study.bands(f"strings.{name}", names) for name in CONDITIONS if study.has(f"strings.{name}")}
    rows: list[list[str | float | None]] = [
        [name, bands["baseline"][name]["n"], *(_cell(of_condition[name]) for of_condition in bands.values())]
        for name in names
    ]
    note = (
        "Log probability, in nats, that what follows the prompt begins with the answer, all its tokens. The best "
        "remaining answer is the likeliest one with nothing knocked out; knockouts hold at END and all along the "
        "answer."
    )
    header = ["answer", "prompts", *(CONDITIONS[name] for name in bands)]
    return {"strings": bands}, [Table("Whole answers", header, rows, note)]


def _roles(study: _Study) -> Section:
    logits, names = study.stacked("heads"), study.names[:-1]  # the rule is about single tokens: not the mean over many
    roles, mean = head_roles(logits[..., :-1]), _nanmean(logits)
    block: dict[str, Any] = {
        "mean": roles.mean,
        "std": roles.std,
        "promotes": _by_name(names, roles.promotes),
        "suppresses": _by_name(names, roles.suppresses),
        "logit": _by_name(study.names, mean),
    }
    caption = (
        "Head roles: the share of prompts in which a head promotes a name (red), less the share in which it suppresses "
        "it (blue). A head promotes where it writes more than the mean plus one standard deviation of its layer, and "
        "suppresses where it writes less than the mean minus one; what that is in logits differs between layers."
    )
    parts: list[Part] = [Figure("head_roles", caption, maps(_by_name(names, roles.promotes - roles.suppresses)))]
    previous = slice(1, 1 + study.n_previous)
    # All previous answers together: each prompt counts once for each that it has.
    present = (~np.isnan(logits[..., previous])).sum(0)

    def pooled(values: Values) -> Values:
        total: Values = (np.nan_to_num(values[..., previous]) * present).sum(-1) / np.maximum(present.sum(-1), 1)
        return total

    candidates = {"promotes_next": (roles.promotes[..., -1], mean[..., -2], -1)}
    if present.any():
        candidates["suppresses_previous"] = (pooled(roles.suppresses), pooled(mean), 1)
    titles = {"promotes_next": "promote the next answer", "suppresses_previous": "suppress previous answers"}
    for role, (share, logit, sign) in candidates.items():
        order = [divmod(int(i), logit.shape[1]) for i in np.argsort(sign * logit, axis=None, kind="stable")]
        heads = [head for head in order if share[head] >= OFTEN][:SHOWN_HEADS]
        block[f"top_{role}"] = [[*head, float(share[head]), float(logit[head])] for head in heads]
        rows: list[list[str | float | None]] = [
            [f"L{layer}H{head}", *values] for layer, head, *values in block[f"top_{role}"]
        ]
        note = f"Heads that do so in at least {OFTEN:.0%} of the prompts, strongest first, {SHOWN_HEADS} at most."
        parts.append(Table(f"Heads that {titles[role]}", ["head", "share of prompts", "mean logit"], rows, note))
    return {"head_roles": block}, parts


def _tracing(
    model: HeadModel,
    chosen: Sequence[Encoded],
    names: list[str],
    deviations: Mapping[str, float],
    progress: Progress,
    n_noise: int,
    window: int,
    centres: range,
    seed: int,
) -> Section:
    depth = len(names) - 3
    groups = ["subject", *(f"previous_{i}" for i in range(1, depth + 1)), "rest", "end"]
    block: dict[str, Any] = {"n_examples": len(chosen), "centres": list(centres), "groups": groups, "noise": {}}
    parts: list[Part] = []
    for noisy in ("subject", "previous_1")[: 1 + bool(depth)]:
        usable = [encoded for encoded in chosen if encoded.sources().get(noisy)]
        if not usable:
            parts.append(f"No traced prompt has {shown(noisy)}, so there is no trace with noise on it.")
            continue
        rows = [
            traced(model, encoded, noisy, deviations[noisy], depth, n_noise, window, centres, seed)
            for encoded in progress(usable, f"tracing with noise on {shown(noisy)}")
        ]
        study = _Study(names, [encoded.example.subject for encoded in usable], rows)
        clean, with_noise = (_nanmean(study.stacked(run)) for run in ("clean", "noisy"))
        effect: dict[str, dict[str, Values]] = {
            kind: {
                group: _nanmean(study.stacked(key)) for group in groups if study.has(key := f"effect.{kind}.{group}")
            }
            for kind in KINDS
        }
        block["noise"][noisy] = {
            "n_examples": len(usable),
            "deviation": deviations[noisy],
            "clean": _p_and_logit(names, clean),
            "noisy": _p_and_logit(names, with_noise),
            "effect": {
                kind: {group: _p_and_logit(names, values) for group, values in by_group.items()}
                for kind, by_group in effect.items()
            },
        }
        embedded = "all subjects" if noisy == "subject" else "all previous answers"
        caption = (
            f"Causal tracing, prompts: {len(usable)}. There is noise on {shown(noisy)}, {NOISE:g} times the standard "
            f"deviation of the embeddings of {embedded}, and each cell puts back what "
            f"attention (left) or the MLPs (right) wrote in the clean run at one place, in a window of {window} layers "
            "around the one given. Red cells raise the probability of the answer, blue ones lower it; titles give that "
            "probability without and with the noise."
        )
        png = traces(effect, clean, with_noise, names, centres)
        parts.append(Figure(f"tracing_noise_on_{noisy}", caption, png))
    return {"tracing": block}, parts


# --- numbers ----------------------------------------------------------------------------------------------------------


def _nanmean(values: Values) -> Values:
    """Mean over the first axis of what is there; NaN where nothing is."""
    count = (~np.isnan(values)).sum(0)
    return np.where(count > 0, np.nan_to_num(values).sum(0) / np.maximum(count, 1), np.nan)


def _by_name(names: Sequence[str], values: Values) -> dict[str, Values]:
    return {name: values[..., i] for i, name in enumerate(names)}


def _p_and_logit(names: Sequence[str], values: Values) -> dict[str, dict[str, Values]]:
    """`[..., 2, n_names]` -> name -> p and logit."""
    return {name: {"p": values[..., 0, i], "logit": values[..., 1, i]} for i, name in enumerate(names)}


def _plain(value: Any) -> Any:
    """JSON-able, NaN as None."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and np.isnan(value) else value


def _cell(band: Band) -> str | None:
    return None if band["mean"] is None else with_interval(band["mean"], (band["low"], band["high"]))
