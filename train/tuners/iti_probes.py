"""What heads know about true and false: directions from false to true, and how well a probe tells the two apart.

    result = probe_heads(load_model("smollm2-135m"), load_task("truthfulqa:questions.csv"))
    result.ranked(48)                 # heads by probe accuracy, with intervals: the probe-based choice of ITI and LoFiT

z is taken at the last token of statements, prompt + answer, labelled true or false (Li et al. 2023, sections 3 and 4).
For each head

    theta = d / |d|,  d = mean(z | true) - mean(z | false)       (the mass-mean direction)
    sigma = standard deviation of z . theta over all statements
    accuracy = share of statements that a logistic regression on z gets right, fitted on other subjects

Statements of one subject are never on both sides: what a probe learns about Italy's cities says little about whether it
tells true from false.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from headtune.analysis.methods.scores import Scores
from headtune.analysis.models import hooks
from headtune.analysis.models.head_model import HeadModel
from headtune.analysis.tasks.chat import as_chat
from headtune.analysis.tasks.prompt_tokens import require_embeddings, token_ids
from headtune.analysis.tasks.task import Example, Task, canonical
from headtune.analysis.tasks.tokenized import continuation
from headtune.analysis.utils.errors import CheckError, InputError
from headtune.analysis.utils.progress import Progress, silent
from headtune.train.types import ACCURACY, ProbeResult

log = logging.getLogger(__name__)

FOLDS = 5
_BATCH = 16


# --- statements -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Statement:
    """A prompt with an answer, and whether that is a right one.

    Attributes:
        text: the whole text; z is taken at its last token.
        true: the answer is accepted and not given yet.
        subject: of the example; probes are never tested on a subject that they were fitted on.
    """

    text: str
    true: bool
    subject: str


def statements(task: Task, seed: int = 0, per_prompt: int | None = None) -> tuple[list[Statement], dict[str, Any]]:
    """True and false statements of a task.

    True: each accepted answer that the prompt does not give already. False: the example's `incorrect` answers, if the
    task has any. In a task that has none, false are the answers
    already given and, to make as many as there are true ones, answers of other subjects, drawn by `seed`: from
    prompts of the same wording (the text before the first answer, less the subject), or, where no other subject has
    that wording, from the whole task. Examples without a true or without a false answer are left out, and counted.

    Args:
        task: with its prompts as the model gets them (see `as_chat`).

    Returns:
        The statements, and a JSON-able note on how they were made.

    Raises:
        InputError: no false answers: none are listed, none are given already, and no other subject has any.
    """
    listed = any(example.incorrect for example in task.examples)
    others = {} if listed else _answers_by_wording(task)
    labelled: list[Statement] = []
    left_out = any_wording = 0
    for example in task.examples:
        generator = random.Random(f"{seed}/{example.prompt}")
        true = list(example.remaining)
        if listed:
            false = list(example.incorrect)
        else:
            drawn, elsewhere = _drawn(example, others, len(true) - len(example.previous), generator)
            false, any_wording = [*example.previous, *drawn], any_wording + elsewhere
        if not (true and false):
            left_out += 1
            continue
        for answers, label in ((true, True), (false, False)):
            if per_prompt is not None and len(answers) > per_prompt:
                answers = generator.sample(answers, per_prompt)
            labelled += [
                Statement(example.prompt + continuation(example.prompt, answer), label, example.subject)
                for answer in answers
            ]
    if not labelled:
        raise InputError(
            f"task {task.name!r} has no false answers to tell from true ones: it lists no incorrect answers, and no "
            "other subject has answers to draw from; add 'incorrect' to its examples, or more subjects"
        )
    if left_out:
        log.warning("%s: %d examples lack a true or a false answer and are left out", task.name, left_out)
    n_true = sum(statement.true for statement in labelled)
    note = {
        "true": n_true,
        "false": len(labelled) - n_true,
        "false_answers": "listed" if listed else "given already and drawn from other subjects",
        "prompts_drawn_from_any_wording": any_wording,
        "prompts_left_out": left_out,
        "per_prompt": per_prompt,
    }
    return labelled, note


def _wording(example: Example) -> str:
    cut = len(example.prompt)
    for answer in reversed(example.previous):
        at = example.prompt.rfind(answer, 0, cut)
        cut = at if at >= 0 else cut
    return example.prompt[:cut].replace(example.subject, "{}").strip()


def _answers_by_wording(task: Task) -> dict[str, list[tuple[str, str]]]:
    """Wording -> (subject, answer), sorted; the empty wording has all of them."""
    table: dict[str, set[tuple[str, str]]] = {}
    for example in task.examples:
        for wording in (_wording(example), ""):
            table.setdefault(wording, set()).update((example.subject, answer) for answer in example.answers)
    return {wording: sorted(answers) for wording, answers in table.items()}


def _drawn(
    example: Example, others: Mapping[str, Sequence[tuple[str, str]]], n: int, generator: random.Random
) -> tuple[list[str], bool]:
    """Up to `n` wrong answers that are right for other subjects; True if none of them have the example's wording."""
    if n <= 0:
        return [], False
    wording = _wording(example)
    for key in (wording, ""):
        taken = {canonical(answer, example.subject) for answer in example.answers}
        wrong: list[str] = []
        for subject, answer in generator.sample(others[key], len(others[key])):
            name = canonical(answer, example.subject)
            if subject != example.subject and name not in taken:
                taken.add(name)
                wrong.append(answer)
            if len(wrong) == n:
                break
        if wrong:
            return wrong, key != wording
    return [], False


