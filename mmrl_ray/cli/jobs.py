"""Commands that submit runs as jobs and follow them, and that list, show and scale runs by their folders."""

from __future__ import annotations

import contextlib
import json
import time
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmrl_ray.cli.program import (
    AsJson,
    ConfigFile,
    Overrides,
    app,
    command,
    jobs_app,
    load,
    runs_app,
    show_columns,
    show_json,
)
from mmrl_ray.errors import ConfigError

if TYPE_CHECKING:
    from mmrl_ray.jobs.client import JobsClient
    from mmrl_ray.jobs.records import Job

_DEFAULT_ADDRESS = "http://127.0.0.1:8265"
_ADDRESS = Annotated[
    str,
    typer.Option(
        "--address",
        envvar="RAY_API_SERVER_ADDRESS",
        metavar="URL",
        help="The cluster's job server; its token comes from RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH.",
    ),
]
_JOB = Annotated[str, typer.Argument(metavar="JOB|RUN", help="A job's id, or the name of its run.")]
_PYTHON = Annotated[
    str | None,
    typer.Option(
        "--python",
        metavar="PROGRAM",
        help="The cluster's interpreter: python3 of its PATH, or this one where the cluster is this machine.",
        show_default=False,
    ),
]
_WAIT = Annotated[bool, typer.Option("--wait/--no-wait", help="Follow the log and end with the job's exit code.")]
_ID = Annotated[str | None, typer.Option("--id", help="What the job is called; made of the run's name otherwise.")]
_RUN = Annotated[str, typer.Argument(metavar="RUN", help="A run folder: a path, or a location as in run.root.")]
_WATCH_S = 1.0


@command(app, "submit")
def submit(
    ctx: typer.Context,
    config: ConfigFile,
    address: _ADDRESS = _DEFAULT_ADDRESS,
    set_: Overrides = None,
    shared: Annotated[
        list[str] | None,
        typer.Option(
            "--shared-paths",
            metavar="FOLDER",
            help="Paths below it are the same on every node; may be repeated.",
            show_default=False,
        ),
    ] = None,
    python: _PYTHON = None,
    id: _ID = None,
    wait: _WAIT = True,
) -> None:
    """Train on a cluster: send the config and this program as a job, follow it, end with its exit code."""
    cfg = load(config, set_)
    from mmrl_ray.training import jobs

    client = jobs.connect(address)
    source = ctx.get_parameter_source("address")
    chosen = source is None or source.name != "DEFAULT"
    _begun(client, jobs.submit(client, cfg, python=python, shared=shared or (), id=id, chosen=chosen), wait)


@command(jobs_app, "list")
def show(address: _ADDRESS = _DEFAULT_ADDRESS, as_json: AsJson = False) -> None:
    """List the jobs that the cluster remembers, the newest first."""
    found = _client(address).jobs()
    if as_json:
        show_json([_facts(job) for job in found])
        return
    rows = [("JOB", "STATUS", "RUN", "BEGAN", "BY")]
    show_columns(rows + [(j.id, j.status, j.facts.run, _time(j.created), j.facts.by) for j in found])


@command(jobs_app, "status")
def status(name: _JOB, address: _ADDRESS = _DEFAULT_ADDRESS, as_json: AsJson = False) -> None:
    """Say how a job is."""
    job = _client(address).find(name)
    if as_json:
        show_json(_facts(job))
        return
    lines = {
        "job": job.id,
        "status": job.status,
        "run": job.facts.location,
        "task": job.facts.task,
        "by": job.facts.by,
        "began": _time(job.created),
        "ended": _time(job.ended),
        "exit code": str(job.exit_code) if job.is_over else "",
        "reason": job.reason if job.status == "failed" else "",
    }
    for label, value in lines.items():
        if value:
            typer.echo(f"{label:<10}{value}")


@command(jobs_app, "logs")
def logs(
    name: _JOB,
    address: _ADDRESS = _DEFAULT_ADDRESS,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job is over.")] = False,
) -> None:
    """Print a job's log; with --follow end with the job's exit code."""
    client = _client(address)
    job = client.find(name)
    if follow:
        _follow(client, job.id)
    else:
        typer.echo(client.logs(job.id), nl=False)


@command(jobs_app, "stop")
def stop(name: _JOB, address: _ADDRESS = _DEFAULT_ADDRESS) -> None:
    """Let a job finish its step, write a checkpoint and end, as Ctrl-C does."""
    from mmrl_ray.jobs.submit import STOP_S

    client = _client(address)
    job = client.find(name)
    if client.stop(job.id):
        typer.echo(f"job {job.id} is asked to stop: it finishes its step, and is killed if that takes {STOP_S} s")
    else:
        typer.echo(f"job {job.id} is over already: {client.get(job.id).status}")


@command(jobs_app, "resume")
def resume(
    name: _JOB, address: _ADDRESS = _DEFAULT_ADDRESS, python: _PYTHON = None, id: _ID = None, wait: _WAIT = True
) -> None:
    """Go on with a job's run from its newest checkpoint, in a new job."""
    from mmrl_ray.training import jobs

    client = _client(address)
    _begun(client, jobs.resume(client, name, python=python, id=id), wait)


