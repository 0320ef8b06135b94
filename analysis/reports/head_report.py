"""The page a person reads: which heads, how surely, whether the proof holds, and what a run changed.

One HTML file that needs nothing beside it: pictures are inlined, there is no script and no request, and it reads on a
phone. The same tables go to the terminal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from numpy.typing import ArrayLike

from headtune.analysis.heads.head_set import ROLES, HeadSet

from .head_cards import ANSWERS, GUIDE, HeadPortrait, anchor, card, gist
from .heat_maps import MAPS as MAPS
from .heat_maps import Sheet, agreement, marked_heads, scale_note, sheet_png, sheets
from .html import html_table, number, picture, signed, track, unbroken, with_interval, write_page

QUANTITIES = {"p_remaining": "p(remaining)", "p_previous": "p(previous)"}
SHOWN_EXAMPLES = 50


# --- the dissociation -------------------------------------------------------------------------------------------------


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
        """What is to be said of it, each part to be read in one piece."""
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
    """Baseline, then for suppression and recall the chosen heads silenced, and the controls (see `identify.verify`).

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
    return [quantity for quantity in QUANTITIES if any(quantity in row.cells for row in rows)]


def verdict(heads: HeadSet) -> str:
    """Whether the dissociation holds, in plain words, and for each role where it fails why."""
    found = heads.verification.get("dissociation")
    if not found:
        return "The dissociation was not tested: this head set has no verification."
    parts = {role: _role_verdict(heads, role, found[role]) for role in ("suppression", "recall") if role in found}
    failed = [role for role in parts if not found[role]["held"]]
    if not failed:
        return f"The dissociation holds: {'; '.join(parts.values())}."
    text = f"The dissociation FAILS for {' and '.join(failed)}: {'; '.join(parts[role] for role in failed)}."
    held = [role for role in parts if role not in failed]
    return text + "".join(f" It holds for {role}: {parts[role]}." for role in held)


def next_step(heads: HeadSet) -> str:
    """What to do about roles whose dissociation fails, in one line; empty where it holds or was not tested."""
    found = heads.verification.get("dissociation") or {}
    tested = {role: found[role]["held"] for role in ("suppression", "recall") if role in found}
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


# --- the page ---------------------------------------------------------------------------------------------------------


def write_report(
    path: Path,
    heads: HeadSet,
    means: Mapping[str, ArrayLike],
    evaluation: Mapping[str, Any] | None = None,
    portraits: Sequence[HeadPortrait] = (),
    title: str = "",
) -> None:
    """Write the page as one HTML file that refers to nothing outside itself.

    Args:
        means: score name -> `[n_layers, n_heads]`; the maps of every method are drawn (see `maps.sheets`).
        evaluation: the content of evaluation.json, `{"before", "after", "task", "examples"}`; adds the comparison.
        portraits: of chosen heads; each gets a card.
        title: default: the name of the folder that the page is written to.
    """
    title = title or path.resolve().parent.name
    by_head = {(portrait.layer, portrait.head): portrait for portrait in portraits}
    sections = [
        f"<h1>{escape(title)}</h1>",
        f"<p class='lead'>{escape(_lead(heads))}</p>",
        *(["<h2>Before and after</h2>", _metrics(evaluation)] if evaluation is not None else []),
        # Heads that a training chose have no role whose loss could be told apart.
        *(["<h2>Does it hold?</h2>", _dissociation(heads)] if set(heads.roles) & set(ROLES) else []),
        "<h2>The heads</h2>",
        _stability(heads),
        f"<p class='note'>{GUIDE}</p>" if portraits else "",
        *(_ranked(heads, role, by_head) for role in heads.roles),
        _maps(means, heads),
        *(["<h2>What it writes</h2>", _lists(evaluation)] if evaluation is not None else []),
        "<h2>How this was made</h2>",
        _about(heads),
    ]
    write_page(path, title, "\n".join(section for section in sections if section))


def write_run_report(path: Path, evaluation: Mapping[str, Any], recipe: str, lead: str, title: str) -> None:
    """Write the page of a run for which no heads were ranked: before and after, generations, recipe.

    Args:
        evaluation: as for `write_report`.
        recipe: its text.
        lead: one line under the title.
    """
    sections = [
        f"<h1>{escape(title)}</h1>",
        f"<p class='lead'>{escape(lead)}</p>",
        "<h2>Before and after</h2>",
        _metrics(evaluation),
        "<h2>What it writes</h2>",
        _lists(evaluation),
        "<h2>How this was made</h2>",
        f"<article><pre>{escape(recipe)}</pre></article>",
    ]
    write_page(path, title, "\n".join(sections))


