"""A role is a quantity and a sign: parsed, ranked by a difference where it is one, refused where it makes no sense."""

from __future__ import annotations

import numpy as np
import pytest

from headtune.analysis.heads.ranking import Rule, rank, rule_for, stability, with_differences
from headtune.analysis.heads.roles import DEFAULT_ROLES, ROLES_BY_NAME, Role, role_of, roles_of
from headtune.analysis.methods.scores import Scores
from headtune.analysis.utils.errors import InputError

GENERATOR = np.random.default_rng(0)
SUBJECTS = [f"s{index // 2}" for index in range(24)]


def scores_of(**effects: dict[tuple[int, int], float]) -> Scores:
    """Little noise around 0, and what is asked for at some heads: `ablation__target` is `ablation.target`."""
    by_example = {}
    for name, heads in effects.items():
        values = GENERATOR.normal(0, 0.01, (24, 2, 3)).astype(np.float32)
        for (layer, head), value in heads.items():
            values[:, layer, head] += value
        by_example[name.replace("__", ".")] = values
    return Scores(by_example, SUBJECTS)


BOTH, MEMORY, CONTEXT = (0, 1), (1, 0), (1, 2)
TARGET, PREVIOUS = {BOTH: 3.0, MEMORY: 1.0}, {BOTH: 3.0, CONTEXT: 1.0}


def conflict() -> Scores:
    scores = scores_of(
        dla__target=TARGET,
        dla__previous=PREVIOUS,
        ablation__target=TARGET,
        ablation__previous=PREVIOUS,
        ablation__target_logp=TARGET,
        ablation__previous_logp=PREVIOUS,
    )
    return with_differences(scores, [role_of("memory"), role_of("context")])


def test_known_roles_and_written_ones() -> None:
    assert [role_of(name) for name in ("recall", "suppression")] == list(DEFAULT_ROLES) == list(roles_of(None))
    assert str(role_of("memory")) == "target-previous:+" and str(role_of("context")) == "previous-target:+"
    assert role_of("retrieval") == Role("retrieval", "retrieval.copy", 1.0, threshold=0.1)
    assert role_of("facts=target-previous:+") == Role("facts", "target", 1.0, "previous")
    assert role_of("inhibitor=ablation.target_logp:-") == Role("inhibitor", "ablation.target_logp", -1.0)
    for role in ROLES_BY_NAME.values():
        written = role_of(f"{role.name}={role}")
        assert (written.effect, str(written)) == (role.effect, str(role))


def test_what_silencing_must_do() -> None:
    effects = {name: role.effect for name, role in ROLES_BY_NAME.items()}
    assert effects == {
        "recall": "lower p_remaining",
        "suppression": "raise p_previous",
        "memory": "lower p_remaining",
        "context": "lower p_previous",
        "retrieval": "lower p_remaining",
    }
    assert role_of("x=ablation.previous_logp:-").effect == "raise p_previous"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("memori", "role 'memori' is unknown; did you mean 'memory'?"),
        ("memori", "known: context, memory, recall, retrieval, suppression"),
        ("x=target", "not of the form NAME=QUANTITY:+"),
        ("x=target:0", "not of the form"),
        ("a b=target:+", "not of the form"),
        ("x=a-b-c:+", "not of the form"),
        ("x=:+", "'' is no quantity"),
        ("x=target-ablation.previous:+", "both with their method or both without"),
        ("x=target-target:+", "a difference of two quantities"),
        ("both=target:+", "the name 'both' is taken"),
        ("selected=target:+", "the name 'selected' is taken"),
        ("bootstrap=target:+", "the name 'bootstrap' is taken"),
    ],
)
def test_refused_in_one_line(text: str, words: str) -> None:
    with pytest.raises(InputError) as caught:
        role_of(text)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_name_twice() -> None:
    with pytest.raises(InputError, match="role 'memory' is given twice"):
        roles_of(["memory", "memory=target:+"])


def test_a_difference_ranks_by_what_one_answer_gets_more_than_the_other() -> None:
    scores, roles = conflict(), roles_of(["memory", "context"])
    rule = Rule("dla.target-previous", 1.0, ("ablation.target-previous", "ablation.target_logp"))
    assert rule_for("memory", scores) == rule_for("memory", scores, "centred") == rule
    assert rule_for("context", scores).confirm == ("ablation.previous-target", "ablation.previous_logp")
    ranked = {role.name: rank(scores, role, None, roles=roles) for role in roles}
    assert {name: [(head.layer, head.head) for head in heads] for name, heads in ranked.items()} == {
        "memory": [MEMORY],
        "context": [CONTEXT],
    }, "the strongest head raises both answers alike and is neither"
    values = scores.by_example
    assert np.array_equal(values["dla.target-previous"], values["dla.target"] - values["dla.previous"])
    assert stability(scores, "memory", 1) == 1.0
    # One quantity alone would have put the head of both first.
    assert (rank(scores, "recall", 1)[0].layer, rank(scores, "recall", 1)[0].head) == BOTH


def test_false_discovery_is_over_the_roles_asked_for() -> None:
    scores = conflict()
    two, three = roles_of(["memory", "context"]), roles_of(["memory", "context", "recall"])
    q = [rank(scores, "memory", None, fdr=None, roles=roles)[-1].effect["q"] for roles in (two, three)]
    assert q[0] != q[1]


def test_a_quantity_of_a_method_ranks_and_confirms_itself() -> None:
    scores = scores_of(retrieval__copy={(0, 0): 0.9, (0, 1): 0.05}, ablation__target={(1, 1): 2.0})
    assert rule_for("retrieval", scores) == Rule("retrieval.copy", 1.0, ("retrieval.copy",))
    roles = roles_of(["retrieval"])
    assert [head.name for head in rank(scores, "retrieval", None, roles=roles)] == ["L0H0"], "less than .1 is nothing"
    assert len(rank(scores, "retrieval", None, threshold=0.03, roles=roles)) == 2
    with pytest.raises(InputError, match=r"role retrieval: the scores hold no 'retrieval.copy'; they hold dla.target"):
        rule_for("retrieval", scores_of(dla__target={}))


def test_no_previous_answers() -> None:
    single = with_differences(scores_of(dla__target=TARGET, ablation__target=TARGET), [role_of("memory")])
    with pytest.raises(InputError, match="memory heads cannot be ranked"):
        rule_for("memory", single)
    assert rule_for("suppression", single).rank == "dla.target"
