"""Where there is nothing to find nothing is said to hold: on random models, and with the answers given to others."""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from headtune.analysis.heads.head_set import ROLES
from headtune.analysis.heads.ranking import rank
from headtune.analysis.identify.pipeline import IdentifyResult, identify
from headtune.analysis.identify.verdict import FEWEST_SETS, HOLDS
from headtune.analysis.identify.verification import verify
from headtune.analysis.models.loading import wrap_model
from headtune.analysis.synthetic.planted import KINDS, plant
from headtune.analysis.tasks.tokenized import Encoded, EncodedTask, _with_others, encode
from helpers.tiny import quick_among, tiny_model, tiny_task, tiny_tokenizer

RANDOM = [(family, seed) for family in ("llama", "qwen3", "gpt2", "gpt_neox") for seed in range(3)]


@functools.cache
def identified(family: str, seed: int) -> IdentifyResult:
    model = wrap_model(tiny_model(family, seed), tiny_tokenizer(), f"{family} {seed}")
    return identify(model, tiny_task().limited(8), top=4, verify_top=2)


def verdicts(found: IdentifyResult) -> list[str]:
    return [found.heads.verification["dissociation"][role]["verdict"] for role in ROLES]


def test_nothing_holds_in_random_models() -> None:
    """24 verdicts. Of the 144 heads some 14 would be beyond p = 0.05 in one role or the other; none is confirmed."""
    assert not [name for name in RANDOM if HOLDS in verdicts(identified(*name))]
    assert not [entry.name for name in RANDOM for role in ROLES for entry in identified(*name).heads.roles[role]]


def test_the_verification_alone_holds_in_one_of_twenty_random_models_at_most() -> None:
    """The best heads of each random model, as though they were confirmed: the other half of the subjects disagrees."""
    results = []
    for name in RANDOM:
        found = identified(*name)
        best = {role: tuple(rank(found.scores, role, 2, fdr=None)) for role in ROLES}
        again = verify(found.model, replace(found.heads, roles=best), found.examples, found.scores, 2, n_random=25)
        results += [again.verification["dissociation"][role] for role in ROLES]
    assert sum(result["held"] for result in results) <= 1
    assert sum(result.get("sets", 0) >= FEWEST_SETS for result in results) > 12, "most of them were tested"


def exchanged(task: EncodedTask, seed: int) -> EncodedTask:
    """The answers of every subject given to another one, prompt by prompt; the prompts stay."""
    by_subject: dict[str, list[Encoded]] = {}
    for each in task.examples:
        by_subject.setdefault(each.example.subject, []).append(each)
    names = sorted(by_subject)
    giver = dict(zip(names, np.random.default_rng(seed).permutation(names).tolist(), strict=True))
    assert any(giver[name] != name for name in names)
    examples, taken = [], Counter[str]()
    for each in task.examples:
        name = each.example.subject
        other = by_subject[giver[name]][taken[name] % len(by_subject[giver[name]])]
        taken[name] += 1
        answers = {key: getattr(other, key) for key in ("target_tokens", "previous_tokens", "ambiguous")}
        examples.append(replace(each, **answers))
    return replace(task, examples=_with_others(examples))


@pytest.mark.parametrize("name", quick_among([kind.name for kind in KINDS], ("redundant",)))
def test_nothing_holds_where_the_answers_are_those_of_other_subjects(name: str) -> None:
    """The planted heads raise and lower answers, those of their subject: it is these that roles are about."""
    planted = plant(next(kind for kind in KINDS if kind.name == name))
    model = planted.view()
    task = encode(planted.task.limited(8), model.tokenizer)
    for seed in range(3):
        found = identify(model, exchanged(task, seed), top=4, verify_top=3, n_random=25)
        assert HOLDS not in verdicts(found) and not any(found.heads.roles.values())
    # With their own answers they are seen in as many prompts.
    found = identify(model, task, top=4, verify_top=3, n_random=25)
    assert HOLDS in verdicts(found) and all(found.heads.roles.values())
