"""Few-shot prompts of pairs, with the labels as they are or shuffled among the shots.

    Q: hot        Q: big                          Q: hot        Q: big
    A: cold       A: small    Q: wet  A:          A: small      A: cold     Q: wet  A:

Every clean prompt has the shuffled one of the same shots as its counterpart (`corrupt`), and the other way round:
what a head carries from one to the other is what it knows of the task (Todd et al. 2024, arXiv 2310.15213).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

from headtune.analysis.tasks.formats import PAIRS_TEMPLATE, read
from headtune.analysis.tasks.task import Example
from headtune.analysis.tasks.tokenized import continuation
from headtune.analysis.utils.errors import InputError

from .base import Draw, require_length
from .words import word_lists

LABELS = ("clean", "shuffled")
TRIES = 50  # draws of shots, until shuffling leaves none its label


def fewshot(draw: Draw, pairs: Path | str, shots: int = 5, labels: str = "clean") -> list[Example]:
    """Prompts of `shots` pairs and an input, whose output is the answer.

    Args:
        pairs: a file of the format `pairs`, its own template included.
        shots: pairs in a prompt, at least 2.
        labels: `clean`, or `shuffled`: no shot has its own label.

    Raises:
        InputError: too few pairs, fewer shots than 2, unknown labels.
    """
    queries = list(read("pairs", str(pairs)).examples)
    return _prompts(draw, queries, shots, labels, f"fewshot of {str(pairs)!r}")


def antonyms(draw: Draw, shots: int = 5, labels: str = "clean") -> list[Example]:
    """`fewshot` of the words and opposites in `recipes/data/words.json`."""
    queries = [
        Example(PAIRS_TEMPLATE.replace("{input}", word), word, (opposite,))
        for word, opposite in word_lists()["antonyms"]
    ]
    return _prompts(draw, queries, shots, labels, "antonyms")


def _prompts(draw: Draw, queries: Sequence[Example], shots: int, labels: str, what: str) -> list[Example]:
    if labels not in LABELS:
        raise InputError(f"labels {labels!r} are unknown; expected clean or shuffled")
    if shots < 2:
        raise InputError(f"shots={shots}; expected at least 2: one label alone cannot be shuffled")
    order = list(range(len(queries)))
    draw.random("order").shuffle(order)
    examples: list[Example] = []
    for index in range(draw.n):
        query, generator = queries[order[index % len(order)]], draw.random("shots", index)
        # No shot that says the input or the answer: the answer is to be found, not copied.
        words = {query.subject.lower(), *(answer.lower() for answer in query.answers)}
        usable = [
            other
            for other in queries
            if not words & {other.subject.lower(), *(answer.lower() for answer in other.answers)}
            and query.subject not in other.prompt + " ".join(other.answers)
        ]
        if len(usable) < shots:
            draw.dropped["too few pairs without its words"] += 1
            continue
        for _ in range(TRIES):
            drawn = generator.sample(usable, shots)
            own_labels = [shot.answers[0] for shot in drawn]
            shuffled = _deranged(own_labels, generator)
            if not any(own == other for own, other in zip(own_labels, shuffled, strict=True)):
                break
        else:
            draw.dropped["too many shots with one label to shuffle them"] += 1
            continue
        texts = {"clean": _text(drawn, own_labels, query), "shuffled": _text(drawn, shuffled, query)}
        other = LABELS[1 - LABELS.index(labels)]
        prompt, ranges = texts[labels]
        examples.append(
            Example(prompt, query.subject, query.answers, corrupt=texts[other][0], spans={"labels": tuple(ranges)})
        )
    return require_length(draw, examples, what)


def _text(shots: Sequence[Example], labels: Sequence[str], query: Example) -> tuple[str, list[tuple[int, int]]]:
    """The prompt, and the characters of its labels."""
    text, ranges = "", []
    for shot, label in zip(shots, labels, strict=True):
        text += shot.prompt
        text += continuation(text, label)
        ranges.append((len(text) - len(label), len(text)))
        text += "\n\n"
    return text + query.prompt, ranges


def _deranged(labels: Sequence[str], generator: random.Random) -> list[str]:
    """The labels around a circle in random order: none stays with its shot."""
    circle = list(range(len(labels)))
    generator.shuffle(circle)
    result = list(labels)
    for place, index in enumerate(circle):
        result[index] = labels[circle[(place + 1) % len(circle)]]
    return result
