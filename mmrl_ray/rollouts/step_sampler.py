"""What a step is made of: K samples of the stream, each with a seed of its own. Decided by the step alone.

Only the pump thread touches it. Samples of the next step are read ahead while workers are busy; when a sample was
quarantined since, they are read again, so that reading ahead never changes what a step is made of.

Captions on request, from the same workers: an evaluation is a ticket whose groups have negative steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mmrl_ray.config import Config
from mmrl_ray.data.samples import Sample
from mmrl_ray.errors import RolloutError
from mmrl_ray.experience.carriers import GroupKey, SamplingParams, ScoredGroup
from mmrl_ray.experience.seeds import derive_seed, group_seed
from mmrl_ray.rollouts.types import DataFailure, Generated, GroupRequest, SampleSource


@dataclass(frozen=True, slots=True)
class _Ahead:
    step: int
    samples: Sequence[Sample]
    quarantined: int


class StepSampler:
    """Steps in order, from any step whose place in the stream is known."""

    def __init__(self, source: SampleSource, cfg: Config) -> None:
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

    def read_ahead(self) -> None:
        """Takes the next step's samples out of the stream, if that was not done yet."""
        if self._ahead is None:
            self._before[self.next_step] = self._source.state()
            samples = self._source.take(self.groups_per_step)
            self._ahead = _Ahead(self.next_step, samples, self.quarantined)

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
        return tuple(
            GroupRequest(
                key=GroupKey(step, index),
                sample=sample,
                sampling=replace(self._sampling, seed=group_seed(self._seed, step, index)),
                completions=self._completions,
            )
            for index, sample in enumerate(samples)
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


@dataclass(slots=True)
class Ticket:
    """One evaluation under way."""

    number: int
    version: int
    requests: tuple[GroupRequest, ...]
    groups: dict[int, ScoredGroup] = field(default_factory=dict)
    failures: dict[int, DataFailure] = field(default_factory=dict)
    moved: tuple[int, float] | None = None
    """How many answers there were when it was last seen to move, and when that was."""

    @property
    def came(self) -> int:
        """Samples that have their groups or their failure."""
        return len(self.groups) + len(self.failures)

    @property
    def done(self) -> bool:
        """Whether every sample has."""
        return self.came == len(self.requests)

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


class Evaluations:
    """Tickets under way, by the step of their groups' keys."""

    def __init__(self) -> None:
        self._tickets: dict[int, Ticket] = {}
        self._made = 0

    def open(
        self, samples: Sequence[Sample], sampling: SamplingParams, completions: int, version: int, states: int = 0
    ) -> Ticket:
        """A ticket for these samples; each draws with a seed of its own, derived from the sampling's.

        The first `states` of them come back with the state of their first completion.
        """
        self._made += 1
        requests = tuple(
            GroupRequest(
                key=GroupKey(-self._made, index),
                sample=sample,
                sampling=replace(sampling, seed=derive_seed(sampling.seed, "generate", index)),
                completions=completions,
                wants_state=index < states,
            )
            for index, sample in enumerate(samples)
        )
        ticket = Ticket(self._made, version, requests)
        self._tickets[-self._made] = ticket
        return ticket

    def add(self, groups: Sequence[ScoredGroup]) -> None:
        """Takes in what came back; what belongs to no ticket under way is left alone."""
        for group in groups:
            if group.key.step in self._tickets:
                self._tickets[group.key.step].groups.setdefault(group.key.index, group)

    def fail(self, failure: DataFailure) -> GroupRequest | None:
        """Notes a sample that cannot be captioned: what was asked for, or None of a ticket that is closed."""
        ticket = self._tickets.get(failure.key.step)
        if ticket is None:
            return None
        ticket.failures.setdefault(failure.key.index, failure)
        return ticket.requests[failure.key.index]

    def get(self, number: int) -> Ticket:
        """A ticket under way.

        Raises:
            KeyError: it is not, or not any more.
        """
        return self._tickets[-number]

    def close(self, ticket: Ticket) -> None:
        """Forgets a ticket."""
        self._tickets.pop(-ticket.number, None)

    def __len__(self) -> int:
        return len(self._tickets)


def chunks(requests: Sequence[GroupRequest], size: int) -> Iterator[tuple[GroupRequest, ...]]:
    """Assignments' worth of requests, in order."""
    for start in range(0, len(requests), size):
        yield tuple(requests[start : start + size])
