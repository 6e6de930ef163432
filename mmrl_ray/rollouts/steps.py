"""The steps of a run: what each is made of (`StepSampler`), and what has come back of it (`StepBuffer`).

A step is K samples of the stream, each with a seed of its own, decided by the step alone. Samples of the next one are
read ahead while workers are busy; when a sample was quarantined since, they are read again, so that reading ahead never
changes what a step is made of. With `learner.dynamic_sampling` more samples follow until K of their groups have
completions of different rewards (`experience/plan.Selection`): which ones follows from the results alone, once all that
were drawn are there, so that it does not hang on who sampled them and when. The next step is composed after that.

A step is *open* from its dispatch until it is taken. Each of its places is resolved exactly once: by a scored group
(possibly masked) or by a failure. A second result for a place is a duplicate, refused and counted.

Steps of training count from 0 up; the groups of those that are open are bounded, and may lag behind the policy only so
far. Captions on request, from the same workers, are steps below 0: neither holds for them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from mmrl_ray.config import Config
from mmrl_ray.data.samples import Sample, SampleStream
from mmrl_ray.errors import RolloutError
from mmrl_ray.experience.carriers import GroupKey, SamplingParams, ScoredGroup, derive_seed, group_seed
from mmrl_ray.experience.plan import Selection
from mmrl_ray.rollouts.types import Collected, DataFailure, Generated, GroupRequest

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True)
class _Ahead:
    step: int
    samples: Sequence[Sample]
    quarantined: int


class StepSampler:
    """Steps in order, from any step whose place in the stream is known. For one thread."""

    def __init__(self, source: SampleStream, cfg: Config) -> None:
        self.groups_per_step = cfg.learner.groups_per_step
        self.next_step = 0
        self._source = source
        self._seed = cfg.run.seed
        self._completions = cfg.rollout.group_size
        self._sampling = SamplingParams(temperature=cfg.rollout.temperature, max_new_tokens=cfg.rollout.max_new_tokens)
        self._before: dict[int, dict[str, Any]] = {0: source.state()}
        self._ahead: _Ahead | None = None

    @property
    def quarantined(self) -> int:
        """Samples left out so far."""
        return len(self._source.quarantine)

    def read_ahead(self) -> Sequence[Sample] | None:
        """Takes the next step's samples out of the stream; None if that was done already."""
        if self._ahead is not None:
            return None
        self._before[self.next_step] = self._source.state()
        samples = self._source.take(self.groups_per_step)
        self._ahead = _Ahead(self.next_step, samples, self.quarantined)
        return samples

    def compose(self) -> tuple[GroupRequest, ...]:
        """The groups of `next_step`, which advances.

        Raises:
            DataError: the stream cannot be read, or too much of it is broken.
        """
        if self._ahead is not None and self._ahead.quarantined != self.quarantined:
            self._source.restore(self._place(self.next_step))
            self._ahead = None
        self.read_ahead()
        assert self._ahead is not None
        step, samples = self._ahead.step, self._ahead.samples
        self._ahead = None
        self.next_step = step + 1
        return self._requests(step, 0, samples)

    def further(self, first: int, count: int) -> tuple[GroupRequest, ...]:
        """So many more groups of the step that was composed last, from place `first` on; raises as `compose`."""
        if self._ahead is not None:
            raise ValueError(f"samples of step {self._ahead.step} were taken before those of the step before it")
        return self._requests(self.next_step - 1, first, self._source.take(count))

    def _requests(self, step: int, first: int, samples: Sequence[Sample]) -> tuple[GroupRequest, ...]:
        return tuple(
            GroupRequest(
                key=GroupKey(step, index),
                sample=sample,
                sampling=replace(self._sampling, seed=group_seed(self._seed, step, index)),
                completions=self._completions,
            )
            for index, sample in enumerate(samples, first)
        )

    def quarantine(self, sample: Sample, reason: str) -> None:
        """A worker could not use this row: it does not come again, while others of the same id do.

        Raises:
            QuarantineError: more than the run tolerates.
        """
        self._source.quarantine.add(sample.id, reason, sample.place)

    def state(self, step: int) -> dict[str, Any]:
        """Where the stream stands before `step`, with everything quarantined by now. JSON-able.

        Raises:
            RolloutError: that was long ago, and forgotten.
        """
        if step == self.next_step and self._ahead is None:
            return self._source.state()
        return self._place(step)

    def seek(self, step: int, state: Mapping[str, Any] | None = None) -> None:
        """Goes on with `step`, from `state` or from where the stream was before it, with what was quarantined then.

        Raises:
            RolloutError: no `state`, and the place is not known.
            DataError: the state is of another data set or seed.
        """
        state = dict(state) if state is not None else self._known(step)
        self._source.restore(state)
        self._before = {0: self._before[0], step: state}
        self._ahead = None
        self.next_step = step

    def forget_before(self, step: int) -> None:
        """Places before `step` will not be asked for again; the very first one is kept."""
        self._before = {s: state for s, state in self._before.items() if s >= step or s == 0}

    def _known(self, step: int) -> dict[str, Any]:
        if step not in self._before:
            raise RolloutError(f"where the samples of step {step} begin is not known here; restore its checkpoint")
        return self._before[step]

    def _place(self, step: int) -> dict[str, Any]:
        return {**self._known(step), "quarantine": self._source.quarantine.state()}