def _lead(heads: HeadSet) -> str:
    found = ", ".join(f"{len(ranked)} {role} heads" for role, ranked in heads.roles.items())
    total = heads.model["n_layers"] * heads.model["n_heads"]
    return f"{heads.model.get('name')} on {heads.task.get('name')}: {found}, of {total}."


def _about(heads: HeadSet) -> str:
    model, task, method = heads.model, heads.task, heads.method
    dropped = ", ".join(f"{count} {reason}" for reason, count in (task.get("dropped") or {}).items())
    lines = {
        "Model": f"{model.get('name')} ({model.get('model_type')}, {model.get('n_layers')} layers × "
        f"{model.get('n_heads')} heads, {model.get('dtype')})",
        "Revision": model.get("revision"),
        "Weights": f"sha256 {model['weights_sha256']}" if model.get("weights_sha256") else None,
        "Task": task.get("name"),
        "Examples": f"{task.get('n_examples')} used"
        + (f", about {task['n_subjects']} subjects" if "n_subjects" in task else "")
        + f", {task.get('n_dropped', 0)} left out"
        + (f": {dropped}" if dropped else ""),
        "Method": method.get("name"),
        "Parameters": _flat(method.get("parameters") or {}),
        "Seed": method.get("seed"),
        "Made": heads.created,
        "Versions": _flat(heads.versions),
        "Command": heads.command,
    }
    rows = "".join(
        f"<dt>{name}</dt><dd>{escape(str(value))}</dd>" for name, value in lines.items() if value not in (None, "")
    )
    return f"<dl>{rows}</dl>"


def _flat(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items() if value not in (None, {}))


def _dissociation(heads: HeadSet) -> str:
    rows = dissociation_table(heads)
    text = verdict(heads)
    kind = "good" if text.startswith("The dissociation holds") else "bad"
    result = f"<p class='verdict {kind}'>{escape(text)}</p>"
    if advice := next_step(heads):
        result += f"<p class='note'>{escape(advice)}</p>"
    if rows:
        columns = quantities_of(rows)
        largest = {column: max(row.cells[column].mean for row in rows if column in row.cells) for column in columns}

        def cell(row: Condition, column: str) -> str:
            share = row.cells[column].mean / largest[column] if largest[column] else 0.0
            return " ".join(unbroken(part) for part in row.cells[column].parts()) + track(share)

        header = ["Silenced at the end of the prompt", *(QUANTITIES[column] for column in columns)]
        result += html_table(header, [[escape(row.name), *(cell(row, c) for c in columns)] for row in rows])
        result += (
            "<p class='note'>Mean probability of the first tokens of the answers still to be given (remaining) and of "
            "those already given (previous), with its 95% interval over subjects and its ratio to nothing silenced.</p>"
        )
    return result


def _ranked(heads: HeadSet, role: str, portraits: Mapping[tuple[int, int], HeadPortrait]) -> str:
    ranked = heads.roles[role]
    if not ranked:
        return f"<h3>{escape(role.capitalize())}</h3><p>No head was confirmed for this role.</p>"
    rule = ((heads.method.get("parameters") or {}).get("rules") or {}).get(role)
    confirmed_by = rule["confirm"].split(".")[0] if rule else "ablation"
    # In logits; the same in nats and probability is in heads.json, and would make the table too wide to read.
    effects = {
        f"{confirmed_by}.{quantity}": f"effect on {answers}"
        for quantity, answers in ANSWERS.items()
        if any(f"{confirmed_by}.{quantity}" in head.effect for head in ranked)
    }
    drawn = [portraits.get((head.layer, head.head)) for head in ranked]
    rows, cards = [], []
    for rank, (head, portrait) in enumerate(zip(ranked, drawn, strict=True), start=1):
        values = [
            unbroken(with_interval(head.score, head.ci)),
            *(signed(head.effect.get(effect)) for effect in effects),
        ]
        name = head.name
        if portrait is not None:
            name = f"<a href='#{anchor(head, role)}'>{name}</a>"
            cards.append(card(head, role, rank, portrait))
        if any(drawn):
            values.append("" if portrait is None else f"<span class='reads'>{gist(portrait)}</span>")
        rows.append([str(rank), name, *values])
    header = ["#", "head", "score [95% interval]", *effects.values(), *(["reads"] if any(drawn) else [])]
    note = "Scores are positive where a head raises the quantity." if role in ROLES else ""
    if rule:
        note = f"Ranked by {rule['rank']}, confirmed by {rule['confirm']}. {note}"
    if confirmed_by == "ablation" and effects:
        note += " Effects are exact, in logits, intact minus silenced."
    heading = f"<h3>{escape(role.capitalize())}</h3><p class='note'>{escape(note)}</p>"
    return heading + html_table(header, rows) + "".join(cards)


