"""Before and after: what a model writes or prefers on held-out prompts, and a guard against damage.

What is measured goes by the task's kind:

- `lists`: every list item asked for is one of: a **repeat** of an item given or generated earlier, a **correct new**
  answer, a **wrong** one, or **missing** (the model stopped). Rates are over all items asked for, so they sum to 1.
- `exact_match`: the answer that the model writes is one of the accepted ones (see `read_answer`).
- `multiple_choice`: the model finds the right answers likelier than the wrong ones (see `multiple_choice`).

Intervals are over subjects: see `stats.mean_interval`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from headtune.analysis.models.generation import generate, padding_id
from headtune.analysis.models.head_model import positions_of, vocabulary_of
from headtune.analysis.tasks.chat import LINES_BEFORE_ITEMS, as_chat, begins_reply, items_start
from headtune.analysis.tasks.neutral import neutral_text
from headtune.analysis.tasks.prompt_tokens import prefix_ids, token_ids
from headtune.analysis.tasks.task import Example, Task, canonical, normalise
from headtune.analysis.tasks.tokenized import EncodedTask, check_prompt_length, encode
from headtune.analysis.utils.errors import InputError
from headtune.analysis.utils.stats import mean_interval

from .multiple_choice import Scoring, choice_log_likelihoods, choices, multiple_choice

KINDS = ("repeat", "correct_new", "wrong", "missing")
TOKENS_OF_ITEM = 12  # written for each item of a list, at most


@dataclass(frozen=True)
class Scored:
    """What a model did with one example.

    Attributes:
        example: the prompt.
        text: what the model wrote, or the choice that it finds likeliest.
        items: the list items, the one answer, or the choice, as read from `text`; empty where nothing was written.
        kinds: of each item asked for: one of KINDS for lists; "correct", "wrong" or "missing" for an answer; "best",
            "correct" or "incorrect" for a choice.
        values: the example's own value of each metric of its kind, whose mean over examples is the metric.
    """

    example: Example
    text: str
    items: tuple[str, ...]
    kinds: tuple[str, ...]
    values: dict[str, float]


def parse_items(text: str, n_items: int, example: Example | None = None) -> list[str]:
    """The first `n_items` list items of a continuation: lines without their number or bullet, cut at an explanation.

    An item is cut at its first dash, comma, colon, semicolon or bracket, unless a longer part of it is an answer of
    `example` ("I, Robot").
    """
    answers = set() if example is None else {canonical(answer, example.subject) for answer in example.answers}
    items = []
    for index, line in enumerate(text.split("\n")):
        bare = re.sub(r"^\s*(\d+[.)](?!\d)|[-*•](?!\.?\d))\s*", "", line) if index else line
        parts = [bare[: match.start()] for match in re.finditer(r"\s[-–—]\s|[,:;(]", bare)]
        longest = (part for part in (bare, *reversed(parts)) if example and canonical(part, example.subject) in answers)
        bare = next(longest, parts[0] if parts else bare).strip()
        if bare:
            items.append(bare)
        elif index and items:
            break  # an empty line ends the list
    return items[:n_items]


def score_items(example: Example, items: Sequence[str], n_items: int) -> list[str]:
    """The kind of each of the `n_items` items asked for."""
    accepted = {canonical(answer, example.subject) for answer in example.answers}
    seen = {canonical(answer, example.subject) for answer in example.previous}
    kinds = []
    for item in items:
        name = canonical(item, example.subject)
        kinds.append("repeat" if name in seen else "correct_new" if name in accepted else "wrong")
        seen.add(name)
    return kinds + ["missing"] * (n_items - len(items))


class _EnoughLines(StoppingCriteria):
    """Stop a row once it has written `n` line breaks after some text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt_length: int, n: int) -> None:
        self.tokenizer, self.start, self.n = tokenizer, prompt_length, n

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        texts = self.tokenizer.batch_decode(input_ids[:, self.start :])
        done = [text.lstrip().count("\n") >= self.n for text in texts]
        return torch.tensor(done, device=input_ids.device)