def chunks(items: Sequence[Item], size: int) -> Iterator[tuple[Item, ...]]:
    """Assignments' worth of requests, or of samples, in order."""
    for start in range(0, len(items), size):
        yield tuple(items[start : start + size])


@dataclass(slots=True)
class OpenStep:
    """One step by place: each has a request, and at last either a group or a failure."""

    requests: dict[int, GroupRequest]
    groups: dict[int, ScoredGroup] = field(default_factory=dict)
    failures: dict[int, DataFailure] = field(default_factory=dict)
    tables: list[bytes] = field(default_factory=list)
    timings: list[Mapping[str, float]] = field(default_factory=list)
    selection: Selection | None = None
    """Of a step that may yet be given more places."""
    dropped: set[int] = field(default_factory=set)
    """Places that it has not kept."""
    figures: Mapping[str, float] = field(default_factory=dict)
    """Of one that was."""

    @property
    def came(self) -> int:
        """Places that are resolved."""
        return len(self.groups) + len(self.failures)

    @property
    def complete(self) -> bool:
        """Whether every place is."""
        return self.came == len(self.requests)


@dataclass(slots=True, kw_only=True)
class Evaluation(OpenStep):
    """Captions on request."""

    number: int
    version: int
    moved: tuple[int, float] | None = None
    """How many answers there were when it was last seen to move, and when that was."""

    def stuck_for(self, now: float, is_served: bool) -> float:
        """Seconds without an answer while somebody could have given one.

        The start of a worker, and of one in the place of another, has deadlines of its own (those of the pool).
        """
        if not is_served or self.moved is None or self.came > self.moved[0]:
            self.moved = (self.came, now)
        return now - self.moved[1]

    def answer(self) -> Generated:
        """What has come back, in the order of the samples."""
        return Generated(
            groups=tuple(self.groups.get(i) for i in range(len(self.requests))),
            failures=tuple(self.failures[i] for i in sorted(self.failures)),
            version=self.version,
        )


@dataclass(frozen=True, slots=True)
class TakenStep:
    """A complete step, out of the buffer."""

    groups: Sequence[ScoredGroup]
    """By place; failed places are missing."""
    tables: Sequence[bytes]
    """What the rollout log says of them (`Collected.records`)."""
    timings: Sequence[Mapping[str, float]]
    samples: Sequence[Sample]
    """Of `groups`."""
    figures: Mapping[str, float] = field(default_factory=dict)
    """Of its selection, where there was one."""


