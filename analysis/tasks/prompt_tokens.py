"""Texts in tokens as a model gets them, whatever the tokenizer's own settings.

    ids = prefix + tokens of the text

The prefix is what the tokenizer puts in front (BOS, or nothing), once. What it appends (the end of the text, with
`add_eos_token` and the like) is left out: an answer would come after the end.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable, Sequence

from transformers import PreTrainedTokenizerBase

from headtune.analysis.utils.errors import InputError

log = logging.getLogger(__name__)


def prefix_ids(tokenizer: PreTrainedTokenizerBase, special: bool = True) -> list[int]:
    """The ids that the tokenizer puts in front of every text; none where `special` is False.

    Raises:
        InputError: a text has other tokens with special tokens around it than without.
    """
    if not special:
        return []
    plain: list[int] = tokenizer("a", add_special_tokens=False).input_ids
    whole: list[int] = tokenizer("a").input_ids
    for n in range(len(whole) - len(plain), -1, -1):
        if whole[n : n + len(plain)] == plain:
            return whole[:n]
    raise InputError(
        f"tokenizer {tokenizer.name_or_path!r} makes {whole} of 'a', and {plain} without special tokens: what it puts "
        "in front cannot be told; use its fast version, or one that only adds tokens around a text"
    )


def token_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], special: bool = True) -> list[list[int]]:
    """The ids of each text: see the module.

    A text that begins with the prefix already gets no second one, and a line says so.

    Args:
        special: put the prefix in front; False where a chat template has written its own.

    Raises:
        InputError: see `prefix_ids`.
    """
    if not texts:
        return []
    rows: list[list[int]] = tokenizer(list(texts), add_special_tokens=False).input_ids
    prefix = prefix_ids(tokenizer, special)
    return [with_prefix(tokenizer, prefix, row) for row in rows]


def with_prefix(tokenizer: PreTrainedTokenizerBase, prefix: Sequence[int], ids: Sequence[int]) -> list[int]:
    """`prefix + ids`, or `ids` where they begin with it."""
    if prefix and list(ids[: len(prefix)]) == list(prefix):
        text = str(tokenizer.decode(list(prefix)))
        _warn_once(f"prompts begin with {text!r}, and the tokenizer adds another: they get one of the two")
        return list(ids)
    return [*prefix, *ids]


@functools.lru_cache(maxsize=64)
def _warn_once(line: str) -> None:
    log.warning(line)


def require_embeddings(
    tokenizer: PreTrainedTokenizerBase, rows: Iterable[Sequence[int]], vocabulary: int | None, place: str
) -> None:
    """Refuse tokens that the model has no embedding for.

    Args:
        rows: token ids.
        vocabulary: how many embeddings the model has; None: not known.
        place: what the tokens are of, for the message.

    Raises:
        InputError: naming the token.
    """
    if vocabulary is None:
        return
    for row in rows:
        for token in row:
            if token >= vocabulary:
                raise InputError(
                    f"{place}: token {tokenizer.convert_ids_to_tokens(int(token))!r} is number {token}, and the model "
                    f"has embeddings for {vocabulary}; write the text without it, or give a model whose embeddings "
                    "were resized to its tokenizer and trained"
                )


class BlankTokens:
    """Tells whether a token is white space alone, as it reads within a text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._before: list[int] = tokenizer("a", add_special_tokens=False).input_ids
        self._start = len(self._decoded([]))
        self._blank: dict[int, bool] = {}

    def __call__(self, token: int) -> bool:
        if token not in self._blank:
            # Decoded alone, some tokenizers drop the space that begins a text.
            self._blank[token] = not self._decoded([token])[self._start :].strip()
        return self._blank[token]

    def count(self, tokens: Sequence[int]) -> int:
        """How many tokens of white space alone stand in front."""
        return next((n for n, token in enumerate(tokens) if not self(token)), len(tokens))

    def _decoded(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode([*self._before, *tokens], clean_up_tokenization_spaces=False))
