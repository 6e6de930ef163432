"""A run seen from outside, through its folder: its state on a terminal, and how many rollout workers it should have.

Whoever may write the folder may scale the run. `run_records/control_files.py` says what lies in it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from mmrl_ray.errors import ConfigError, RunError
from mmrl_ray.run_records.control_files import ScaleAnswer, ScaleRequest, put_request, read_status, take_answer
from mmrl_ray.run_records.run_dir import RunDir
from mmrl_ray.run_records.samples import newest_samples
from mmrl_ray.telemetry.terminal import PlainTable, plain

ALIVE = ("starting", "running", "ending")
_LOCAL_S = 0.2
_REMOTE_S = 1.0
_DECISIONS = 5
_LAYOUT: Mapping[str, Any] = {"box": None, "pad_edge": False, "padding": (0, 2, 0, 0)}
_WALL = ("step", "wait_plan")
"""Phases of the wall's time; others are sums over workers or learners."""


def list_runs(root: str, *, clock: Callable[[], float] = time.time) -> list[dict[str, Any]]:
    """The runs below a folder, by name: state, step of steps, when each was last heard of, reward before and after.

    None stands for what a run has not said: one that has just begun, or is of an older version.

    Raises:
        RunError: there is no such folder, or it cannot be read.
    """
    try:
        folder = RunDir.at(root)
    except RunError as error:
        if error.__cause__ is not None:  # storage that fails
            raise
        raise RunError(f"there is no folder {root}: name the one of run.root") from None
    return [run_facts(RunDir.open(root, name), clock) for name in folder.list() if folder.exists(f"{name}/config.yaml")]


def run_facts(run: RunDir, clock: Callable[[], float] = time.time) -> dict[str, Any]:
    """How one run stands, as `list_runs` tells it; a run that should have said something by now is `dead`."""
    status: Mapping[str, Any] = {}
    summary: Mapping[str, Any] = {}
    with contextlib.suppress(RunError):  # it has none yet, or none that this version reads
        status = RunControl(run, clock=clock).status()
    with contextlib.suppress(RunError):
        summary = run.read_json("summary.json")
    state = str(status.get("state") or summary.get("status") or "unknown").partition(":")[0]
    rewards = {
        f"reward_{side}": figures.get("measures", {}).get("reward", {}).get("value")
        for side in ("before", "after")
        if isinstance(figures := summary.get("eval", {}).get(side, {}), Mapping)
    }
    return {
        "run": run.name,
        "location": run.location,
        "state": "dead" if state in ALIVE and not status.get("alive") else state,
        "step": status.get("step"),
        "steps": status.get("steps"),
        "heard": status.get("time"),
        **rewards,
    }