class StepBuffer:
    """Holds open steps, and hands one over once every place of it is resolved. Its owner holds a lock around it.

    Args:
        capacity: groups of open training steps, dispatched or arrived; bounds the memory behind their payloads.
        max_staleness: policy versions a group may lag behind when its step is taken.
    """

    def __init__(self, capacity: int, max_staleness: int) -> None:
        if capacity < 1 or max_staleness < 0:
            raise ValueError(f"capacity={capacity} must be 1 or more, max_staleness={max_staleness} 0 or more")
        self.capacity = capacity
        self.max_staleness = max_staleness
        self.counts: Counter[str] = Counter()
        """`duplicate` and `stale` groups so far."""
        self._steps: dict[int, OpenStep] = {}
        self._evaluations: dict[int, Evaluation] = {}
        self._evaluated = 0

    @property
    def held(self) -> int:
        """Groups of open training steps."""
        return sum(len(step.requests) for step in self._steps.values())

    @property
    def arrived(self) -> int:
        """Scored groups that wait to be taken."""
        return sum(len(step.groups) for step in self._steps.values())

    @property
    def evaluations(self) -> int:
        """Evaluations under way."""
        return len(self._evaluations)

    def has_room(self, groups: int) -> bool:
        """Whether a step of so many groups may be opened."""
        return self.held + groups <= self.capacity

    @property
    def unsettled(self) -> int | None:
        """The step that may yet be given more places: the newest, if any."""
        return next((step for step, opened in self._steps.items() if opened.selection is not None), None)

    def open(self, step: int, requests: Sequence[GroupRequest], selection: Selection | None = None) -> None:
        """Expects a result for each request, placed by its key's index; with `selection`, which was shown none yet, the
        step is complete only once that has enough."""
        if step in self._steps:
            raise ValueError(f"step {step} is open already")
        if not self.has_room(len(requests)):
            raise ValueError(f"no room for {len(requests)} groups beside {self.held} of {self.capacity}")
        self._steps[step] = OpenStep({request.key.index: request for request in requests}, selection=selection)

    def is_resolved(self, step: int) -> bool:
        """Whether every place that `step` has so far is resolved."""
        return self._steps[step].complete

    def select(self, step: int) -> tuple[int, int]:
        """Of the unsettled step, once its places are resolved: (how many it has had, how many more `extend` should give
        it).

        What cannot be part of it any more is dropped. With none to be given, it is complete, and `figures` of its
        selection are known.
        """
        opened = self._steps[step]
        if opened.selection is None:
            raise ValueError(f"step {step} is settled")
        new = range(opened.selection.drawn, max(opened.requests, default=-1) + 1)
        wanted = opened.selection.judge([opened.groups.get(index) for index in new])
        kept = opened.selection.kept
        opened.dropped |= opened.requests.keys() - set(kept)
        opened.requests = {index: opened.requests[index] for index in kept}
        opened.groups = {index: opened.groups[index] for index in kept}
        opened.failures.clear()
        drawn = opened.selection.drawn
        if not wanted:
            opened.figures, opened.selection = opened.selection.figures, None
        return drawn, wanted

    def extend(self, step: int, requests: Sequence[GroupRequest]) -> None:
        """Gives the unsettled step more places, behind all that it ever had."""
        self._steps[step].requests |= {request.key.index: request for request in requests}

    def figures(self, step: int) -> Mapping[str, float]:
        """Of an open step's selection, if that is over."""
        return self._steps[step].figures

    def add(self, collected: Collected) -> None:
        """Takes in what one assignment gave; a place that is resolved already keeps what it has."""
        result = collected.result
        taken_from: set[int] = set()
        for group in result.groups:
            if opened := self._unresolved(group.key):
                opened.groups[group.key.index] = group
                taken_from.add(group.key.step)
        for step in taken_from & self._steps.keys():
            self._steps[step].tables += collected.records
            self._steps[step].timings.append(result.timings)

    def fail(self, failure: DataFailure) -> GroupRequest | None:
        """Resolves a place without a group: what was asked for there, or None when it was resolved already."""
        opened = self._unresolved(failure.key)
        if opened is None:
            return None
        opened.failures[failure.key.index] = failure
        return opened.requests[failure.key.index]

    # -- steps of training -----------------------------------------------------------------------------------------

    def is_complete(self, step: int) -> bool:
        """Whether every place of `step` is resolved."""
        return step in self._steps and self._steps[step].complete and self._steps[step].selection is None

    def take(self, step: int, version: int) -> TakenStep | list[GroupRequest]:
        """A complete step for a learner at policy `version`, or requests for those of its groups that are too stale.

        When any group lags by more than `max_staleness`, nothing is taken: the stale ones are dropped and counted, and
        their places open again.
        """
        if not self.is_complete(step):
            raise ValueError(f"step {step} is not complete")
        opened = self._steps[step]
        groups = [opened.groups[index] for index in sorted(opened.groups)]
        stale = [group.key for group in groups if version - group.policy_version > self.max_staleness]
        if stale:
            self.counts["stale"] += len(stale)
            return [self._anew(opened, key) for key in stale]
        del self._steps[step]
        samples = [opened.requests[group.key.index].sample for group in groups]
        return TakenStep(groups, opened.tables, opened.timings, samples, opened.figures)

    def waiting(self, from_step: int) -> list[ScoredGroup]:
        """Groups that have come back for `from_step` and later and were not taken."""
        steps = sorted(step for step in self._steps if step >= from_step)
        return [self._steps[step].groups[index] for step in steps for index in sorted(self._steps[step].groups)]

    def progress(self, step: int) -> tuple[int, int]:
        """(groups that have come back, groups asked for) of a step."""
        opened = self._steps.get(step)
        return (0, 0) if opened is None else (len(opened.groups), len(opened.requests))

    def clear(self) -> None:
        """Forgets every open step of training: its groups are to be sampled again."""
        self._steps.clear()

    # -- evaluations -----------------------------------------------------------------------------------------------

    def open_evaluation(
        self,
        samples: Sequence[Sample],
        sampling: SamplingParams,
        completions: int,
        version: int,
        states: int = 0,
        others: Sequence[Sample] = (),
    ) -> Evaluation:
        """Expects captions for these samples; each draws with a seed of its own, derived from the sampling's.

        The first `states` of them are to come back with the state of their first completion, and those that have one of
        `others`, at the same place, with what the policy makes of that one's pictures.
        """
        self._evaluated += 1
        requests = {
            index: GroupRequest(
                key=GroupKey(-self._evaluated, index),
                sample=sample,
                sampling=replace(sampling, seed=derive_seed(sampling.seed, "generate", index)),
                completions=completions,
                wants_state=index < states,
                other=others[index] if index < len(others) else None,
            )
            for index, sample in enumerate(samples)
        }
        evaluation = Evaluation(requests, number=self._evaluated, version=version)
        self._evaluations[evaluation.number] = evaluation
        return evaluation

    def evaluation(self, number: int) -> Evaluation:
        """An evaluation under way.

        Raises:
            KeyError: it is not, or not any more.
        """
        return self._evaluations[number]

    def close_evaluation(self, number: int) -> None:
        """Forgets it: what still comes back for it is left alone."""
        self._evaluations.pop(number, None)

    # -- inside ----------------------------------------------------------------------------------------------------

    def _unresolved(self, key: GroupKey) -> OpenStep | None:
        """The step of a place that has no result yet."""
        step = self._steps.get(key.step) if key.step >= 0 else self._evaluations.get(-key.step)
        if step is None or key.index in step.groups or key.index in step.failures or key.index in step.dropped:
            self.counts["duplicate"] += 1
            return None
        if key.index not in step.requests:
            raise ValueError(f"place {key.index} is outside step {key.step} of {len(step.requests)} groups")
        return step

    @staticmethod
    def _anew(opened: OpenStep, key: GroupKey) -> GroupRequest:
        del opened.groups[key.index]
        request = replace(opened.requests[key.index], key=replace(key, attempt=key.attempt + 1))
        opened.requests[key.index] = request
        return request
