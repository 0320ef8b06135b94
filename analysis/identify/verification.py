"""The causal proof: heads chosen on one half of the subjects, silenced together on the other, beside the controls."""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from headtune.analysis.heads.controls import largest, lowest, random_sets
from headtune.analysis.heads.head_set import HeadSet
from headtune.analysis.heads.ranking import rank
from headtune.analysis.heads.roles import DEFAULT_ROLES, Role
from headtune.analysis.methods.parallel_map import ParallelMap
from headtune.analysis.methods.patching import set_probabilities
from headtune.analysis.methods.scores import Array, Scores
from headtune.analysis.models import hooks
from headtune.analysis.models.head_model import HeadModel
from headtune.analysis.tasks.tokenized import Encoded
from headtune.analysis.utils.progress import Progress, silent
from headtune.analysis.utils.stats import mean_interval

from .verdict import dissociation

log = logging.getLogger(__name__)

Heads = Sequence[tuple[int, int]]
QUANTITIES = ("p_remaining", "p_previous")
N_RANDOM = 50  # random sets
NORM_EXAMPLES = 16  # prompts that heads' sizes are measured on


def probabilities(
    model: HeadModel,
    examples: Sequence[Encoded],
    sets: Mapping[str, Heads],
    parallel: ParallelMap,
    progress: Progress,
    what: str,
) -> Array:
    """p(remaining) and p(previous) with each named set silenced at the last token: `[sets, 2, examples]`."""
    return _probabilities(model, examples, [list(sets.values())] * len(examples), parallel, progress, what)


def _probabilities(
    model: HeadModel,
    examples: Sequence[Encoded],
    sets: Sequence[Sequence[Heads]],
    parallel: ParallelMap,
    progress: Progress,
    what: str,
) -> Array:
    """`[sets, 2, examples]`, each example with the sets of its own."""

    def one(index: int) -> dict[str, Array]:
        return {"p": set_probabilities(model, examples[index], sets[index])}

    return np.stack([row["p"] for row in parallel.map(len(examples), one, progress, what)], axis=2)


@torch.no_grad()
def output_norms(model: HeadModel, examples: Sequence[Encoded]) -> Array:
    """`[n_layers, n_heads]` mean norm of what each head writes at the last token, `||z[l, h] W_O[l, h]||`, over the
    first `NORM_EXAMPLES` prompts."""
    total = np.zeros((model.n_layers, model.n_heads), dtype=np.float32)
    weights = [model.output_weight(layer).float() for layer in range(model.n_layers)]
    for encoded in examples[:NORM_EXAMPLES]:
        position = torch.tensor([encoded.end], device=model.device)
        with hooks.capture(model, positions=position) as z:
            model.hf(encoded.tokens[None].to(model.device), use_cache=False, logits_to_keep=1)
        written = [
            torch.einsum("hd,hdm->hm", z[layer][0].float().to(weight), weight) for layer, weight in enumerate(weights)
        ]
        total += torch.stack([row.norm(dim=-1).cpu() for row in written]).numpy()
    mean: Array = total / np.float32(min(len(examples), NORM_EXAMPLES))
    return mean


