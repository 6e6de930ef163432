"""The pool of rollout workers on Ray: RLlib's actor manager for calls and health, our own book for assignments.

What the manager leaves to its user, and where it is done here:

    it forgets a failed actor's pending calls       → `Ledger`, which knows what was lost
    a stopped process counts as healthy             → deadlines: `_replace_hung`
    it has no probe loop                            → `_probe`, every few seconds, idle workers only
    it breaks on calls without explicit actor ids   → every call names its one actor
    an exception makes an actor unhealthy           → broken samples come back as values, and what raised is replaced

A worker: placing (first ping under way) → starting (engine being built) → ready → gone. Never brought back: a new
one takes its place. One assignment at a time each, so that it is known which one a crash is to be blamed on.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import RayTaskError
from ray.rllib.utils.actor_manager import CallResult, FaultTolerantActorManager

from mmrl_ray.errors import ConfigError, MMRLError, PlacementError, RolloutError
from mmrl_ray.rollouts.assignments import Assignment, DataFailure
from mmrl_ray.rollouts.ledger import Ledger
from mmrl_ray.rollouts.nodes import Nodes
from mmrl_ray.rollouts.pool_settings import PoolSettings
from mmrl_ray.rollouts.protocols import Collected, EngineFactory
from mmrl_ray.rollouts.quorum import Quorum
from mmrl_ray.rollouts.worker import PoolWorker, RolloutWorker, WorkerCall, join_result

# It logs a page for each worker that dies; the pool says it in a line, in its events.
logging.getLogger("ray.rllib.utils.actor_manager").setLevel(logging.CRITICAL)


class RayWorkerPool:
    """A `WorkerPool` of Ray actors. One thread drives it; `resize`, `status` and `busy_seconds` are for any."""

    def __init__(
        self, run: str, factory: EngineFactory, settings: PoolSettings, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Workers are made from the first `poll` on, each with an engine from `factory`."""
        self.ledger = Ledger(settings.model)
        self._run = run
        self._factory = factory
        self._settings = settings
        self._clock = clock
        self._manager = FaultTolerantActorManager([], max_remote_requests_in_flight_per_actor=1)
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
        return self.ledger.outstanding

    def submit(self, assignment: Assignment) -> None:
        """Queues it; evaluations go before training."""
        self.ledger.submit(assignment)

    def cancel(self, kind: str) -> None:
        """Forgets queued assignments of a kind; those at work are discarded when they come back."""
        self.ledger.cancel(kind)

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
        finished = self._collect_runs(timeout_s if self.ledger.busy else 0.0)
        finished += self._collect_health()
        finished += self._replace_hung()
        self._probe()
        placing = [self._clock() - w.since for w in self._workers.values() if w.state == "placing"]
        self._nodes.look(max(placing, default=0.0))
        self._dispatch()
        self._quorum.look(self._ready, self._target, self._clock(), self._last_loss)
        return finished

    def events(self) -> list[dict[str, Any]]:
        """What happened to workers since the last call."""
        events, self._events = self._events, []
        return events

    def busy_seconds(self) -> float:
        """Worker-seconds spent on assignments so far, including those under way."""
        return self._busy_s + self.ledger.at_work_seconds(self._clock())

    def status(self) -> dict[str, Any]:
        """Workers by name with their state, queue and counts."""
        now, workers = self._clock(), list(self._workers.values())
        return {
            "workers": {
                w.name: w.describe(now, self.ledger.working_on(w.id), self.ledger.since(w.id)) for w in workers
            },
            "demand": self._settings.demand,
            "free": self._nodes.free,
            "ready": self._ready,
            "target": self._target,
            "min": self._settings.min_workers,
            "queued_assignments": self.ledger.queued,
            "assignments": dict(self.ledger.counts),
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
        staying.sort(key=lambda w: (order[w.state] + (w.id in self.ledger.busy), -w.id))
        for worker in staying[: max(surplus, 0)]:
            worker.retiring = True
            self._note("worker_retiring", worker, f"resized to {self._target}")
        for worker in [w for w in self._workers.values() if w.retiring and w.id not in self.ledger.busy]:
            self._end(worker)

    def _create(self) -> None:
        name = f"worker-{self._made}"
        actor = ray.remote(RolloutWorker).options(max_restarts=0, **self._settings.actor_options)
        handle = actor.remote(name, self._run, self._factory, self._settings.log_format)
        call = WorkerCall(handle)
        known = set(self._manager.actor_ids())
        self._manager.add_actors([call])  # type: ignore[list-item]  # annotated for handles, uses `.apply.remote`
        (actor_id,) = set(self._manager.actor_ids()) - known
        first = self._made < self._settings.workers and not self._quorum.complete
        self._workers[actor_id] = PoolWorker(actor_id, name, call, "placing", self._clock(), first)
        self._made += 1
        self._call(RolloutWorker.ping, actor_id)
        self._note("worker_created", self._workers[actor_id], self._settings.demand)

    def _end(self, worker: PoolWorker) -> None:
        del self._workers[worker.id]
        self._manager.remove_actor(worker.id)
        ray.kill(worker.call.handle, no_restart=True)

    def _lose(self, worker: PoolWorker, reason: str) -> list[Collected | DataFailure]:
        """The worker is dead, stuck or not to be trusted: end it, and put its assignment back."""
        work = self.ledger.working_on(worker.id)
        self._note("worker_lost", worker, reason, samples=[g.sample.id for g in work.groups] if work else [])
        self._last_loss = f"{worker.name}: {reason}"
        self._end(worker)
        if worker.state != "ready":
            self._start_failures += 1
            self._no_new_before = self._clock() + self._settings.retry_start_s * 2 ** min(self._start_failures, 5)
            if self._start_failures >= self._settings.max_start_failures and self._ready < self._settings.min_workers:
                raise RolloutError(f"{self._start_failures} rollout workers in a row died while starting: {reason}")
        return list(self.ledger.lose(worker.id, reason))

    # -- calls and their results -----------------------------------------------------------------------------------

    def _call(self, method: Callable[..., Any], actor_id: int, **kwargs: Any) -> bool:
        # The function rather than its name: the manager would make a closure of that, and pickle it each time.
        call: dict[str, Any] = {"tag": method.__name__, "kwargs": kwargs, "remote_actor_ids": [actor_id]}
        return bool(self._manager.foreach_actor_async(method, **call))

    def _answers(self, tags: tuple[str, ...], timeout_s: float) -> list[CallResult]:
        answers = self._manager.fetch_ready_async_reqs(tags=tags, timeout_seconds=timeout_s)
        return list(answers)  # type: ignore[arg-type]  # annotated as the results' inner type

    def _dispatch(self) -> None:
        busy = self.ledger.busy
        for worker in self._workers.values():
            # One that has yet to answer a ping may hang: it would keep the assignment until that is found out.
            if worker.state != "ready" or worker.retiring or worker.id in busy or worker.probe_pending:
                continue
            assignment = self.ledger.give(worker.id, self._clock())
            if assignment is None:
                return
            worker.version = assignment.version
            if not self._call(RolloutWorker.run, worker.id, assignment=assignment):
                raise RolloutError(f"{worker.name} was idle, yet the actor manager refused it an assignment")

    def _collect_runs(self, timeout_s: float) -> list[Collected | DataFailure]:
        finished: list[Collected | DataFailure] = []
        for answer in self._answers(("run",), timeout_s):
            worker = self._workers.get(answer.actor_id)
            if worker is None:
                continue
            if not answer.ok:
                finished += self._on_error(worker, answer)
                continue
            parts, worker.call.parts = worker.call.parts, ()
            light, worker.since = answer.get(), self._clock()
            began = self.ledger.accept(worker.id, light.result.assignment_id)
            if began is not None:
                self._busy_s += worker.since - began
                worker.groups += len(light.result.groups)
                finished.append(join_result(light, parts))
        return finished

    def _collect_health(self) -> list[Collected | DataFailure]:
        finished: list[Collected | DataFailure] = []
        for answer in self._answers(("ping", "start"), 0.0):
            worker = self._workers.get(answer.actor_id)
            if worker is None:
                continue  # a call before it in this list was the end of it
            if not answer.ok:
                finished += self._on_error(worker, answer)
            elif worker.state == "placing":
                worker.state, worker.since = "starting", self._clock()
                self._call(RolloutWorker.start, worker.id)
            elif answer.tag == "start":
                worker.state, worker.since, worker.place = "ready", self._clock(), answer.get()
                self._start_failures = 0
                self._note("worker_ready", worker, f"pid {worker.place.pid} on {worker.place.node}")
            else:
                worker.probe_pending = False
        return finished

    def _on_error(self, worker: PoolWorker, answer: CallResult) -> list[Collected | DataFailure]:
        error = answer.get()
        if isinstance(error, MMRLError):
            # The project's own errors say what is wrong with model, adapter or reward: another worker would say it too.
            raise getattr(error, "cause", None) or error
        cause = error.cause if isinstance(error, RayTaskError) else error
        return self._lose(worker, f"{type(cause).__name__}: {(str(cause).strip() or 'no message').splitlines()[0]}")

    # -- deadlines -------------------------------------------------------------------------------------------------

    def _probe(self) -> None:
        """Pings idle workers, so that one that died or hangs is found before it gets an assignment."""
        now, busy = self._clock(), self.ledger.busy
        for worker in self._workers.values():
            idle = worker.state == "ready" and worker.id not in busy and not worker.probe_pending
            due = idle and now - worker.probed > self._settings.probe_every_s
            if due and self._call(RolloutWorker.ping, worker.id):
                worker.probed, worker.probe_pending = now, True

    def _replace_hung(self) -> list[Collected | DataFailure]:
        now, limits = self._clock(), self._settings
        finished: list[Collected | DataFailure] = []
        overdue = set(self.ledger.overdue(now, limits.assignment_timeout_s))
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
