"""Does the model do at all what heads are looked for? A detector of a behaviour that is not there ranks noise.

    behaviour = first_token_accuracy(model, encoded.examples)
    require_behaviour(behaviour, "ioi")              # InputError below chance + 3 standard errors

The standard error is the larger of two: that of guessing, `sqrt(chance (1 - chance) / subjects)`, and the jackknife's
of the accuracy over subjects, which counts where chance is next to nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from headtune.analysis.models.head_model import HeadModel
from headtune.analysis.tasks.prompt_tokens import BlankTokens, token_ids
from headtune.analysis.tasks.task import Example
from headtune.analysis.tasks.tokenized import Encoded, continuation, first_tokens
from headtune.analysis.utils.errors import InputError
from headtune.analysis.utils.stats import standard_error

ABOVE = 3.0  # standard errors above chance


@dataclass(frozen=True)
class Behaviour:
    """How often a model does what a task asks.

    Attributes:
        right: `[n_examples]` 1 or 0, or a share.
        subjects: `[n_examples]` of each example.
        chance: what guessing reaches.
        measure: what counts as right, in words.
        greedy: how often the likeliest next token is right, `[n_examples]`; None where `right` says so.
    """

    right: Sequence[float]
    subjects: Sequence[str]
    chance: float
    measure: str
    greedy: Sequence[float] | None = None

    @property
    def accuracy(self) -> float:
        return float(np.mean(self.right))

    @property
    def threshold(self) -> float:
        """Chance and `ABOVE` standard errors."""
        _, error, n = (each.item() for each in standard_error(self.right, self.subjects))
        guessing = math.sqrt(self.chance * (1 - self.chance) / n)
        return self.chance + ABOVE * max(guessing, 0.0 if math.isnan(error) else error)

    def __str__(self) -> str:
        return f"{self.measure} in {self.accuracy:.3f} of {len(self.right)} prompts (chance {self.chance:.3g})"


def require_behaviour(behaviour: Behaviour, task: str) -> None:
    """Refuse a task that the model does not do better than by chance.

    Raises:
        InputError: an accuracy below chance + 3 standard errors, or of nothing.
    """
    if behaviour.accuracy < behaviour.threshold or not behaviour.accuracy:
        raise InputError(
            f"task {task!r}: {behaviour}, below chance + {ABOVE:g} standard errors "
            f"({min(behaviour.threshold, 1):.3f}): the model does not show the behaviour, and scores of heads would be "
            "noise; use an easier task, more prompts or another model"
        )


def first_token_accuracy(model: HeadModel, examples: Sequence[Encoded]) -> Behaviour:
    """How often a right answer's first token is likelier than every wrong one's; greedy: than all others.

    Wrong are the previous answers and the example's `incorrect`. Where an example has none, being right is being the
    likeliest token, which guessing is in one of the vocabulary's. Chance with w wrong first tokens and r right ones:
    r / (r + w), meaned over examples.
    """
    right, greedy, chance = [], [], []
    for encoded in examples:
        logits = _last_logits(model, encoded.tokens)
        targets = torch.tensor(encoded.target_tokens)
        wrong = _wrong_tokens(model, encoded)
        best = logits[targets].max()
        greedy.append(float(best == logits.max()))
        right.append(float(best > logits[torch.tensor(wrong)].max()) if wrong else greedy[-1])
        chance.append(len(targets) / (len(targets) + len(wrong) if wrong else len(logits)))
    subjects = [encoded.example.subject for encoded in examples]
    measure = "the right answer is likelier than the best wrong one"
    if not any(_wrong_tokens(model, encoded) for encoded in examples):
        measure = "the likeliest token begins a right answer"
    return Behaviour(right, subjects, float(np.mean(chance)), measure, greedy)


def answer_success(model: HeadModel, examples: Sequence[Encoded]) -> Behaviour:
    """How often greedy decoding writes `answers[0]` to its end: told by one pass over prompt and answer.

    Every token of the answer is the likeliest after those before it if and only if greedy decoding writes it.
    """
    right = []
    for encoded in examples:
        answer = answer_tokens(model, encoded)
        with torch.no_grad():
            tokens = torch.cat([encoded.tokens, answer[:-1]]).to(model.device)
            logits = model.hf(tokens[None], use_cache=False, logits_to_keep=len(answer)).logits[0]
        right.append(float((logits.argmax(-1).cpu() == answer).all()))
    return written_in_full(right, [encoded.example.subject for encoded in examples])


def written_in_full(right: Sequence[float], subjects: Sequence[str]) -> Behaviour:
    """The behaviour of `answer_success`, from what is known already."""
    return Behaviour(right, subjects, 0.0, "greedy decoding writes the whole answer")


def answer_tokens(model: HeadModel, encoded: Encoded) -> Tensor:
    """`[n]` the tokens of the first answer that remains, as they follow the prompt.

    Raises:
        InputError: tokens merge across the end of the prompt, or prompt and answer are too long for the model.
    """
    example = encoded.example
    text = example.prompt + continuation(example.prompt, example.remaining[0])
    rows = token_ids(model.tokenizer, [text], encoded.special)[0]
    n = len(encoded.tokens)
    if len(rows) <= n or rows[:n] != encoded.tokens.tolist():
        raise InputError(
            f"the answer {example.remaining[0]!r} has no tokens by itself after {example.prompt[-30:]!r}: they merge; "
            "end the prompt otherwise"
        )
    if model.positions is not None and len(rows) - 1 > model.positions:
        raise InputError(
            f"a prompt of {n} tokens with its answer of {len(rows) - n} exceeds the {model.positions} positions "
            f"of {model.name}; shorten it"
        )
    return torch.tensor(rows[n:])


def _wrong_tokens(model: HeadModel, encoded: Encoded) -> list[int]:
    """First tokens of the previous and the incorrect answers, less those of the right ones."""
    example: Example = encoded.example
    before = encoded.tokens.tolist()
    firsts = first_tokens(model.tokenizer, example.prompt, before, example.incorrect, encoded.special)
    blank = BlankTokens(model.tokenizer)
    tokens = {*encoded.previous_tokens, *(t for t in firsts.values() if t is not None and not blank(t))}
    return sorted(tokens - set(encoded.target_tokens))


def _last_logits(model: HeadModel, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model.hf(tokens.to(model.device)[None], use_cache=False, logits_to_keep=1).logits[0, -1]
    return logits.float().cpu()
