"""Which heads carry a task that the prompt shows by examples: average indirect effects (Todd et al. 2024, section 2).

    clean      hot -> cold, tall -> short, wet ->      examples, then the question
    shuffled   hot -> short, tall -> cold, wet ->      the same, each example with another one's answer
    zero       wet ->                                  the question alone

    zbar[l, h]        mean of z[l, h] at the last token over the clean prompts that the model solves
    CIE[l, h](p')     p(answer | p', z[l, h, last] := zbar[l, h]) - p(answer | p')           p' shuffled
    AIE[l, h]         mean of CIE[l, h] over prompts: a head that carries the task restores it

A prompt is solved where the most probable next token begins a right answer. As published, zbar is a mean over all
solved prompts, that of the question itself among them. The examples of a prompt are of other subjects than its
question, and all are of the task that is passed in: held-out subjects are in no prompt.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from headtune.analysis.models import hooks
from headtune.analysis.models.head_model import HeadModel
from headtune.analysis.tasks.task import Example, Task
from headtune.analysis.tasks.tokenized import Encoded, continuation, encode
from headtune.analysis.utils.errors import InputError
from headtune.analysis.utils.progress import Progress, silent

from .patching import patching_effects
from .scores import Scores, stack

CIE = "in_context.cie"
SHOTS, PROMPTS, SCORED, SEPARATOR = 5, 100, 25, "\n\n"


# --- prompts ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FewShotPrompt:
    """One question, asked in three ways (see the head of this module)."""

    clean: Encoded
    shuffled: Encoded
    zero: Encoded

    @property
    def subject(self) -> str:
        return self.zero.example.subject


def few_shot_text(question: Example, shown: Sequence[Example], answers: Sequence[str], separator: str) -> str:
    """A question behind examples, each with the answer at its place in `answers`."""
    parts = [one.prompt + continuation(one.prompt, answer) for one, answer in zip(shown, answers, strict=True)]
    return separator.join([*parts, question.prompt])


def few_shot_prompts(
    model: HeadModel,
    task: Task,
    shots: int = SHOTS,
    n: int = PROMPTS,
    separator: str = SEPARATOR,
    seed: int = 0,
    examples_from: Task | None = None,
) -> list[FewShotPrompt]:
    """Up to `n` questions of a task, spread evenly over subjects, each behind `shots` of the task's other examples.

    An example's answer is the first that its prompt does not hold already. In a shuffled prompt every example has the
    answer of the one after it (which is the same answer where the two share it). Questions whose answer cannot be told
    by its first token in all three ways are left out.

    Args:
        separator: the text between two examples.
        examples_from: the task that the examples are of; None: the questions' own.

    Raises:
        InputError: fewer than two shots, fewer subjects than a prompt needs, a task of chats, prompts longer than the
            model takes, or no question left.
    """
    if task.chat_template:
        raise InputError(f"task {task.name!r} is of chats, which cannot be strung together; leave chat_template out")
    if shots < 2:
        raise InputError(f"shots {shots} is too few to shuffle answers among examples; give at least 2")
    by_subject: dict[str, list[Example]] = {}
    for example in (examples_from or task).examples:
        by_subject.setdefault(example.subject, []).append(example)
    if len(by_subject) < shots + 1:
        raise InputError(
            f"task {task.name!r} has {len(by_subject)} subjects, and {shots} examples before a question need "
            f"{shots + 1}; lower shots, or add pairs"
        )
    texts: dict[str, list[Example]] = {"clean": [], "shuffled": [], "zero": []}
    for question in task.limited(n, seed).examples:
        generator = random.Random(f"{seed}/{question.prompt}")
        subjects = generator.sample([name for name in by_subject if name != question.subject], shots)
        shown = [generator.choice(by_subject[name]) for name in subjects]
        answers = [example.remaining[0] for example in shown]
        rotated = [*answers[1:], answers[0]]
        for kind, labels in (("clean", answers), ("shuffled", rotated)):
            prompt = few_shot_text(question, shown, labels, separator)
            texts[kind].append(replace(question, prompt=prompt, spans={}))  # spans are those of the question alone
        texts["zero"].append(question)
    usable = {kind: _by_place(model, replace(task, examples=tuple(texts[kind]))) for kind in texts}
    places = sorted(set.intersection(*(set(encoded) for encoded in usable.values())))
    if not places:
        raise InputError(f"task {task.name!r}: no question's answer can be told by its first token")
    return [FewShotPrompt(*(usable[kind][place] for kind in ("clean", "shuffled", "zero"))) for place in places]


def _by_place(model: HeadModel, task: Task) -> dict[int, Encoded]:
    """Those of a task's examples that can be encoded, by their places in it."""
    places = {id(example): place for place, example in enumerate(task.examples)}
    return {places[id(e.example)]: e for e in encode(task, model.tokenizer, model.positions, model.vocabulary).examples}


