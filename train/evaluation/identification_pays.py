"""Whether the choice of heads paid: identified heads against every control that was run beside them.

    for result in identification_pays(runs):
        print(*result.sentences(), sep="\n")

A difference is that of the means, paired over the same held-out examples; its interval is a two-way bootstrap over
subjects and runs (seeds, and draws of random heads). Identification paid on a metric where every control of as many
heads is beaten with an interval that excludes 0.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .compare import LOWER_IS_BETTER, Group, compare, difference
from .metric_names import METRIC_NAMES
from .run_reader import RunRecord

GAINS = ("repeat_rate", "correct_new_rate", "exact_match", "prefix_match", "mc1", "mc2", "op")
DAMAGE = ("neutral_perplexity", "wrong_rate", "missing_rate")
CONTROLS = {
    "random": "random heads of the same layers",
    "anywhere": "random heads of any layer",
    "nearest_zero": "heads of the same layers with scores nearest to zero",
    "largest": "the largest other heads of the same layers",
}


@dataclass(frozen=True)
class Against:
    """The identified heads less one control, on one metric.

    Attributes:
        heads: the control is one of as many heads; else LoRA or norms.
        difference: identified less control.
        interval: 95%; None where examples have no such number.
        better: whether the identified heads are better, the interval excluding 0; False: worse; None: neither.
    """

    control: str
    heads: bool
    runs: int
    parameters: int
    mean: float
    difference: float
    interval: tuple[float, float] | None
    better: bool | None


@dataclass(frozen=True)
class Result:
    """One metric of the identified heads of one group.

    Attributes:
        paid: every control of heads is beaten; None: there is none.
        damage: metric -> base, identified, controls (name -> mean).
    """

    group: str
    task: str
    metric: str
    runs: int
    parameters: int
    base: float | None
    mean: float
    against: tuple[Against, ...]
    damage: dict[str, dict[str, Any]]

    @property
    def paid(self) -> bool | None:
        results = [each.better for each in self.against if each.heads]
        return all(result is True for result in results) if results else None

    def sentences(self) -> list[str]:
        """In words: the verdict, then a line for each control."""
        name = METRIC_NAMES[self.metric]
        base = f" (base {self.base:.3g})" if self.base is not None else ""
        opening = f"{name}, {self.group}: {self.mean:.3g}{base}, {self.parameters:,} numbers trained, {self.runs} run"
        verdict = {
            True: "identification paid: every control of as many heads is beaten",
            False: "identification did not pay: not every control of as many heads is beaten",
            None: "no control of as many heads was run beside it",
        }[self.paid]
        lines = [f"{opening}{'s' * (self.runs != 1)}. {verdict}."]
        for each in self.against:
            bounds = "" if each.interval is None else f" [{each.interval[0]:+.3g}, {each.interval[1]:+.3g}]"
            what = {True: "better", False: "worse", None: "not distinguishable"}[each.better]
            lines.append(
                f"  against {each.control} ({each.parameters:,} numbers, {each.runs} run{'s' * (each.runs != 1)}): "
                f"{each.mean:.3g}, difference {each.difference:+.3g}{bounds}: {what}"
            )
        return lines

    def damage_sentences(self) -> list[str]:
        """What it cost, beside each control; the same for every metric of a group."""
        lines = []
        for metric, values in self.damage.items():
            others = "; ".join(f"{control} {value:.4g}" for control, value in values["controls"].items())
            base = "" if values["base"] is None else f"base {values['base']:.4g}, "
            lines.append(f"{METRIC_NAMES[metric]}: {base}{self.group} {values['identified']:.4g}; {others}")
        return lines

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"paid": self.paid}


def identification_pays(runs: Sequence[RunRecord]) -> list[Result]:
    """Every group of identified heads that has controls among the runs, on every metric of gain.

    Controls are runs of the same recipe with `heads.control`, `heads.random` or another role's heads, of the same head
    set and number, and LoRA and norms that were measured on the same prompts.
    """
    groups = [group for group in compare(runs).groups if group.runs]
    results = []
    for chosen in groups:
        source = chosen.runs[0].recipe.get("heads.from")
        controls = [group for group in groups if group is not chosen and _is_control(chosen, group)]
        if source is None or not any(_kind(group) in CONTROLS for group in controls):
            continue
        results += [_result(chosen, metric, controls) for metric in GAINS if metric in chosen.metrics]
    return results


def _kind(group: Group) -> str:
    recipe = group.runs[0].recipe
    if recipe.get("heads.control.kind"):
        return str(recipe["heads.control.kind"])
    if recipe.get("heads.random.like"):
        return "random"
    return "role" if recipe.get("heads.from") else str(recipe["recipe"])


def _is_control(chosen: Group, group: Group) -> bool:
    if group.measured != chosen.measured:
        return False
    ours, theirs = chosen.runs[0].recipe, group.runs[0].recipe
    if theirs["recipe"] in ("lora", "ln") and ours["recipe"] not in ("lora", "ln"):
        return True
    kind = _kind(group)
    if kind not in (*CONTROLS, "role"):
        return False
    like = theirs.get("heads.from") or theirs.get("heads.control.like") or theirs.get("heads.random.like")
    if like != ours.get("heads.from"):
        return False
    same_role = theirs.get("heads.role") == ours.get("heads.role")
    if same_role == (kind == "role") or theirs.get("heads.top") != ours.get("heads.top"):
        return False
    skip = ("seed", "name", "output_dir", "evaluation.before")
    keys = {key for key in (*ours, *theirs) if key not in skip and not key.startswith(("heads.", "tracking."))}
    return all(json.dumps(ours.get(key)) == json.dumps(theirs.get(key)) for key in keys)


def _name(group: Group) -> str:
    kind, recipe = _kind(group), group.runs[0].recipe
    if kind == "role":
        return f"the {recipe.get('heads.role')} heads"
    if kind == "lora":
        where = "" if recipe.get("method.layers") is None else f", layers {recipe['method.layers']}"
        return f"LoRA r={recipe.get('method.r')}{where}"
    return CONTROLS.get(kind, "the gains of all norms" if kind == "ln" else group.name)


def _names(groups: Sequence[Group]) -> list[str]:
    """What controls are called, with the group's name where two are called alike (LoRA at two rates)."""
    names = [_name(group) for group in groups]
    return [
        f"{name} ({group.name})" if names.count(name) > 1 else name for name, group in zip(names, groups, strict=True)
    ]


