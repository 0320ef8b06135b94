"""Head profiles: what single heads read and write at END, as data and as portraits.json.

`profile_heads` makes them from the model; without the model, the page is made again from the file.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from headtune.analysis.utils.errors import InputError
from headtune.analysis.utils.files import write_json

SCHEMA = 1
# What a head can read; the order is the page's.
SOURCES = ("subject", "previous", "first", "end", "rest")
# A head copies (suppresses) a source if the token's own logit is within the top (bottom) 5% of the vocabulary.
COPIES = 0.05


@dataclass(frozen=True)
class Written:
    """A token and how far the head moves its logit, against the mean over the vocabulary."""

    token: str
    logits: float


@dataclass(frozen=True)
class Read:
    """A token string, the attention it gets where it occurs (mean over these examples), and in how many it occurs."""

    token: str
    mass: float
    examples: int


@dataclass(frozen=True)
class Copying:
    """What full attention on a token would do to that same token, over all tokens of a source in all examples.

    Attributes:
        tokens: how many.
        own: mean logit given to the token itself, against the mean over the vocabulary.
        others: the same for tokens of this source in other examples that the prompt does not hold; None without any.
        above: median share of the vocabulary (of an even sample of a large one) that gets a larger logit than the token
            itself: 0 = first, 1 = last.
    """

    tokens: int
    own: float
    others: float | None
    above: float

    @property
    def verdict(self) -> str:
        return "copies" if self.above <= COPIES else "suppresses" if self.above >= 1 - COPIES else "neither"


@dataclass(frozen=True)
class Prompt:
    """One prompt, token by token; END is the last. Of all, the one with the most typical attributions.

    Attributes:
        tokens, sources: strings, and the source each token belongs to (see `Encoded.sources`).
        attention: the head's attention row at END.
        target, previous: each token's part of the head's direct attribution to the mean logit of the remaining and
            of the previous answers; `previous` is None where there are none.
        targets, given: first tokens of the remaining and of the previous answers.
        raises, lowers: the tokens that the head raises and lowers most here, against what it writes on average.
    """

    tokens: tuple[str, ...]
    sources: tuple[str, ...]
    attention: tuple[float, ...]
    target: tuple[float, ...]
    previous: tuple[float, ...] | None
    targets: tuple[str, ...]
    given: tuple[str, ...]
    raises: tuple[Written, ...]
    lowers: tuple[Written, ...]


@dataclass(frozen=True)
class HeadProfile:
    """What one head reads and writes at END.

    Attributes:
        layer, head: zero-based.
        examples: how many examples it is a mean over.
        attention: source (subject, previous, first, end, rest) -> mean attention mass; sums to 1.
        reads: the token strings that get most attention where they occur.
        raises, lowers: the tokens it moves most on average, strongest first.
        copying: source -> test, for those whose tokens the copying test is made on.
        prompt: one prompt in full.
    """

    layer: int
    head: int
    examples: int
    attention: dict[str, float]
    reads: tuple[Read, ...]
    raises: tuple[Written, ...]
    lowers: tuple[Written, ...]
    copying: dict[str, Copying]
    prompt: Prompt

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> HeadProfile:
        """The inverse of `to_json`, also after a round through JSON text.

        Raises:
            KeyError, TypeError: something is missing or unknown.
        """

        def written(block: dict[str, Any]) -> dict[str, Any]:
            return {name: tuple(Written(**entry) for entry in block[name]) for name in ("raises", "lowers")}

        prompt = {
            key: tuple(value) if isinstance(value, list | tuple) else value for key, value in data["prompt"].items()
        }
        changed = {
            "reads": tuple(Read(**entry) for entry in data["reads"]),
            "copying": {source: Copying(**entry) for source, entry in data["copying"].items()},
            "prompt": Prompt(**(prompt | written(data["prompt"]))),
        }
        return cls(**(data | written(data) | changed))


def write_profiles(profiles: Sequence[HeadProfile], path: Path) -> None:
    """Write portraits.json."""
    write_json(path, {"schema": SCHEMA, "portraits": [profile.to_json() for profile in profiles]})


def read_profiles(path: Path) -> list[HeadProfile]:
    """Read portraits.json.

    Raises:
        InputError: not there, not JSON, or not what `write_profiles` writes.
    """
    name = f"portraits file {str(path)!r}"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{name} cannot be read: {error.strerror}; headtune identify writes it") from None
    except ValueError as error:
        raise InputError(f"{name} is not JSON: {error}; run headtune identify again") from None
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        raise InputError(f"{name} is not of schema {SCHEMA}; run headtune identify again")
    try:
        return [HeadProfile.from_json(entry) for entry in data["portraits"]]
    except (AttributeError, KeyError, TypeError) as error:
        raise InputError(f"{name} is damaged ({error}); run headtune identify again") from None
