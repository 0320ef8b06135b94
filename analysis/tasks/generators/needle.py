"""Needles in a long text: a code that is said once and asked for at the end.

    needle     " The secret code of NAME is w1 w2 ... ." in running text; "The secret code of NAME is" at the end
    passkey    several passkeys in running text, and one of them asked for

The words of a code are single tokens, and the span `needle` is the code alone, so that a head that copies it can be
told by where it looks (see `methods.retrieval`). All prompts of one length have as many tokens, special ones included:
the text is cut at a word, and begins where that comes out even.

Sources: retrieval heads (Wu et al. 2024, arXiv 2404.15574); the passkeys of DuoAttention (Xiao et al. 2024,
arXiv 2410.10819), whose words are the NATO alphabet's; here they are plain nouns of one token.
"""

from __future__ import annotations

import importlib.resources
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from headtune.analysis.tasks.task import Example
from headtune.analysis.tasks.tokenized import continuation
from headtune.analysis.utils.errors import InputError

from .base import Draw
from .words import single_token_words, word_lists

TRIES = 400  # beginnings of the text, until a cut has as many tokens as asked for
_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")


def needle(
    draw: Draw,
    lengths: Sequence[int] = (256,),
    depths: int = 5,
    words: int = 6,
    filler: Path | str | None = None,
) -> list[Example]:
    """The secret code of a person, whose name is the subject.

    Args:
        lengths: tokens of a prompt, special ones included; prompts take turns.
        depths: so many, the middles of equal parts: 5 are .1, .3, .5, .7, .9 of the text; prompts take turns.
        words: of a code.
        filler: a text to hide needles in; None: `recipes/data/neutral.txt`.

    Raises:
        InputError: a length that cannot be made, too few words or names.
    """
    text = _Filler.read(draw, filler)
    lists = word_lists()
    names = [f"{first} {last}" for first in lists["first_names"] for last in lists["last_names"]]
    if draw.n > len(names):
        raise InputError(f"a needle for each of {draw.n} names was asked for, and there are {len(names)}; lower n")
    draw.random("names").shuffle(names)

    def one(index: int) -> Example:
        name, generator = names[index], draw.random("needle", index)
        (code,) = _codes(draw, generator, text, 1, words)
        question = f"The secret code of {name} is"
        length, depth = _cell(index, lengths, depths)
        prompt = text.around([(depth, f"{question} {code}.")], f"\n{question}", length, generator)
        return Example(prompt, name, (code,), spans={"needle": (code,)})

    return _made(draw, one)


def passkey(
    draw: Draw,
    lengths: Sequence[int] = (512,),
    needles: int = 10,
    words: int = 8,
    filler: Path | str | None = None,
) -> list[Example]:
    """Several passkeys, evenly in the text; prompts ask for them in turn. The subject is the code's first word.

    The span `others` is the passkeys that are not asked for.

    Args:
        needles: passkeys in a prompt, 2 to 10.
        lengths, words, filler: see `needle`.

    Raises:
        InputError: a length that cannot be made, too few words, or a number of needles that has no words.
    """
    if not 2 <= needles <= len(_ORDINALS):
        raise InputError(f"passkey with needles={needles}; expected 2 to {len(_ORDINALS)}")
    text = _Filler.read(draw, filler)

    def one(index: int) -> Example:
        generator = draw.random("passkey", index)
        codes = _codes(draw, generator, text, needles, words)
        asked = index % needles
        sentence = "Remember this sequence of words, it is the {} passkey to the vault: {}."
        sentences = [((k + 0.5) / needles, sentence.format(_ORDINALS[k], code)) for k, code in enumerate(codes)]
        question = f"\nBased on the text, what is the {_ORDINALS[asked]} passkey to the vault?\nPasskey:"
        prompt = text.around(sentences, question, _cell(index, lengths, needles)[0], generator)
        others = tuple(code for k, code in enumerate(codes) if k != asked)
        return Example(
            prompt, codes[asked].split()[0], (codes[asked],), spans={"needle": (codes[asked],), "others": others}
        )

    return _made(draw, one)


def _made(draw: Draw, one: Callable[[int], Example]) -> list[Example]:
    examples = [one(index) for index in range(draw.n)]
    for example in examples:
        _check_copy(draw, example)
    return examples


