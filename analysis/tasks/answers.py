"""When two texts are the same answer: spelling, accents, quotes."""

from __future__ import annotations

import functools
import unicodedata

_LETTERS = str.maketrans({"ł": "l", "ø": "o", "đ": "d", "ð": "d", "ı": "i", "ß": "ss", "æ": "ae", "œ": "oe", "’": "'"})
# Around an answer: punctuation, quotes and brackets of any script, and characters without width.
_OUTER = " \t\r\n.,;:!?\"'`*_()[]“”„‟‘’‚‛«»‹›「」『』《》〈〉【】〔〕、。｡·।॥؟،؛۔¿¡\u200b\u200e\u200f\ufeff"
_STRESSED = set("аеиоуыэюяіє")


@functools.lru_cache(maxsize=2**16)
def normalise(answer: str) -> str:
    """Answers are compared without case, accents, outer punctuation, a leading "the", and with "Saint" as "St".

    An accent is a mark on a Latin or Greek letter, a stress on a Cyrillic vowel, the dots of a Russian ё, and the
    points of Hebrew and Arabic; a mark that makes another letter stays (й, パ, signs of Thai and Indian scripts).
    What consists of outer punctuation alone is nothing.
    """
    plain = _without_accents(answer.casefold().translate(_LETTERS))
    words = plain.strip(_OUTER).removeprefix("the ")
    return " ".join(words.replace("saint ", "st ").replace("st. ", "st ").split())


def _without_accents(text: str) -> str:
    if text.isascii():
        return text
    characters, base = [], ""
    for c in unicodedata.normalize("NFKD", text):
        if not unicodedata.combining(c):
            base = c
        elif _is_accent(base, c):
            continue
        characters.append(c)
    return unicodedata.normalize("NFC", "".join(characters))


def _is_accent(base: str, mark: str) -> bool:
    if not base.isalpha() or unicodedata.name(base, "").startswith(("LATIN", "GREEK")):
        return True
    if base in _STRESSED and mark in "\u0300\u0301":
        return True
    points = "\u0591" <= mark <= "\u05c7" or "\u064b" <= mark <= "\u0652" or mark == "\u0670"
    return points or (base == "е" and mark == "\u0308")


def canonical(answer: str, subject: str) -> str:
    """`normalise`, and "Quebec City" is "Quebec", unless what is left is the subject itself ("Mexico City")."""
    name = normalise(answer)
    short = name.removesuffix(" city")
    return name if short == normalise(subject) else short
