"""What is known of a job: Ray's record of it as this project wrote it, and its log, followed to its end."""

from __future__ import annotations

import asyncio
import json
import re
import secrets
import time
from collections.abc import Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from mmrl_ray.errors import JobError, JobServerError

if TYPE_CHECKING:
    from mmrl_ray.jobs.client import JobsClient  # makes the records below of what Ray says

Status = Literal["pending", "running", "succeeded", "failed", "stopped"]

INTERRUPTED = 130
"""Exit code of a job that was stopped, as of a run that Ctrl-C stopped."""
ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
"""A submission id; it becomes a part of paths on the cluster."""
HTTP_PREFIX = "ftjob-"
"""Begins the ids of jobs that were asked for over HTTP."""
_MARK = "mmrl."
"""Begins the keys of a job's metadata that are this project's."""
_LONGEST_MESSAGE = 2000
_LARGEST_CONFIG = 32 << 10
"""Bytes. Ray hands metadata to the job in an environment variable, of which Linux takes 128 kB."""
PATIENCE_S = 120.0
"""A job server that is away for longer is given up on; the job goes on without a listener."""
_PAUSE_S = 1.0
_SILENT_S = 30.0
"""A connection that brings nothing for so long may be dead without saying so: the log is looked at another way."""


@dataclass(frozen=True, slots=True)
class JobFacts:
    """What a submitter says of a job; Ray keeps it as the job's metadata for as long as the cluster lives."""

    run: str
    """Name of the run."""
    location: str
    """Its folder, as the cluster's nodes see it."""
    by: str
    """Who submitted it, and from where."""
    task: Literal["train", "resume"] = "train"
    request: Mapping[str, Any] = field(default_factory=dict)
    """JSON of whoever asked for the job over HTTP; empty otherwise."""
    code: str = ""
    """Folder on the submitter's machine with its own reward functions, for a resume; empty where none is sent."""
    config: str = ""
    """YAML of the run, for a resume where the job was stopped before there was a run folder; empty of older jobs."""

    def metadata(self) -> dict[str, str]:
        """In Ray's shape: texts alone."""
        facts = {"run": self.run, "location": self.location, "by": self.by, "task": self.task}
        if self.request:
            facts["request"] = json.dumps(self.request, ensure_ascii=False)
        if self.code:
            facts["code"] = self.code
        if self.config and len(self.config.encode()) <= _LARGEST_CONFIG:
            facts["config"] = self.config
        return {"job_name": self.run, **{f"{_MARK}{key}": value for key, value in facts.items()}}

    @classmethod
    def of(cls, metadata: Mapping[str, str] | None) -> JobFacts | None:
        """What `metadata` made; None where something else did."""
        found = {key.removeprefix(_MARK): value for key, value in (metadata or {}).items() if key.startswith(_MARK)}
        try:
            task: Literal["train", "resume"] = "resume" if found.get("task") == "resume" else "train"
            request = json.loads(found.get("request", "{}"))
            request = request if isinstance(request, dict) else {}
            code, config = found.get("code", ""), found.get("config", "")
            return cls(found["run"], found["location"], found["by"], task, request, code, config)
        except (KeyError, ValueError):
            return None


@dataclass(frozen=True, slots=True)
class Job:
    """One job as it stands."""

    id: str
    status: Status
    facts: JobFacts
    created: float
    """Unix seconds."""
    ended: float | None = None
    """Unix seconds."""
    driver_code: int | None = None
    """What the entry point's process ended with; negative for the signal that killed it."""
    message: str = ""
    """Ray's; of a failed job it has the last lines of the log."""

    @property
    def is_over(self) -> bool:
        """Whether nothing more will happen to it."""
        return self.status not in ("pending", "running")

    @property
    def exit_code(self) -> int:
        """What a shell would tell: the job's own, 128 + the signal that killed it, 130 where it was stopped."""
        if self.status == "stopped":
            return INTERRUPTED
        if self.status == "failed":
            code = self.driver_code or 1  # none: Ray could not even start it
            return code if code > 0 else 128 - code
        return 0

    @property
    def reason(self) -> str:
        """Why it failed, on one line: the last that it said."""
        lines = [line.strip() for line in self.message.splitlines() if line.strip()]
        if not lines:
            return "no reason is known"
        said = next((line for line in reversed(lines) if line.startswith("error:")), lines[-1])
        return said.removeprefix("error:").strip()[:_LONGEST_MESSAGE]


def new_id(run: str) -> str:
    """A submission id that nobody had before, with the run's name in it."""
    return f"{run[:100]}-{secrets.token_hex(4)}"


def new_http_id() -> str:
    """The same for a job that was asked for over HTTP, where the name of its run tells nothing."""
    return HTTP_PREFIX + secrets.token_hex(12)


def check_id(id: str) -> str:
    """The id, if it can be that of a job; a JobError otherwise."""
    if ID.fullmatch(id) is None:
        raise JobError(f"{id[:64]!r} is no id of a job: it has up to 128 letters, digits, dots, dashes and underscores")
    return id


def follow(
    source: JobsClient,
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


@dataclass(slots=True)
class _Follower:
    source: JobsClient
    id: str
    write: Callable[[str], object]
    patience_s: float
    pause_s: float
    silent_s: float
    shown: int = 0
    """Characters written so far. Every connection begins the log anew; what it repeats is passed over."""
    heard: float = field(default_factory=time.monotonic)

    async def whole(self) -> Job:
        """Connects as often as it takes."""
        while True:
            try:
                job = await self._connection()
                if job is None:
                    job = await asyncio.to_thread(self.source.get, self.id)
                self.heard = time.monotonic()
                if job.is_over:
                    self._catch_up(await asyncio.to_thread(self.source.logs, self.id))
                    return job
            except JobServerError as error:
                if time.monotonic() - self.heard > self.patience_s:
                    raise JobServerError(
                        f"{error}; given up after {self.patience_s:g} s. The job is not stopped by that: go on with "
                        f"mmrl jobs logs {self.id} --follow"
                    ) from error
            await asyncio.sleep(self.pause_s)

    async def _connection(self) -> Job | None:
        """One connection to its end; the job, where it was found to be over while nothing came."""
        seen = 0
        async with aclosing(self.source.tail(self.id)) as pieces:  # type: ignore[type-var]
            while True:
                coming = asyncio.ensure_future(anext(pieces, None))
                try:
                    while not (await asyncio.wait({coming}, timeout=self.silent_s))[0]:
                        job = await asyncio.to_thread(self.source.get, self.id)
                        self.heard = time.monotonic()
                        self._catch_up(await asyncio.to_thread(self.source.logs, self.id))
                        if job.is_over:
                            return job
                    piece = coming.result()
                finally:
                    await _ended(coming)
                self.heard = time.monotonic()
                if piece is None:
                    return None
                seen += len(piece)
                if seen > self.shown:
                    self.write(piece[len(piece) - (seen - self.shown) :])
                    self.shown = seen

    def _catch_up(self, whole: str) -> None:
        if len(whole) > self.shown:
            self.write(whole[self.shown :])
            self.shown = len(whole)


async def _ended(task: asyncio.Future[str | None]) -> None:
    """Lets go of a piece that is not waited for any more: the iterator cannot be closed before."""
    task.cancel()
    await asyncio.wait({task})
    if not task.cancelled():
        task.exception()
