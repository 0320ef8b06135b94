"""The other subjects' answers, which scores are contrasted with: each counts the same, this one not at all."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

import pytest
from transformers import PreTrainedTokenizerFast

from headtune.analysis.tasks import contrast
from headtune.analysis.tasks.task import Example, Task
from headtune.analysis.tasks.tokenized import Encoded, encode
from helpers.tiny import FACTS, tiny_task


def answers_of(examples: Sequence[Encoded]) -> dict[str, set[int]]:
    answers: dict[str, set[int]] = defaultdict(set)
    for each in examples:
        answers[each.example.subject] |= {*each.target_tokens, *each.previous_tokens, *each.ambiguous}
    return answers


def questions(facts: dict[str, list[str]]) -> Task:
    return Task("facts", tuple(Example(f"Some cities in {name}:", name, tuple(facts[name])) for name in facts))


def test_weights_are_a_mean_over_the_other_subjects(tokenizer: PreTrainedTokenizerFast) -> None:
    """Against a loop over the subjects."""
    facts = {"Italy": ["Rome", "Milan"], "Japan": ["Tokyo", "Rome", "Kyoto"], "France": ["Paris"], "Spain": ["Rome"]}
    examples = encode(questions(facts), tokenizer).examples
    answers = answers_of(examples)
    for each in examples:
        taken = answers[each.example.subject]
        rest = {name: answers[name] - taken for name in answers if name != each.example.subject}
        rest = {name: left for name, left in rest.items() if left}  # Spain has nothing that Italy has not
        expected: dict[int, float] = defaultdict(float)
        for left in rest.values():
            for token in left:
                expected[token] += 1 / len(left) / len(rest)
        assert dict(each.others) == pytest.approx(dict(expected))
        assert list(dict(each.others)) == sorted(expected)
    (rome,) = answers["Spain"]
    assert rome in dict(examples[2].others) and rome not in dict(examples[0].others)


def test_they_sum_to_1_and_hold_no_answer_of_the_subject_given_or_not(tokenizer: PreTrainedTokenizerFast) -> None:
    """An answer that one prompt has given is remaining in another: both are this subject's."""
    examples = encode(tiny_task(previous=(1, 2, 3)), tokenizer).examples
    answers = answers_of(examples)
    for each in examples:
        tokens, weights = zip(*each.others, strict=True)
        assert sum(weights) == pytest.approx(1) and min(weights) > 0
        assert not set(tokens) & answers[each.example.subject]
        assert len(set(tokens)) == len(tokens)
    by_subject = {each.example.subject: each.others for each in examples}
    assert all(each.others == by_subject[each.example.subject] for each in examples), "one for all of its prompts"
    assert len(by_subject) == len(FACTS)


def test_they_do_not_depend_on_the_order_of_the_prompts(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contrast, "PERMUTATIONS", 3)  # of seven: which ones must not depend on it either
    task = tiny_task()
    backwards = Task(task.name, task.examples[::-1])
    assert [each.others for each in encode(task, tokenizer).examples] == [
        each.others for each in encode(backwards, tokenizer).examples
    ][::-1]


def test_there_are_none_where_all_subjects_have_the_same_answers(tokenizer: PreTrainedTokenizerFast) -> None:
    alike = questions({name: ["Rome", "Milan"] for name in FACTS})
    assert [each.others for each in encode(alike, tokenizer).examples] == [()] * len(FACTS)
    alone = questions({"Italy": ["Rome"]})
    assert [each.others for each in encode(alone, tokenizer).examples] == [()]


@pytest.mark.parametrize("permutations", [1, 3, 7, 100])
def test_at_most_so_many_others_and_every_subject_as_often(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, permutations: int
) -> None:
    """Each of the first cities is one subject's alone: the tokens say whose answers were taken."""
    monkeypatch.setattr(contrast, "PERMUTATIONS", permutations)
    examples = encode(questions({name: cities[:1] for name, cities in FACTS.items()}), tokenizer).examples
    assert len({token for each in examples for token in each.target_tokens}) == len(FACTS)
    expected = min(permutations, len(FACTS) - 1)
    assert [len(each.others) for each in examples] == [expected] * len(FACTS)
    used = Counter(token for each in examples for token, _ in each.others)
    assert set(used.values()) == {expected} and len(used) == len(FACTS)
    assert all(weight == pytest.approx(1 / expected) for each in examples for _, weight in each.others)
