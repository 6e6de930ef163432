"""A log is shown once and to its end, whatever the connection does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field

import pytest

from mmrl_ray.errors import JobServerError, UnknownJobError
from mmrl_ray.jobs.records import Job, JobFacts, Status, follow

FACTS = JobFacts("a", "/runs/a", "me@here")
LOG = "".join(f"step {number}\n" for number in range(10)) + "the end, without a line break"


@dataclass
class Server:
    """Hands out `LOG`; each connection breaks off, or falls silent, where it is told to."""

    breaks: list[int | None]
    """Characters until each connection breaks; None for one that goes to the end."""
    silent: bool = False
    """A connection does not break, it stops bringing anything."""
    away: int = 0
    """Connections that do not even come about, after the first."""
    piece: int = 7
    over_after: int = 0
    """Times that the job is said to be running before it is over."""
    status: Status = "succeeded"
    asked: int = 0
    connections: int = 0
    cut: int = 0
    """Characters that a connection leaves out at the end: what was written as the job ended."""
    written: list[str] = field(default_factory=list)

    def get(self, id: str) -> Job:
        self.asked += 1
        is_over = self.asked > self.over_after
        return Job(id, self.status if is_over else "running", FACTS, 0.0)

    def logs(self, id: str) -> str:
        return LOG

    async def tail(self, id: str) -> AsyncIterator[str]:
        self.connections += 1
        if self.connections > 1 and self.away:
            self.away -= 1
            raise JobServerError("no job server answers")
        end = self.breaks.pop(0) if self.breaks else None
        for piece in pieces(LOG[: len(LOG) - self.cut if end is None else end], self.piece):
            yield piece
        if end is not None and self.silent:
            await asyncio.Event().wait()
        if end is not None:
            raise JobServerError("the connection broke off")


def pieces(text: str, size: int) -> Iterator[str]:
    for begin in range(0, len(text), size):
        yield text[begin : begin + size]


def shown(server: Server, **options: float) -> str:
    job = follow(server, "j", server.written.append, **{"pause_s": 0.0, "silent_s": 0.05, "patience_s": 5.0, **options})
    assert job.is_over
    assert all(server.written), "nothing is written where nothing is new"
    return "".join(server.written)


@pytest.mark.parametrize("breaks", [[], [0], [1, 1, 5], [30, 10, 50], [len(LOG)], [len(LOG) - 1, 3]])
@pytest.mark.parametrize("piece", [1, 7, 1000])
def test_a_connection_that_breaks_loses_nothing_and_repeats_nothing(breaks: list[int | None], piece: int) -> None:
    server = Server(list(breaks), piece=piece)
    assert shown(server) == LOG
    assert server.connections == len(breaks) + 1


def test_a_server_that_is_away_for_a_while_is_waited_for() -> None:
    assert shown(Server([20], away=3)) == LOG


def test_a_connection_that_ends_before_the_job_is_made_again() -> None:
    server = Server([], over_after=2)
    assert shown(server) == LOG
    assert server.connections == 3


def test_what_came_as_the_job_ended_is_fetched() -> None:
    assert shown(Server([], cut=12)) == LOG


def test_a_connection_that_falls_silent_is_not_believed() -> None:
    server = Server([20], silent=True, over_after=2)
    assert shown(server) == LOG
    assert server.connections == 1
    assert server.asked == 3


def test_a_server_that_stays_away_is_given_up_on() -> None:
    server = Server([20], away=10**9)
    with pytest.raises(JobServerError, match=r"given up after 0\.05 s.*mmrl jobs logs j --follow"):
        shown(server, patience_s=0.05, pause_s=0.01)
    assert "".join(server.written) == LOG[:20]


def test_a_job_that_nobody_knows_is_no_reason_to_wait() -> None:
    class Forgetful(Server):
        def get(self, id: str) -> Job:
            raise UnknownJobError("no job j")

    with pytest.raises(UnknownJobError):
        follow(Forgetful([]), "j", lambda text: None)
