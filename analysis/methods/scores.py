"""Scores by head, with the examples behind them, so that every mean has an interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from headtune.analysis.utils.errors import InputError
from headtune.analysis.utils.files import atomic_path
from headtune.analysis.utils.stats import one_sided_p, subject_weights, t_interval

Array = NDArray[np.float32]


@dataclass
class Scores:
    """Per-example scores, `quantity -> [n_examples, n_layers, n_heads]` float32; NaN where an example has no such part.

    Sign convention: positive = the head raises the quantity. Names are `<method>.<quantity>`.

    Attributes:
        by_example: the scores.
        subjects: `[n_examples]` the subject of each example; intervals and tests count subjects, since examples of one
            subject are not independent.
        whole: quantities that only the task as a whole has, `[n_layers, n_heads]`; they have no interval.
    """

    by_example: dict[str, Array]
    subjects: Sequence[str]
    whole: dict[str, Array] = field(default_factory=dict)

    def __contains__(self, name: str) -> bool:
        return name in self.by_example or name in self.whole

    def subset(self, indices: Sequence[int]) -> Scores:
        """The scores of some examples; quantities of the task as a whole are left out, for they saw all examples."""
        rows = list(indices)
        return Scores({n: v[rows] for n, v in self.by_example.items()}, [self.subjects[i] for i in rows])

    def counts(self) -> dict[str, int]:
        """Method -> how many examples it has scores of; methods that score the task as a whole saw all of them."""
        counts: dict[str, int] = {}
        for name, values in self.by_example.items():
            method = name.split(".")[0]
            counts[method] = max(counts.get(method, 0), int((~np.isnan(values[:, 0, 0])).sum()))
        return counts

    def mean(self, name: str) -> Array:
        """`[n_layers, n_heads]` mean over the examples that have the quantity; NaN where none has."""
        if name in self.whole:
            return self.whole[name]
        values = self.by_example[name]
        with np.errstate(invalid="ignore"):
            mean = np.nansum(values, axis=0, dtype=np.float64) / (~np.isnan(values)).sum(0)
        return mean.astype(np.float32)

    def means(self) -> dict[str, Array]:
        return {name: self.mean(name) for name in (*self.by_example, *self.whole)}

    def bootstrap(self, name: str, n: int = 1000, seed: int = 0) -> Array:
        """`[n, n_layers, n_heads]` means over resampled subjects (cluster bootstrap).

        NaN in a resampling that holds no example with the quantity.

        Raises:
            InputError: a quantity of the task as a whole, which cannot be resampled.
        """
        self._require_examples(name)
        values = self.by_example[name].astype(np.float64)
        present = ~np.isnan(values[:, :1, :1])
        weights = subject_weights(self.subjects, n, seed)  # [n, n_examples]
        total = np.einsum("be,elh->blh", weights, np.nan_to_num(values))
        count = np.einsum("be,elh->blh", weights, present.astype(np.float64))
        return np.where(count > 0, total / np.maximum(count, 1), np.nan).astype(np.float32)

    def interval(self, name: str, level: float = 0.95) -> tuple[Array, Array]:
        """Student's interval of the mean over subjects (see `stats.t_interval`): two `[n_layers, n_heads]`.

        Raises:
            InputError: a quantity of the task as a whole, which has no interval.
        """
        self._require_examples(name)
        low, high = t_interval(self.by_example[name], self.subjects, level)
        return low.astype(np.float32), high.astype(np.float32)

    def p_values(self, name: str, sign: float) -> NDArray[np.float64]:
        """`[n_layers, n_heads]` one-sided p of each head's mean having this sign (see `stats.one_sided_p`).

        Raises:
            InputError: a quantity of the task as a whole, which cannot be tested.
        """
        self._require_examples(name)
        return one_sided_p(self.by_example[name], self.subjects, sign)

    def _require_examples(self, name: str) -> None:
        if name in self.whole:
            raise InputError(f"score {name!r} has one value for the whole task, so no interval; fit it on resamplings")

    def save(self, path: Path) -> None:
        """Write the means as `scores.safetensors`."""
        with atomic_path(path) as temporary:
            save_file({name: np.ascontiguousarray(value) for name, value in self.means().items()}, temporary)


def load_means(path: Path, shape: tuple[int, int] | None = None) -> dict[str, Array]:
    """Read `scores.safetensors`: name -> `[n_layers, n_heads]`.

    Raises:
        InputError: not there, not readable, or maps of another shape than `shape`.
    """
    if not path.is_file():
        raise InputError(f"scores file {str(path)!r} does not exist; headtune identify writes it beside heads.json")
    try:
        means = load_file(path)
    except Exception as error:  # safetensors raises its own error type for every kind of damage
        raise InputError(f"scores file {str(path)!r} cannot be read ({error}); run headtune identify again") from None
    for name, mean in means.items():
        if shape is not None and mean.shape != shape:
            raise InputError(
                f"scores file {str(path)!r} has {name} of shape {list(mean.shape)}, and the head set beside it is of a "
                f"model with {shape[0]} layers of {shape[1]} heads; run headtune identify again"
            )
    return means


def stack(
    rows: Sequence[Mapping[str, Array]], subjects: Sequence[str], whole: Mapping[str, Array] | None = None
) -> Scores:
    """Collect one mapping per example; a quantity missing from an example becomes NaN there."""
    names = sorted({name for row in rows for name in row})
    if not names:
        return Scores({}, list(subjects), dict(whole or {}))
    shape = next(value for row in rows for value in row.values()).shape
    missing = np.full(shape, np.nan, dtype=np.float32)
    by_example = {name: np.stack([row.get(name, missing) for row in rows]) for name in names}
    return Scores(by_example, list(subjects), dict(whole or {}))
