"""Words and names that generators put into prompts: plain nouns, people, antonyms."""

from __future__ import annotations

import importlib.resources
import json
import re
from collections.abc import Collection, Iterator
from functools import lru_cache
from typing import Any

from transformers import PreTrainedTokenizerBase


@lru_cache(maxsize=1)
def word_lists() -> dict[str, Any]:
    """`recipes/data/words.json`: nouns, first and last names, places, things, and pairs of antonyms."""
    data = importlib.resources.files("headtune.recipes") / "data" / "words.json"
    lists: dict[str, Any] = json.loads(data.read_text(encoding="utf-8"))
    return lists


@lru_cache(maxsize=4)
def single_token_words(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Words that are one token after a space: nouns of the list, or of the vocabulary where those are fewer than 40.

    Words of the vocabulary have 3 to 10 letters of the Latin alphabet, and may be parts of words.
    """

    def usable(words: Collection[str]) -> Iterator[str]:
        base = tokenizer("x:", add_special_tokens=False).input_ids
        rows = tokenizer([f"x: {word}" for word in words], add_special_tokens=False).input_ids if words else []
        for word, ids in zip(words, rows, strict=True):
            if ids[:-1] == base and str(tokenizer.decode(ids[-1:])).strip() == word:  # no token for unknown words
                yield word

    nouns = tuple(usable(word_lists()["nouns"]))
    if len(nouns) >= 40:
        return nouns
    decoded = (tokenizer.convert_tokens_to_string([token]).strip() for token in sorted(tokenizer.get_vocab()))
    return tuple(usable(list(dict.fromkeys(word for word in decoded if re.fullmatch(r"[A-Za-z]{3,10}", word)))))
