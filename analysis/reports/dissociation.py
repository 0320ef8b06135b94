"""The dissociation of a head set: its table, whether it holds in plain words, and what to do where it fails."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from headtune.analysis.heads.head_set import HeadSet

from .html import number, with_interval

if TYPE_CHECKING:
    pass

QUANTITIES = {"p_remaining": "p(remaining)", "p_previous": "p(previous)"}


@dataclass(frozen=True)
class Cell:
    """A probability under one condition.

    Attributes:
        mean, interval: over the examples, with the 95% interval.
        ratio: to the baseline; `None` in the baseline itself, or where that is 0.
        extreme: random sets only: the mean of the most extreme set in the direction that the role is tested in.
    """

    mean: float
    interval: tuple[float, float]
    ratio: float | None = None
    extreme: float | None = None

    def parts(self) -> list[str]:
        """Its text in parts, each to be read in one piece."""
        parts = [with_interval(self.mean, self.interval)]
        if self.ratio is not None:
            parts.append(f"×{number(self.ratio)}")
        if self.extreme is not None:
            parts.append(f"(most extreme set {number(self.extreme)})")
        return parts

    def __str__(self) -> str:
        return " ".join(self.parts())


@dataclass(frozen=True)
class Condition:
    """One row of the dissociation table: what was silenced, and quantity (a key of QUANTITIES) -> cell."""

    name: str
    cells: dict[str, Cell]


def dissociation_table(heads: HeadSet) -> list[Condition]:
    """Baseline, then for suppression and recall the chosen heads silenced, and the controls (see `identify`).

    Empty for a head set that was not verified; a role without confirmed heads has no rows; without previous answers
    there is no `p_previous`.
    """
    block = heads.verification
    if "baseline" not in block:
        return []
    baseline = block["baseline"]

    def condition(name: str, numbers: dict[str, Any], extreme: str | None = None) -> Condition:
        cells = {}
        for quantity in QUANTITIES:
            if quantity in numbers:
                entry, before = numbers[quantity], baseline[quantity]["mean"]
                ratio = entry["mean"] / before if before and numbers is not baseline else None
                cells[quantity] = Cell(entry["mean"], tuple(entry["ci"]), ratio, entry[extreme] if extreme else None)
        return Condition(name, cells)

    rows = [condition("nothing silenced", baseline)]
    for role, extreme in (("suppression", "highest_set"), ("recall", "lowest_set")):
        if f"ablate_{role}" not in block:
            continue
        chosen, matched = block[f"ablate_{role}"], block[f"ablate_random_like_{role}"]
        n, sets = len(chosen["heads"]), matched["sets"]
        rows.append(condition(f"top {n} {role} heads silenced", chosen))
        if sets:
            rows.append(condition(f"{n} random heads of the same layers silenced ({sets} sets)", matched, extreme))
        if lowest := block.get(f"ablate_lowest_like_{role}"):
            n = len(lowest["heads"])
            rows.append(condition(f"{n} heads of the same layers with scores nearest to zero silenced", lowest))
        for name, control in block.items():
            if name.startswith("ablate_control_") and name.endswith(f"_{role}"):
                task = name.removeprefix("ablate_control_").removesuffix(f"_{role}")
                rows.append(condition(f"top {len(control['heads'])} {role} heads of {task} silenced", control))
    return rows


def quantities_of(rows: Sequence[Condition]) -> list[str]:
    """The quantities that some row has."""
    return [quantity for quantity in QUANTITIES if any(quantity in row.cells for row in rows)]


def verdict(heads: HeadSet) -> str:
    """Whether the dissociation holds, in plain words, and for each role where it fails why."""
    tests = heads.verification.get("dissociation")
    if not tests:
        return "The dissociation was not tested: this head set has no verification."
    parts = {role: _role_verdict(heads, role, tests[role]) for role in ("suppression", "recall") if role in tests}
    failed = [role for role in parts if not tests[role]["held"]]
    if not failed:
        return f"The dissociation holds: {'; '.join(parts.values())}."
    text = f"The dissociation FAILS for {' and '.join(failed)}: {'; '.join(parts[role] for role in failed)}."
    held = [role for role in parts if role not in failed]
    return text + "".join(f" It holds for {role}: {parts[role]}." for role in held)


def next_step(heads: HeadSet) -> str:
    """What to do about roles whose dissociation fails, in one line; empty where it holds or was not tested."""
    tests = heads.verification.get("dissociation") or {}
    tested = {role: tests[role]["held"] for role in ("suppression", "recall") if role in tests}
    failed = [role for role, held in tested.items() if not held]
    if not failed:
        return ""
    held = [role for role in tested if role not in failed]
    silenced = any(f"ablate_{role}" in heads.verification for role in failed)
    steps = [
        "give more subjects or prompts",
        *(["see how far the random heads beside them go"] if silenced else []),
        *([f"train the {held[0]} heads alone (heads.role: {held[0]})"] if held else []),
        *(["or take the heads as a hypothesis"] if silenced else []),
    ]
    return f"For {' and '.join(failed)}: {'; '.join(steps)}."


def _role_verdict(heads: HeadSet, role: str, result: dict[str, Any]) -> str:
    if "quantity" not in result and f"ablate_{role}" in heads.verification:
        return f"the {role} heads cannot be compared with random ones: {result['reason']}"
    if "quantity" not in result:
        return f"there are {result['reason']} for {role}, so there was nothing to silence"
    raises = role == "suppression"
    quantity = QUANTITIES[result["quantity"]]
    n = len(heads.verification[f"ablate_{role}"]["heads"])
    sets = heads.verification[f"ablate_random_like_{role}"]["sets"]
    before, after, extreme = result["baseline"], result["ablated"], result["most_extreme_random_set"]
    ratio = f" (×{number(result['ratio'])})" if result["ratio"] is not None else ""
    heads_named = f"the {n} {role} heads" if n > 1 else f"the one {role} head"
    change = f"{quantity} from {number(before)} to {number(after)}{ratio}"
    which = "highest" if raises else "lowest"
    if result["held"]:
        verb, beyond = ("raises", "above") if raises else ("lowers", "below")
        return (
            f"silencing {heads_named} {verb} {change}, {beyond} the {which} of {sets} random sets ({number(extreme)})"
        )
    wrong = []
    if (after <= before) if raises else (after >= before):
        wrong.append(f"does not {'raise' if raises else 'lower'} it")
    if (after <= extreme) if raises else (after >= extreme):
        wrong.append(
            f"does not go {'above' if raises else 'below'} the {which} of {sets} random sets ({number(extreme)})"
        )
    return f"silencing {heads_named} takes {change}, which {' and '.join(wrong)}"
