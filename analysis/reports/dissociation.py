"""The dissociation of a head set: its table, whether it holds in plain words, and what to do where it fails."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from headtune.analysis.heads.head_set import HeadSet

from .html import number, with_interval

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
    """Baseline, then for each role the chosen heads silenced, and the controls (see `identify`).

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
    for role in _in_order(heads.roles):
        if f"ablate_{role}" not in block:
            continue
        definition = heads.role(role)
        extreme = "highest_set" if definition is not None and definition.raises else "lowest_set"
        chosen, matched = block[f"ablate_{role}"], block[f"ablate_random_like_{role}"]
        n, sets = len(chosen["heads"]), matched["sets"]
        rows.append(condition(f"top {n} {role} heads silenced", chosen))
        if sets:
            rows.append(
                condition(
                    f"{_count(n, 'random')} of the same layers silenced ({sets} sets)",
                    matched,
                    extreme,
                )
            )
        for kind, words in (("largest", "of largest output"), ("lowest", "with scores nearest to zero")):
            if control := block.get(f"ablate_{kind}_like_{role}"):
                n = len(control["heads"])
                rows.append(condition(f"{_count(n, 'other')} of the same layers {words} silenced", control))
        for name, control in block.items():
            if name.startswith("ablate_control_") and name.endswith(f"_{role}"):
                task = name.removeprefix("ablate_control_").removesuffix(f"_{role}")
                rows.append(condition(f"top {len(control['heads'])} {role} heads of {task} silenced", control))
    return rows


def _in_order(roles: Iterable[str]) -> list[str]:
    """Suppression first, then recall, then other roles as they come."""
    names = list(roles)
    first = [role for role in ("suppression", "recall") if role in names]
    return first + [role for role in names if role not in first]


def quantities_of(rows: Sequence[Condition]) -> list[str]:
    """The quantities that some row has."""
    return [quantity for quantity in QUANTITIES if any(quantity in row.cells for row in rows)]


def verdicts(heads: HeadSet) -> list[tuple[str, str]]:
    """For each role tested `holds`, `does not hold` or `cannot be told`, and the same in a sentence with numbers."""
    tests = heads.verification.get("dissociation") or {}
    roles = _in_order(tests)
    return [(verdict_of(tests[role]), _role_verdict(heads, role, tests[role])) for role in roles]


def verdict(heads: HeadSet) -> str:
    """Whether each role's heads do what its name says, in plain words."""
    sentences = [sentence for _, sentence in verdicts(heads)]
    return " ".join(sentences) or "The dissociation was not tested: this head set has no verification."


def verdict_of(result: dict[str, Any]) -> str:
    """`holds`, `does not hold` or `cannot be told`; head sets of older versions tell the first two apart only."""
    return str(result.get("verdict") or ("holds" if result["held"] else "does not hold"))


def _count(n: int, kind: str) -> str:
    return f"{n} {kind} head{'s' if n != 1 else ''}"


def next_step(heads: HeadSet) -> str:
    """What to do about roles that do not hold or cannot be told; empty where all hold or none was tested."""
    tests = heads.verification.get("dissociation") or {}
    tested = {role: verdict_of(tests[role]) for role in _in_order(tests)}
    held = [role for role, result in tested.items() if result == "holds"]
    lines = []
    for role, result in tested.items():
        if result == "holds":
            continue
        silenced = f"ablate_{role}" in heads.verification
        if result == "cannot be told":
            few_sets = "random sets of heads are all there is" in str(tests[role].get("reason"))
            steps = [
                "choose fewer heads or verify fewer (--verify-top), so that more random sets exist, or a larger model"
                if few_sets
                else "give more subjects or prompts, or another model that knows the answers"
            ]
        elif silenced:
            steps = ["see how far the controls beside them go", "give more subjects or prompts"]
        else:
            steps = ["give more subjects or prompts"]
        steps += [f"train the {held[0]} heads alone (heads.role: {held[0]})"] if held else []
        steps += ["or take the heads as a hypothesis"] if silenced else []
        lines.append(f"For {role}: {'; '.join(steps)}.")
    return " ".join(lines)


def _named(effect: str) -> str:
    """`lower p(remaining)` of `lower p_remaining`."""
    verb, _, quantity = effect.partition(" ")
    return f"{verb} {QUANTITIES[quantity]}"


def _role_verdict(heads: HeadSet, role: str, result: dict[str, Any]) -> str:
    """The verdict, why it is not a better one, what silencing changes, and how far chance and the controls go."""
    meaning = f" (silencing must {_named(result['expected'])})" if "expected" in result else ""
    opening = f"{role.capitalize()}{meaning} {verdict_of(result)}: "
    if "quantity" not in result:
        return f"{opening}{result['reason']}."
    opening += f"{result['reason']}. Silencing" if result.get("reason") else "silencing"
    n = len(heads.verification[f"ablate_{role}"]["heads"])
    heads_named = f"the {n} {role} heads" if n > 1 else f"the one {role} head"
    before, after = result["baseline"], result["ablated"]
    ratio = f" (\u00d7{number(result['ratio'])})" if result["ratio"] is not None else ""
    change = f"{QUANTITIES[result['quantity']]} from {number(before)} to {number(after)}{ratio}"
    apart = ", on subjects that they were not chosen on" if heads.verification.get("halves") == 2 else ""
    sets, extreme = heads.verification[f"ablate_random_like_{role}"].get("sets", 0), result["most_extreme_random_set"]
    controls = f"the most extreme of {sets} random sets reaches {number(extreme)}"
    if result.get("largest_other") is not None:
        controls += f", the largest other heads {number(result['largest_other'])}"
    if result.get("p_value") is not None:
        controls += f", p = {number(result['p_value'])}"
    if result.get("change_ci"):
        controls = f"change {with_interval(result['change'], result['change_ci'])}, {controls}"
    return f"{opening} {heads_named} takes {change}{apart} ({controls})."
