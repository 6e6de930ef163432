"""The rollout workers on Ray: the pool, what it knows of each worker, and the actor, a thin one around an engine.

A worker: placing (first ping under way) → starting (engine being built) → ready → gone. Never brought back: a new
one takes its place. One call at a time each (`PoolWorker.call`), so that it is known which assignment a crash is to be
blamed on; Ray forgets a dead actor's calls, the `AssignmentTracker` does not.

A process that is stopped is alive to Ray. So every wait has a deadline (`_replace_hung`), and idle workers are asked
every few seconds (`_probe`). What raises is replaced: broken samples come back as values.

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
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import ray
import torch
from ray import cloudpickle
from ray.exceptions import RayError, RayTaskError

from mmrl_ray.data.samples import Sample
from mmrl_ray.errors import ConfigError, MMRLError, PlacementError, ProcessError, RolloutError, first_line
from mmrl_ray.experience.carriers import ScoredGroup
from mmrl_ray.rollouts.assignment_tracker import AssignmentTracker
from mmrl_ray.rollouts.group_codec import Parcelled, pack
from mmrl_ray.rollouts.pool_settings import Nodes, PoolSettings, Quorum
from mmrl_ray.rollouts.types import Assignment, AssignmentResult, Collected, DataFailure, Engine, EngineFactory
from mmrl_ray.rollouts.weights import decode_state
from mmrl_ray.telemetry import table
from mmrl_ray.telemetry.logs import CONTEXT, LogFormat, start_logging
from mmrl_ray.telemetry.meter import Meter
from mmrl_ray.telemetry.ray_meter import RayMeter

logger = logging.getLogger(__name__)

_FETCH_S = 60.0
"""For an answer that Ray says is there."""
WEIGHTS_TIMEOUT_S = 120.0
"""A worker that has not got a version's weights from the object store by then is lost."""


