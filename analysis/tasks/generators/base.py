"""What every generator of task files shares: the draw, the tokenizer, how many prompts, who answers them."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from headtune.analysis.tasks.task import Example, Kind
from headtune.analysis.tasks.tokenized import first_tokens
from headtune.analysis.utils.errors import InputError


class Answerer(Protocol):
    """A model that generators ask what it would write; `HeadModel` is one."""

    tokenizer: PreTrainedTokenizerBase

    def next_tokens(self, prompts: Sequence[str]) -> list[int]:
        """The likeliest token after each prompt."""


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
        """With the tokenizer's special tokens, as prompts are encoded."""
        ids: list[int] = self.tokenizer(text).input_ids
        return ids

    def first_token(self, prompt: str, answer: str) -> int | None:
        """The first token of an answer after a prompt; None where tokens merge across the border."""
        return first_tokens(self.tokenizer, prompt, self.ids(prompt), [answer])[answer]


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
