"""How frequent tokens are in text, and whether logits follow it.

Lv et al. (2024) find that the last layers raise tokens in proportion to their frequency, whatever the prompt:
`corr(W_U norm(.), log p(token))`.

Counts come from any text (a file or a folder of files) by the model's own tokenizer. Without one there is a small
table: no corpus comes with headtune, so it is made of about 700 common English words, ordered by hand, whose
frequencies are guessed from their rank (Zipf's law), and of a short neutral text. It tells frequent tokens from rare
ones and not much more. The facts of the built-in tasks are not in it, or the tokens of their answers would be the rare
ones that are compared with.
"""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray
from transformers import PreTrainedTokenizerBase

from headtune.analysis.utils.errors import InputError
from headtune.analysis.utils.stats import pearson, spearman

_PIECE = 200_000  # characters tokenised at once; texts are cut at line ends


@dataclass(frozen=True)
class Frequencies:
    """Token counts.

    Attributes:
        source: what was counted, in words.
        counts: `[len(tokenizer)]` how often each token occurs.
        special: ids of tokens that occur in no text, such as `<eos>`; they are left out of correlations.
    """

    source: str
    counts: NDArray[np.int64]
    special: frozenset[int] = frozenset()

    @property
    def log_p(self) -> NDArray[np.float64]:
        """`log((count + 1) / (total + vocabulary))`: add-one smoothing gives tokens never seen a frequency too."""
        logs: NDArray[np.float64] = np.log((self.counts + 1) / (self.counts.sum() + len(self.counts)))
        return logs

    def masks(self) -> dict[str, NDArray[np.bool_]]:
        """Which tokens a correlation runs over: those `seen` in the text, or `all` (unseen ones share one value)."""
        ordinary = np.ones(len(self.counts), dtype=bool)
        ordinary[[token for token in self.special if token < len(ordinary)]] = False
        return {"seen": ordinary & (self.counts > 0), "all": ordinary}

    def correlate(self, logits: ArrayLike) -> dict[str, float | None]:
        """Correlation of logits with `log_p`, over the tokens that have both.

        A tokenizer may have more entries than the model has logits, such as special tokens added to it, and a model
        more logits than its tokenizer has entries.

        Returns:
            `pearson_seen`, `spearman_seen`, `pearson_all`, `spearman_all`; None where one side does not vary.
        """
        result = {}
        for name in self.masks():
            values, logs = self.pairs(logits, name)
            result[f"pearson_{name}"] = pearson(values, logs)
            result[f"spearman_{name}"] = spearman(values, logs)
        return result

    def pairs(self, logits: ArrayLike, mask: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Logit and `log_p` of each token of a mask that has both."""
        values = np.asarray(logits, dtype=np.float64)
        n = min(len(values), len(self.counts))
        chosen = self.masks()[mask][:n]
        return values[:n][chosen], self.log_p[:n][chosen]


def counts(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> NDArray[np.int64]:
    """`[len(tokenizer)]` how often each token occurs in texts, without the special tokens that a tokenizer adds."""
    total = np.zeros(len(tokenizer), dtype=np.int64)
    for text in texts:
        for piece in _pieces(text):
            ids = tokenizer(piece, add_special_tokens=False).input_ids
            total += np.bincount(ids, minlength=len(total))[: len(total)]
    return total


def _pieces(text: str) -> Iterator[str]:
    """The text in pieces of about `_PIECE` characters, cut behind a line end where there is one."""
    start = 0
    while start < len(text):
        stop = min(start + _PIECE, len(text))
        if stop < len(text) and (line_end := text.rfind("\n", start, stop)) >= 0:
            stop = line_end + 1
        yield text[start:stop]
        start = stop


def read_texts(path: Path) -> Iterator[str]:
    """The text of a file, or of every `*.txt` and `*.md` file in a folder and its folders, one after the other.

    Raises:
        InputError: no such path, no such files in the folder, or a file that is not UTF-8 text.
    """
    files = sorted(file for file in path.rglob("*") if file.suffix in (".txt", ".md")) if path.is_dir() else [path]
    if not files:
        raise InputError(
            f"folder {str(path)!r} holds no .txt or .md file to count tokens in; name a file or another folder"
        )
    for file in files:
        try:
            yield file.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise InputError(f"text {str(path)!r} does not exist; name a text file or a folder of .txt files") from None
        except UnicodeDecodeError as error:
            raise InputError(f"text {str(file)!r} is not UTF-8: {error.reason} at byte {error.start}") from None


def frequencies(tokenizer: PreTrainedTokenizerBase, text: str | None = None) -> Frequencies:
    """Count a text file or folder, or, without one, make the small built-in table.

    Raises:
        InputError: see `read_texts`, or the text is empty.
    """
    special = frozenset(tokenizer.all_special_ids)
    if text is None:
        return Frequencies(_BUILT_IN, _built_in(tokenizer), special)
    total = counts(tokenizer, read_texts(Path(text)))
    if not total.any():
        raise InputError(f"text {text!r} is empty; name one with words in it")
    return Frequencies(f"{text} ({int(total.sum())} tokens)", total, special)


_BUILT_IN = (
    "the small built-in table: about 700 common English words with frequencies guessed from their rank, and a neutral "
    "text of 1200 words; name a text of your own for real counts"
)


def _built_in(tokenizer: PreTrainedTokenizerBase) -> NDArray[np.int64]:
    """Counts as if in a million words of English, made from ranks, plus those of the neutral text."""
    data = importlib.resources.files("headtune.recipes") / "data"
    table = json.loads((data / "unigrams.json").read_text(encoding="utf-8"))
    total = np.zeros(len(tokenizer), dtype=np.int64)
    for rank, word in enumerate(" ".join(table["words"]).split(), start=1):
        # A word follows a space; a mark mostly does not.
        ids = tokenizer(f" {word}" if word[0].isalnum() else word, add_special_tokens=False).input_ids
        count = round(table["top"] * (1 + table["shift"]) / (rank + table["shift"]))
        np.add.at(total, ids, count)
    return total + counts(tokenizer, [(data / "neutral.txt").read_text(encoding="utf-8")])