class RunControl:
    """One run's folder, and what time it is."""

    def __init__(
        self,
        run: RunDir,
        *,
        clock: Callable[[], float] = time.time,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """`clock` gives Unix time."""
        self._run = run
        self._clock = clock
        self._sleep = sleep
        self._period_s = _LOCAL_S if run.is_local else _REMOTE_S

    def status(self) -> dict[str, Any]:
        """The newest status, or a RunError; with `alive`, and `age_s`: seconds since the run last said something."""
        status = read_status(self._run)
        age = max(0.0, self._clock() - status["time"])
        alive = status["state"] in ALIVE and age <= status["next_within_s"]
        return {**status, "age_s": age, "alive": alive}

    def shown(self) -> dict[str, Any]:
        """`status`, and beside it the newest `samples`: pictures with their best and worst captions, if there are any.

        Raises:
            RunError: as `status`.
        """
        found = self.status()
        samples = newest_samples(self._run)
        return found if samples is None else {**found, "samples": samples}

    def request(self, workers: int | None, *, by: str, timeout_s: float) -> ScaleAnswer:
        """Asks the run for so many rollout workers, or None to leave it to the run; returns once it said yes.

        Raises:
            ConfigError: the run refuses, and why.
            RunError: it does not live, or did not answer within `timeout_s`; then it will not come to that later.
        """
        self._require_alive(self.status())
        deadline = self._clock() + timeout_s
        name = put_request(self._run, ScaleRequest(workers=workers, by=by, expires=deadline))
        while (answer := take_answer(self._run, name)) is None:
            if self._clock() >= deadline:
                self._run.delete(name)
                is_starting = self.status()["state"] == "starting"
                why = "it is still starting: try again later" if is_starting else "mmrl status says how it stands"
                told = f"did not answer within {timeout_s:g} s, and was not changed; {why}"
                raise RunError(f"{self._run.location} {told}")
            self._sleep(self._period_s)
        if not answer.accepted:
            raise ConfigError(answer.message)
        return answer

    def wait_in_effect(self, answer: ScaleAnswer, *, timeout_s: float) -> str:
        """Returns, with a line about it, when the run has just the workers that `answer` promised, each ready.

        Raises:
            RunError: somebody asked for another number meanwhile, the run ended, or it did not come to that in time;
                the message says what is missing. What was asked for stays asked for.
        """
        deadline = self._clock() + timeout_s
        while True:
            status = self.status()
            self._require_alive(status)
            missing: str | None = "the run has not said anything since"
            if status.get("scaling", {}).get("requests", 0) >= answer.number:
                if (now := status["scaling"]["target"]) != answer.target:
                    why = status["scaling"]["decisions"][-1]["reason"]
                    raise RunError(f"{now} rollout workers are wanted by now, not {answer.target}: {why}")
                missing = what_is_missing(status)
                if missing is None:
                    return f"{answer.target} rollout workers are ready"
            if self._clock() >= deadline:
                raise RunError(f"not in effect after {timeout_s:g} s, but still asked for: {missing}")
            self._sleep(self._period_s)

    def _require_alive(self, status: Mapping[str, Any]) -> None:
        if status["alive"] and status["state"] != "ending":
            return
        if status["state"] not in ALIVE:
            told = f"the run is {status['state']}" + (f": {status['error']}" if status.get("error") else "")
        elif status["alive"]:
            told = "the run has taken its last step and is about to end"
        else:
            told = f"the run has died: it last said something {status['age_s']:.0f} s ago"
        raise RunError(f"{self._run.location}: {told}; only a run in progress can be scaled")


def what_is_missing(status: Mapping[str, Any]) -> str | None:
    """Why a run has not yet the workers that it should have, or None when it has."""
    pool = status["pool"]
    workers: Mapping[str, Mapping[str, Any]] = pool["workers"]
    by_state: dict[str, list[str]] = {}
    for name, worker in workers.items():
        by_state.setdefault(worker["state"], []).append(name)
    ready = len(by_state.get("ready", [])) + len(by_state.get("busy", []))
    parts = [f"{ready} of {pool['target']} rollout workers are ready"] if ready != pool["target"] else []
    if placing := by_state.get("placing"):
        free = "" if pool["free"] is None else f", and {amounts(pool['free'])} is free in the cluster"
        longest = max(workers[name]["seconds"] for name in placing)
        each = f"each asks for {pool['demand']}" if len(placing) > 1 else f"it asks for {pool['demand']}"
        parts.append(f"being placed for {longest:.0f} s: {', '.join(placing)} ({each}{free})")
    if starting := by_state.get("starting"):
        parts.append(f"loading the model: {', '.join(starting)}")
    if retiring := by_state.get("retiring"):
        parts.append(f"finishing what they are at: {', '.join(retiring)}")
    return "; ".join(parts) or None


def amounts(resources: Mapping[str, float]) -> str:
    """CPUs and GPUs in Ray's words."""
    parts = [f"{name}: {amount:g}" for name, amount in sorted(resources.items()) if amount]
    return "{" + ", ".join(parts) + "}" if parts else "nothing"


def render(status: Mapping[str, Any]) -> RenderableType:
    """Everything of `RunControl.status`, in words and tables."""
    parts: list[RenderableType] = [_fact_lines(status)]
    if status.get("pool"):
        parts += [Text(), _workers(status["pool"])]
    if status.get("throughput"):
        parts += [Text(), _throughput(status["throughput"])]
    if samples := status.get("samples"):
        parts += [Text(), _samples(samples)]
    if decisions := status.get("scaling", {}).get("decisions", [])[-_DECISIONS:]:
        parts += [Text(), _decisions(decisions)]
    return Group(*parts)


def _fact_lines(status: Mapping[str, Any]) -> PlainTable:
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
    if told := _held_out(status.get("held_out", {})):
        yield "held out", told
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


def _held_out(found: Mapping[str, Any]) -> str:
    """Of evaluations beside the learning; nothing before the first."""
    parts = [f"step {step} under way" for step in found.get("open", ())]
    if found.get("best") is not None:
        figures = [f"{k} {v:.4g}" for k, v in found.items() if k not in ("step", "best") and isinstance(v, float)]
        parts = [f"step {found['step']}: {', '.join(figures)}", f"best: step {found['best']}", *parts]
    return "; ".join(parts)


def _queue(status: Mapping[str, Any]) -> str:
    groups, buffer, pool = status["step_groups"], status["buffer"], status["pool"]
    parts = [
        f"{groups['arrived']} of {groups['asked']} groups of step {status['step']} have arrived",
        f"buffer {buffer['arrived']} arrived, {buffer['held']} held of {buffer['capacity']}",
        f"{pool['queued_assignments']} assignments wait for a worker",
    ]
    if status["evaluations"] > len(status.get("held_out", {}).get("open", ())):  # those wait for the rest
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
    columns = ("worker", "state", "for", "version", "at", "groups", "where")
    table = PlainTable(*columns, right=("for", "version", "groups"), **_LAYOUT)
    for name, worker in pool["workers"].items():
        where = f"{worker['node']}, pid {worker['pid']}" if worker["pid"] else ""
        told = (f"{worker['seconds']:.0f} s", _or(worker["version"]), worker["at"] or "", str(worker["groups"]), where)
        table.add_row(name, worker["state"], *told)
    if pool["free"] is not None:
        free = f"each worker asks for {pool['demand']}; free in the cluster: {amounts(pool['free'])}"
        table.caption = plain(free, "table.caption")
    return table


def _throughput(rate: Mapping[str, Any]) -> PlainTable:
    table = PlainTable("phase", "seconds a step", right=("seconds a step",), **_LAYOUT)
    seconds = rate["seconds"]
    for phase in (*_WALL, *sorted(set(seconds) - set(_WALL), key=lambda name: -seconds[name])):
        if phase in seconds:
            table.add_row(phase.replace("_", " "), f"{seconds[phase]:.3f}")
    return table


def _samples(found: Mapping[str, Any]) -> PlainTable:
    """The newest pictures: a fixed one is the same each time, a fresh one is of the step itself."""
    table = PlainTable("picture", "reward", "best and worst caption", right=("reward",), **_LAYOUT)
    for each in found["pictures"]:
        best, worst = each["best"], each["worst"]
        table.add_row(f"{each['kind']} {each['sample']}", f"{best['reward']:.3f}", best["caption"])
        if worst != best:
            table.add_row("", f"{worst['reward']:.3f}", worst["caption"])
    version = f", captions of policy version {_or(found.get('policy_version'))}"
    table.caption = plain(
        f"after step {found['step']}{version}; the pictures are in samples/ and images/", "table.caption"
    )
    return table


def _decisions(decisions: list[Mapping[str, Any]]) -> PlainTable:
    table = PlainTable("when", "workers", "why", **_LAYOUT)
    for decision in decisions:
        when = datetime.fromtimestamp(decision["time"]).astimezone()
        change = f"{decision['before']} → {decision['workers']}"
        table.add_row(f"{when:%H:%M:%S}", change, decision["reason"])
    return table


def _or(value: Any) -> str:
    return "–" if value is None else str(value)
