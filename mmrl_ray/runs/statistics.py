"""Bootstrap intervals of corpus figures that are no means: BLEU, precision and recall over all samples.

`N` samples, `K` counts a sample, `R` resamples. Such a figure is a function of column sums of counts [N, K]: samples
are drawn with replacement, their counts summed, the figure taken of each sum. Two evaluations of the same samples are
resampled with the same draws, so that their difference is paired.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from mmrl_ray.metrics.bootstrap import Interval

Counts = npt.NDArray[np.float64]
Figure = Callable[[Counts], float]
"""Column sums [K] to the figure."""

RESAMPLES = 2000
"""Enough for the two ends of a 95 % interval to be stable in the third digit."""
_CONFIDENCE = 0.95
_CHUNK = 2_000_000


def resampled_sums(counts: Counts, *, seed: int = 0, resamples: int = RESAMPLES) -> Counts:
    """Column sums [R, K] of samples drawn with replacement from counts [N, K].

    Raises:
        ValueError: `counts` is not [N, K] with N of 1 or more, or not finite.
    """
    if counts.ndim != 2 or counts.shape[0] == 0 or not np.isfinite(counts).all():
        raise ValueError(f"resampling needs finite counts of shape [N, K] with N >= 1, got shape {counts.shape}")
    size = counts.shape[0]
    rng = np.random.default_rng(seed)
    rows = max(1, _CHUNK // size)
    sums = []
    for start in range(0, resamples, rows):
        count = min(rows, resamples - start)
        drawn = rng.integers(0, size, size=(count, size)) + size * np.arange(count)[:, None]
        times = np.bincount(drawn.ravel(), minlength=count * size).reshape(count, size)
        sums.append(times @ counts)
    return np.concatenate(sums)


def figure_interval(counts: Counts, figure: Figure, *, seed: int = 0, resamples: int = RESAMPLES) -> Interval:
    """`figure` of the whole corpus with its 95 % percentile interval."""
    values = [figure(sums) for sums in resampled_sums(counts, seed=seed, resamples=resamples)]
    return _interval(figure(counts.sum(axis=0)), values, counts.shape[0])


def figure_difference(
    before: Counts, after: Counts, figure: Figure, *, seed: int = 0, resamples: int = RESAMPLES
) -> Interval:
    """`figure(after) - figure(before)` with its 95 % interval, paired by sample.

    Raises:
        ValueError: the shapes differ.
    """
    if before.shape != after.shape:
        raise ValueError(f"a paired difference needs equal shapes, got {before.shape} and {after.shape}")
    first = resampled_sums(before, seed=seed, resamples=resamples)
    second = resampled_sums(after, seed=seed, resamples=resamples)
    values = [figure(b) - figure(a) for a, b in zip(first, second, strict=True)]
    return _interval(figure(after.sum(axis=0)) - figure(before.sum(axis=0)), values, before.shape[0])


def _interval(value: float, values: Sequence[float], n: int) -> Interval:
    if n == 1:
        return Interval(float(value), math.nan, math.nan, n)
    tail = (1.0 - _CONFIDENCE) / 2.0
    low, high = np.quantile(values, [tail, 1.0 - tail])
    return Interval(float(value), float(low), float(high), n)
