"""Puts a run, or the rest of one, onto a cluster as a job."""

from __future__ import annotations

import getpass
import shlex
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from mmrl_ray.config import Config
from mmrl_ray.config.load import dump_config
from mmrl_ray.errors import JobError
from mmrl_ray.jobs.package import CONFIG_FILE, own_code, packed
from mmrl_ray.jobs.records import Job, JobFacts, new_http_id, new_id
from mmrl_ray.run_dir import run_location

DEFAULT_PYTHON = "python3"
"""On the cluster's PATH, unless another is named. On this machine alone it is the one that runs here."""
STOP_S = 600
"""A job that is stopped has so long to finish its step and to write a checkpoint, then it is killed."""
_ENVIRONMENT = {
    # As Ctrl-C does: the run finishes its step, writes a checkpoint, and says how to go on.
    "RAY_JOB_STOP_SIGNAL": "SIGINT",
    "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_S),
    # See `runs/cluster.py`.
    "GOMP_SPINCOUNT": "1000",
}


class JobServer(Protocol):
    """As much of `JobsClient` as it takes."""

    def hosts(self) -> list[str]:
        """Host names of the cluster's nodes."""
        ...

    def jobs(self) -> list[Job]:
        """This project's jobs, the newest first."""
        ...

    def submit(self, id: str, entrypoint: str, folder: Any, facts: JobFacts, environment: Mapping[str, str]) -> None:
        """See `JobsClient.submit`."""
        ...


def submit_run(
    server: JobServer,
    cfg: Config,
    *,
    python: str = DEFAULT_PYTHON,
    id: str | None = None,
    request: Mapping[str, Any] | None = None,
    ray_address: str | None = None,
) -> str:
    """Sends a run; `cfg` names places that the cluster sees. Returns the job's id.

    Args:
        server: the cluster's.
        cfg: resolved.
        python: the interpreter on the cluster.
        id: of the job; by default one with the run's name in it.
        request: of whoever asked over HTTP; see `JobFacts`.
        ray_address: of the cluster's control store, for the run to join; by default what Ray tells its jobs, which on
            a machine with several clusters may be another one.

    Raises:
        JobError: another job is at this run, or Ray does not take it.
    """
    location = run_location(cfg.run.root, cfg.run.name)
    code, text = own_code(cfg.reward, cfg.algorithm), dump_config(cfg)
    facts = JobFacts(cfg.run.name, location, submitter(), "train", request or {}, code, text)
    command = f"train {CONFIG_FILE}" + (f" --address {shlex.quote(ray_address)}" if ray_address else "")
    return _send(server, facts, command, text, python, id)


def resume_run(server: JobServer, facts: JobFacts, *, python: str = DEFAULT_PYTHON, id: str | None = None) -> str:
    """Sends a job that goes on with the run of another one from its newest checkpoint; returns the new job's id.

    The config goes along, for the case that the other was stopped before there was a run folder. What was asked for
    over HTTP is known there again, as a job of its own.

    Raises:
        JobError: a job is still at this run, or Ray does not take it.
    """
    if facts.code and not Path(facts.code).is_dir():
        raise JobError(
            f"job of {facts.run}: its own reward functions are in {facts.code} of {facts.by}: resume it from there"
        )
    again = JobFacts(facts.run, facts.location, submitter(), "resume", facts.request, facts.code, facts.config)
    if facts.config:
        return _send(server, again, f"train {CONFIG_FILE} --resume-or-start", facts.config, python, id)
    return _send(server, again, f"train --resume {shlex.quote(facts.location)}", None, python, id)


def python_for(server: JobServer, named: str | None) -> str:
    """The interpreter for a job: the one that was named, else this one where the cluster is this machine."""
    if named is not None:
        return named
    return sys.executable if is_this_machine(server) else DEFAULT_PYTHON


def is_this_machine(server: JobServer) -> bool:
    """Whether all nodes of the cluster see this machine's files, for they are this machine.

    Asked of the cluster, since an address says nothing: that of a forwarded port is a loopback one, too.
    """
    return server.hosts() == [socket.gethostname()]


def submitter() -> str:
    """Who submits, for the job's record."""
    try:
        name = getpass.getuser()
    except (KeyError, OSError):  # a container's user that has no name
        name = "unknown"
    return f"{name}@{socket.gethostname()}"


def _send(server: JobServer, facts: JobFacts, command: str, config: str | None, python: str, id: str | None) -> str:
    busy = next((job for job in server.jobs() if not job.is_over and job.facts.location == facts.location), None)
    if busy is not None:
        raise JobError(
            f"job {busy.id} is {busy.status} and writes {facts.location}: stop it first (mmrl jobs stop {busy.id}), "
            "or choose another run.name"
        )
    id = id or (new_http_id() if facts.request else new_id(facts.run))
    # `exec`: the shell that Ray starts makes way for the interpreter, which then gets the signals itself.
    entrypoint = f"exec {shlex.quote(python)} -m mmrl_ray.cli {command}"
    with packed(config, code=facts.code) as folder:
        server.submit(id, entrypoint, folder, facts, _ENVIRONMENT)
    return id
