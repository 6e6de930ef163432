"""Commands that list runs, look at one in progress and scale it, through their folders."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from datetime import datetime
from typing import Annotated

import typer

from mmrl_ray.cli.groups import app, runs_app
from mmrl_ray.cli.guard import command
from mmrl_ray.cli.options import AsJson, show_columns, show_json
from mmrl_ray.errors import ConfigError

_RUN = Annotated[str, typer.Argument(metavar="RUN", help="A run folder: a path, or a location as in run.root.")]
_WATCH_S = 1.0


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
def status(
    run: _RUN,
    watch: Annotated[bool, typer.Option("--watch", help="Show it again every second, until the run ends.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON: one line each time.")] = False,
) -> None:
    """Show a run's workers, versions, staleness, queue and throughput, and what waits for what."""
    from rich.console import Console
    from rich.live import Live

    from mmrl_ray.jobs.control import RunControl
    from mmrl_ray.jobs.status_view import render
    from mmrl_ray.run_dir import RunDir

    control = RunControl(RunDir.at(run))
    found = control.status()
    console = Console(highlight=False)
    if not watch:
        typer.echo(json.dumps(found)) if as_json else console.print(render(found))
        return
    with contextlib.suppress(KeyboardInterrupt):  # how a watcher leaves; the run goes on
        if as_json:
            typer.echo(json.dumps(found))
            while found["alive"]:
                time.sleep(_WATCH_S)
                found = control.status()
                typer.echo(json.dumps(found))
            return
        with Live(render(found), console=console, auto_refresh=False) as live:
            while found["alive"]:
                time.sleep(_WATCH_S)
                found = control.status()
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
    from mmrl_ray.rollouts.control_files import MAX_WORKERS
    from mmrl_ray.run_dir import RunDir

    count = None
    if workers != "auto":
        if not workers.isdecimal() or not 1 <= int(workers[:9]) <= MAX_WORKERS or len(workers) > 9:
            raise ConfigError(f"--rollout-workers {workers}: give a number from 1 to {MAX_WORKERS:,}, or auto")
        count = int(workers)
    control = RunControl(RunDir.at(run))
    began = time.monotonic()
    answer = control.request(count, by=_who(), timeout_s=timeout_s)
    typer.echo(answer.message)
    if count is not None:
        left = max(1.0, timeout_s - (time.monotonic() - began))
        typer.echo(f"{control.wait_in_effect(answer, timeout_s=left)}, {time.monotonic() - began:.1f} s after asking")


def _who() -> str:
    return f"{os.environ.get('USER') or os.getuid()}@{socket.gethostname()}"
