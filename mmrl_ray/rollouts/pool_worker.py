"""One rollout worker: what the pool knows of it, and the actor, a thin one around an engine.

A run returns its parts as separate return values of one actor call: what the controller reads (the light result with
its record rows), then parcels of groups. The caller of an actor owns what the call returns, so the groups outlive the
worker that made them, each parcel is freed by itself, and none of more than 100 KB passes through the caller. The first
value does: rows that lay on the worker's node until their step was written would be gone with that node.
(`ray.put(..., _owner=)`, which was made for owning by another, is gone since Ray 2.56.)
"""

from __future__ import annotations

import gc
import logging
import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import ray
import torch
from ray import cloudpickle

from mmrl_ray.data.samples import Sample
from mmrl_ray.errors import RolloutError
from mmrl_ray.experience.carriers import ScoredGroup
from mmrl_ray.rollouts.group_codec import Parcelled, pack
from mmrl_ray.rollouts.types import Assignment, AssignmentResult, Collected, Engine, EngineFactory
from mmrl_ray.rollouts.weights import decode_state
from mmrl_ray.telemetry import table
from mmrl_ray.telemetry.logs import CONTEXT, LogFormat, start_logging
from mmrl_ray.telemetry.meter import Meter
from mmrl_ray.telemetry.ray_meter import RayMeter

logger = logging.getLogger(__name__)

WEIGHTS_TIMEOUT_S = 120.0
"""A worker that has not got a version's weights from the object store by then is lost."""


@dataclass(frozen=True, slots=True)
class Started:
    """A worker is ready."""

    pid: int
    node: str


@dataclass(frozen=True, slots=True)
class WorkerCall:
    """What a worker was asked, and where its answer will be."""

    method: Literal["ping", "start", "prepare", "run"]
    answer: Any
    """Reference to what the call returns; of a run to the first, light value."""
    parts: tuple[Any, ...] = ()
    """References to a run's parcels."""


@dataclass(slots=True)
class PoolWorker:
    """What the pool knows about one worker, and how it asks it."""

    id: int
    """Its number, from 0."""
    name: str
    handle: Any
    """Of the actor."""
    state: Literal["placing", "starting", "ready"]
    since: float
    """When it entered `state`, or last had nothing more to do."""
    first: bool
    """One of those the run began with."""
    bundle: int | None = None
    """Of the GPU that it shares with a learner."""
    place: Started | None = None
    call: WorkerCall | None = None
    """The one under way."""
    probed: float = 0.0
    retiring: bool = False
    version: int | None = None
    """Policy version of the assignment it was given last."""
    groups: int = 0
    """Groups that it has handed back."""

    @property
    def probe_pending(self) -> bool:
        """Whether it has yet to answer a short call that it got while it was idle."""
        return self.state == "ready" and self.call is not None and self.call.method in ("ping", "prepare")

    def ask(self, method: Literal["ping", "start", "prepare"], *arguments: Any) -> None:
        """Calls a method other than `run`."""
        self.call = WorkerCall(method, getattr(self.handle, method).remote(*arguments))

    def give(self, assignment: Assignment) -> None:
        """Has it run an assignment."""
        self.version = assignment.version
        light, *parts = self.handle.run.options(num_returns=1 + len(assignment.groups)).remote(assignment)
        self.call = WorkerCall("run", light, tuple(parts))

    def describe(self, now: float, assignment: Assignment | None, since: float | None) -> dict[str, Any]:
        """For the run's status: what it is at, and for how long, by the clock that says `now`."""
        state = "retiring" if self.retiring else "busy" if assignment is not None else self.state
        return {
            "state": state,
            "seconds": now - (self.since if since is None else since),
            "version": self.version,
            "at": None if assignment is None else assignment.describe(),
            "groups": self.groups,
            "pid": self.place and self.place.pid,
            "node": self.place and self.place.node,
        }


