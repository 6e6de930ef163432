"""`mmrl submit` and `mmrl jobs`: what is checked here before anything is sent, and how a job is followed to its end."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from mmrl_ray.config import Config
from mmrl_ray.config.paths import refuse_missing, refuse_unseen, with_absolute_paths
from mmrl_ray.errors import ConfigError, JobError
from mmrl_ray.jobs.client import JobsClient, local_rays
from mmrl_ray.jobs.records import Job, follow
from mmrl_ray.jobs.submit import is_this_machine, python_for, resume_run, submit_run
from mmrl_ray.run_records.run_dir import RunDir
from mmrl_ray.training.cluster import configure_ray, read_token_again


def connect(address: str) -> JobsClient:
    """The job server at an address, with the token of this process's environment.

    Raises:
        ConfigError: no such address can be.
        JobError: no job server answers there, or it refuses the token.
    """
    configure_ray()
    read_token_again()
    return JobsClient(address)


def submit(
    client: JobsClient,
    cfg: Config,
    *,
    python: str | None = None,
    shared: Sequence[str] = (),
    id: str | None = None,
    chosen: bool = True,
) -> str:
    """Checks what can be checked from here, then sends the run; returns the job's id.

    Args:
        cfg: as it was written; its paths are those of this process.
        shared: folders that this machine shares with the cluster's nodes, under the same path.
        chosen: whether the user has named the cluster; else there may be only one on this machine.

    Raises:
        ConfigError: the config names paths that the cluster does not see, or that are not there.
        RunError: the run folder exists already.
        JobError: the cluster does not take the job.
    """
    cfg = with_absolute_paths(cfg)
    if wrong := [folder for folder in shared if not folder.startswith("/")]:
        raise ConfigError(f"--shared-paths {wrong[0]}: write an absolute path, which is the same on every node")
    here = is_this_machine(client)
    if not here:
        refuse_unseen(cfg, shared, f"the cluster at {client.address}")
    if "://" not in cfg.run.root and (here or Path(cfg.run.root).exists()):
        RunDir.require_new(cfg.run.root, cfg.run.name)
    if here:
        refuse_missing(cfg)
    store = _store_of(client.address, chosen=chosen) if here else None
    return submit_run(client, cfg, python=python_for(client, python), id=id, ray_address=store)


def resume(client: JobsClient, name: str, *, python: str | None = None, id: str | None = None) -> str:
    """Goes on with the run of a job, in a new job whose id is returned.

    Args:
        name: id of the job, or name of its run.

    Raises:
        UnknownJobError: there is no such job.
        JobError: a job is still at that run.
    """
    facts = client.find(name).facts
    store = _store_of(client.address) if is_this_machine(client) else None
    return resume_run(client, facts, python=python_for(client, python), id=id, ray_address=store)


def show_to_end(client: JobsClient, id: str) -> Job:
    """Copies the job's log to standard output until the job is over."""
    return follow(client, id, _print)


def outcome(job: Job) -> str | None:
    """One line about a job that did not succeed; None of one that did."""
    resume = f"go on with: mmrl jobs resume {job.id}"
    if job.status == "stopped":
        return f"job {job.id} was stopped; {resume}"
    if job.status == "failed":
        code = f"exit code {job.exit_code}" if job.driver_code is not None else "it did not run to an exit code"
        return f"job {job.id} failed ({code}): {job.reason}; {resume}"
    return None


def _store_of(address: str, *, chosen: bool = True) -> str | None:
    """The control store for a run to join: Ray would have it join any that is on this machine when it begins.

    Raises:
        ConfigError: there are several, and the user has named none.
    """
    servers = {each.url: each.store for each in local_rays() if each.url is not None}
    if not chosen and len(servers) > 1:
        named = " and ".join(servers)
        raise ConfigError(f"several Rays of this machine take jobs: {named}: name the one to use with --address")
    port = urlsplit(address).port
    return next((store for url, store in servers.items() if urlsplit(url).port == port), None)


def _print(text: str) -> None:
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except OSError as error:  # whoever read it is gone
        raise JobError(f"the log cannot be written: {error.strerror}") from error
