"""How far a metric on N examples is to be trusted: percentile intervals, and the paired test of two runs.

Examples are drawn again with replacement (Efron 1979; for BLEU, Koehn 2004), and the metric is worked out from the
drawn examples' counts: the metric of a resample, not the mean of single scores.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from foreword.errors import ConfigError, DataError
from foreword.evaluate._counts import Counts, Numbers

_CHUNK = 64


@dataclass(frozen=True)
class Difference:
    """Of a metric between two runs on the same examples.

    Attributes:
        difference: this run's value less the other's.
        low, high: 95 % interval of it.
        p: of a difference at least this large if there were none.
    """

    difference: float
    low: float | None
    high: float | None
    p: float | None


def interval(counts: Counts, resamples: int, seed: int) -> tuple[float, float] | None:
    """The 95 % percentile interval of a metric; None where resampling examples does not apply.

    Raises ConfigError if ``resamples`` is negative; 0 is no interval.
    """
    if resamples < 0:
        raise ConfigError(f"intervals={resamples}; expected 0 (none) or more resamples, 1000 is usual")
    if not resamples or not counts.resamples:
        return None
    return _bounds(np.array([counts.value(sums) for (sums,) in _drawn([counts.rows], resamples, seed)]))


def paired(one: Counts, other: Counts, resamples: int, seed: int) -> Difference:
    """The paired bootstrap of two runs: both are scored on the same draws.

    The p-value is that of sacrebleu's ``--paired-bs`` (Koehn 2004; Riezler & Maxwell 2005): how often the difference
    of a draw, shifted to mean zero, exceeds the one observed. It is two-sided, and at least 1/(resamples + 1). Where
    there is no difference at all it is 1 (sacrebleu gives the least there).

    Raises:
        DataError: the runs have different numbers of examples.
        ConfigError: ``resamples`` is below 1.
    """
    if len(one.rows) != len(other.rows):
        raise DataError(f"{len(one.rows)} and {len(other.rows)} examples cannot be compared pair by pair")
    if resamples < 1:
        raise ConfigError(f"resamples={resamples}; expected 1 or more, 1000 is usual")
    observed = one.total - other.total
    if not (one.resamples and other.resamples):
        return Difference(observed, None, None, None)
    draws = np.array([one.value(a) - other.value(b) for a, b in _drawn([one.rows, other.rows], resamples, seed)])
    sizes = np.abs(draws)
    beyond = int((sizes - sizes.mean() > abs(observed)).sum())
    low, high = _bounds(draws)
    return Difference(observed, low, high, (beyond + 1) / (resamples + 1) if observed else 1.0)


def _drawn(tables: list[Numbers], resamples: int, seed: int) -> Iterator[tuple[Numbers, ...]]:
    """For each draw of N of N examples, the sums of each table's rows: how often each was drawn, times its counts."""
    size = len(tables[0])
    rng = np.random.default_rng(seed)
    for start in range(0, resamples, _CHUNK):
        times = rng.multinomial(size, np.full(size, 1 / size), size=min(_CHUNK, resamples - start)).astype(float)
        yield from zip(*(times @ table for table in tables), strict=True)


def _bounds(values: Numbers) -> tuple[float, float]:
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)
