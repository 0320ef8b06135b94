"""The page a person reads: which heads, how surely, whether the proof holds, and what a run changed.

One HTML file that needs nothing beside it: pictures are inlined, there is no script and no request, and it reads on a
phone. Here the numbers are collected; how they look is in `templates/`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import ArrayLike

from headtune.analysis.heads.head_set import HeadSet
from headtune.analysis.tasks.answer_starts import beginnings

from .dissociation import QUANTITIES, dissociation_table, next_step, quantities_of, verdict, verdicts
from .evaluation_view import evaluation_view, in_words
from .head_dashboard import ANSWERS, dashboard
from .head_profiles import HeadProfile
from .heat_maps import Sheet, agreement, marked_heads, scale_note, sheet_png, sheets
from .html import number, render_page


def write_report(
    path: Path,
    heads: HeadSet,
    means: Mapping[str, ArrayLike],
    evaluation: Mapping[str, Any] | None = None,
    profiles: Sequence[HeadProfile] = (),
    title: str = "",
) -> None:
    """Write the page as one HTML file that refers to nothing outside itself.

    Args:
        means: score name -> `[n_layers, n_heads]`; the maps of every method are drawn (see `heat_maps.sheets`).
        evaluation: the content of evaluation.json, `{"before", "after", "task", "examples"}`; adds the comparison.
        profiles: of chosen heads; each gets a dashboard.
        title: default: the name of the folder that the page is written to.
    """
    by_head = {(profile.layer, profile.head): profile for profile in profiles}
    render_page(
        path,
        "head_report.html.j2",
        title=title or path.resolve().parent.name,
        about_page=", ".join(
            filter(None, (str(heads.model.get("name")), str(heads.task.get("name")), heads.created[:10]))
        ),
        lead=_lead(heads),
        evaluation=None if evaluation is None else evaluation_view(evaluation),
        # Heads that a training chose have no role whose loss could be told apart.
        proof=_proof(heads) if set(heads.roles) - {"selected"} else None,
        stability=_stability(heads),
        resamplings=heads.stability.get("bootstrap", "?"),
        profiled=bool(profiles),
        roles=[_role(heads, role, by_head) for role in heads.roles],
        maps=_maps(means, heads),
        about=_about(heads),
    )


def write_run_report(path: Path, evaluation: Mapping[str, Any], recipe: str, lead: str, title: str) -> None:
    """Write the page of a run for which no heads were ranked: before and after, generations, recipe.

    Args:
        evaluation: as for `write_report`.
        recipe: its text.
        lead: one line under the title.
    """
    view = evaluation_view(evaluation)
    render_page(path, "run_report.html.j2", title=title, lead=lead, evaluation=view, recipe=recipe)


def _lead(heads: HeadSet) -> str:
    counts = ", ".join(f"{len(ranked)} {role} heads" for role, ranked in heads.roles.items())
    total = heads.model["n_layers"] * heads.model["n_heads"]
    return f"{heads.model.get('name')} on {heads.task.get('name')}: {counts}, of {total}."


def _about(heads: HeadSet) -> dict[str, Any]:
    model, task, method = heads.model, heads.task, heads.method
    dropped = ", ".join(f"{count} {reason}" for reason, count in (task.get("dropped") or {}).items())
    return {
        "Model": f"{model.get('name')} ({model.get('model_type')}, {model.get('n_layers')} layers × "
        f"{model.get('n_heads')} heads, {model.get('dtype')})",
        "Revision": model.get("revision"),
        "Weights": f"sha256 {model['weights_sha256']}" if model.get("weights_sha256") else None,
        "Task": task.get("name"),
        "Examples": f"{task.get('n_examples')} used"
        + (f", about {task['n_subjects']} subjects" if "n_subjects" in task else "")
        + f", {task.get('n_dropped', 0)} left out"
        + (f": {dropped}" if dropped else ""),
        "Answers": beginnings(task) or None,
        "Method": method.get("name"),
        "Parameters": in_words(method.get("parameters") or {}),
        "Seed": method.get("seed"),
        "Made": heads.created,
        "Versions": in_words(heads.versions),
        "Command": heads.command,
    }


def _proof(heads: HeadSet) -> dict[str, Any]:
    """The dissociation: verdict, advice, and the table with the largest mean of each column."""
    rows = dissociation_table(heads)
    columns = {quantity: QUANTITIES[quantity] for quantity in quantities_of(rows)}
    return {
        "verdicts": verdicts(heads) or [("cannot be told", verdict(heads))],
        "advice": next_step(heads),
        "conditions": rows,
        "columns": columns,
        "largest": {q: max(row.cells[q].mean for row in rows if q in row.cells) for q in columns},
    }


def _role(heads: HeadSet, role: str, profiles: Mapping[tuple[int, int], HeadProfile]) -> dict[str, Any]:
    """A role's ranked heads, each with its dashboard or None, the effects shown of them, and how to read the table."""
    ranked = heads.roles[role]
    rule = ((heads.method.get("parameters") or {}).get("rules") or {}).get(role)
    confirms = [rule["confirm"]] if rule and isinstance(rule["confirm"], str) else rule["confirm"] if rule else []
    confirmed_by = confirms[0].split(".")[0] if confirms else "ablation"
    # In logits, and in nats of what a softmax makes of them; the rest is in heads.json.
    effects = {
        name: f"effect on {answers}{words}"
        for quantity, answers in ANSWERS.items()
        for name, words in (
            (f"{confirmed_by}.{quantity}", ""),
            (f"{confirmed_by}.{quantity}_logp", " (log-probability)"),
        )
        if any(name in head.effect for head in ranked)
    }
    if any("q" in head.effect for head in ranked):
        effects["q"] = "q"
    pairs = []
    for rank, head in enumerate(ranked, start=1):
        profile = profiles.get((head.layer, head.head))
        pairs.append((head, None if profile is None else dashboard(head, role, rank, profile)))
    definition = heads.role(role)
    note = "Scores are positive where a head raises the quantity." if definition is not None else ""
    if rule:
        note = f"Ranked by {rule['rank']}, confirmed by {' and '.join(confirms)}. {note}"
    if confirmed_by == "ablation" and effects:
        note += " Effects are exact, in logits (log-probability in nats), intact minus silenced."
    if "q" in effects:
        note += " q: the least false discovery rate at which a head counts as confirmed."
    return {
        "name": role,
        "heads": pairs,
        "profiled": any(profile is not None for _, profile in pairs),
        "effects": effects,
        "note": note,
    }