@torch.no_grad()
def _generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    lines: int,
    batch_size: int,
    max_new_tokens: int,
    sample_seed: int | None = None,
) -> list[str]:
    """Continue every prompt, in the task's order, until `lines` line breaks after some text."""
    if sample_seed is not None:
        torch.manual_seed(sample_seed)
    model.eval()
    prompts = [example.prompt for example in as_chat(task, tokenizer).examples]
    ids, pad = token_ids(tokenizer, prompts, special=not task.chat_template), padding_id(model, tokenizer)
    # Prompts of about one length share a batch.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    texts: dict[int, str] = {}
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        # Padding on the left, so that every row of a batch goes on at its end.
        length = max(len(ids[i]) for i in indices)
        rows = torch.tensor([[pad] * (length - len(ids[i])) + ids[i] for i in indices], device=model.device)
        mask = torch.tensor([[0] * (length - len(ids[i])) + [1] * len(ids[i]) for i in indices], device=model.device)
        stop = StoppingCriteriaList([_EnoughLines(tokenizer, length, lines)])
        output = generate(model, rows, mask, max_new_tokens, pad, sample_seed is not None, stopping_criteria=stop)
        written = tokenizer.batch_decode(output[:, length:], skip_special_tokens=True)
        texts |= dict(zip(indices, written, strict=True))
    return [texts[i] for i in range(len(prompts))]


def generate_lists(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    n_items: int = 3,
    batch_size: int = 16,
    max_new_tokens: int | None = None,
    sample_seed: int | None = None,
) -> list[Scored]:
    """Continue every prompt (greedily, or sampled with `sample_seed`) and score the next `n_items` items.

    An example's `values` are its shares of the items asked for: `repeat_rate`, `correct_new_rate` and so on.
    """
    lines = n_items + _lines_before(task)
    texts = _generate(model, tokenizer, task, lines, batch_size, max_new_tokens or TOKENS_OF_ITEM * lines, sample_seed)
    results = []
    for example, text in zip(task.examples, texts, strict=True):
        items = parse_items(text[items_start(text) if begins_reply(task, example) else 0 :], n_items, example)
        kinds = score_items(example, items, n_items)
        shares = {f"{kind}_rate": kinds.count(kind) / n_items for kind in KINDS}
        results.append(Scored(example, text, tuple(items), tuple(kinds), shares))
    return results


def _lines_before(task: Task) -> int:
    """Lines that a reply may have before its list, where none has begun."""
    return LINES_BEFORE_ITEMS if any(begins_reply(task, example) for example in task.examples) else 0


def read_answer(text: str, example: Example) -> tuple[str, float, float]:
    """The answer in a continuation, and whether it is right: `(answer, exact_match, prefix_match)`.

    Of the first line that is not blank, the parts that begin it and stop at a sentence's end (`.`, `!`, `?` or `;`
    before a space) or at the line's are what may be the answer: the first of them, unless a longer one is an accepted
    answer ("St. Louis"). `exact_match` is 1 where that part equals an accepted answer, both after `normalise`.

    `prefix_match` asks less: that the line begins with an accepted answer and a word ends there ("Rome, the capital").
    A model that knows the answers but not where to stop has this one already.
    """
    line = text.strip().split("\n")[0].strip()
    accepted = {normalise(answer) for answer in example.remaining} - {""}
    parts = [line[: match.start()] for match in re.finditer(r"[.!?;](?=\s)", line)] + [line]
    longest = (part for part in reversed(parts) if normalise(part) in accepted)
    answer = next(longest, parts[0])
    begins = any(re.match(re.escape(name) + r"(?!\w)", normalise(line)) for name in accepted)
    return answer, float(normalise(answer) in accepted), float(begins)


