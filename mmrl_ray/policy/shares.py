"""Which of several callers of a decode loop is next: fair queueing by what each has cost (Demers et al., 1989).

A caller is a name, or None where nobody shares.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping

_FOR_OTHERS = 4
"""One caller leaves one in so many of the rows free, so that nobody else waits for a whole group of its to end."""
_PASS_COST = 8
"""Of a pass beside that of its rows, each of which counts 1, as does a token of a prompt. The measure is rough, and the
same on every machine, so that the order of steps is, too."""
LIGHT_ROWS = 8
"""With more rows in a pass a caller has it to itself: others would wait for its rows at each token."""


class Shares:
    """What callers with rows have had, since they or the others came."""

    def __init__(self, max_rows: int) -> None:
        self._most = max_rows - max_rows // _FOR_OTHERS
        self._cost: dict[str | None, float] = {}
        self._last: dict[str | None, int] = {}
        """By caller that waits, how many groups had started when its last one did."""
        self._starts = 0

    @property
    def several(self) -> bool:
        """Whether there may be more than one caller with rows."""
        return len(self._cost) > 1

    def keep(self, running: Mapping[str | None, int]) -> None:
        """Forgets callers without rows: nobody saves up."""
        self._cost = {caller: cost for caller, cost in self._cost.items() if running.get(caller)}

    def next_caller(self, wanted: Mapping[str | None, int], running: Counter[str | None]) -> Collection[str | None]:
        """Whose group starts next, or nobody's: whoever has the fewest rows, of several to whom the last one started
        longest ago. Passed over are those who have their part of the rows or have had more than another one with rows.

        Args:
            wanted: rows of the first group of each caller that waits, in the order in which they came.
            running: rows of each caller.
        """
        least = min((cost for caller, cost in self._cost.items() if running[caller]), default=0.0)
        may_start = [
            caller
            for caller, rows in wanted.items()
            if caller is None
            or not running[caller]
            or (running[caller] + rows <= self._most and self._cost[caller] <= least)
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
        return min(callers, key=lambda caller: (self._cost.get(caller, 0.0), caller or ""))

    def _charge(self, callers: Collection[str | None], cost: float) -> None:
        """Who is new begins where the others are."""
        for caller in callers:
            self._cost.setdefault(caller, min(self._cost.values(), default=0.0))
            self._cost[caller] += cost / len(callers)
