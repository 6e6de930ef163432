"""The end of a Ray that has jobs under way: they checkpoint first, and are remembered in their run folders."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

from mmrl_ray.errors import RunError
from mmrl_ray.jobs.records import Job, JobFacts
from mmrl_ray.jobs.submit import STOP_S
from mmrl_ray.run_dir import RunDir

JOB_FILE = "job.json"
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
            run.write_json(
                JOB_FILE, {"id": job.id, "created": job.created, "ended": ended, "metadata": job.facts.metadata()}
            )
        except RunError as error:  # stopped before it had one
            say(f"job {job.id} left no run folder: {error}")
        else:
            say(f"job {job.id} is stopped; go on with: mmrl train --resume {job.facts.location}")
    return found


def remembered(root: str) -> list[Job]:
    """Jobs of a Ray that is gone, of the runs in the folder `root`, as stopped.

    Raises:
        RunError: it cannot be read.
    """
    try:
        folder = RunDir.at(root)
    except RunError:
        return []
    found: list[Job] = []
    for name in folder.list():
        if not folder.exists(f"{name}/{JOB_FILE}"):
            continue
        said = folder.read_json(f"{name}/{JOB_FILE}")
        facts = JobFacts.of(said.get("metadata"))
        if facts is not None:  # the run may have been moved since
            facts = replace(facts, location=f"{root.rstrip('/')}/{name}")
            found.append(Job(said["id"], "stopped", facts, float(said["created"]), float(said["ended"])))
    return found
