"""Open steps: what was asked for, what has come back, and what is needed to write it down."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from mmrl_ray.data.samples import Sample
from mmrl_ray.experience.buffer import GroupBuffer
from mmrl_ray.experience.carriers import GroupKey, ScoredGroup
from mmrl_ray.rollouts.types import Collected, DataFailure, GroupRequest


@dataclass(slots=True)
class _OpenStep:
    requests: dict[int, GroupRequest]
    groups: dict[int, ScoredGroup] = field(default_factory=dict)
    tables: list[bytes] = field(default_factory=list)
    timings: list[Mapping[str, float]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class TakenStep:
    """A complete step, out of the buffer."""

    groups: Sequence[ScoredGroup]
    """By place; failed places are missing."""
    tables: Sequence[bytes]
    timings: Sequence[Mapping[str, float]]
    samples: Sequence[Sample]
    """Of `groups`."""


class StepBook:
    """The buffer of scored groups with what belongs to them. One lock around it is its owner's business."""

    def __init__(self, capacity: int, max_staleness: int) -> None:
        self.buffer = GroupBuffer(capacity, max_staleness)
        self._open: dict[int, _OpenStep] = {}

    def open(self, step: int, requests: Sequence[GroupRequest]) -> None:
        """Expects a result for each request, placed by its key's index."""
        self.buffer.open_step(step, len(requests))
        self._open[step] = _OpenStep({request.key.index: request for request in requests})

    def add(self, collected: Collected) -> None:
        """Takes in what one assignment gave; a place that is resolved already keeps what it has."""
        result = collected.result
        taken_from: set[int] = set()
        for group in result.groups:
            if self.buffer.add(group):
                self._open[group.key.step].groups[group.key.index] = group
                taken_from.add(group.key.step)
        for step in taken_from:
            self._open[step].tables.append(collected.records)
            self._open[step].timings.append(result.timings)

    def fail(self, failure: DataFailure) -> GroupRequest | None:
        """Resolves a place without a group: what was asked for there, or None when it was resolved already."""
        if not self.buffer.fail(failure.key, failure.reason):
            return None
        return self._open[failure.key.step].requests[failure.key.index]

    def take(self, step: int, version: int) -> TakenStep | list[GroupRequest]:
        """A complete step for a learner at `version`, or requests for those of its groups that are too stale for it."""
        groups, stale = self.buffer.take(step, version)
        opened = self._open[step]
        if stale:
            return [self._anew(opened, key) for key in stale]
        del self._open[step]
        return TakenStep(
            groups=groups,
            tables=opened.tables,
            timings=opened.timings,
            samples=[opened.requests[group.key.index].sample for group in groups],
        )

    def waiting(self, from_step: int) -> list[ScoredGroup]:
        """Groups that have come back for `from_step` and later and were not taken."""
        steps = sorted(step for step in self._open if step >= from_step)
        return [self._open[step].groups[index] for step in steps for index in sorted(self._open[step].groups)]

    def progress(self, step: int) -> tuple[int, int]:
        """(groups that have come back, groups asked for) of a step."""
        opened = self._open.get(step)
        return (0, 0) if opened is None else (len(opened.groups), len(opened.requests))

    def clear(self) -> None:
        """Forgets every open step."""
        self.buffer.clear()
        self._open.clear()

    @staticmethod
    def _anew(opened: _OpenStep, key: GroupKey) -> GroupRequest:
        del opened.groups[key.index]
        request = replace(opened.requests[key.index], key=replace(key, attempt=key.attempt + 1))
        opened.requests[key.index] = request
        return request