def halves(subjects: Sequence[str], seed: int) -> tuple[list[int], list[int]]:
    """Indices of the examples of each half of the subjects, drawn at random; the first half has the odd subject."""
    names = sorted(set(subjects))
    random.Random(seed).shuffle(names)
    first = set(names[: -(-len(names) // 2)])
    rows = range(len(subjects))
    return [i for i in rows if subjects[i] in first], [i for i in rows if subjects[i] not in first]


@dataclass(frozen=True)
class _Fold:
    """Heads chosen on one half: role -> heads, name -> what is silenced on the other half, the random sets by role."""

    chosen: dict[str, Heads]
    named: dict[str, Heads]
    random: dict[str, list[tuple[tuple[int, int], ...]]]

    def sets(self, n: Mapping[str, int], names: Sequence[str]) -> list[Heads]:
        """Nothing, the named sets (none where this fold has no such set), and `n` random sets of each role."""
        drawn = [each for role, count in n.items() for each in self.random[role][:count]]
        return [(), *(self.named.get(name, ()) for name in names), *drawn]


def verify(
    model: HeadModel,
    heads: HeadSet,
    examples: Sequence[Encoded],
    scores: Scores,
    top: int,
    n_random: int = N_RANDOM,
    seed: int = 0,
    progress: Progress = silent,
    controls: Mapping[str, HeadSet] | None = None,
    parallel: ParallelMap | None = None,
    by: str = "contrast",
    roles: Sequence[Role] = DEFAULT_ROLES,
) -> HeadSet:
    """Choose heads on each half of the subjects and silence them together on the other half, and the controls there.

    Nothing is verified on a prompt that it was chosen on. Quantities that only the task as a whole has cannot be
    halved: their heads are those of `heads` in both halves, which the block says (`"halves": 1`).

    Adds the `verification` block, each entry with p(remaining) and p(previous) over all examples, every example with
    the heads that the other half chose:

        baseline, ablate_<role>         nothing, and the chosen heads (`heads`: of all subjects; `folds`: of each half)
        ablate_random_like_<role>       random sets with as many heads in each of the same layers (the nearest ones,
                                        where these hold too few): mean over the sets, the smallest and largest set
                                        mean, and `set_means`
        ablate_largest_like_<role>      the largest other heads of the same layers, by what they write
        ablate_lowest_like_<role>       the heads of the same layers with the scores nearest to zero
        ablate_control_<name>_<role>    another task's heads of that role
        dissociation                    what was expected and whether it was seen: see `verdict`

    p(previous) is over the examples that have previous answers.

    Args:
        roles: those of `heads`.
    """
    subjects = [example.example.subject for example in examples]
    split = halves(subjects, seed)
    whole = any(rule["rank"] in scores.whole for rule in heads.method["parameters"]["rules"].values())
    norms = output_norms(model, examples)
    by_role = {role.name: role for role in roles}
    confirmed = [role for role in by_role if heads.roles[role]]
    for name, other in (controls or {}).items():
        for role in confirmed:
            if not other.roles.get(role):
                log.warning("control %s has no %s heads: there is nothing of it to silence", name, role)
    folds = []
    for index, rows in enumerate(split):
        part = scores if whole else scores.subset(rows)
        if whole:
            chosen: dict[str, Heads] = {role: heads.top(role)[:top] for role in confirmed}
        else:
            counts = {role: min(top, len(heads.roles[role])) for role in confirmed}
            ranked = {role: rank(part, by_role[role], n, by=by, fdr=None, roles=roles) for role, n in counts.items()}
            chosen = {role: [(entry.layer, entry.head) for entry in entries] for role, entries in ranked.items()}
        folds.append(_fold(model, part, chosen, by_role, norms, n_random, seed + index, controls or {}, top, by))

    # What every example is run with: the sets of the half that it is not in.
    names = list(dict.fromkeys(name for fold in folds for name in fold.named))
    n_sets = {role: min(len(fold.random[role]) for fold in folds) for role in confirmed}
    sets_of: list[list[Heads]] = [[]] * len(examples)
    for fold, rows in zip(folds, reversed(split), strict=True):
        for index in rows:
            sets_of[index] = fold.sets(n_sets, names)
    values = _probabilities(model, examples, sets_of, parallel or ParallelMap(), progress, "verifying")
    labels = ["baseline", *names, *(f"random_{role}_{i}" for role, count in n_sets.items() for i in range(count))]
    by_name = dict(zip(labels, values, strict=True))

    # Their probabilities, with intervals over subjects.
    listing = [index for index, example in enumerate(examples) if example.previous_tokens]
    rows_of = {"p_remaining": list(range(len(examples)))} | ({"p_previous": listing} if listing else {})

    def numbers(values_of_set: Array) -> dict[str, Any]:
        return {
            name: mean_interval(values_of_set[QUANTITIES.index(name), rows].tolist(), [subjects[i] for i in rows])
            for name, rows in rows_of.items()
        }

    block: dict[str, Any] = {
        "halves": 1 if whole else 2,
        "subjects": [len({subjects[i] for i in rows}) for rows in split],
        "baseline": numbers(by_name["baseline"]),
    }
    for name in names:
        if all(fold.named.get(name) for fold in folds):
            block[name] = {"heads": [list(pair) for pair in folds[0].named[name]]} | numbers(by_name[name])
            block[name]["folds"] = [[list(pair) for pair in fold.named[name]] for fold in folds]
    for role in confirmed:
        if f"ablate_{role}" not in block:
            continue  # a half without heads of this role has no sets like them either
        block[f"ablate_{role}"]["heads"] = [list(pair) for pair in heads.top(role)[:top]]
        block[f"ablate_random_like_{role}"] = _random_block(by_name, role, n_sets[role], rows_of, numbers, n_random)
    block["dissociation"] = {
        name: dissociation(role, heads, block, by_name, rows_of, subjects, n_sets.get(name, 0))
        | ({} if role in DEFAULT_ROLES else {"expected": role.effect})
        for name, role in by_role.items()
    }
    return replace(heads, verification=block)


def _fold(
    model: HeadModel,
    scores: Scores,
    chosen: dict[str, Heads],
    by_role: Mapping[str, Role],
    norms: Array,
    n_random: int,
    seed: int,
    controls: Mapping[str, HeadSet],
    top: int,
    by: str,
) -> _Fold:
    """What is silenced on the half that did not choose `chosen`."""
    everyone = [head for pairs in chosen.values() for head in pairs]
    named: dict[str, Heads] = {}
    drawn: dict[str, list[tuple[tuple[int, int], ...]]] = {}
    for index, (role, pairs) in enumerate(chosen.items()):
        drawn[role] = []
        if not pairs:
            continue
        named[f"ablate_{role}"] = pairs
        named[f"ablate_largest_like_{role}"] = largest(norms, pairs, everyone)
        named[f"ablate_lowest_like_{role}"] = lowest(scores, by_role[role], pairs, by)
        for name, other in controls.items():
            if theirs := [(entry.layer, entry.head) for entry in other.roles.get(role, ())[:top]]:
                named[f"ablate_control_{name}_{role}"] = theirs
        drawn[role] = random_sets(pairs, (model.n_layers, model.n_heads), n_random, 2 * seed + index, everyone)
    return _Fold(chosen, named, drawn)


def _random_block(
    by_name: Mapping[str, Array], role: str, n: int, rows_of: Mapping[str, list[int]], numbers: Any, asked: int
) -> dict[str, Any]:
    """The random sets of a role: their mean, and the mean of each."""
    if not n:
        reason = "no random sets were asked for" if not asked else "the layers hold no other heads to draw from"
        return {"sets": 0, "reason": reason}
    of_sets = np.stack([by_name[f"random_{role}_{index}"] for index in range(n)])  # [sets, 2, examples]
    pooled: dict[str, Any] = numbers(of_sets.mean(0))
    for name, rows in rows_of.items():
        means = of_sets[:, QUANTITIES.index(name), rows].mean(-1)
        pooled[name] |= {
            "lowest_set": float(means.min()),
            "highest_set": float(means.max()),
            "set_means": [float(mean) for mean in means],
        }
    return {"sets": n} | pooled
