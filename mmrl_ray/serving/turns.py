"""Places that callers share: whoever holds the fewest is next, nobody holds all of them, and some rest in between."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Turns:
    """Used from one event loop at a time."""

    def __init__(self, places: int, *, most: int | None = None) -> None:
        """`places` may be held at a time, `most` of them by one caller: by default all but one, of several."""
        self._free = places
        self._most = max(1, places - 1) if most is None else most
        self._held: Counter[str | None] = Counter()
        self._waiting: list[tuple[str | None, asyncio.Future[None]]] = []
        self._last: dict[str | None, int] = {}
        """By caller that waits or holds a place, when it was handed one last."""
        self._handed = 0
        self._rested: dict[str | None, float] = {}
        """By caller that rests, when it may go on: `loop.time`, the same clock in every loop."""
        self._timer: asyncio.TimerHandle | None = None
        """For the first one that waits and rests."""

    @asynccontextmanager
    async def turn(self, caller: str | None, *, rest: float = 0.0) -> AsyncIterator[None]:
        """Holds a place inside; the caller's next one comes `rest` times as long after it as it was held."""
        await self._take(caller)
        loop = asyncio.get_running_loop()
        began = loop.time()
        try:
            yield
        finally:
            if rest > 0:
                now = loop.time()
                self._rested[caller] = max(self._rested.get(caller, 0.0), now + rest * (now - began))
            self._give_back(caller)

    async def _take(self, caller: str | None) -> None:
        place = asyncio.get_running_loop().create_future()
        self._waiting.append((caller, place))
        self._hand_out()
        try:
            await place
        except asyncio.CancelledError:
            if place.cancelled():
                self._waiting.remove((caller, place))
            else:  # it was handed out at the same moment
                self._give_back(caller)
            raise

    def _give_back(self, caller: str | None) -> None:
        self._free += 1
        self._held[caller] -= 1
        self._hand_out()
        if not self._held[caller]:  # callers come and go
            del self._held[caller]
            if all(waiting != caller for waiting, _ in self._waiting):
                self._last.pop(caller, None)

    def _hand_out(self) -> None:
        """To the caller with the fewest places, of several to who had the last one longest ago, in its own order."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        self._rested = {caller: end for caller, end in self._rested.items() if end > now}
        while self._free:
            able = [
                (c, place)
                for c, place in self._waiting
                if self._held[c] < self._most and c not in self._rested and not place.done()
            ]
            if not able:
                break
            caller, place = min(able, key=lambda each: (self._held[each[0]], self._last.get(each[0], 0)))
            self._handed += 1
            self._last[caller] = self._handed
            self._waiting.remove((caller, place))
            self._held[caller] += 1
            self._free -= 1
            place.set_result(None)
        if self._timer is not None:
            self._timer.cancel()
        ends = [self._rested[caller] for caller, _ in self._waiting if caller in self._rested]
        # A loop's timers may come up to its clock's resolution early.
        self._timer = loop.call_at(min(ends) + 0.001, self._hand_out) if ends else None
