"""Captions on request, from the same workers: an evaluation is a ticket whose groups have negative steps."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from mmrl_ray.data.samples import Sample
from mmrl_ray.experience.carriers import GroupKey, SamplingParams, ScoredGroup
from mmrl_ray.experience.seeds import derive_seed
from mmrl_ray.rollouts.assignments import DataFailure, GroupRequest
from mmrl_ray.rollouts.protocols import Generated


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