def _result(chosen: Group, metric: str, controls: Sequence[Group]) -> Result:
    against = []
    names = _names(controls)
    for name, control in zip(names, controls, strict=True):
        minus = difference(chosen.runs, metric, control.runs)
        if metric not in control.metrics or minus is None:
            continue
        gap, interval, _ = minus
        better = None
        if interval is not None and not interval[0] <= 0 <= interval[1]:
            better = (gap < 0) == (metric in LOWER_IS_BETTER)
        heads = _kind(control) in (*CONTROLS, "role")
        mean = control.metrics[metric].mean
        against.append(Against(name, heads, len(control.runs), control.parameters, mean, gap, interval, better))
    damage = {
        name: {
            "base": _base(chosen, name),
            "identified": chosen.metrics[name].mean,
            "controls": {
                called: each.metrics[name].mean
                for called, each in zip(names, controls, strict=True)
                if name in each.metrics
            },
        }
        for name in DAMAGE
        if name in chosen.metrics
    }
    base, mean = _base(chosen, metric), chosen.metrics[metric].mean
    numbers = (len(chosen.runs), chosen.parameters, base, mean)
    return Result(chosen.name, chosen.task, metric, *numbers, tuple(against), damage)


def _base(group: Group, metric: str) -> float | None:
    before = group.runs[0].before.get(metric)
    value = before["mean"] if isinstance(before, dict) else before
    return None if value is None or math.isnan(value) else float(value)
