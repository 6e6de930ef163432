"""The end of a Ray that has jobs under way: they checkpoint first, and are remembered beside and in their run folders.

A Ray that is killed says nothing: what it was asked for over HTTP is noted in `.jobs` of the runs' root when it is
accepted, and how it ended is told by the run's own folder.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any, Protocol

from mmrl_ray.errors import RunError
from mmrl_ray.jobs.records import Job, JobFacts, Status
from mmrl_ray.jobs.submit import STOP_S
from mmrl_ray.run_records.control_files import read_status
from mmrl_ray.run_records.run_dir import RunDir
from mmrl_ray.run_records.run_owner import living_owner

JOB_FILE = "job.json"
_NOTES = ".jobs"
_ENDS: dict[str, Status] = {"finished": "succeeded", "failed": "failed"}
_LOOK_S = 0.5


class Stoppable(Protocol):
    """As much of `JobsClient` as it takes."""

    def jobs(self) -> list[Job]:
        """This project's jobs."""
        ...

    def stop(self, id: str) -> bool:
        """Asks a job to stop."""
        ...


def stop_jobs(server: Stoppable, say: Callable[[str], None], *, timeout_s: float = STOP_S) -> list[Job]:
    """Lets every job that is under way finish its step and checkpoint; returns them as they are then.

    Their runs' folders remember them, see `remembered`.

    Raises:
        JobError: the job server does not answer.
    """
    active = {job.id for job in server.jobs() if not job.is_over}
    for id in sorted(active):
        server.stop(id)
        say(f"job {id} finishes its step and writes a checkpoint")
    deadline = time.monotonic() + timeout_s
    while True:
        found = [job for job in server.jobs() if job.id in active]
        if all(job.is_over for job in found) or time.monotonic() >= deadline:
            break
        time.sleep(_LOOK_S)
    for job in found:
        try:
            run = RunDir.at(job.facts.location)
            ended = job.ended or time.time()
            run.write_json(JOB_FILE, _record(job, ended))
        except RunError as error:  # stopped before it had one
            say(f"job {job.id} left no run folder: {error}")
        else:
            say(f"job {job.id} is stopped; go on with: mmrl train --resume {job.facts.location}")
    return found


def note_job(root: str, job: Job) -> None:
    """Notes a job whose run will lie in the folder `root`, for `remembered`.

    Raises:
        RunError: nothing can be written there.
    """
    try:
        notes = RunDir.create(root, _NOTES)
    except RunError:  # it was there
        notes = RunDir.open(root, _NOTES)
    notes.write_json(f"{job.id}.json", _record(job, None))


def remembered(root: str) -> list[Job]:
    """Jobs of other Rays or such that are gone, of the runs in the folder `root`, as it stands with their runs.

    One that nobody goes on with is a stopped one.

    Raises:
        RunError: it cannot be read.
    """
    try:
        folder = RunDir.at(root)
    except RunError:
        return []
    found: dict[str, Job] = {}
    for name in folder.list():
        if folder.exists(f"{name}/{JOB_FILE}"):  # the run may have been moved since
            _remember(found, folder.read_json(f"{name}/{JOB_FILE}"), f"{root.rstrip('/')}/{name}")
    for name in folder.list(_NOTES):
        if name.removesuffix(".json") not in found:
            _remember(found, folder.read_json(f"{_NOTES}/{name}"), None)
    return list(found.values())


def _record(job: Job, ended: float | None) -> dict[str, Any]:
    return {"id": job.id, "created": job.created, "ended": ended, "metadata": job.facts.metadata()}


def _remember(found: dict[str, Job], said: Mapping[str, Any], location: str | None) -> None:
    facts = JobFacts.of(said.get("metadata"))
    if facts is None:
        return
    facts = facts if location is None else replace(facts, location=location)
    created = float(said["created"])
    last: Mapping[str, Any] = {}
    is_alive = False
    with suppress(RunError):  # it was not begun
        run = RunDir.at(facts.location)
        is_alive, last = living_owner(run) is not None, read_status(run)
    status = "running" if is_alive else _ENDS.get(last.get("state", ""), "stopped")
    ended = None if is_alive else float(said["ended"] or last.get("time") or created)
    found[said["id"]] = Job(said["id"], status, facts, created, ended, message=last.get("error") or "")