def _stability(heads: HeadSet) -> str:
    values = {role: heads.stability[role] for role in heads.roles if heads.stability.get(role) is not None}
    if not values:
        return ""
    listed = ", ".join(f"{escape(role)} {number(value)}" for role, value in values.items())
    return (
        f"<p>Stability, the mean overlap (Jaccard, 1 = always the same heads) with the choice on "
        f"{escape(str(heads.stability.get('bootstrap', '?')))} resamplings of the subjects: <b>{listed}</b>.</p>"
    )


def _maps(means: Mapping[str, ArrayLike], heads: HeadSet) -> str:
    drawn = sheets(means)
    if not drawn:
        return ""
    guide = (
        "<p>One row a layer, one column a head; outlined are the chosen heads. Red raises the logits of these answers, "
        "blue lowers them. <b>dla</b> is what a head writes itself; <b>lens</b> the part of it that is read from the "
        "subject, or from the given answers; <b>ablation</b> the exact effect of the head, later layers included. "
        "Where dla and ablation agree, the head does it itself; where only ablation is strong, it works through "
        "others.</p>"
    )
    parts = ["<h2>Maps</h2>", guide]
    for quantity, answers in ANSWERS.items():
        of_quantity = [sheet for sheet in drawn if sheet.quantity == quantity]
        if of_quantity:
            parts += [f"<h3>Toward the {answers}</h3>", *(_sheet(sheet, heads) for sheet in of_quantity)]
            parts.append(_agreement(means, quantity, answers))
    return "\n".join(part for part in parts if part)


def _sheet(sheet: Sheet, heads: HeadSet) -> str:
    png, width = sheet_png(sheet, marked_heads(heads))
    alt = f"Layer by head maps toward the {ANSWERS[sheet.quantity]}: {', '.join(sheet.maps)}"
    return f"<div class='maps'>{picture(png, alt, escape(scale_note(sheet)), width)}</div>"


def _agreement(means: Mapping[str, ArrayLike], quantity: str, answers: str) -> str:
    names, correlation = agreement(means, quantity)
    if len(names) < 2:
        return ""
    rows = [[escape(name), *(number(value) for value in row)] for name, row in zip(names, correlation, strict=True)]
    note = f"How far the methods agree on the {answers}: Spearman's rank correlation over all heads."
    return html_table(["", *(escape(name) for name in names)], rows) + f"<p class='note'>{note}</p>"


def _metrics(evaluation: Mapping[str, Any]) -> str:
    before, after = evaluation["before"], evaluation["after"]

    def cell(value: Any) -> str:
        if isinstance(value, Mapping):
            return unbroken(with_interval(value["mean"], value["ci"]))
        return number(value) if isinstance(value, int | float) else "–"

    def mean(value: Any) -> float | None:
        return value.get("mean") if isinstance(value, Mapping) else value

    rows = []
    for name in [key for key in {**before, **after} if key != "n"]:
        old, new = mean(before.get(name)), mean(after.get(name))
        change = None if old is None or new is None else new - old
        rows.append([escape(name.replace("_", " ")), cell(before.get(name)), cell(after.get(name)), signed(change)])
    counts = after.get("n") or before.get("n") or {}
    note = f"Task {evaluation.get('task')}. " + ", ".join(
        f"{key.replace('_', ' ')}: {_flat(value) or 'none' if isinstance(value, Mapping) else value}"
        for key, value in counts.items()
    )
    return html_table(["", "before", "after", "change"], rows) + f"<p class='note'>{escape(note)}</p>"


def _lists(evaluation: Mapping[str, Any]) -> str:
    examples = evaluation.get("examples") or []

    def side(example: Mapping[str, Any], when: str) -> str:
        kinds = "".join(
            f"<li class='{escape(kind)}'>{index} {escape(kind.replace('_', ' '))}</li>"
            for index, kind in enumerate(example[f"{when}_kinds"], start=1)
        )
        return f"<div><h4>{when}</h4><pre>{escape(example[when])}</pre><ol class='kinds'>{kinds}</ol></div>"

    blocks = [
        f"<article><pre class='prompt'>{escape(example['prompt'])}</pre>"
        f"<div class='sides'>{side(example, 'before')}{side(example, 'after')}</div></article>"
        for example in examples[:SHOWN_EXAMPLES]
    ]
    note = f"{len(blocks)} of {len(examples)} examples; all of them are in evaluation.json."
    return f"<p class='note'>{note}</p>" + "".join(blocks)