def _client(address: str) -> JobsClient:
    from mmrl_ray.training.jobs import connect

    return connect(address)


def _begun(client: JobsClient, id: str, wait: bool) -> None:
    if not wait:
        typer.echo(id)
        return
    typer.echo(f"job {id}: Ctrl-C leaves it running; mmrl jobs stop {id} ends it", err=True)
    _follow(client, id)


def _follow(client: JobsClient, id: str) -> None:
    from mmrl_ray.training.jobs import outcome, show_to_end

    try:
        job: Job = show_to_end(client, id)
    except KeyboardInterrupt:
        typer.echo(f"job {id} goes on; follow it again with: mmrl jobs logs {id} --follow", err=True)
        raise
    line = outcome(job)
    if line is not None:
        typer.echo(f"{typer.style('error:', fg='red')} {line}", err=True)
        raise typer.Exit(job.exit_code)


def _facts(job: Job) -> dict[str, Any]:
    """For programs: times in Unix seconds, and nothing where there is nothing."""
    return {
        "job": job.id,
        "status": job.status,
        "run": job.facts.run,
        "location": job.facts.location,
        "task": job.facts.task,
        "by": job.facts.by,
        "began": job.created,
        "ended": job.ended,
        "exit_code": job.exit_code if job.is_over else None,
        "reason": job.reason if job.status == "failed" else None,
    }


def _time(seconds: float | None) -> str:
    return "" if seconds is None else f"{datetime.fromtimestamp(seconds):%Y-%m-%d %H:%M:%S}"


@command(runs_app, "list")
def list_(
    root: Annotated[
        str, typer.Argument(metavar="[ROOT]", help="Folder of runs, or a location as in run.root.")
    ] = "runs",
    as_json: AsJson = False,
) -> None:
    """List the runs below a folder: how each stands, and what its reward became."""
    from mmrl_ray.jobs.control import list_runs

    found = list_runs(root)
    if as_json:
        show_json(found)
        return
    rows = [("RUN", "STATE", "STEP", "LAST HEARD", "REWARD BEFORE", "AFTER")]
    for run in found:
        when = "" if run["heard"] is None else f"{datetime.fromtimestamp(run['heard']):%Y-%m-%d %H:%M}"
        step = "" if run["step"] is None else f"{run['step']}/{run['steps']}"
        before, after = ("" if run[key] is None else f"{run[key]:.4f}" for key in ("reward_before", "reward_after"))
        rows.append((run["run"], run["state"], step, when, before, after))
    show_columns(rows)


@command(app, "status")
def run_status(
    run: _RUN,
    watch: Annotated[bool, typer.Option("--watch", help="Show it again every second, until the run ends.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON: one line each time.")] = False,
) -> None:
    """Show a run's workers, versions, staleness, queue, throughput and newest captions, and what waits for what."""
    from rich.console import Console
    from rich.live import Live

    from mmrl_ray.jobs.control import RunControl, render
    from mmrl_ray.run_records.run_dir import RunDir

    control = RunControl(RunDir.at(run))
    found = control.shown()
    console = Console(highlight=False)
    if not watch:
        typer.echo(json.dumps(found)) if as_json else console.print(render(found))
        return
    with contextlib.suppress(KeyboardInterrupt):  # how a watcher leaves; the run goes on
        if as_json:
            typer.echo(json.dumps(found))
            while found["alive"]:
                time.sleep(_WATCH_S)
                found = control.shown()
                typer.echo(json.dumps(found))
            return
        with Live(render(found), console=console, auto_refresh=False) as live:
            while found["alive"]:
                time.sleep(_WATCH_S)
                found = control.shown()
                live.update(render(found), refresh=True)


@command(app, "scale")
def scale(
    run: _RUN,
    workers: Annotated[
        str, typer.Option("--rollout-workers", metavar="N|auto", help="How many; `auto`: as the run sees fit.")
    ],
    timeout_s: Annotated[float, typer.Option("--timeout", min=1, help="Seconds to wait until it is so.")] = 120.0,
) -> None:
    """Change how many rollout workers a run in progress has; returns when it has them."""
    from mmrl_ray.jobs.control import RunControl
    from mmrl_ray.jobs.submit import submitter
    from mmrl_ray.run_records.control_files import MAX_WORKERS
    from mmrl_ray.run_records.run_dir import RunDir

    count = None
    if workers != "auto":
        if not workers.isdecimal() or not 1 <= int(workers[:9]) <= MAX_WORKERS or len(workers) > 9:
            raise ConfigError(f"--rollout-workers {workers}: give a number from 1 to {MAX_WORKERS:,}, or auto")
        count = int(workers)
    control = RunControl(RunDir.at(run))
    began = time.monotonic()
    answer = control.request(count, by=submitter(), timeout_s=timeout_s)
    typer.echo(answer.message)
    if count is not None:
        left = max(1.0, timeout_s - (time.monotonic() - began))
        typer.echo(f"{control.wait_in_effect(answer, timeout_s=left)}, {time.monotonic() - began:.1f} s after asking")