# --- means ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class InContextMeans:
    """What heads put out at the last token with examples and without.

    Attributes:
        few: `[n_layers, n_heads, head_dim]` mean over the solved clean prompts, float32.
        zero: the same questions without examples.
        solved: the prompts that the means are over.
        note: JSON-able: `prompts`, `solved`, `few_shot_accuracy`, `zero_shot_accuracy` (shares of all prompts whose
            most probable next token begins a right answer) and `chance` (see `in_context_means`).
    """

    few: Tensor
    zero: Tensor
    solved: tuple[FewShotPrompt, ...]
    note: dict[str, Any]

    def offsets(self, heads: Sequence[tuple[int, int]], factor: float = 1.0) -> dict[tuple[int, int], Tensor]:
        """(layer, head) -> `[head_dim]` `factor * (few - zero)`."""
        return {head: factor * (self.few[head] - self.zero[head]) for head in heads}


def in_context_means(
    model: HeadModel, prompts: Sequence[FewShotPrompt], name: str = "the task", progress: Progress = silent
) -> InContextMeans:
    """Read the heads at the last token of clean and of zero-shot prompts, one prompt at a time.

    Chance is what the model's predictions score on the answers of other subjects' questions: the mean over all
    such pairings.

    Args:
        name: of the task, for messages.

    Raises:
        InputError: with examples the model solves no more than chance and three standard errors of it (of one prompt's
            share where chance is smaller): its heads carry no task.
    """
    few = zero = torch.zeros(model.n_layers, model.n_heads, model.head_dim, device=model.device)
    solved, predictions, zero_hits = [], [], 0
    for prompt in progress(prompts, "reading few-shot prompts"):
        predicted, z_few = read_last_token(model, prompt.clean.tokens)
        predicted_zero, z_zero = read_last_token(model, prompt.zero.tokens)
        predictions.append(predicted)
        zero_hits += predicted_zero in prompt.zero.target_tokens
        if predicted in prompt.clean.target_tokens:
            solved.append(prompt)
            few, zero = few + z_few, zero + z_zero
    n = len(prompts)
    chance = _chance(prompts, predictions)
    least = max(chance, 1 / n)
    if len(solved) / n <= chance + 3 * math.sqrt(least * (1 - least) / n):
        raise InputError(
            f"with examples before it the model solves {len(solved)} of {n} questions of {name}, and by chance "
            f"{100 * chance:.0f}%: its heads carry no such task; give more shots, another form of prompt, or another "
            "model"
        )
    note = {
        "prompts": n,
        "solved": len(solved),
        "few_shot_accuracy": len(solved) / n,
        "zero_shot_accuracy": zero_hits / n,
        "chance": chance,
    }
    return InContextMeans(few / len(solved), zero / len(solved), tuple(solved), note)


@torch.no_grad()
def read_last_token(model: HeadModel, tokens: Tensor) -> tuple[int, Tensor]:
    """The most probable next token of a prompt, and `[n_layers, n_heads, head_dim]` z at its last token, float32."""
    with hooks.capture(model, positions=torch.tensor([len(tokens) - 1], device=model.device)) as z:
        output = model.hf(tokens[None].to(model.device), use_cache=False, logits_to_keep=1)
    stacked = torch.stack([z[layer][0].float().to(model.device) for layer in range(model.n_layers)])
    return int(output.logits[0, -1].argmax()), stacked


def _chance(prompts: Sequence[FewShotPrompt], predictions: Sequence[int]) -> float:
    pairs = [
        predicted in other.clean.target_tokens
        for prompt, predicted in zip(prompts, predictions, strict=True)
        for other in prompts
        if other.subject != prompt.subject
    ]
    return sum(pairs) / len(pairs) if pairs else 0.0


# --- scores -----------------------------------------------------------------------------------------------------------


def indirect_effects(model: HeadModel, means: InContextMeans, n: int = SCORED, progress: Progress = silent) -> Scores:
    """`in_context.cie` of every head on the shuffled forms of the first `n` solved prompts; its mean is the AIE.

        prompts = few_shot_prompts(model, task)
        scores = indirect_effects(model, in_context_means(model, prompts))
        scores.mean(CIE), scores.interval(CIE)                          # [n_layers, n_heads]

    Positive = the head's output in clean prompts makes a right answer's first token more probable. One prompt is one
    run and `n_layers * n_heads` decoding steps in batches (see `LastTokenRunner`).
    """
    scored = means.solved[:n]
    rows = [
        {CIE: -patching_effects("in_context", model, prompt.shuffled, means.few)["in_context.target_p"]}
        for prompt in progress(scored, "patching few-shot means")
    ]
    return stack(rows, [prompt.subject for prompt in scored])