def generate_answers(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task, batch_size: int = 16
) -> list[Scored]:
    """Write one answer to every prompt, greedily, and read it with `read_answer`.

    As many tokens are written as the task's longest accepted answer has, and 8 more: an answer that goes on beyond
    them would not be one of the accepted.
    """
    texts = _generate(model, tokenizer, task, 1, batch_size, _tokens_of_answer(tokenizer, task))
    results = []
    for example, text in zip(task.examples, texts, strict=True):
        answer, exact, begins = read_answer(text, example)
        kind = "correct" if exact else "wrong" if answer else "missing"
        values = {"exact_match": exact, "prefix_match": begins}
        results.append(Scored(example, text, (answer,) if answer else (), (kind,), values))
    return results


def _tokens_of_answer(tokenizer: PreTrainedTokenizerBase, task: Task) -> int:
    answers = sorted({answer for example in task.examples for answer in example.answers})
    return max(len(ids) for ids in token_ids(tokenizer, [" " + answer for answer in answers])) + 8


def check_generation_length(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task, n_items: int = 3
) -> None:
    """Refuse a task whose prompts, with what is written after them, are too long for the model (InputError).

    Choices are looked at where they are scored: their length depends on the preamble.
    """
    if task.kind != "multiple_choice":
        lists = task.kind == "lists"
        more = TOKENS_OF_ITEM * (n_items + _lines_before(task)) if lists else _tokens_of_answer(tokenizer, task)
        check_prompt_length(task, tokenizer, positions_of(model), more, vocabulary=vocabulary_of(model))


def score_choices(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    batch_size: int = 16,
    preamble: str = "",
    scoring: Scoring = "harness",
) -> list[Scored]:
    """Score every example's choices: `mc1`, `mc2` and `mc1_norm` (see `multiple_choice`)."""
    results = []
    scores = choice_log_likelihoods(model, tokenizer, task, batch_size, preamble, scoring)
    for example, log_likelihoods in zip(task.examples, scores, strict=True):
        top = max(range(len(log_likelihoods)), key=log_likelihoods.__getitem__)
        kind = "best" if top == 0 else "correct" if top < len(example.remaining) else "incorrect"
        choice = choices(example, scoring)[top]
        results.append(Scored(example, choice, (choice,), (kind,), multiple_choice(example, log_likelihoods, scoring)))
    return results


@torch.no_grad()
def answer_mass(model: PreTrainedModel, encoded: EncodedTask) -> tuple[list[float], list[float]]:
    """p(remaining) and p(previous) at END, summed over first tokens, one value an example."""
    remaining, previous = [], []
    for example in encoded.examples:
        logits = model(example.tokens[None].to(model.device), use_cache=False, logits_to_keep=1).logits[0, -1]
        p = logits.float().softmax(-1)
        remaining.append(p[list(example.target_tokens)].sum().item())
        previous.append(p[sorted(set(example.previous_tokens))].sum().item())
    return remaining, previous


@torch.no_grad()
def perplexity(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str | None = None, window: int = 512
) -> float:
    """`exp(mean negative log-likelihood)` per token of `text` in consecutive windows of `window` tokens.

    In front of every window stands what the tokenizer puts in front of a text (see `prompt_tokens`); it is not scored.
    Families that need it (Gemma) are broken without.
    """
    prefix = prefix_ids(tokenizer)
    if (positions := positions_of(model)) is not None:
        window = min(window, positions - len(prefix))
    ids = token_ids(tokenizer, [neutral_text() if text is None else text])[0]
    tokens, front = torch.tensor(ids, device=model.device), torch.tensor(prefix, dtype=torch.long, device=model.device)
    total, count = 0.0, 0
    for start in range(0, len(tokens) - 1, window):
        part = tokens[start : start + window + 1]
        inputs = torch.cat([front, part[:-1]]) if start else part[:-1]
        # Places whose next token is scored: in the first window the prefix is part of the text's tokens.
        first = max(0, len(prefix) - 1) if start == 0 else len(prefix)
        targets = part[1:] if start else part[1 + first :]
        log_p = model(inputs[None], use_cache=False).logits[0, first:].float().log_softmax(-1)
        total -= log_p.gather(-1, targets[:, None]).sum().item()
        count += len(targets)
    return math.exp(total / count)


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    n_items: int = 3,
    batch_size: int = 16,
    preamble: str = "",
    scoring: Scoring = "harness",
) -> tuple[dict[str, Any], list[Scored]]:
    """All metrics of a model on a task, by the task's kind, and the guard against damage.

    Args:
        n_items, batch_size, preamble, scoring: as `score_task` takes them.

    Returns:
        metrics: those of `score_task`, and `neutral_perplexity`, a number.
        scored: what the model did with each example.

    Raises:
        InputError: a preamble for another kind of task; see `choice_log_likelihoods` for multiple choice.
    """
    metrics, scored = score_task(model, tokenizer, task, n_items, batch_size, preamble, scoring)
    return metrics | {"neutral_perplexity": perplexity(model, tokenizer), "n": metrics["n"]}, scored


