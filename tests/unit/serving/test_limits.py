"""Rates and caps of keys, on a clock that is turned by hand."""

from __future__ import annotations

import pytest

from mmrl_ray.config.serving import RateSection
from mmrl_ray.serving.auth import KeyLimits


class Clock:
    now = 50.0

    def __call__(self) -> float:
        return self.now


def test_a_burst_then_the_rate() -> None:
    clock = Clock()
    limits = KeyLimits(RateSection(requests_per_minute=30.0, burst=3, concurrency=100), clock)
    assert [limits.enter("a") for _ in range(3)] == [None] * 3
    refusal = limits.enter("a")
    assert refusal is not None
    assert refusal.retry_after_s == pytest.approx(2.0)
    assert "30 requests a minute" in refusal.message
    clock.now += 1.5
    later = limits.enter("a")
    assert later is not None
    assert later.retry_after_s == pytest.approx(0.5), "a refused try costs nothing"
    clock.now += 0.5
    assert limits.enter("a") is None
    assert limits.enter("a") is not None
    clock.now += 1000
    assert [limits.enter("a") is None for _ in range(4)] == [True, True, True, False], "no more than the burst is saved"


def test_keys_do_not_share() -> None:
    limits = KeyLimits(RateSection(requests_per_minute=1.0, burst=1), Clock())
    assert limits.enter("a") is None
    assert limits.enter("a") is not None
    assert limits.enter("b") is None


def test_the_cap_on_what_is_under_way() -> None:
    clock = Clock()
    limits = KeyLimits(RateSection(requests_per_minute=60.0, burst=3, concurrency=2), clock)
    assert limits.enter("a") is None
    assert limits.enter("a") is None
    refusal = limits.enter("a")
    assert refusal is not None
    assert "2 requests under way" in refusal.message
    assert refusal.retry_after_s > 0
    limits.leave("a")
    assert limits.enter("a") is None, "the refused one took no token"
    limits.leave("a")
    over = limits.enter("a")
    assert over is not None
    assert "a minute" in over.message
