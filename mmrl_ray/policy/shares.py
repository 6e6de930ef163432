"""Which of several callers of a decode loop is next: fair queueing by what each has cost (Demers et al., 1989).

A caller is a name, or None where nobody shares.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping

_FOR_OTHERS = 4
"""One caller leaves one in so many of the rows free, so that nobody else waits for a whole group of its to end."""
_PASS_COST = 8
"""Of a pass beside that of its rows, each of which counts 1, as does a token of a prompt. The measure is rough, and the
same on every machine, so that the order of steps is, too."""
LIGHT_ROWS = 8
"""With more rows in a pass a caller has it to itself: others would wait for its rows at each token."""
_SAVED = 256
"""What a caller may have had less, or more, than the others when it comes back: about a short answer. So much of those
who ask now and then goes before those who ask all the time, and nobody waits longer for what was long ago."""


class Shares:
    """What callers with rows have had."""

    def __init__(self, max_rows: int) -> None:
        self._most = max_rows - max_rows // _FOR_OTHERS
        self._cost: dict[str | None, float] = {}
        """Of those with rows."""
        self._left: dict[str | None, float] = {}
        """Of those that had rows before."""
        self._last: dict[str | None, int] = {}
        """By caller that waits, how many groups had started when its last one did."""
        self._starts = 0

    @property
    def named(self) -> bool:
        """Whether callers with rows have names."""
        return any(caller is not None for caller in self._cost)

    @property
    def several(self) -> bool:
        """Whether there may be more than one caller with rows."""
        return len(self._cost) > 1

    def keep(self, running: Mapping[str | None, int]) -> None:
        """Tells who has rows: `running` of each caller."""
        for caller in [caller for caller in self._cost if not running.get(caller)]:
            self._left[caller] = self._cost.pop(caller)

    def next_caller(self, wanted: Mapping[str | None, int], running: Counter[str | None]) -> Collection[str | None]:
        """Whose group starts next, or nobody's: whoever has the fewest rows, of several to whom the last one started
        longest ago. Passed over are those who have their part of the rows or have had more than another one with rows.

        Args:
            wanted: rows of the first group of each caller that waits, in the order in which they came.
            running: rows of each caller.
        """
        least = min((cost for caller, cost in self._cost.items() if running[caller]), default=math.inf)
        may_start = [
            caller
            for caller, rows in wanted.items()
            if caller is None
            or (self._cost_of(caller) <= least and (not running[caller] or running[caller] + rows <= self._most))
        ]
        self._last = {caller: self._last.get(caller, 0) for caller in wanted}
        return sorted(may_start, key=lambda caller: (running[caller], self._last[caller]))[:1]

    def started(self, caller: str | None, tokens: int) -> None:
        """A group of the caller's, whose prompt has so many tokens."""
        self._starts += 1
        self._last[caller] = self._starts
        self._charge({caller}, tokens)

    def passed(self, callers: Collection[str | None], rows: int) -> None:
        """A pass of so many rows, for these callers together."""
        self._charge(callers, _PASS_COST + rows)

    def least(self, callers: Collection[str | None]) -> str | None:
        """Who has had the least of them."""
        return min(callers, key=lambda caller: (self._cost_of(caller), caller or ""))

    def _charge(self, callers: Collection[str | None], cost: float) -> None:
        for caller in callers:
            self._cost[caller] = self._cost_of(caller) + cost / len(callers)
            self._left.pop(caller, None)

    def _cost_of(self, caller: str | None) -> float:
        """Who is new begins where the others are, who comes back near them."""
        if caller in self._cost:
            return self._cost[caller]
        others = min(self._cost.values(), default=0.0)
        return min(max(self._left.get(caller, others), others - _SAVED), others + _SAVED)
