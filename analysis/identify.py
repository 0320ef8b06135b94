"""The identify stage: scores of every head on a task, ranking into roles, causal verification, files."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .attribution import attribute
from .errors import InputError
from .files import require_new_folder
from .headset import ROLES, HeadSet, provenance, random_like
from .model import HeadModel
from .patching import ablation_effects, set_probabilities
from .scores import Array, Scores, mean_interval, stack
from .selection import rank, rule_for, stability
from .tasks import Encoded, Task, encode

METHODS = ("all", "dla", "ablation")
Progress = Callable[[Sequence[Encoded], str], Iterable[Encoded]]


def silent(examples: Sequence[Encoded], _what: str) -> Iterator[Encoded]:
    """The `Progress` that shows nothing."""
    return iter(examples)


@dataclass(frozen=True)
class Identified:
    """What identify found: the head set, the scores, and the examples behind them."""

    heads: HeadSet
    scores: Scores
    examples: list[Encoded]


def identify(
    model: HeadModel,
    task: Task,
    method: str = "all",
    top: int = 8,
    verify_top: int = 4,
    n_random: int = 10,
    seed: int = 0,
    progress: Progress = silent,
) -> Identified:
    """Score every head, rank recall and suppression heads, verify them against random heads of the same layers.

    Args:
        method: `dla` attribution only; `ablation` exact ablation only ranks by its effect; `all` both (attribution
            ranks, ablation confirms).
        top: heads kept per role.
        verify_top: heads silenced together in the verification.
        n_random: matched random sets drawn for the verification.
        progress: wraps the list of examples while it is worked through.

    Raises:
        InputError: an unknown method, or a task that cannot be scored on this model.
    """
    if method not in METHODS:
        raise InputError(f"method {method!r} is unknown; choose one of {', '.join(METHODS)}")
    encoded = encode(task, model.tokenizer)
    subjects = [example.example.subject for example in encoded.examples]
    rows = []
    for example in progress(encoded.examples, "scoring heads"):
        row: dict[str, Array] = {}
        if method in ("all", "dla"):
            row |= attribute(model, example)
        if method in ("all", "ablation"):
            row |= ablation_effects(model, example)
        rows.append(row)
    scores = stack(rows, subjects)
    ranked = {role: tuple(rank(scores, role, top, seed=seed)) for role in ROLES}
    heads = HeadSet(
        model=model.identity(),
        task=encoded.summary(),
        method={
            "name": method,
            "parameters": {
                "top": top,
                "verify_top": verify_top,
                "n_random": n_random,
                "rules": {
                    role: dict(zip(("rank", "sign", "confirm"), rule_for(role, scores), strict=True)) for role in ROLES
                },
            },
            "seed": seed,
        },
        roles=ranked,
        stability={role: stability(scores, role, top, seed=seed) for role in ROLES} | {"bootstrap": 200},
        **provenance(),
    )
    return Identified(
        verify(model, heads, encoded.examples, verify_top, n_random, seed, progress), scores, encoded.examples
    )


def verify(
    model: HeadModel,
    heads: HeadSet,
    examples: Sequence[Encoded],
    top: int,
    n_random: int,
    seed: int,
    progress: Progress = silent,
) -> HeadSet:
    """Silence the chosen heads together at END, and random sets with as many heads in each of the same layers.

    Adds the `verification` block: `baseline`, `ablate_<role>`, `ablate_random_like_<role>` (mean over the sets, and the
    largest and smallest set mean), each with p(remaining) and p(previous); and `dissociation`, what was expected and
    whether it was seen. p(previous) is over the examples that have previous answers. A role whose layers have too few
    other heads for a matched set has `{"sets": 0, "reason"}` in its place.
    """
    chosen = {role: heads.top(role)[:top] for role in ROLES}
    generator = random.Random(seed)
    everyone = [head for pairs in chosen.values() for head in pairs]
    sets: dict[str, Sequence[tuple[int, int]]] = {"baseline": ()}
    unmatched: dict[str, str] = {}
    for role, pairs in chosen.items():
        if not pairs:
            continue
        sets[f"ablate_{role}"] = pairs
        try:
            drawn = [random_like(pairs, model.n_heads, generator.randrange(2**31), everyone) for _ in range(n_random)]
        except InputError as error:  # the scores behind these heads took long: they are not thrown away for this
            unmatched[role] = str(error)
        else:
            sets |= {f"random_{role}_{index}": heads_drawn for index, heads_drawn in enumerate(drawn)}
    values = set_probabilities(model, progress(examples, "verifying"), dict(sets))
    subjects = [example.example.subject for example in examples]
    listing = [index for index, example in enumerate(examples) if example.previous_tokens]
    of_listing = [subjects[index] for index in listing]

    def numbers(remaining: Sequence[float], previous: Sequence[float]) -> dict[str, Any]:
        result: dict[str, Any] = {"p_remaining": mean_interval(remaining, subjects, seed=seed)}
        if listing:
            result["p_previous"] = mean_interval([previous[index] for index in listing], of_listing, seed=seed)
        return result

    block: dict[str, Any] = {"baseline": numbers(*values["baseline"])}
    for role, pairs in chosen.items():
        if not pairs:
            continue
        block[f"ablate_{role}"] = {"heads": [list(pair) for pair in pairs]} | numbers(*values[f"ablate_{role}"])
        if role in unmatched:
            block[f"ablate_random_like_{role}"] = {"sets": 0, "reason": unmatched[role]}
            continue
        of_sets = np.array([values[f"random_{role}_{index}"] for index in range(n_random)])  # [sets, 2, examples]
        pooled = numbers(of_sets[:, 0].mean(0).tolist(), of_sets[:, 1].mean(0).tolist())
        for column, (name, counted) in enumerate((("p_remaining", range(len(examples))), ("p_previous", listing))):
            if name in pooled:
                means = of_sets[:, column, list(counted)].mean(-1)
                pooled[name] |= {"lowest_set": float(means.min()), "highest_set": float(means.max())}
        block[f"ablate_random_like_{role}"] = {"sets": n_random} | pooled
    block["dissociation"] = dissociation(block)
    return HeadSet(**{**heads.__dict__, "verification": block})


def dissociation(block: dict[str, Any]) -> dict[str, Any]:
    """Compare each role's ablation with the most extreme matched random set.

    Silencing suppression heads must raise p(previous) above every random set; silencing recall heads must lower
    p(remaining) below every random set. On single facts, suppression heads must raise p(remaining).
    """
    result: dict[str, Any] = {}
    baseline = block["baseline"]
    quantity = "p_previous" if "p_previous" in baseline else "p_remaining"
    for role, name, raises in (("suppression", quantity, True), ("recall", "p_remaining", False)):
        if f"ablate_{role}" not in block:
            result[role] = {"held": False, "reason": "no confirmed heads"}
            continue
        if reason := block[f"ablate_random_like_{role}"].get("reason"):
            result[role] = {"held": False, "reason": reason}
            continue
        before, after = baseline[name]["mean"], block[f"ablate_{role}"][name]["mean"]
        extreme = block[f"ablate_random_like_{role}"][name]["highest_set" if raises else "lowest_set"]
        held = after > max(before, extreme) if raises else after < min(before, extreme)
        result[role] = {
            "quantity": name,
            "baseline": before,
            "ablated": after,
            "ratio": after / before if before else None,
            "most_extreme_random_set": extreme,
            "held": bool(held),
        }
    return result


def write(found: Identified, folder: Path) -> None:
    """Write heads.json and scores.safetensors into a new folder.

    Raises:
        InputError: the folder exists with contents or cannot be written.
    """
    require_new_folder(folder, "choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    found.scores.save(folder / "scores.safetensors")
    found.heads.write(folder / "heads.json")
