"""Bootstrap intervals: seeded, right coverage, paired where asked."""

import math

import numpy as np
import pytest

from mmrl_ray.metrics import statistics
from mmrl_ray.metrics.statistics import Interval, bootstrap_difference, bootstrap_mean


def test_matches_normal_theory_on_a_large_sample() -> None:
    scores = np.random.default_rng(0).normal(3.0, 2.0, size=2000)
    interval = bootstrap_mean(scores, seed=1, resamples=4000)
    half = 1.959964 * scores.std(ddof=0) / math.sqrt(scores.size)
    assert interval.mean == pytest.approx(scores.mean())
    assert interval.low == pytest.approx(scores.mean() - half, abs=0.06 * half)
    assert interval.high == pytest.approx(scores.mean() + half, abs=0.06 * half)
    assert interval.n == 2000


def test_same_draws_one_by_one() -> None:
    scores = [0.1, 0.9, 0.4, 0.4, 0.7]
    rng = np.random.default_rng(7)
    means = sorted(sum(scores[i] for i in row) / 5 for row in rng.integers(0, 5, size=(400, 5)))
    interval = bootstrap_mean(scores, seed=7, resamples=400, confidence=0.9)
    assert interval.low == pytest.approx(np.quantile(means, 0.05))
    assert interval.high == pytest.approx(np.quantile(means, 0.95))


def test_seeded_and_independent_of_the_chunk_size(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = list(np.random.default_rng(3).uniform(size=50))
    whole = bootstrap_mean(scores, seed=5, resamples=500)
    assert bootstrap_mean(scores, seed=5, resamples=500) == whole
    assert bootstrap_mean(scores, seed=6, resamples=500) != whole
    monkeypatch.setattr(statistics, "_CHUNK", 333)
    assert bootstrap_mean(scores, seed=5, resamples=500) == whole


def test_coverage() -> None:
    rng = np.random.default_rng(11)
    hits = 0
    for trial in range(200):
        interval = bootstrap_mean(rng.exponential(1.0, size=100), seed=trial, resamples=400)
        hits += interval.low <= 1.0 <= interval.high
    assert 176 <= hits <= 199  # 95 % nominal, a little less for a skewed sample


def test_paired_difference_is_tighter_than_two_intervals() -> None:
    rng = np.random.default_rng(2)
    before = rng.normal(0, 5, size=300)
    after = before + 0.5 + rng.normal(0, 0.1, size=300)
    assert bootstrap_mean(before).overlaps(bootstrap_mean(after))
    difference = bootstrap_difference(list(before), list(after))
    assert 0.45 < difference.low < difference.mean < difference.high < 0.55


def test_overlap() -> None:
    assert Interval(1, 0, 2, 9).overlaps(Interval(2, 2, 3, 9))
    assert not Interval(1, 0, 2, 9).overlaps(Interval(3, 2.1, 3, 9))


def test_one_sample_has_a_mean_and_no_interval() -> None:
    one, many = bootstrap_mean([0.25]), bootstrap_mean([0.5, 0.75])
    assert (one.mean, one.n, one.known, one.words(".2f")) == (0.25, 1, False, "n/a")
    assert not bootstrap_difference([0.25], [0.5]).known
    assert many.words(".2f") == "[0.50, 0.75]"
    assert one.overlaps(many), "nothing is known that speaks against it"
    assert many.overlaps(one)


def test_refuses() -> None:
    for bad in ([], [[1.0]], [1.0, math.nan], [math.inf]):
        with pytest.raises(ValueError, match="bootstrap"):
            bootstrap_mean(bad)
    with pytest.raises(ValueError, match="equal lengths"):
        bootstrap_difference([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="confidence"):
        bootstrap_mean([1.0], confidence=1.0)
