"""The causal proof: chosen heads silenced together at END, beside the controls."""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from headtune.analysis.heads.controls import lowest, random_like
from headtune.analysis.heads.head_set import ROLES, HeadSet
from headtune.analysis.methods.parallel_map import ParallelMap
from headtune.analysis.methods.patching import set_probabilities
from headtune.analysis.methods.scores import Array, Scores
from headtune.analysis.models.head_model import HeadModel
from headtune.analysis.tasks.tokenized import Encoded
from headtune.analysis.utils.errors import InputError
from headtune.analysis.utils.progress import Progress, silent
from headtune.analysis.utils.stats import mean_interval

log = logging.getLogger(__name__)

Heads = Sequence[tuple[int, int]]


def probabilities(
    model: HeadModel,
    examples: Sequence[Encoded],
    sets: Mapping[str, Heads],
    parallel: ParallelMap,
    progress: Progress,
    what: str,
) -> Array:
    """p(remaining) and p(previous) with each named set silenced at END: `[sets, 2, examples]`."""

    def one(index: int) -> dict[str, Array]:
        return {"p": set_probabilities(model, examples[index], list(sets.values()))}

    return np.stack([row["p"] for row in parallel.map(len(examples), one, progress, what)], axis=2)


def verify(
    model: HeadModel,
    heads: HeadSet,
    examples: Sequence[Encoded],
    top: int,
    n_random: int,
    seed: int,
    progress: Progress = silent,
    scores: Scores | None = None,
    controls: Mapping[str, HeadSet] | None = None,
    parallel: ParallelMap | None = None,
) -> HeadSet:
    """Silence the chosen heads together at END, and the controls.

    Adds the `verification` block: `baseline`, `ablate_<role>`, `ablate_random_like_<role>` (random sets with as many
    heads in each of the same layers: mean over the sets, and the largest and smallest set mean),
    `ablate_lowest_like_<role>` (the heads of the same layers with the scores nearest to zero; where `scores` are
    given), `ablate_control_<name>_<role>` (another task's heads of that role), each with p(remaining) and p(previous);
    and `dissociation`, what was expected and whether it was seen. p(previous) is over the examples that have previous
    answers. A role whose layers have too few other heads for a matched set has `{"sets": 0, "reason"}` in its place.
    """
    # The sets to silence: the chosen heads, those nearest to zero, other tasks', and random ones.
    selected = {role: heads.top(role)[:top] for role in ROLES}
    generator = random.Random(seed)
    everyone = [head for pairs in selected.values() for head in pairs]
    sets: dict[str, Heads] = {"baseline": ()}
    named: dict[str, Heads] = {}  # reported with their heads
    unmatched: dict[str, str] = {}
    for role, pairs in selected.items():
        if not pairs:
            continue
        named[f"ablate_{role}"] = pairs
        if scores is not None and (control := lowest(scores, role, pairs)):
            named[f"ablate_lowest_like_{role}"] = control
        for name, other in (controls or {}).items():
            if theirs := [(entry.layer, entry.head) for entry in other.roles.get(role, ())[:top]]:
                named[f"ablate_control_{name}_{role}"] = theirs
            else:
                log.warning("control %s has no %s heads: there is nothing of it to silence", name, role)
        try:
            drawn = [random_like(pairs, model.n_heads, generator.randrange(2**31), everyone) for _ in range(n_random)]
        except InputError as error:  # the scores behind these heads took long: they are not thrown away for this
            unmatched[role] = str(error)
        else:
            sets |= {f"random_{role}_{index}": heads_drawn for index, heads_drawn in enumerate(drawn)}
    sets |= named
    values = dict(
        zip(sets, probabilities(model, examples, sets, parallel or ParallelMap(), progress, "verifying"), strict=True)
    )
    # Their probabilities, with intervals over subjects.
    subjects = [example.example.subject for example in examples]
    listing = [index for index, example in enumerate(examples) if example.previous_tokens]
    of_listing = [subjects[index] for index in listing]

    def numbers(of_set: Array) -> dict[str, Any]:
        result: dict[str, Any] = {"p_remaining": mean_interval(of_set[0].tolist(), subjects, seed=seed)}
        if listing:
            result["p_previous"] = mean_interval(of_set[1, listing].tolist(), of_listing, seed=seed)
        return result

    block: dict[str, Any] = {"baseline": numbers(values["baseline"])}
    for name, of_set in named.items():
        block[name] = {"heads": [list(pair) for pair in of_set]} | numbers(values[name])
    # Random sets: their mean, and the most extreme of them.
    for role, pairs in selected.items():
        if role in unmatched:
            block[f"ablate_random_like_{role}"] = {"sets": 0, "reason": unmatched[role]}
        elif pairs and n_random:
            of_sets = np.stack([values[f"random_{role}_{index}"] for index in range(n_random)])  # [sets, 2, examples]
            pooled = numbers(of_sets.mean(0))
            for column, (name, counted) in enumerate((("p_remaining", range(len(examples))), ("p_previous", listing))):
                if name in pooled:
                    means = of_sets[:, column, list(counted)].mean(-1)
                    pooled[name] |= {"lowest_set": float(means.min()), "highest_set": float(means.max())}
            block[f"ablate_random_like_{role}"] = {"sets": n_random} | pooled
        elif pairs:
            block[f"ablate_random_like_{role}"] = {"sets": 0, "reason": "no random sets were asked for"}
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
