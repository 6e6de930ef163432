"""Who is next in a decode loop: which groups start, and whose rows get a token.

Groups wait until there are rows for them, strictly in their order; where they name callers, those of the caller with
the fewest rows start first, no caller has all rows, and all have as much of the time: fair queueing by what each has
cost (Demers et al., 1989). A caller is a name, or None where nobody shares.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from mmrl_ray.experience.carriers import VisionFeatures
from mmrl_ray.policy.generation.base import DecodeRequest
from mmrl_ray.policy.generation.decode_batch import DecodeBatch, Row

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


@dataclass(slots=True, eq=False)
class Group:
    """One admitted request."""

    handle: int
    request: DecodeRequest
    rows: list[Row]
    streams: bool
    caller: str | None
    vision: VisionFeatures | None = None

    @property
    def adapter(self) -> str | None:
        """PEFT's name of the one that all its rows go through."""
        return self.rows[0].adapter

    @property
    def unfinished(self) -> int:
        """Rows that get more tokens."""
        return sum(row.finish_reason is None for row in self.rows)


class DecodeQueue:
    """The groups of a decode loop, those that wait and those that run."""

    def __init__(self, max_rows: int) -> None:
        """`max_rows` run at the same time."""
        self.groups: dict[int, Group] = {}
        """By handle; those that run and those that wait."""
        self.waiting: deque[Group] = deque()
        self._max_rows = max_rows
        self._shares = Shares(max_rows)

    def add(self, group: Group) -> None:
        """Puts a group at the end."""
        self.groups[group.handle] = group
        self.waiting.append(group)

    def starting(self) -> Iterator[Group]:
        """The groups that start now, as long as there are rows for them.

        Each leaves the queue when the next one is asked for: one that is not started in the end goes on waiting.
        """
        if not self.waiting:
            return
        running = self._rows_by_caller()
        self._shares.keep(running)
        while (group := self._next(running)) is not None:
            yield group
            self.waiting.remove(group)
            running[group.caller] += len(group.rows)
            self._shares.started(group.caller, group.request.prompt.input_ids.numel())

    def in_turn(self, batches: Sequence[DecodeBatch]) -> Sequence[DecodeBatch]:
        """Those of `batches` that get a token at this step; each is counted for its callers."""
        if not self._shares.named:
            return batches
        callers = [self._callers(decode_batch) for decode_batch in batches]
        everybody = set().union(*callers)
        if not everybody:
            return batches
        least = self._shares.least(everybody)
        chosen = [(decode_batch, found) for decode_batch, found in zip(batches, callers, strict=True) if least in found]
        for decode_batch, found in chosen:
            self._shares.passed(found, len(decode_batch.slots))
        return [decode_batch for decode_batch, _ in chosen]

    def may_share(self, one: DecodeBatch, other: DecodeBatch) -> bool:
        """Whether the rows of two batches may be decoded by the same passes."""
        if not self._shares.several:
            return True
        rows = self._callers(one, other)
        return len(rows) < 2 or max(rows.values()) <= LIGHT_ROWS

    def _callers(self, *batches: DecodeBatch) -> Counter[str | None]:
        """Rows of each caller in a pass."""
        slots = (row for decode_batch in batches for row in decode_batch.slots)
        return Counter(self.groups[r.handle].caller for r in slots if r is not None and r.finish_reason is None)

    def _rows_by_caller(self) -> Counter[str | None]:
        """Rows that get a token at the next step."""
        waiting = {group.handle for group in self.waiting}
        running: Counter[str | None] = Counter()
        for handle, group in self.groups.items():
            if handle not in waiting:
                running[group.caller] += group.unfinished
        return running

    def _next(self, running: Counter[str | None]) -> Group | None:
        """What starts next, if there are rows for it.

        Where it has to wait for rows so do all others, or small groups would keep out a large one for ever.
        """
        first: dict[str | None, Group] = {}
        for group in self.waiting:
            first.setdefault(group.caller, group)
        free = self._max_rows - running.total()
        for caller in self._shares.next_caller({caller: len(g.rows) for caller, g in first.items()}, running):
            return first[caller] if len(first[caller].rows) <= free else None
        return None


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