# --- reading heads ----------------------------------------------------------------------------------------------------


def end_batches(model: HeadModel, rows: Sequence[Sequence[int]]) -> list[tuple[list[int], Tensor, Tensor, Tensor]]:
    """Rows of tokens in batches of like length: their indices, ids, mask and last positions.

    Padded on the right, whatever the tokenizer's habit: no token sees what comes after it, and positions are unchanged.
    """
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    batches = []
    for start in range(0, len(rows), _BATCH):
        indices = order[start : start + _BATCH]
        lengths = torch.tensor([len(rows[index]) for index in indices])
        ids = torch.zeros(len(indices), int(lengths.max()), dtype=torch.long)
        for row, index in enumerate(indices):
            ids[row, : lengths[row]] = torch.tensor(rows[index])
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        batches.append((indices, ids.to(model.device), mask.to(model.device), (lengths - 1).to(model.device)))
    return batches


def tokenised(model: HeadModel, texts: Sequence[str], task: Task) -> list[list[int]]:
    """Texts in tokens, as the model gets a task's prompts: a chat template writes its own special tokens."""
    rows = token_ids(model.tokenizer, texts, special=not task.chat_template)
    require_embeddings(model.tokenizer, rows, model.vocabulary, f"task {task.name!r}")
    return rows


@torch.no_grad()
def read_ends(
    model: HeadModel, rows: Sequence[Sequence[int]], layers: Sequence[int], progress: Progress = silent
) -> dict[int, Tensor]:
    """z at the last token of each row of token ids.

    Returns:
        layer -> `[n_rows, n_heads, head_dim]` in the model's dtype, in main memory.
    """
    shape = (len(rows), model.n_heads, model.head_dim)
    by_layer = {layer: torch.empty(shape, dtype=model.dtype) for layer in layers}
    for indices, ids, mask, ends in progress(end_batches(model, rows), "reading heads"):
        with hooks.capture(model, layers, ends) as z:
            model.hf(ids, attention_mask=mask, use_cache=False, logits_to_keep=1)
        for layer in layers:
            by_layer[layer][indices] = z[layer].cpu()
    return by_layer


# --- directions and probes --------------------------------------------------------------------------------------------


def mass_mean(z: Tensor, true: Tensor) -> tuple[Tensor, Tensor]:
    """Mass-mean directions and the spread along them.

    Args:
        z: `[n, n_heads, head_dim]`.
        true: `[n]` bool, both values present.

    Returns:
        theta `[n_heads, head_dim]`, of length 1, or 0 for a head whose two means are equal; sigma `[n_heads]`, the
        standard deviation of `z . theta` (dividing by n).
    """
    theta = functional.normalize(z[true].mean(0) - z[~true].mean(0), dim=-1, eps=torch.finfo(z.dtype).tiny)
    sigma = torch.einsum("nhd,hd->nh", z, theta).std(0, correction=0)
    return theta, sigma


def logistic(x: Tensor, y: Tensor) -> Tensor:
    """Logistic regression with L2, one for each head, by Newton's method with step halving.

    Minimises `sum_i log(1 + exp(-s_i (w . x_i + b))) + |w|^2 / 2`, s_i = 1 where y_i, else -1; b is not penalised.

    Args:
        x: `[n_heads, n, d]` float64.
        y: `[n]` bool, both values present.

    Returns:
        `[n_heads, d + 1]`: w, then b.

    Raises:
        CheckError: no convergence.
    """
    x = torch.cat([x, x.new_ones(*x.shape[:2], 1)], -1)
    target, penalty = y.to(x), torch.cat([x.new_ones(x.shape[-1] - 1), x.new_zeros(1)])
    sign = 2 * target - 1

    def objective(beta: Tensor) -> Tensor:  # [n_heads]
        margin = sign * (x @ beta[..., None])[..., 0]
        return functional.softplus(-margin).sum(-1) + (penalty * beta.square()).sum(-1) / 2

    beta = x.new_zeros(x.shape[0], x.shape[2])
    for _ in range(100):
        p = (x @ beta[..., None])[..., 0].sigmoid()  # [n_heads, n]
        gradient = ((p - target)[:, None] @ x)[:, 0] + penalty * beta
        if gradient.abs().max() <= 1e-6 * len(y):
            return beta
        hessian = (x.mT * (p * (1 - p))[:, None]) @ x + penalty.diag()
        step = torch.linalg.solve(hessian, gradient)
        now, size = objective(beta), x.new_ones(len(x))
        for _ in range(40):
            worse = objective(beta - size[:, None] * step) > now
            if not worse.any():
                break
            size = torch.where(worse, size / 2, size)
        beta = beta - size[:, None] * step
    raise CheckError(f"logistic regression did not converge: largest gradient {gradient.abs().max().item():.2g}")


