"""A run's status on a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from mmrl_ray.jobs.control import amounts
from mmrl_ray.telemetry.terminal import PlainTable, plain

_DECISIONS = 5
_WALL = ("step", "wait_plan")
"""Phases of the wall's time; others are sums over workers or learners."""


def render(status: Mapping[str, Any]) -> RenderableType:
    """Everything of `RunControl.status`, in words and tables."""
    parts: list[RenderableType] = [_facts(status)]
    if status.get("pool"):
        parts += [Text(), _workers(status["pool"])]
    if status.get("throughput"):
        parts += [Text(), _throughput(status["throughput"])]
    if decisions := status.get("scaling", {}).get("decisions", [])[-_DECISIONS:]:
        parts += [Text(), _decisions(decisions)]
    return Group(*parts)


def _facts(status: Mapping[str, Any]) -> PlainTable:
    table = PlainTable(
        box=None, show_header=False, show_edge=False, pad_edge=False, collapse_padding=True, padding=(0, 2)
    )
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for name, value in _rows(status):
        table.add_row(name, value)
    return table


def _rows(status: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    yield "run", f"{status['run']}: {_state(status)}"
    if status.get("error"):
        yield "error", str(status["error"])
    if "pool" not in status:
        return
    yield "step", f"{status['step']} of {status['steps']}, policy version {_or(status['policy_version'])}"
    yield "waiting", str(status["waiting"]) + (f"; to stop: {status['stopping']}" if status["stopping"] else "")
    line = status["metrics"]
    last = "" if not line else f"mean {line['staleness/mean']:.2f}, max {line['staleness/max']} in the last step; "
    yield "staleness", f"{last}at most {status['max_staleness']}"
    yield "queue", _queue(status)
    yield "workers", _scaling(status)
    if rate := status["throughput"]:
        per_second = f"{rate['samples_per_second']:.3g} completions, {rate['groups_per_second']:.3g} groups a second"
        yield "throughput", f"{per_second}, over {rate['steps']} steps"


def _state(status: Mapping[str, Any]) -> str:
    if status["alive"]:
        return str(status["state"])
    if status["state"] in ("starting", "running", "ending"):
        return f"dead: it was {status['state']}, and has said nothing for {status['age_s']:.0f} s"
    ended = datetime.fromtimestamp(status["time"]).astimezone()
    return f"{status['state']}, {ended:%Y-%m-%d %H:%M:%S}"


def _queue(status: Mapping[str, Any]) -> str:
    groups, buffer, pool = status["step_groups"], status["buffer"], status["pool"]
    parts = [
        f"{groups['arrived']} of {groups['asked']} groups of step {status['step']} have arrived",
        f"buffer {buffer['arrived']} arrived, {buffer['held']} held of {buffer['capacity']}",
        f"{pool['queued_assignments']} assignments wait for a worker",
    ]
    if status["evaluations"]:
        parts.append("an evaluation goes first")
    if status["quarantined"]:
        parts.append(f"{status['quarantined']} samples quarantined")
    return "; ".join(parts)


def _scaling(status: Mapping[str, Any]) -> str:
    scaling, pool = status["scaling"], status["pool"]
    bounds = f"between {scaling['min']} and {scaling['max']}" if scaling["max"] else f"at least {scaling['min']}"
    told = f"{pool['ready']} ready, {scaling['target']} wanted, {bounds}, {scaling['useful']} can work at a time"
    return f"{told}; {scaling['mode']}" + (f": {scaling['finding']}" if scaling["finding"] else "")


def _workers(pool: Mapping[str, Any]) -> PlainTable:
    table = PlainTable(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("worker", "state", "for", "version", "at", "groups", "where"):
        table.add_column(column, justify="right" if column in ("for", "version", "groups") else "left")
    for name, worker in pool["workers"].items():
        where = f"{worker['node']}, pid {worker['pid']}" if worker["pid"] else ""
        told = (f"{worker['seconds']:.0f} s", _or(worker["version"]), worker["at"] or "", str(worker["groups"]), where)
        table.add_row(name, worker["state"], *told)
    if pool["free"] is not None:
        free = f"each worker asks for {pool['demand']}; free in the cluster: {amounts(pool['free'])}"
        table.caption = plain(free, "table.caption")
    return table


def _throughput(rate: Mapping[str, Any]) -> PlainTable:
    table = PlainTable(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("phase")
    table.add_column("seconds a step", justify="right")
    seconds = rate["seconds"]
    for phase in (*_WALL, *sorted(set(seconds) - set(_WALL), key=lambda name: -seconds[name])):
        if phase in seconds:
            table.add_row(phase.replace("_", " "), f"{seconds[phase]:.3f}")
    return table


def _decisions(decisions: list[Mapping[str, Any]]) -> PlainTable:
    table = PlainTable(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("when", "workers", "why"):
        table.add_column(column)
    for decision in decisions:
        when = datetime.fromtimestamp(decision["time"]).astimezone()
        change = f"{decision['before']} → {decision['workers']}"
        table.add_row(f"{when:%H:%M:%S}", change, decision["reason"])
    return table


def _or(value: Any) -> str:
    return "–" if value is None else str(value)
