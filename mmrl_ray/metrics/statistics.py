"""Whether figures differ: seeded bootstrap intervals of means and of corpus figures, and what counts as equal.

**Means** (`bootstrap_mean`): the interval is a percentile bootstrap (Efron 1979). For corpus metrics the unit that is
resampled is the sample: pass one score a sample.

**Corpus figures that are no means** (`figure_interval`): BLEU, precision and recall over all samples. `N` samples, `K`
counts a sample, `R` resamples. Such a figure is a function of column sums of counts [N, K]: samples are drawn with
replacement, their counts summed, the figure taken of each sum. Two evaluations of the same samples are resampled with
the same draws, so that their difference is paired.

**Equal numbers** (`resolution`): plain arithmetic, for floats and for arrays of NumPy and PyTorch alike; no torch.
Rewards come as float32 of a network or as float64 sums in some order, and two that mean the same may differ in their
last bits. Divided by their standard deviation, such noise becomes an advantage of 1. So a difference counts only above
what float32 can tell apart at the magnitude of the numbers themselves: 100 and the next float32 are the same, 1e-9 and
2e-9 are not. Every test of "all equal" and every division by a standard deviation asks here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

_CHUNK = 4_000_000
"""Indices drawn at once: bounds the memory, never changes the draws."""
Counts = npt.NDArray[np.float64]
Figure = Callable[[Counts], float]
"""Column sums [K] to the figure."""

RESAMPLES = 2000
"""Enough for the two ends of a 95 % interval to be stable in the third digit."""
_CONFIDENCE = 0.95
_DRAWS_AT_ONCE = 2_000_000
RELATIVE = 4 * 2.0**-23
"""Four steps of float32 at 1."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean with its bootstrap interval."""

    mean: float
    low: float
    """NaN, as `high`, of a single sample: resampling it gives nothing but itself."""
    high: float
    n: int
    """Samples behind the mean."""

    @property
    def known(self) -> bool:
        """Whether there is an interval."""
        return not math.isnan(self.low)

    def overlaps(self, other: Interval) -> bool:
        """Whether the two intervals have a point in common, for all that is known."""
        return not (self.known and other.known) or (self.low <= other.high and other.low <= self.high)

    def words(self, style: str, between: str = ", ", brackets: str = "[]") -> str:
        """The interval for people, each end in this format: `[0.25, 0.75]`, or `n/a`."""
        if not self.known:
            return "n/a"
        return f"{brackets[:1]}{self.low:{style}}{between}{self.high:{style}}{brackets[1:]}"


def bootstrap_mean(
    scores: Sequence[float] | npt.NDArray[np.floating],
    *,
    seed: int = 0,
    resamples: int = 10_000,
    confidence: float = _CONFIDENCE,
) -> Interval:
    """Percentile interval of the mean of `scores` [N]; the same arguments give the same interval, N = 1 none.

    Raises:
        ValueError: no scores, not one-dimensional, a NaN or infinite score, or a confidence outside (0, 1).
    """
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 1 or values.size == 0:
        raise ValueError(f"bootstrap needs scores of shape [N] with N >= 1, got shape {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError(f"bootstrap got {int((~np.isfinite(values)).sum())} NaN or infinite scores of {values.size}")
    if not 0.0 < confidence < 1.0 or resamples < 1:
        raise ValueError(f"confidence={confidence} must lie in (0, 1) and resamples={resamples} be at least 1")
    rng = np.random.default_rng(seed)
    rows = max(1, _CHUNK // values.size)
    means = [
        values[rng.integers(0, values.size, size=(min(rows, resamples - start), values.size))].mean(axis=1)
        for start in range(0, resamples, rows)
    ]
    return _interval(values.mean(), np.concatenate(means), int(values.size), confidence)


def bootstrap_difference(
    before: Sequence[float], after: Sequence[float], *, seed: int = 0, resamples: int = 10_000
) -> Interval:
    """Interval of the mean of `after - before`, paired by sample: it excludes what both owe to the samples.

    Raises:
        ValueError: the two differ in length, or as `bootstrap_mean`.
    """
    if len(before) != len(after):
        raise ValueError(f"a paired difference needs equal lengths, got {len(before)} and {len(after)}")
    difference = np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)
    return bootstrap_mean(difference, seed=seed, resamples=resamples)


def resampled_sums(counts: Counts, *, seed: int = 0, resamples: int = RESAMPLES) -> Counts:
    """Column sums [R, K] of samples drawn with replacement from counts [N, K].

    Raises:
        ValueError: `counts` is not [N, K] with N of 1 or more, or not finite.
    """
    if counts.ndim != 2 or counts.shape[0] == 0 or not np.isfinite(counts).all():
        raise ValueError(f"resampling needs finite counts of shape [N, K] with N >= 1, got shape {counts.shape}")
    size = counts.shape[0]
    rng = np.random.default_rng(seed)
    rows = max(1, _DRAWS_AT_ONCE // size)
    sums = []
    for start in range(0, resamples, rows):
        count = min(rows, resamples - start)
        drawn = rng.integers(0, size, size=(count, size)) + size * np.arange(count)[:, None]
        times = np.bincount(drawn.ravel(), minlength=count * size).reshape(count, size)
        sums.append(times @ counts)
    return np.concatenate(sums)


def figure_interval(counts: Counts, figure: Figure, *, seed: int = 0) -> Interval:
    """`figure` of the whole corpus with its 95 % percentile interval."""
    values = [figure(sums) for sums in resampled_sums(counts, seed=seed)]
    return _interval(figure(counts.sum(axis=0)), values, counts.shape[0])


def figure_difference(before: Counts, after: Counts, figure: Figure, *, seed: int = 0) -> Interval:
    """`figure(after) - figure(before)` with its 95 % interval, paired by sample.

    Raises:
        ValueError: the shapes differ.
    """
    if before.shape != after.shape:
        raise ValueError(f"a paired difference needs equal shapes, got {before.shape} and {after.shape}")
    first, second = (resampled_sums(counts, seed=seed) for counts in (before, after))
    values = [figure(b) - figure(a) for a, b in zip(first, second, strict=True)]
    return _interval(figure(after.sum(axis=0)) - figure(before.sum(axis=0)), values, before.shape[0])


def _interval(value: float, values: Sequence[float] | Counts, n: int, confidence: float = _CONFIDENCE) -> Interval:
    if n == 1:
        return Interval(float(value), math.nan, math.nan, n)
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(values, [tail, 1.0 - tail])
    return Interval(float(value), float(low), float(high), n)


def resolution(magnitude: Any) -> Any:
    """Differences up to this are none, between numbers of at most `magnitude`, or made from some of at most that.

    A float gives a float, an array an array of its shape.
    """
    return RELATIVE * magnitude