def _check_copy(draw: Draw, example: Example) -> None:
    """The answer's tokens must be the needle's: else no head could copy them one by one."""
    prompt, (code,) = example.prompt, example.answers
    ids = draw.ids(prompt)
    answer = draw.ids(prompt + continuation(prompt, code))[len(ids) :]
    if len(answer) != len(code.split()) or not any(ids[i : i + len(answer)] == answer for i in range(len(ids))):
        raise InputError(f"the tokenizer splits the code {code!r} otherwise after the question than in the text")


def _cell(index: int, lengths: Sequence[int], depths: int) -> tuple[int, float]:
    """The length and depth of a prompt: all depths of a length, then the next length."""
    if depths < 1:
        raise InputError(f"depths={depths}; expected at least 1")
    return lengths[index // depths % len(lengths)], (index % depths + 0.5) / depths


def _codes(draw: Draw, generator: random.Random, text: _Filler, n: int, words: int) -> list[str]:
    """Codes of distinct words, none of them a word of the text."""
    pool = [word for word in single_token_words(draw.tokenizer) if word.lower() not in text.vocabulary]
    if words < 1 or len(pool) < n * words:
        raise InputError(
            f"{n} codes of {words} words need {n * words} words of a single token that the filler does not hold, and "
            f"this tokenizer has {len(pool)}; ask for fewer words or give another filler"
        )
    drawn = generator.sample(pool, n * words)
    return [" ".join(drawn[k * words : (k + 1) * words]) for k in range(n)]


@dataclass(frozen=True)
class _Filler:
    """A running text, read in a circle.

    Attributes:
        draw: whose tokenizer counts.
        words: of the text.
        begins: which of them begin a sentence.
        vocabulary: lower-case words without punctuation.
    """

    draw: Draw
    words: tuple[str, ...]
    begins: tuple[int, ...]
    vocabulary: frozenset[str]

    @classmethod
    def read(cls, draw: Draw, path: Path | str | None) -> _Filler:
        neutral = importlib.resources.files("headtune.recipes") / "data" / "neutral.txt"
        try:
            text = neutral.read_text(encoding="utf-8") if path is None else Path(path).read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"filler {str(path)!r} cannot be read as UTF-8 text: {error}") from None
        words = tuple(text.split())
        begins = tuple(i for i in range(len(words)) if words[i - 1].endswith((".", "!", "?")))
        if len(words) < 20 or not begins:
            raise InputError(f"filler {str(path)!r} must be running text of at least 20 words, with sentences that end")
        return cls(draw, words, begins, frozenset(re.findall(r"\w+", text.lower())))

    def around(self, needles: Sequence[tuple[float, str]], question: str, length: int, generator: random.Random) -> str:
        """A prompt of exactly `length` tokens: the text with needles between its sentences, and the question.

        Args:
            needles: (depth, sentence): after the sentence whose end is nearest to that share of the text.
        """
        starts = [*self.begins, *(i for i in range(len(self.words)) if i not in set(self.begins))]
        head, tail = starts[: len(self.begins)], starts[len(self.begins) :]
        generator.shuffle(head)
        generator.shuffle(tail)
        for start in [*head, *tail][:TRIES]:
            low, high = 0, length  # words; the number of tokens grows with them
            while low < high:
                middle = (low + high + 1) // 2
                if len(self.draw.ids(self._written(start, middle, needles, question))) <= length:
                    low = middle
                else:
                    high = middle - 1
            prompt = self._written(start, low, needles, question)
            tokens = len(self.draw.ids(prompt))
            if tokens > length:
                raise InputError(
                    f"a prompt of {length} tokens cannot hold needle and question, which take {tokens}; ask for a "
                    "longer one"
                )
            if tokens == length:
                return prompt
        raise InputError(f"no cut of the filler gives a prompt of exactly {length} tokens; choose another length")

    def _written(self, start: int, n: int, needles: Sequence[tuple[float, str]], question: str) -> str:
        words = [self.words[(start + i) % len(self.words)] for i in range(n)]
        # A needle stands after a sentence, or at the end of the text; never at its beginning, where models look anyway.
        ends = [i + 1 for i, word in enumerate(words[:-1]) if word.endswith((".", "!", "?"))]
        places = [_nearest_to(depth * n, [*ends, n]) for depth, _ in needles]
        parts, cursor = [], 0
        for place, (_, sentence) in zip(places, needles, strict=True):
            parts += [*words[cursor:place], sentence]
            cursor = max(cursor, place)
        return " ".join([*parts, *words[cursor:]]) + question


def _nearest_to(place: float, ends: Sequence[int]) -> int:
    return min(ends, key=lambda end: abs(end - place))
