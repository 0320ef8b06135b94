"""Few-shot prompts and average indirect effects, against loops with hooks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from headtune.analysis.methods.in_context import (
    CIE,
    FewShotPrompt,
    InContextMeans,
    few_shot_prompts,
    in_context_means,
    indirect_effects,
)
from headtune.analysis.models import hooks
from headtune.analysis.models.head_model import HeadModel
from headtune.analysis.tasks.task import Example, Task
from headtune.analysis.utils.errors import InputError
from helpers.copying import copying_model, copying_task
from helpers.tiny import FACTS, N_HEADS, N_LAYERS, quick_among


@torch.no_grad()
def z_at_end(model: HeadModel, tokens: Tensor) -> Tensor:
    with hooks.capture(model) as z:
        model.hf(tokens[None])
    return torch.stack([z[layer][0, -1] for layer in range(model.n_layers)])


def patched_p(model: HeadModel, prompt: FewShotPrompt, layer: int, head: int, value: Tensor | None) -> float:
    """p(answer) of the shuffled prompt, one head replaced at the last token by a hook on a full pass."""

    def put(z: Tensor) -> Tensor:
        z = z.clone()
        if value is not None:
            z[:, -1, head] = value
        return z

    with torch.no_grad(), hooks.at_projections(model, {layer: put}):
        p = model.hf(prompt.shuffled.tokens[None]).logits[0, -1].softmax(-1)
    return float(p[list(prompt.shuffled.target_tokens)].sum())


def test_the_three_forms_of_a_question() -> None:
    model, names = copying_model(), list(FACTS)
    task = Task(
        "next", tuple(Example(f"{a} is by", a, (b,)) for a, b in zip(names, [*names[1:], names[0]], strict=True))
    )
    answer_of = {example.subject: example.answers[0] for example in task.examples}
    prompts = few_shot_prompts(model, task, shots=3, n=5, separator="\n")
    assert len({prompt.subject for prompt in prompts}) == len(prompts) == 5
    for prompt in prompts:
        question = f"{prompt.subject} is by"
        assert prompt.zero.example.prompt == question
        *shown, last = prompt.clean.example.prompt.split("\n")
        pairs = [line.split(" is by ") for line in shown]
        assert last == question and len(pairs) == 3
        assert all(answer_of[subject] == answer for subject, answer in pairs)
        assert prompt.subject not in [subject for subject, _ in pairs]
        *mixed, last = prompt.shuffled.example.prompt.split("\n")
        others = [line.split(" is by ") for line in mixed]
        assert last == question and [subject for subject, _ in others] == [subject for subject, _ in pairs]
        assert sorted(answer for _, answer in others) == sorted(answer for _, answer in pairs)
        assert all(a != b for (_, a), (_, b) in zip(pairs, others, strict=True))
        assert prompt.clean.target_tokens == prompt.shuffled.target_tokens == prompt.zero.target_tokens
    marked = tuple(replace(example, spans={"start": ((0, 1),)}) for example in task.examples)
    few = few_shot_prompts(model, replace(task, examples=marked), shots=3, n=5, separator="\n")
    assert all(not prompt.clean.spans and not prompt.shuffled.spans and prompt.zero.spans for prompt in few)
    again = few_shot_prompts(model, task, shots=3, n=5, separator="\n")
    assert [p.clean.example for p in again] == [p.clean.example for p in prompts]
    elsewhere = replace(task, examples=task.examples[:3])
    for prompt in few_shot_prompts(model, replace(task, examples=task.examples[3:]), 2, examples_from=elsewhere):
        shown = [line.split(" is by")[0] for line in prompt.clean.example.prompt.split("\n\n")[:-1]]
        assert set(shown) <= set(elsewhere.subjects)


@pytest.mark.parametrize("family", quick_among(["llama", "gpt2", "opt"], ["llama"]))
def test_means_and_effects_are_those_of_a_loop_with_hooks(family: str) -> None:
    strength = 12.0 if family == "opt" else 8.0  # neither sure nor at a loss
    model = copying_model(family, strength, **({"num_key_value_heads": 2} if family == "llama" else {}))
    prompts = few_shot_prompts(model, copying_task(), shots=2, n=8)
    means = in_context_means(model, prompts)
    solved = []
    with torch.no_grad():
        for prompt in prompts:
            if int(model.hf(prompt.clean.tokens[None]).logits[0, -1].argmax()) in prompt.clean.target_tokens:
                solved.append(prompt)
    assert means.solved == tuple(solved) and len(solved) >= 5
    for form, value in (("clean", means.few), ("zero", means.zero)):
        mean = torch.stack([z_at_end(model, getattr(prompt, form).tokens) for prompt in solved]).mean(0)
        torch.testing.assert_close(value, mean, atol=1e-5, rtol=1e-5)
    assert means.note["solved"] == len(solved) and means.note["chance"] < means.note["few_shot_accuracy"]
    scores = indirect_effects(model, means, n=5)
    slow = np.zeros((5, N_LAYERS, N_HEADS))
    for index, prompt in enumerate(solved[:5]):
        before = patched_p(model, prompt, 0, 0, None)
        for layer in range(N_LAYERS):
            for head in range(N_HEADS):
                slow[index, layer, head] = patched_p(model, prompt, layer, head, means.few[layer, head]) - before
    np.testing.assert_allclose(scores.by_example[CIE], slow, atol=1e-4)
    assert np.abs(slow).max() > 1e-3
    assert scores.subjects == [prompt.subject for prompt in solved[:5]]
    low, high = scores.interval(CIE)
    assert ((low <= scores.mean(CIE)) & (scores.mean(CIE) <= high)).all()


def test_a_prompts_own_outputs_have_no_effect_and_equal_forms_no_offset() -> None:
    model = copying_model()
    prompts = few_shot_prompts(model, copying_task(), shots=2, n=6)
    means = in_context_means(model, prompts)
    one = means.solved[0]
    same = InContextMeans(z_at_end(model, one.shuffled.tokens), means.zero, (one,), {})
    assert np.abs(indirect_effects(model, same).by_example[CIE]).max() < 1e-5
    without = in_context_means(model, [replace(prompt, clean=prompt.zero) for prompt in prompts])
    heads = [(0, 1), (2, 3)]
    assert all(not offset.any() for offset in without.offsets(heads).values())
    half, whole = means.offsets(heads, 0.5), means.offsets(heads)
    for head in heads:
        assert whole[head].norm() > 0.01
        torch.testing.assert_close(whole[head], means.few[head] - means.zero[head])
        torch.testing.assert_close(2 * half[head], whole[head])


def test_what_shows_no_task_is_refused() -> None:
    model, task = copying_model(), copying_task()
    few = replace(task, examples=task.examples[:4])
    wrong = [replace(e, answers=(list(FACTS)[(i + 1) % 8],)) for i, e in enumerate(task.examples)]
    with pytest.raises(InputError, match=r"has 4 subjects, and 5 examples before a question need 6; lower shots"):
        few_shot_prompts(model, few)
    with pytest.raises(InputError, match="shots 1 is too few to shuffle"):
        few_shot_prompts(model, task, shots=1)
    with pytest.raises(InputError, match="of chats"):
        few_shot_prompts(model, replace(task, chat_template=True))
    prompts = few_shot_prompts(model, replace(task, examples=tuple(wrong)), shots=2)
    with pytest.raises(InputError, match=r"solves \d of 8 questions of the pairs, and by chance \d+%") as caught:
        in_context_means(model, prompts, "the pairs")
    assert "\n" not in str(caught.value)
    # Always one answer, which is right for some: solved as often as by chance.
    names = list(FACTS)
    same = [Example(f"{name} by Rome", name, ("Rome",) if i % 2 else ("Milan",)) for i, name in enumerate(names)]
    constant = few_shot_prompts(model, Task("constant", tuple(same)), shots=2)
    with pytest.raises(InputError, match=r"solves [3-5] of 8 .*by chance [3-5]\d%"):
        in_context_means(model, constant)
