"""A job's log as it grows, to its end, whatever happens to the connection meanwhile."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from typing import Protocol

from mmrl_ray.errors import JobServerError
from mmrl_ray.jobs.records import Job

PATIENCE_S = 120.0
"""A job server that is away for longer is given up on; the job goes on without a listener."""
_PAUSE_S = 1.0
_SILENT_S = 30.0
"""A connection that brings nothing for so long may be dead without saying so: the log is looked at another way."""


class LogSource(Protocol):
    """The job server, as far as a log is followed.

    Raises (every method): `JobServerError` it is out of reach.
    """

    def get(self, id: str) -> Job:
        """The job as it stands."""
        ...

    def logs(self, id: str) -> str:
        """All that it has said."""
        ...

    def tail(self, id: str) -> AsyncIterator[str]:
        """The log from its beginning, in pieces, until the job is over."""
        ...


def follow(
    source: LogSource,
    id: str,
    write: Callable[[str], object],
    *,
    patience_s: float = PATIENCE_S,
    pause_s: float = _PAUSE_S,
    silent_s: float = _SILENT_S,
) -> Job:
    """Hands every character of the log to `write`, once and in order; returns the job when it is over.

    Raises:
        JobServerError: the server was out of reach for `patience_s`.
        UnknownJobError: there is no such job.
    """
    return asyncio.run(_Follower(source, id, write, patience_s, pause_s, silent_s).whole())


class _Follower:
    def __init__(
        self,
        source: LogSource,
        id: str,
        write: Callable[[str], object],
        patience_s: float,
        pause_s: float,
        silent_s: float,
    ) -> None:
        self._source, self._id, self._write = source, id, write
        self._patience_s, self._pause_s, self._silent_s = patience_s, pause_s, silent_s
        self._shown = 0
        """Characters written so far. Every connection begins the log anew; what it repeats is passed over."""
        self._heard = time.monotonic()

    async def whole(self) -> Job:
        """Connects as often as it takes."""
        while True:
            try:
                job = await self._connection()
                if job is None:
                    job = await asyncio.to_thread(self._source.get, self._id)
                self._heard = time.monotonic()
                if job.is_over:
                    self._catch_up(await asyncio.to_thread(self._source.logs, self._id))
                    return job
            except JobServerError as error:
                if time.monotonic() - self._heard > self._patience_s:
                    raise JobServerError(
                        f"{error}; given up after {self._patience_s:g} s. The job is not stopped by that: go on with "
                        f"mmrl jobs logs {self._id} --follow"
                    ) from error
            await asyncio.sleep(self._pause_s)

    async def _connection(self) -> Job | None:
        """One connection to its end; the job, where it was found to be over while nothing came."""
        seen = 0
        async with aclosing(self._source.tail(self._id)) as pieces:  # type: ignore[type-var]
            while True:
                coming = asyncio.ensure_future(anext(pieces, None))
                try:
                    while not (await asyncio.wait({coming}, timeout=self._silent_s))[0]:
                        job = await asyncio.to_thread(self._source.get, self._id)
                        self._heard = time.monotonic()
                        self._catch_up(await asyncio.to_thread(self._source.logs, self._id))
                        if job.is_over:
                            return job
                    piece = coming.result()
                finally:
                    await _ended(coming)
                self._heard = time.monotonic()
                if piece is None:
                    return None
                seen += len(piece)
                if seen > self._shown:
                    self._write(piece[len(piece) - (seen - self._shown) :])
                    self._shown = seen

    def _catch_up(self, whole: str) -> None:
        if len(whole) > self._shown:
            self._write(whole[self._shown :])
            self._shown = len(whole)


async def _ended(task: asyncio.Future[str | None]) -> None:
    """Lets go of a piece that is not waited for any more: the iterator cannot be closed before."""
    task.cancel()
    await asyncio.wait({task})
    if not task.cancelled():
        task.exception()
