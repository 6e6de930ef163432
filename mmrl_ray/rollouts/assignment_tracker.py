"""Who has which assignment, since when, at which try: the pool's own book, without Ray.

Ray forgets a dead actor's pending calls, so what was lost is known here alone. An assignment leaves the book exactly
once: accepted, or quarantined group by group. Every try has an id of its own, under which alone its result counts.

    crash 1 of an assignment      the next worker gets it whole, for the same completions: it may have been the machine
    crash 2                       its groups go on as assignments of one, of which one is the culprit
    a single that crashes again   quarantined; and at crash 2 already one that was alone from the beginning

Samples are blamed only where others do work. At the beginning of a run the same error from different samples, with none
that worked, is the model's (`FirstErrors`): what crashes then goes to the end of the queue, so that the next worker
takes other samples.

A worker may be told of samples that could come next (`upcoming`), and is given them if it comes for more in time. That
is no promise, and nothing that the book holds.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from mmrl_ray.data.samples import Sample
from mmrl_ray.errors import ModelError
from mmrl_ray.rollouts.types import Assignment, DataFailure, Kind

CRASHES_BEFORE_SPLIT = 2
SAME_ERRORS = 3
"""Of different samples, at the beginning of a run and with none that worked: then the model is at fault."""
_ORDER: Mapping[Kind, int] = {"eval": 0, "train": 1, "aside": 2}
"""Of kinds in the queue."""
_VARIABLE = re.compile(r"'[^']*'|\"[^\"]*\"|0x[0-9a-f]+|\d+")
"""What differs in one error from sample to sample: names in quotes, sizes, addresses."""


class FirstErrors:
    """Whether a run's first failures are all the same error: then no sample is to blame, and the run ends with it.

    One that works settles it: what fails later is a matter of samples.
    """

    def __init__(self, model: str) -> None:
        """`model` is named in the error."""
        self.settled = False
        self._model = model
        self._kind = ""
        self._failed: list[frozenset[str]] = []

    def worked(self) -> None:
        """A sample went through."""
        self.settled = True

    def failed(self, samples: Iterable[str], reason: str) -> None:
        """One of these samples (by `Sample.key`), or the model, is to blame for `reason`.

        Raises:
            ModelError: it is the `SAME_ERRORS`-th such failure, and no single sample explains all of them.
        """
        if self.settled:
            return
        if (kind := _VARIABLE.sub("…", reason)) != self._kind:
            self._kind, self._failed = kind, []
        if (keys := frozenset(samples)) not in self._failed:
            self._failed.append(keys)
        if len(self._failed) >= SAME_ERRORS and not frozenset.intersection(*self._failed):
            raise ModelError(
                f"the first samples all failed with the same error, and none has worked: {reason}; no single sample is "
                f"to blame: look at model {self._model!r}, its processor and settings, and at what all samples share"
            )


@dataclass(slots=True)
class _Entry:
    assignment: Assignment
    crashes: int = 0
    last_reason: str = ""
    passed: int = 0
    """So many others that stood behind it were given out before it."""


@dataclass(frozen=True, slots=True)
class _AtWork:
    entry: _Entry
    since: float
    number: int
    """Of the tries, from 0."""
    cancelled: bool = False


class AssignmentTracker:
    """Assignments by state: queued, or at work on one worker. Times are of the caller's clock, in seconds.

    One thread changes it; others may read its figures.
    """

    def __init__(self, model: str = "") -> None:
        """`model` is the run's, to be named where it is to blame."""
        self.counts: Counter[str] = Counter()
        """`accepted`, `retried`, `split`, `quarantined` and `superseded` so far."""
        self._first = FirstErrors(model)
        self._given = 0
        self._counts_from = 0
        self._queue: deque[_Entry] = deque()
        self._at_work: dict[int, _AtWork] = {}
        self._expected: list[tuple[Sample, ...]] = []
        self._told: dict[int, tuple[str, ...]] = {}
        """By worker, what it was told to expect and was not given yet."""
        # Ids of tries after the first; below 0, since the controller counts its own upwards from 0.
        self._retry_ids = itertools.count(-1, -1)

    @property
    def queued(self) -> int:
        """Assignments that wait for a worker."""
        return len(self._queue)

    @property
    def outstanding(self) -> int:
        """Assignments queued or at work, without cancelled ones."""
        return len(self._queue) + sum(not work.cancelled for work in list(self._at_work.values()))

    @property
    def busy(self) -> set[int]:
        """Workers that have an assignment, cancelled or not."""
        return set(self._at_work)

    def submit(self, assignment: Assignment) -> None:
        """Queues a new assignment behind those of its kind, and before those that have time (`_ORDER`)."""
        self._append(_Entry(assignment))

    def assign(self, worker: int, now: float) -> Assignment | None:
        """The next assignment, from now on `worker`'s; None when none is queued."""
        if worker in self._at_work:
            raise ValueError(f"worker {worker} has an assignment already")
        if not self._queue:
            return None
        entry = self._next(worker)
        self._at_work[worker] = _AtWork(entry, now, self._given)
        self._given += 1
        return entry.assignment

    def expect(self, samples: Iterable[tuple[Sample, ...]]) -> None:
        """Of assignments that will be submitted after what is queued, as far as that is known."""
        self._expected = list(samples)

    def upcoming(self, worker: int) -> tuple[Sample, ...]:
        """What `worker` may be given next and nobody was told of, which it is told now; nothing where none is known."""
        told = set(self._told.values())
        for samples in itertools.chain((entry.assignment.samples for entry in self._queue), self._expected):
            if (names := _names(samples)) not in told:
                self._told[worker] = names
                return samples
        return ()

    def is_told(self, worker: int) -> bool:
        """Whether it was told what to expect, and was given nothing since."""
        return worker in self._told

    def leave(self, worker: int) -> None:
        """It is told nothing any more."""
        self._told.pop(worker, None)

    def complete(self, worker: int, assignment_id: int) -> float | None:
        """Takes a result: when its try began, or None for one that no longer counts."""
        work = self._at_work.get(worker)
        if work is None or work.entry.assignment.id != assignment_id:
            self.counts["superseded"] += 1
            return None
        del self._at_work[worker]
        if work.cancelled:
            self.counts["superseded"] += 1
            return None
        self.counts["accepted"] += 1
        self._first.worked()
        return work.since

    def requeue(self, worker: int, reason: str) -> list[DataFailure]:
        """The worker is gone: its assignment, counted as having crashed it, goes back to the front of the queue.

        It gets a fresh id.

        Returns the groups given up: at most one.

        Raises:
            ModelError: the run's first assignments all end so, and none was ever finished.
        """
        work = self._at_work.pop(worker, None)
        if work is None or work.cancelled:
            return []
        entry = work.entry
        entry.crashes += 1
        entry.last_reason = reason
        # Tries that were under way at the last loss that counted may have ended with it, by the node they shared say.
        if work.number >= self._counts_from:
            self._counts_from = self._given
            self._first.failed((group.sample.key for group in entry.assignment.groups), reason)
        if entry.crashes < CRASHES_BEFORE_SPLIT:
            self.counts["retried"] += 1
            self._requeue([_Entry(self._again(entry.assignment), entry.crashes, entry.last_reason)])
            return []
        if len(entry.assignment.groups) > 1:
            self.counts["split"] += 1
            singles = [replace(entry.assignment, groups=(group,)) for group in entry.assignment.groups]
            self._requeue([_Entry(self._again(single), entry.crashes, entry.last_reason) for single in singles])
            return []
        self.counts["quarantined"] += 1
        (group,) = entry.assignment.groups
        return [
            DataFailure(group.key, group.sample.id, f"its rollout crashed {entry.crashes} workers, the last: {reason}")
        ]

    def cancel(self, kind: str) -> None:
        """Forgets queued assignments of `kind`; results of those at work will not count."""
        self._queue = deque(e for e in self._queue if e.assignment.kind != kind)
        for worker, work in self._at_work.items():
            if work.entry.assignment.kind == kind:
                self._at_work[worker] = replace(work, cancelled=True)

    def overdue(self, now: float, timeout_s: float) -> list[int]:
        """Workers that have had their assignment for longer than `timeout_s`."""
        return [worker for worker, work in self._at_work.items() if now - work.since > timeout_s]

    def at_work_seconds(self, now: float) -> float:
        """Worker-seconds of the tries under way."""
        return sum(now - work.since for work in list(self._at_work.values()))

    def working_on(self, worker: int) -> Assignment | None:
        """What a worker has."""
        work = self._at_work.get(worker)
        return None if work is None else work.entry.assignment

    def since(self, worker: int) -> float | None:
        """When a worker was given what it has."""
        work = self._at_work.get(worker)
        return None if work is None else work.since

    def _next(self, worker: int) -> _Entry:
        """Takes the first one, or what `worker` was told of: not past another kind, and past the first one only as
        often as there are workers who were told."""
        first = self._queue[0]
        told, waiting = self._told.pop(worker, None), len(self._told)
        if told is not None and first.passed <= waiting:
            for place, entry in enumerate(self._queue):
                if entry.assignment.kind != first.assignment.kind:
                    break
                if _names(entry.assignment.samples) == told:
                    first.passed += place > 0
                    del self._queue[place]
                    return entry
        return self._queue.popleft()

    def _append(self, entry: _Entry) -> None:
        order = _ORDER[entry.assignment.kind]
        place = len(self._queue)
        while place and _ORDER[self._queue[place - 1].assignment.kind] > order:
            place -= 1
        self._queue.insert(place, entry)

    def _requeue(self, entries: Iterable[_Entry]) -> None:
        if self._first.settled:
            self._queue.extendleft(reversed(list(entries)))
            return
        for entry in entries:
            self._append(entry)

    def _again(self, assignment: Assignment) -> Assignment:
        groups = tuple(replace(g, key=replace(g.key, attempt=g.key.attempt + 1)) for g in assignment.groups)
        return replace(assignment, id=next(self._retry_ids), groups=groups)


def _names(samples: Iterable[Sample]) -> tuple[str, ...]:
    return tuple(sample.key for sample in samples)
