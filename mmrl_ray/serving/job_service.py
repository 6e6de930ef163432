"""`JobService` over a Ray cluster's job server and the run folders of its jobs. Keeps nothing between two calls."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict
from typing import Any, TypeVar

from mmrl_ray.config.serving import ServingSection
from mmrl_ray.errors import ConfigError, OverloadedError, RunError, UnknownFileError, UnknownJobError
from mmrl_ray.jobs.client import JobsClient, own_address, own_ray
from mmrl_ray.jobs.records import HTTP_PREFIX, ID, Job, Status, new_http_id
from mmrl_ray.jobs.shutdown import note_job, remembered
from mmrl_ray.jobs.submit import python_for, submit_run
from mmrl_ray.serving.fine_tuning import (
    compose,
    open_run,
    recipe_configs,
    result_file,
    results,
    run_checkpoints,
    run_events,
    run_name,
    trained_tokens,
)
from mmrl_ray.serving.protocols import ResultFile, TuningCheckpoint, TuningEvent, TuningJob, TuningOrder, TuningStatus

logger = logging.getLogger(__name__)

_FILE_ID = re.compile(rf"file-({ID.pattern})-([a-z]+\.[a-z]+)")
"""Of a job's result file: the job's id without its prefix, and the name in the run's folder."""
_MARK_CHARS = 8
_STATUSES: dict[Status, TuningStatus] = {
    "pending": "queued",
    "running": "running",
    "succeeded": "succeeded",
    "failed": "failed",
    "stopped": "cancelled",
}

T = TypeVar("T")


class RayJobService:
    """See `JobService`. Everything that waits does so in a thread."""

    def __init__(self, settings: ServingSection) -> None:
        """Looks at the recipes; the job server is looked for when the first request comes.

        Raises:
            ConfigError: a recipe is wrong, or there is no `fine_tuning` section.
        """
        allowed, root = settings.fine_tuning, settings.adapters_root
        if allowed is None:
            raise ConfigError("jobs need serving.fine_tuning, which says what may be trained")
        recipe_configs(allowed)
        self._allowed = allowed
        self._root = str(allowed.root or root)
        self._client: JobsClient | None = None

    async def create(self, order: TuningOrder) -> TuningJob:
        """See `JobService`."""
        return await asyncio.to_thread(self._create, order)

    async def get(self, id: str) -> TuningJob:
        """See `JobService`."""
        return await asyncio.to_thread(lambda: _told(self._job(id)))

    async def jobs(self) -> list[TuningJob]:
        """See `JobService`."""
        return await asyncio.to_thread(lambda: [_told(job) for job in self._jobs()])

    async def cancel(self, id: str) -> TuningJob:
        """See `JobService`."""
        return await asyncio.to_thread(self._cancel, id)

    async def events(self, id: str) -> list[TuningEvent]:
        """See `JobService`."""
        return await asyncio.to_thread(lambda: _events(self._job(id)))

    async def checkpoints(self, id: str) -> list[TuningCheckpoint]:
        """See `JobService`."""

        def read() -> list[TuningCheckpoint]:
            run = open_run(self._job(id).facts.location)
            return [] if run is None else run_checkpoints(run, id)

        return await asyncio.to_thread(read)

    async def result(self, file_id: str) -> ResultFile:
        """See `JobService`."""
        return await asyncio.to_thread(self._result, file_id)

    # -- in a thread -----------------------------------------------------------------------------------------------

    @property
    def _server(self) -> JobsClient:
        if self._client is None:
            self._client = JobsClient(self._allowed.address or own_address())
        return self._client

    def _create(self, order: TuningOrder) -> TuningJob:
        active = sum(not job.is_over for job in self._jobs())
        if active >= self._allowed.max_active:
            raise OverloadedError(f"{active} jobs are under way, the most there may be: wait for one, or cancel it")
        id = new_http_id()
        run = run_name(order, id[-_MARK_CHARS:])
        cfg = compose(self._allowed, self._root, run, order, _rows)
        python = python_for(self._server, self._allowed.python)
        joined = None if self._allowed.address else own_ray()
        submit_run(self._server, cfg, python=python, id=id, request=asdict(order), ray_address=joined)
        job = self._server.get(id)
        try:
            note_job(self._root, job)
        except RunError as error:  # it is under way all the same
            logger.warning("job %s will be forgotten if this server is killed: %s", id, error)
        return _told(job)

    def _result(self, file_id: str) -> ResultFile:
        found: ResultFile | None = None
        if (parts := _FILE_ID.fullmatch(file_id)) is not None:
            for id in (HTTP_PREFIX + parts[1], parts[1]):  # of a resumed job the user may have chosen the id
                with suppress(UnknownJobError):
                    run = open_run(self._job(id).facts.location)
                    found = None if run is None else result_file(run, parts[2])
                    break
        if found is None:
            raise UnknownFileError(f"there is no file {file_id[:64]!r}: a job names its own as result_files")
        return found

    def _cancel(self, id: str) -> TuningJob:
        job = self._job(id)
        if not job.is_over:
            self._server.stop(id)
        return _told(self._server.get(id))

    def _jobs(self) -> list[Job]:
        """Those that were asked for over HTTP."""
        known = [job for job in self._server.jobs() if job.facts.request]
        ids = {job.id for job in known}
        return known + [job for job in remembered(self._root) if job.facts.request and job.id not in ids]

    def _job(self, id: str) -> Job:
        job: Job | None = None
        if ID.fullmatch(id):
            try:
                job = self._server.get(id)
            except UnknownJobError:  # of a Ray before this one, maybe
                job = next((job for job in remembered(self._root) if job.id == id), None)
        if job is None or not job.facts.request:
            raise UnknownJobError(f"there is no fine-tuning job {id[:64]!r}: GET /v1/fine_tuning/jobs lists them")
        return job