def score_task(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    n_items: int = 3,
    batch_size: int = 16,
    preamble: str = "",
    scoring: Scoring = "harness",
) -> tuple[dict[str, Any], list[Scored]]:
    """A task's own metrics.

    Args:
        n_items: list items scored per prompt; lists only.
        batch_size: prompts generated, or choices scored, together.
        preamble: text before every prompt; multiple choice only.
        scoring: of multiple choice: as the Evaluation Harness or as ITI and LoFiT do it, see `multiple_choice`.

    Returns:
        metrics: name -> `{"mean", "ci"}`: for lists `repeat_rate`, `correct_new_rate`, `wrong_rate`, `missing_rate`,
            `p_previous`, `p_remaining`; for one answer `exact_match`, `prefix_match`; for multiple choice `mc1`, `mc2`,
            `mc1_norm`. For all, `n`: the counts behind them.
        scored: what the model did with each example.

    Raises:
        InputError: a preamble for another kind of task, or a prompt that is too long for the model.
    """
    if task.kind != "multiple_choice" and (preamble or scoring != "harness"):
        option = "preamble" if preamble else f"scoring {scoring}"
        raise InputError(f"task {task.name!r} is no multiple choice but {task.kind}; leave the {option} out")
    check_generation_length(model, tokenizer, task, n_items)
    model.eval()
    # What the model does with each example, by the kind of the task.
    if task.kind == "lists":
        scored = generate_lists(model, tokenizer, task, n_items, batch_size)
    elif task.kind == "exact_match":
        scored = generate_answers(model, tokenizer, task, batch_size)
    else:
        scored = score_choices(model, tokenizer, task, batch_size, preamble, scoring)
    # Means over examples, intervals over subjects, and the counts behind them.
    subjects = [one.example.subject for one in scored]
    metrics: dict[str, Any] = {
        name: mean_interval([one.values[name] for one in scored], subjects) for name in scored[0].values
    }
    counts: dict[str, Any] = {"examples": len(scored), "subjects": len(set(subjects))}
    if task.kind == "lists":
        metrics |= _masses(model, encoded := encode(task, tokenizer, positions_of(model), vocabulary_of(model)))
        counts["items"] = len(scored) * n_items
        counts |= {"first_token_examples": len(encoded.examples), "dropped": dict(encoded.dropped)}
        counts |= {"n_started": encoded.n_started} if encoded.n_started else {}
    elif task.kind == "multiple_choice":
        counts["choices"] = sum(len(choices(one.example)) for one in scored)
    metrics["n"] = counts
    return metrics, scored


def _masses(model: PreTrainedModel, encoded: EncodedTask) -> dict[str, Any]:
    remaining, previous = answer_mass(model, encoded)
    subjects = [example.example.subject for example in encoded.examples]
    metrics = {"p_remaining": mean_interval(remaining, subjects)}
    rows = [index for index, example in enumerate(encoded.examples) if example.previous_tokens]
    if rows:  # examples without previous answers would only dilute it with zeros
        metrics["p_previous"] = mean_interval([previous[i] for i in rows], [subjects[i] for i in rows])
    return metrics
