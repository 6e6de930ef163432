"""How much each key may do: a token bucket and a cap on what is under way.

Both count in this process: a gateway of k replicas lets through up to k times as much.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from mmrl_ray.config.serving import RateSection


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a request does not get in now."""

    message: str
    retry_after_s: float


@dataclass(slots=True)
class _Account:
    tokens: float
    at: float
    """When `tokens` was right."""
    running: int = 0


class KeyLimits:
    """Used from one event loop; keys are named by their ids."""

    def __init__(self, rate: RateSection, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate = rate
        self._per_second = rate.requests_per_minute / 60
        self._clock = clock
        self._accounts: dict[str, _Account] = {}

    def enter(self, key_id: str) -> Refusal | None:
        """Lets one request in, which must `leave` later; or says why not, and counts nothing."""
        now = self._clock()
        account = self._accounts.setdefault(key_id, _Account(float(self._rate.burst), now))
        account.tokens = min(self._rate.burst, account.tokens + (now - account.at) * self._per_second)
        account.at = now
        if account.running >= self._rate.concurrency:
            return Refusal(f"this key has {account.running} requests under way, the most it may have", 1.0)
        if account.tokens < 1:
            wait_s = (1 - account.tokens) / self._per_second
            return Refusal(f"this key has made its {self._rate.requests_per_minute:g} requests a minute", wait_s)
        account.tokens -= 1
        account.running += 1
        return None

    def leave(self, key_id: str) -> None:
        """A request that was let in is over."""
        self._accounts[key_id].running -= 1
