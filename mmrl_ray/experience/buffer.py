"""The controller's staleness-bounded buffer: scored groups by the step they were composed for.

A step is *open* from its dispatch until it is taken. Each of its places is resolved exactly once: by a scored group
(possibly masked) or by a failure. A second result for a place is a duplicate, refused and counted.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from mmrl_ray.experience.carriers import GroupKey, ScoredGroup


@dataclass(slots=True)
class _OpenStep:
    size: int
    scored: dict[int, ScoredGroup] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        return len(self.scored) + len(self.failed) == self.size


class GroupBuffer:
    """Holds at most `capacity` groups of open steps; hands a step over once every place of it is resolved.

    Args:
        capacity: groups of open steps, dispatched or arrived; bounds the memory behind the payload references.
        max_staleness: policy versions a group may lag behind when its step is taken.
    """

    def __init__(self, capacity: int, max_staleness: int) -> None:
        if capacity < 1 or max_staleness < 0:
            raise ValueError(f"capacity={capacity} must be 1 or more, max_staleness={max_staleness} 0 or more")
        self.capacity = capacity
        self.max_staleness = max_staleness
        self.counts: Counter[str] = Counter()
        """`duplicate` and `stale` groups so far."""
        self._steps: dict[int, _OpenStep] = {}

    @property
    def held(self) -> int:
        """Groups of open steps."""
        return sum(step.size for step in self._steps.values())

    @property
    def arrived(self) -> int:
        """Scored groups that wait to be taken."""
        return sum(len(step.scored) for step in self._steps.values())

    def has_room(self, groups: int) -> bool:
        """Whether a step of so many groups may be opened."""
        return self.held + groups <= self.capacity

    def open_step(self, step: int, size: int) -> None:
        """Expects `size` groups, at places 0 … size − 1, for `step`."""
        if step in self._steps:
            raise ValueError(f"step {step} is open already")
        if not self.has_room(size):
            raise ValueError(f"no room for {size} groups beside {self.held} of {self.capacity}")
        self._steps[step] = _OpenStep(size)

    def add(self, group: ScoredGroup) -> bool:
        """Takes a scored group in; False for one whose step is not open or whose place is resolved already."""
        return self._resolve(group.key) and self._put(group)

    def fail(self, key: GroupKey, reason: str) -> bool:
        """Resolves a place without a group (its sample was quarantined); False as for `add`."""
        if not self._resolve(key):
            return False
        self._steps[key.step].failed[key.index] = reason
        return True

    def is_complete(self, step: int) -> bool:
        """Whether every place of `step` is resolved."""
        return step in self._steps and self._steps[step].complete

    def take(self, step: int, version: int) -> tuple[list[ScoredGroup], list[GroupKey]]:
        """The groups of a complete step by place, for a learner at policy `version`.

        Returns (groups, stale). When any group lags by more than `max_staleness`, nothing is taken: the stale ones are
        dropped and counted, their places open again, and the caller samples them anew.
        """
        if not self.is_complete(step):
            raise ValueError(f"step {step} is not complete")
        scored = self._steps[step].scored
        stale = [g.key for g in scored.values() if version - g.policy_version > self.max_staleness]
        if stale:
            for key in stale:
                del scored[key.index]
            self.counts["stale"] += len(stale)
            return [], stale
        del self._steps[step]
        return [scored[index] for index in sorted(scored)], []

    def clear(self) -> None:
        """Forgets every open step: their groups are to be sampled again."""
        self._steps.clear()

    def _resolve(self, key: GroupKey) -> bool:
        step = self._steps.get(key.step)
        if step is None or key.index in step.scored or key.index in step.failed:
            self.counts["duplicate"] += 1
            return False
        if not 0 <= key.index < step.size:
            raise ValueError(f"place {key.index} is outside step {key.step} of {step.size} groups")
        return True

    def _put(self, group: ScoredGroup) -> bool:
        self._steps[group.key.step].scored[group.key.index] = group
        return True