def question_folds(subjects: Sequence[str], n: int, seed: int) -> Tensor:
    """`[len(subjects)]` the fold of each statement: subjects, shuffled by `seed`, are dealt to `n` folds in turn.

    Raises:
        InputError: fewer subjects than folds.
    """
    names = sorted(set(subjects))
    if len(names) < n:
        raise InputError(
            f"{len(names)} subjects are too few for {n} folds; use a task with more subjects, or fewer folds"
        )
    random.Random(seed).shuffle(names)
    fold = {name: index % n for index, name in enumerate(names)}
    return torch.tensor([fold[subject] for subject in subjects])


def probe_correct(z: Tensor, true: Tensor, folds: Tensor) -> Tensor:
    """Which statements a linear probe on each head gets right when their fold is held out.

    The probe is `logistic` on z less its mean, divided by its root mean square over statements and dimensions (one
    number a head, from the statements fitted on), so that the penalty weighs the same in heads of any size.

    Args:
        z: `[n, n_heads, head_dim]`.
        true: `[n]` bool.
        folds: `[n]` fold of each statement.

    Returns:
        `[n, n_heads]` bool.
    """
    x = z.double().transpose(0, 1)  # [n_heads, n, head_dim]
    correct = torch.zeros(z.shape[:2], dtype=torch.bool, device=z.device)
    for fold in folds.unique():
        apart = folds == fold
        mean = x[:, ~apart].mean(1, keepdim=True)
        size = (x[:, ~apart] - mean).square().mean((1, 2), keepdim=True).sqrt()
        scaled = (x - mean) / torch.where(size > 0, size, 1.0)
        beta = logistic(scaled[:, ~apart], true[~apart])
        logits = torch.einsum("hnd,hd->nh", scaled[:, apart], beta[:, :-1]) + beta[:, -1]
        correct[apart] = (logits > 0) == true[apart, None]
    return correct


def read_statements(
    model: HeadModel, task: Task, layers: Sequence[int], seed: int, per_prompt: int | None, progress: Progress
) -> tuple[dict[int, Tensor], Tensor, list[str], dict[str, Any]]:
    """z by layer, labels `[n]` on the model's device, subjects, and the note of `statements`."""
    labelled, note = statements(as_chat(task, model.tokenizer), seed, per_prompt)
    rows = tokenised(model, [statement.text for statement in labelled], task)
    z = read_ends(model, rows, layers, progress)
    true = torch.tensor([statement.true for statement in labelled], device=model.device)
    return z, true, [statement.subject for statement in labelled], {"task": task.name, "sha256": task.sha256, **note}


def probe_heads(
    model: HeadModel,
    task: Task,
    seed: int = 0,
    folds: int = FOLDS,
    per_prompt: int | None = None,
    progress: Progress = silent,
) -> ProbeResult:
    """Probe every head: how well its output tells true statements from false ones, and in which direction.

    Needs main memory for z: statements x heads x head_dim numbers of the model's dtype.

    Args:
        seed: of the folds and of what `statements` draws.

    Raises:
        InputError: see `statements` and `question_folds`.
    """
    layers = range(model.n_layers)
    question_folds(task.subjects, folds, seed)  # refuses before the model runs
    z, true, subjects, note = read_statements(model, task, layers, seed, per_prompt, progress)
    fold = question_folds(subjects, folds, seed).to(model.device)
    correct, theta, sigma = [], [], []
    for layer in progress(layers, "probing heads"):
        of_layer = z[layer].to(model.device).float()
        correct.append(probe_correct(of_layer, true, fold).cpu())
        directions, spread = mass_mean(of_layer, true)
        theta.append(directions.cpu())
        sigma.append(spread.cpu())
    table = torch.stack(correct, 1).numpy().astype(np.float32)
    return ProbeResult(
        Scores({ACCURACY: table}, subjects),
        torch.stack(theta),
        torch.stack(sigma),
        note | {"folds": folds, "seed": seed},
    )
