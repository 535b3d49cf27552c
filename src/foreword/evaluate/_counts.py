"""What a metric counted, example by example, so that its value can be worked out again on any resample of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Given:
    """What a metric is given: checked, one entry an example in each list that is there.

    Attributes:
        references: for each prediction, the texts that would have been right.
        inputs: what each prediction was made from.
        labels: what each prediction was meant to be (``positive``), for judges of texts.
        tools: models and classifiers, by name.
    """

    predictions: Sequence[str]
    references: Sequence[Sequence[str]] = ()
    inputs: Sequence[str] = ()
    labels: Sequence[str] = ()
    tools: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Counts:
    """A metric's counts.

    Attributes:
        rows: ``(N, K)``, K numbers an example. Their sum over the examples is all that ``value`` needs.
        value: from the sums ``(K,)`` to the metric.
        per_example: the metric of each example alone, where that means something.
        note: what one has to know to read the value: settings, what is left out.
        resamples: whether resampling examples says how far to trust the value. It does not where the value is about
            the whole set: drawn twice, a text makes a set look more repetitive than any new set would.
    """

    rows: Numbers
    value: Callable[[Numbers], float]
    per_example: tuple[float, ...] | None = None
    note: str = ""
    resamples: bool = True

    @property
    def total(self) -> float:
        """The metric on all examples."""
        return float(self.value(self.rows.sum(axis=0)))


def mean(values: Sequence[float], *, scale: float = 100.0, note: str = "") -> Counts:
    """A metric that is the mean of what each example got; ``scale`` 100 makes percent of shares."""
    scaled = np.asarray(values, dtype=float) * scale
    rows = np.stack([scaled, np.ones_like(scaled)], axis=1)
    return Counts(rows, _ratio, tuple(scaled.tolist()), note)


def share(part: Sequence[float], whole: Sequence[float], *, note: str = "") -> Counts:
    """A metric that is the sum of ``part`` by the sum of ``whole`` over the examples, in percent."""
    rows = np.stack([100.0 * np.asarray(part, dtype=float), np.asarray(whole, dtype=float)], axis=1)
    return Counts(rows, _ratio, note=note)


def fixed(value: float, examples: int, *, note: str = "", per_example: Sequence[float] | None = None) -> Counts:
    """A metric about the set as a whole."""
    each = None if per_example is None else tuple(per_example)
    return Counts(np.zeros((examples, 1)), lambda _: value, each, note, resamples=False)


def _ratio(sums: Numbers) -> float:
    return float(sums[0] / sums[1]) if sums[1] else 0.0