class RayWorkerPool:
    """Runs assignments on Ray actors, each exactly once as far as its caller sees.

    One thread drives it; `resize`, `status` and `busy_seconds` are for any.
    """

    def __init__(
        self, run: str, factory: EngineFactory, settings: PoolSettings, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Workers are made from the first `poll` on, each with an engine from `factory`."""
        self.tracker = AssignmentTracker(settings.model)
        self._run = run
        self._factory = factory
        self._settings = settings
        self._clock = clock
        self._workers: dict[int, PoolWorker] = {}
        self._events: list[dict[str, Any]] = []
        self._target = settings.workers
        self._made = 0
        self._busy_s = 0.0
        self._start_failures = 0
        self._no_new_before = float("-inf")
        self._quorum = Quorum(settings)
        self._last_loss = ""
        self._nodes = Nodes(run, settings, clock)

    # -- what the controller calls ---------------------------------------------------------------------------------

    @property
    def outstanding(self) -> int:
        """Assignments queued or at work."""
        return self.tracker.outstanding

    def submit(self, assignment: Assignment) -> None:
        """Queues it; evaluations go before training."""
        self.tracker.submit(assignment)

    def expect(self, samples: Iterable[tuple[Sample, ...]]) -> None:
        """Of assignments that will be submitted next: workers that make prompts ahead are told of them."""
        self.tracker.expect(samples)

    def cancel(self, kind: str) -> None:
        """Forgets queued assignments of a kind; those at work are discarded when they come back."""
        self.tracker.cancel(kind)

    def resize(self, workers: int) -> None:
        """Sets how many workers there should be; one that has to go finishes its assignment first.

        Raises:
            ConfigError: fewer than the minimum.
        """
        if workers < max(1, self._settings.min_workers):
            raise ConfigError(f"cannot resize to {workers} workers: rollout.min_workers={self._settings.min_workers}")
        self._target = workers

    def poll(self, timeout_s: float) -> list[Collected | DataFailure]:
        """Moves everything on, and returns what finished since the last call.

        Raises:
            RolloutError: too few workers for too long, or they cannot be placed or started.
            ModelError: workers end with the same error on whatever samples come first.
            MMRLError: what an engine could not be built from.
        """
        self._fit_to_target()
        self._events += self._nodes.ask_for(self._target)
        self._dispatch()
        finished = self._collect(timeout_s if self.tracker.busy else 0.0)
        finished += self._replace_hung()
        self._probe()
        placing = [self._clock() - w.since for w in self._workers.values() if w.state == "placing"]
        self._nodes.look(max(placing, default=0.0))
        self._dispatch()
        self._tell()
        self._quorum.look(self._ready, self._target, self._clock(), self._last_loss)
        return finished

    def events(self) -> list[dict[str, Any]]:
        """What happened to workers since the last call."""
        events, self._events = self._events, []
        return events

    def busy_seconds(self) -> float:
        """Worker-seconds spent on assignments so far, including those under way."""
        return self._busy_s + self.tracker.at_work_seconds(self._clock())

    def status(self) -> dict[str, Any]:
        """Workers by name with their state, queue and counts."""
        now, workers = self._clock(), list(self._workers.values())
        return {
            "workers": {
                w.name: w.describe(now, self.tracker.working_on(w.id), self.tracker.since(w.id)) for w in workers
            },
            "demand": self._settings.demand,
            "free": self._nodes.free,
            "ready": self._ready,
            "target": self._target,
            "min": self._settings.min_workers,
            "queued_assignments": self.tracker.queued,
            "assignments": dict(self.tracker.counts),
            "last_loss": self._last_loss,
        }

    def close(self) -> None:
        """Ends every worker, and gives back the nodes that were asked for."""
        self._nodes.close()
        for worker in list(self._workers.values()):
            self._end(worker)

    @property
    def _ready(self) -> int:
        return sum(w.state == "ready" for w in list(self._workers.values()))

    # -- workers come and go ---------------------------------------------------------------------------------------

    def _fit_to_target(self) -> None:
        staying = [w for w in self._workers.values() if not w.retiring]
        surplus = len(staying) - self._target
        for _ in range(-surplus if self._clock() >= self._no_new_before else 0):
            self._create()
        # Those that cost least first: not even placed, not yet built, idle, and only then at work; the youngest first.
        order = {"placing": 0, "starting": 1, "ready": 2}
        staying.sort(key=lambda w: (order[w.state] + (w.id in self.tracker.busy), -w.id))
        for worker in staying[: max(surplus, 0)]:
            worker.retiring = True
            self._note("worker_retiring", worker, f"resized to {self._target}")
        for worker in [w for w in self._workers.values() if w.retiring and w.id not in self.tracker.busy]:
            self._end(worker)

    def _create(self) -> None:
        number, name = self._made, f"worker-{self._made}"
        bundle = self._settings.free_bundle([worker.bundle for worker in self._workers.values()])
        actor = ray.remote(RolloutWorker).options(max_restarts=0, **self._settings.options_in(bundle))
        handle = actor.remote(name, self._run, self._factory, self._settings.log_format)
        first = number < self._settings.workers and not self._quorum.complete
        worker = PoolWorker(number, name, handle, "placing", self._clock(), first, bundle)
        self._workers[number] = worker
        self._made += 1
        worker.ask("ping")
        self._note("worker_created", worker, self._settings.demand)

    def _end(self, worker: PoolWorker) -> None:
        del self._workers[worker.id]
        self.tracker.leave(worker.id)
        ray.kill(worker.handle, no_restart=True)

    def _lose(self, worker: PoolWorker, reason: str) -> list[Collected | DataFailure]:
        """The worker is dead, stuck or not to be trusted: end it, and put its assignment back."""
        work = self.tracker.working_on(worker.id)
        self._note("worker_lost", worker, reason, samples=[g.sample.id for g in work.groups] if work else [])
        self._last_loss = f"{worker.name}: {reason}"
        self._end(worker)
        if worker.state != "ready":
            self._start_failures += 1
            self._no_new_before = self._clock() + self._settings.retry_start_s * 2 ** min(self._start_failures, 5)
            if self._start_failures >= self._settings.max_start_failures and self._ready < self._settings.min_workers:
                raise RolloutError(f"{self._start_failures} rollout workers in a row died while starting: {reason}")
        return list(self.tracker.requeue(worker.id, reason))

    # -- calls and their results -----------------------------------------------------------------------------------

    def _dispatch(self) -> None:
        for worker in self._workers.values():
            # One that has yet to answer a ping may hang: it would keep the assignment until that is found out.
            if worker.state != "ready" or worker.retiring or worker.call is not None:
                continue
            assignment = self.tracker.assign(worker.id, self._clock())
            if assignment is None:
                return
            if self._settings.prepares_ahead:
                assignment = replace(assignment, ahead=self.tracker.upcoming(worker.id))
            worker.give(assignment)

    def _tell(self) -> None:
        """Tells workers that have nothing to do of what comes next, where they can begin with it."""
        for worker in self._workers.values() if self._settings.prepares_ahead else ():
            if worker.state != "ready" or worker.retiring or worker.call is not None or self.tracker.is_told(worker.id):
                continue
            if not (samples := self.tracker.upcoming(worker.id)):
                return
            worker.ask("prepare", samples)
            worker.probed = self._clock()

    def _collect(self, timeout_s: float) -> list[Collected | DataFailure]:
        """Waits for one answer at most so long, then takes in all that are there."""
        asked = {worker.call.answer: worker for worker in self._workers.values() if worker.call is not None}
        finished: list[Collected | DataFailure] = []
        if not asked:
            return finished
        answers = list(asked)
        if timeout_s:
            ray.wait(answers, timeout=timeout_s)
        for answer in ray.wait(answers, num_returns=len(answers), timeout=0)[0]:
            worker = asked[answer]
            call, worker.call = worker.call, None
            assert call is not None
            try:
                value = ray.get(answer, timeout=_FETCH_S)
            except RayError as error:
                finished += self._on_error(worker, call, error)
            else:
                finished += self._on_answer(worker, call, value)
        return finished

    def _on_answer(self, worker: PoolWorker, call: WorkerCall, value: Any) -> list[Collected | DataFailure]:
        now = self._clock()
        if call.method == "start":
            worker.state, worker.since, worker.place = "ready", now, value
            self._start_failures = 0
            self._note("worker_ready", worker, f"pid {value.pid} on {value.node}")
        elif worker.state == "placing":
            worker.state, worker.since = "starting", now
            worker.ask("start")
        elif call.method == "run":
            worker.since = now
            began = self.tracker.complete(worker.id, value.result.assignment_id)
            if began is not None:
                self._busy_s += now - began
                worker.groups += len(value.result.groups)
                return [join_result(value, call.parts)]
        return []

    def _on_error(self, worker: PoolWorker, call: WorkerCall, error: RayError) -> list[Collected | DataFailure]:
        # A process that a worker has beside it, and that is lost, is no more to blame than the worker's own. Once all
        # workers have been ready, what another one cannot begin with is its node's, and the others go on meanwhile.
        is_lost = isinstance(error, ProcessError) or (call.method == "start" and self._quorum.complete)
        if isinstance(error, MMRLError) and not is_lost:
            # The project's own errors say what is wrong with model, adapter or reward: another worker would say it too.
            raise getattr(error, "cause", None) or error
        cause = error.cause if isinstance(error, RayTaskError) else error
        return self._lose(worker, first_line(cause))

    # -- deadlines -------------------------------------------------------------------------------------------------

    def _probe(self) -> None:
        """Pings idle workers, so that one that died or hangs is found before it gets an assignment."""
        now = self._clock()
        for worker in self._workers.values():
            idle = worker.state == "ready" and worker.call is None
            if idle and now - worker.probed > self._settings.probe_every_s:
                worker.ask("ping")
                worker.probed = now

    def _replace_hung(self) -> list[Collected | DataFailure]:
        now, limits = self._clock(), self._settings
        finished: list[Collected | DataFailure] = []
        overdue = set(self.tracker.overdue(now, limits.assignment_timeout_s))
        for worker in list(self._workers.values()):
            age = now - worker.since
            if worker.state == "placing" and age > limits.placement_timeout_s:
                self._unplaced(worker)
            elif worker.state == "starting" and age > limits.placement_timeout_s:
                finished += self._lose(worker, f"did not load its model within {limits.placement_timeout_s:g} s")
            elif worker.id in overdue:
                finished += self._lose(worker, f"no result within {limits.assignment_timeout_s:g} s")
            elif worker.probe_pending and now - worker.probed > limits.probe_timeout_s:
                finished += self._lose(worker, f"idle, and no answer within {limits.probe_timeout_s:g} s")
        return finished

    def _unplaced(self, worker: PoolWorker) -> None:
        """An error for a worker that the run began with or cannot do without; any other one may go on waiting."""
        if not worker.first and self._ready >= self._settings.min_workers:
            self._note("worker_unplaced", worker, self._settings.demand)
            worker.since = self._clock()  # so that it is noted once a deadline
            return
        total = {k: v for k, v in ray.cluster_resources().items() if k in ("CPU", "GPU")}
        raise PlacementError(
            f"{worker.name} was not placed within {self._settings.placement_timeout_s:g} s: it asks for "
            f"{self._settings.demand}, the cluster has {total} in all; lower rollout.workers or resources.rollout"
        )

    def _note(self, kind: str, worker: PoolWorker, detail: str, **more: Any) -> None:
        self._events.append({"kind": kind, "worker": worker.name, "detail": detail, **more})


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