def _rows(location: str) -> int:
    from mmrl_ray.data.shards import ParquetDataset

    return ParquetDataset(location).rows


def _order(job: Job) -> TuningOrder:
    request: dict[str, Any] = dict(job.facts.request)
    return TuningOrder(**request)


def _told(job: Job) -> TuningJob:
    tokens: int | None = None
    files: tuple[str, ...] = ()
    if job.is_over:
        tokens = _of_run(job, trained_tokens)
        mark = job.id.removeprefix(HTTP_PREFIX)
        files = tuple(f"file-{mark}-{name}" for name in _of_run(job, results) or ())
    return TuningJob(
        id=job.id,
        order=_order(job),
        run=job.facts.run,
        status=_STATUSES[job.status],
        created_at=int(job.created),
        finished_at=int(job.ended) if job.is_over and job.ended is not None else None,
        error=job.reason if job.status == "failed" else None,
        trained_tokens=tokens,
        result_files=files,
    )


def _of_run(job: Job, read: Callable[[Any], T]) -> T | None:
    """What the run folder tells; None where it is not to be had: the job itself is known all the same."""
    try:
        run = open_run(job.facts.location)
        return None if run is None else read(run)
    except RunError:
        return None


def _events(job: Job) -> list[TuningEvent]:
    """In the order of what they tell of; of one second the later told first."""
    run = open_run(job.facts.location)
    told = [*_first(job), *(run_events(run, job.id, int(job.created)) if run is not None else ()), *_last(job)]
    numbered = sorted(enumerate(told), key=lambda item: (item[1].created_at, item[0]))
    return [event for _, event in reversed(numbered)]


def _first(job: Job) -> Iterator[TuningEvent]:
    yield TuningEvent(f"ftevent-{job.id}-created", int(job.created), "info", f"Created fine-tuning job: {job.id}")


def _last(job: Job) -> Iterator[TuningEvent]:
    messages: dict[Status, str] = {
        "succeeded": "The job has successfully completed",
        "failed": f"The job failed: {job.reason}",
        "stopped": "The job was cancelled",
    }
    if job.status in messages:
        level: Any = "error" if job.status == "failed" else "info"
        yield TuningEvent(f"ftevent-{job.id}-end", int(job.ended or job.created), level, messages[job.status])
