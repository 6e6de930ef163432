"""The rollout workers on Ray: which there are, what each is given, and what becomes of it when one is lost.

A worker: placing (first ping under way) → starting (engine being built) → ready → gone. Never brought back: a new
one takes its place. One call at a time each (`PoolWorker.call`), so that it is known which assignment a crash is to be
blamed on; Ray forgets a dead actor's calls, the `AssignmentTracker` does not.

A process that is stopped is alive to Ray. So every wait has a deadline (`_replace_hung`), and idle workers are asked
every few seconds (`_probe`). What raises is replaced: broken samples come back as values.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from mmrl_ray.data.samples import Sample
from mmrl_ray.errors import ConfigError, MMRLError, PlacementError, ProcessError, RolloutError, first_line
from mmrl_ray.rollouts.assignment_tracker import AssignmentTracker
from mmrl_ray.rollouts.pool_settings import Nodes, PoolSettings, Quorum
from mmrl_ray.rollouts.pool_worker import PoolWorker, RolloutWorker, WorkerCall, join_result
from mmrl_ray.rollouts.types import Assignment, Collected, DataFailure, EngineFactory

logger = logging.getLogger(__name__)

_FETCH_S = 60.0
"""For an answer that Ray says is there."""


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
