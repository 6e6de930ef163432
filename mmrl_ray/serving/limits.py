"""How much each key may do: a token bucket and a cap on what is under way.

Both count in this process: a gateway of k replicas lets through up to k times as much.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from mmrl_ray.config.serving import RateSection

_WRONG_BURST = 100
_WRONG_PER_S = 5.0
"""Wrong keys from one address: at once after a pause, and in the long run."""
_ADDRESSES = 4096


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


class WrongKeys:
    """Slows down whoever sends keys that do not work: each costs a look into the database.

    Counted by address. Behind a proxy that is one for all, which is why keys that have worked are not asked of here.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._wrong: OrderedDict[str, tuple[float, float]] = OrderedDict()
        """By address: how many beyond what it may send, and when that was right."""

    def count(self, address: str) -> None:
        """A key from there was wrong."""
        self._wrong[address] = (self._now(address) + 1, self._clock())
        self._wrong.move_to_end(address)
        if len(self._wrong) > _ADDRESSES:
            self._wrong.popitem(last=False)

    def refusal(self, address: str) -> Refusal | None:
        """Why the next key from there is not looked up now."""
        above = self._now(address) + 1 - _WRONG_BURST
        if above <= 0:
            return None
        return Refusal("too many keys that do not work came from this address", above / _WRONG_PER_S)

    def _now(self, address: str) -> float:
        count, at = self._wrong.get(address, (0.0, 0.0))
        return max(0.0, count - (self._clock() - at) * _WRONG_PER_S)


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
