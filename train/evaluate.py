"""Before and after: lists generated for held-out subjects, probabilities of the answers, and a guard against damage.

Every list item asked for is one of: a **repeat** of an item given or generated earlier, a **correct new** answer, a
**wrong** one, or **missing** (the model stopped). Rates are over all items asked for, so they sum to 1. Intervals are
percentile bootstraps over subjects.
"""

from __future__ import annotations

import importlib.resources
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from ..analysis.encoding import EncodedTask, as_chat, encode
from ..analysis.scores import mean_interval
from ..analysis.tasks import Example, Task, canonical

KINDS = ("repeat", "correct_new", "wrong", "missing")


@dataclass(frozen=True)
class ScoredList:
    """One generated list: the example, what the model wrote, its items and each item's kind (see KINDS)."""

    example: Example
    text: str
    items: tuple[str, ...]
    kinds: tuple[str, ...]


def parse_items(text: str, n_items: int, example: Example | None = None) -> list[str]:
    """The first `n_items` list items of a continuation: lines without their number or bullet, cut at an explanation.

    An item is cut at its first dash, comma, colon, semicolon or bracket, unless a longer part of it is an answer of
    `example` ("I, Robot").
    """
    known = set() if example is None else {canonical(answer, example.subject) for answer in example.answers}
    items = []
    for index, line in enumerate(text.split("\n")):
        bare = re.sub(r"^\s*(\d+[.)]|[-*•])\s*", "", line) if index else line
        parts = [bare[: match.start()] for match in re.finditer(r"\s[-–—]\s|[,:;(]", bare)]
        longest = (part for part in (bare, *reversed(parts)) if example and canonical(part, example.subject) in known)
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
def generate_lists(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    n_items: int = 3,
    batch_size: int = 16,
    max_new_tokens: int | None = None,
    sample_seed: int | None = None,
) -> list[ScoredList]:
    """Continue every prompt (greedily, or sampled with `sample_seed`) and score the next `n_items` items."""
    side, pad = tokenizer.padding_side, tokenizer.pad_token
    tokenizer.padding_side = "left"
    if pad is None:
        tokenizer.pad_token = tokenizer.eos_token
    if sample_seed is not None:
        torch.manual_seed(sample_seed)
    model.eval()
    prompts = [example.prompt for example in as_chat(task, tokenizer).examples]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    results: dict[int, ScoredList] = {}
    try:
        for start in range(0, len(order), batch_size):
            indices = order[start : start + batch_size]
            batch = tokenizer(
                [prompts[i] for i in indices],
                return_tensors="pt",
                padding=True,
                add_special_tokens=not task.chat_template,
            )
            batch = batch.to(model.device)
            length = batch["input_ids"].shape[1]
            generate: Any = model.generate
            output = generate(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                do_sample=sample_seed is not None,
                top_k=0 if sample_seed is not None else None,
                temperature=1.0 if sample_seed is not None else None,
                top_p=None,
                max_new_tokens=max_new_tokens or 12 * n_items,
                pad_token_id=tokenizer.pad_token_id,
                stopping_criteria=StoppingCriteriaList([_EnoughLines(tokenizer, length, n_items)]),
            )
            for i, text in zip(
                indices, tokenizer.batch_decode(output[:, length:], skip_special_tokens=True), strict=True
            ):
                example = task.examples[i]
                items = parse_items(text, n_items, example)
                results[i] = ScoredList(example, text, tuple(items), tuple(score_items(example, items, n_items)))
    finally:
        tokenizer.padding_side, tokenizer.pad_token = side, pad
    return [results[i] for i in range(len(task.examples))]


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


def neutral_text() -> str:
    """The text, written for this project, on which perplexity is measured."""
    return (importlib.resources.files("headtune.recipes") / "data" / "neutral.txt").read_text(encoding="utf-8")


@torch.no_grad()
def perplexity(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str | None = None, window: int = 512
) -> float:
    """`exp(mean negative log-likelihood)` per token of `text` in consecutive windows of `window` tokens."""
    window = min(window, getattr(model.config.get_text_config(), "max_position_embeddings", None) or window)
    tokens = tokenizer(neutral_text() if text is None else text, return_tensors="pt").input_ids[0].to(model.device)
    total, count = 0.0, 0
    for start in range(0, len(tokens) - 1, window):
        part = tokens[start : start + window + 1][None]
        log_p = model(part[:, :-1], use_cache=False).logits[0].float().log_softmax(-1)
        total -= log_p.gather(-1, part[0, 1:, None]).sum().item()
        count += part.shape[1] - 1
    return math.exp(total / count)


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    n_items: int = 3,
    batch_size: int = 16,
) -> tuple[dict[str, Any], list[ScoredList]]:
    """All metrics of a model on a task.

    Returns:
        metrics: name -> `{"mean", "ci"}` for `repeat_rate`, `correct_new_rate`, `wrong_rate`, `missing_rate`,
            `p_previous`, `p_remaining`; plus `neutral_perplexity` (a number) and the counts behind them.
        lists: what was generated.
    """
    model.eval()
    lists = generate_lists(model, tokenizer, task, n_items, batch_size)
    subjects = [scored.example.subject for scored in lists]
    metrics: dict[str, Any] = {
        f"{kind}_rate": mean_interval([s.kinds.count(kind) / n_items for s in lists], subjects) for kind in KINDS
    }
    encoded = encode(task, tokenizer)
    remaining, previous = answer_mass(model, encoded)
    of_mass = [example.example.subject for example in encoded.examples]
    metrics["p_remaining"] = mean_interval(remaining, of_mass)
    given = [index for index, example in enumerate(encoded.examples) if example.previous_tokens]
    if given:  # examples without previous answers would only dilute it with zeros
        metrics["p_previous"] = mean_interval([previous[i] for i in given], [of_mass[i] for i in given])
    metrics["neutral_perplexity"] = perplexity(model, tokenizer)
    metrics["n"] = {
        "examples": len(lists),
        "items": len(lists) * n_items,
        "subjects": len(set(subjects)),
        "first_token_examples": len(encoded.examples),
        "dropped": dict(encoded.dropped),
    }
    return metrics, lists
