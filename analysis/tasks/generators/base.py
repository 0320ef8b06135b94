"""What every generator of task files shares: the draw, the tokenizer, how many prompts, who answers them."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from headtune.analysis.tasks.answer_starts import answer_rows, blank_start
from headtune.analysis.tasks.prompt_tokens import BlankTokens, token_ids
from headtune.analysis.tasks.task import Example, Kind
from headtune.analysis.tasks.tokenized import continuation
from headtune.analysis.utils.errors import InputError


class Answerer(Protocol):
    """A model that generators ask what it would write; `HeadModel` is one."""

    tokenizer: PreTrainedTokenizerBase

    def next_tokens(self, rows: Sequence[Sequence[int]]) -> list[int]:
        """The likeliest token after each prompt, given as token ids."""


@dataclass
class Draw:
    """One making of a task.

    Attributes:
        tokenizer: of the model that the prompts are for.
        n: how many prompts.
        seed: of everything that is drawn; prompt i draws from its own generator, so that more prompts leave the first
            as they were.
        model: asked what it knows, by generators that can use it; None: nobody is asked.
        dropped: why candidates were left out, counted.
        about: what the generator adds to the parameters in the file's first line.
    """

    tokenizer: PreTrainedTokenizerBase
    n: int
    seed: int
    model: Answerer | None = None
    dropped: Counter[str] = field(default_factory=Counter)
    about: dict[str, Any] = field(default_factory=dict)

    def random(self, *key: Any) -> random.Random:
        return random.Random("/".join(map(str, (self.seed, *key))))

    def ids(self, text: str) -> list[int]:
        """As prompts are encoded."""
        return token_ids(self.tokenizer, [text])[0]

    def first_tokens(self, prompt: str, answers: Sequence[str]) -> list[tuple[int, ...] | None]:
        """Of each answer after a prompt, the token that is scored, and before it any of white space alone.

        These are as many as all of the answers begin with (see `answer_starts`). None where there is no such token:
        tokens merge across the border, or only some answers begin with white space alone.
        """
        blank = BlankTokens(self.tokenizer)
        texts = {answer: prompt + continuation(prompt, answer) for answer in answers}
        rows = answer_rows(self.tokenizer, texts, self.ids(prompt))
        n = blank_start(rows, blank)
        firsts = [rows[answer][: n + 1] for answer in answers]
        return [first if first and not blank(first[-1]) else None for first in firsts]


@dataclass(frozen=True)
class Generator:
    """One kind of task.

    Attributes:
        name: what `task make` calls it.
        summary: one line for people.
        make: (draw, options by keyword) -> examples. Its keyword arguments are the options and their defaults.
        kind: how the task is scored.
        asks: whether `make` can use a model, not its tokenizer alone.
    """

    name: str
    summary: str
    make: Callable[..., list[Example]]
    kind: Kind = "exact_match"
    asks: bool = False


def require_length(draw: Draw, examples: Sequence[Example], what: str) -> list[Example]:
    """Refuse a task with fewer prompts than were asked for (InputError says why they were left out)."""
    if len(examples) < draw.n:
        why = ", ".join(f"{reason} ({count})" for reason, count in draw.dropped.most_common(3))
        raise InputError(
            f"{what} makes {len(examples)} prompts of the {draw.n} asked for{': ' + why if why else ''}; "
            "give more data or a lower n"
        )
    return list(examples)