class RolloutWorker:
    """Runs one assignment at a time. Started empty, so that being placed and being loaded are told apart."""

    def __init__(self, name: str, run: str, factory: EngineFactory, log_format: LogFormat = "text") -> None:
        self.name = name
        self._log_format = log_format
        self._meter: Meter = RayMeter(run=run, worker=name)
        self._run = run
        self._factory = factory
        self._engine: Engine | None = None

    def ping(self) -> str:
        """Answers as soon as the actor is placed and idle."""
        return "pong"

    def start(self) -> Started:
        """Builds the engine.

        Raises:
            MMRLError: model, adapter or reward cannot be used, on any worker.
        """
        start_logging(self._log_format, run=self._run, role=self.name, worker=self.name)
        self._engine = self._factory(self.name)
        gc.freeze()  # the model and all modules stay: a look at them for rubbish would hold up a step
        logger.info("the engine is built")
        return Started(os.getpid(), socket.gethostname())

    def prepare(self, samples: Sequence[Sample]) -> None:
        """Has the engine begin with what may come next; returns at once."""
        if self._engine is not None:
            self._engine.prepare(samples)

    def run(self, assignment: Assignment) -> tuple[Any, ...]:
        """(light result with its rows, parcel 0, parcel 1, …): 1 + `len(assignment.groups)` values.

        None stands for each parcel that was not needed. Broken samples are values in the result. Any exception means
        that the worker itself cannot be trusted any more; the pool replaces it.
        """
        if self._engine is None:
            raise RolloutError(f"worker {self.name} was given assignment {assignment.id} before it was started")
        step = assignment.groups[0].key.step
        CONTEXT.put(step=step if step >= 0 else None)  # an evaluation is of no step
        result = self._engine.run(assignment, lambda: _fetch_weights(assignment))
        export_assignment_metrics(self._meter, result)
        return split_result(assignment, result, self._run)


def _fetch_weights(assignment: Assignment) -> Mapping[str, torch.Tensor] | None:
    if not assignment.weights:
        return None
    return decode_state(ray.get(assignment.weights[0], timeout=WEIGHTS_TIMEOUT_S))


def split_result(assignment: Assignment, result: AssignmentResult, run: str) -> tuple[Any, ...]:
    """A result with payloads in place as the values of `RolloutWorker.run`."""
    parcels, groups = pack(run, result.groups)
    unused = (None,) * (len(assignment.groups) - len(parcels))
    light = Collected(replace(result, groups=tuple(groups)), tuple(parcel.rows for parcel in parcels))
    return (light, *parcels, *unused)


def join_result(light: Collected, parcels: Sequence[Any]) -> Collected:
    """A light result with references to its parcels in place."""
    groups = tuple(_with_parcel(group, parcels) for group in light.result.groups)
    return replace(light, result=replace(light.result, groups=groups))


def _with_parcel(group: ScoredGroup, parcels: Sequence[Any]) -> ScoredGroup:
    at: Parcelled = group.payload
    return replace(group, payload=Parcelled(parcels[at.parcel], at.place))


@dataclass(frozen=True, slots=True)
class PackedFactory:
    """An `EngineFactory` that is unpickled where it is called.

    What it needs, the model's half of the project and the user's reward code, takes 150 MB of a process and seconds:
    the controller passes it on and has no use for it.
    """

    pickled: bytes

    @classmethod
    def of(cls, factory: EngineFactory) -> PackedFactory:
        """Packs it as Ray would."""
        return cls(cloudpickle.dumps(factory))

    def __call__(self, worker: str) -> Engine:
        """Unpickles the factory, in the worker's process, and builds the engine of `worker` with it."""
        factory: EngineFactory = cloudpickle.loads(self.pickled)
        return factory(worker)


def export_assignment_metrics(meter: Meter, result: AssignmentResult) -> None:
    """Exports the metrics of one assignment, in the worker's process."""
    for phase, seconds in result.timings.items():
        meter.add(table.WORKER_SECONDS, seconds, phase=phase)
    meter.observe(table.ASSIGNMENT_SECONDS, sum(result.timings.values()))
    meter.set(table.WORKER_VERSION, result.version)
    meter.add(table.WORKER_GROUPS, len(result.groups))
    meter.add(table.WORKER_TOKENS, sum(group.prompt_tokens for group in result.groups), kind="prompt")
    meter.add(table.WORKER_TOKENS, sum(sum(group.completion_tokens) for group in result.groups), kind="completion")
    for name, found in (("vision_hits", "hit"), ("vision_misses", "miss")):
        meter.add(table.WORKER_VISION, sum(group.counters.get(name, 0) for group in result.groups), result=found)
    for kind, name in (("tokens", "prefix_cache"), ("pictures", "mm_cache")):
        asked, found_there = (
            sum(group.counters.get(f"{name}_{what}", 0) for group in result.groups) for what in ("queries", "hits")
        )
        meter.add(table.WORKER_ENGINE, found_there, kind=kind, result="hit")
        meter.add(table.WORKER_ENGINE, asked - found_there, kind=kind, result="miss")
    meter.add(table.WORKER_PROMPTS_AHEAD, sum(group.counters.get("prompts_ahead", 0) for group in result.groups))
    meter.add(table.WORKER_REWARD_FAILURES, sum(len(group.failures) for group in result.groups))
    meter.add(table.WORKER_BROKEN_SAMPLES, len(result.failures))