def _stability(heads: HeadSet) -> str:
    values = {role: heads.stability[role] for role in heads.roles if heads.stability.get(role) is not None}
    return ", ".join(f"{role} {number(value)}" for role, value in values.items())


def _maps(means: Mapping[str, ArrayLike], heads: HeadSet) -> list[dict[str, Any]]:
    """For each quantity that has maps: its sheets as pictures, and how far the methods agree."""
    drawn = sheets(means)
    groups = []
    for quantity, answers in ANSWERS.items():
        of_quantity = [sheet for sheet in drawn if sheet.quantity == quantity]
        if of_quantity:
            methods, correlation = agreement(means, quantity)
            groups.append(
                {
                    "answers": answers,
                    "sheets": [_picture(sheet, heads) for sheet in of_quantity],
                    "methods": methods,
                    "agreement": [[name, *row] for name, row in zip(methods, correlation.tolist(), strict=True)],
                }
            )
    return groups


def _picture(sheet: Sheet, heads: HeadSet) -> dict[str, Any]:
    png, width = sheet_png(sheet, marked_heads(heads))
    alt = f"Layer by head maps toward the {ANSWERS[sheet.quantity]}: {', '.join(sheet.maps)}"
    return {"png": png, "alt": alt, "caption": scale_note(sheet), "width": width}
