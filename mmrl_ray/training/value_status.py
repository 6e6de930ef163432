"""What `mmrl status` shows of a value-based run, and what `mmrl scale` asks of it.

RLlib's algorithm belongs to one thread: the status writer's thread only takes a request, and the run does it between
rounds.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import ray

from mmrl_ray.algorithms.dqn.rllib import refuse_without_room
from mmrl_ray.algorithms.dqn.trainer import Round
from mmrl_ray.config import Config
from mmrl_ray.errors import ConfigError, PlacementError
from mmrl_ray.run_records.control_files import ScaleAnswer

_REMEMBERED = 20


class ValueStatus:
    """How a run stands, under one lock."""

    def __init__(self, cfg: Config) -> None:
        self._cfg = cfg
        self._lock = threading.Lock()
        self._target = self._told = cfg.rollout.first_workers
        self._places: list[tuple[str, int]] = []
        self._requests, self._by = 0, ""
        self._updates, self._began = 0, time.time()
        self._decisions: deque[dict[str, Any]] = deque(maxlen=_REMEMBERED)

    # -- the run's thread ------------------------------------------------------------------------------------------

    def tell(self, done: Round) -> None:
        """A round is over."""
        with self._lock:
            self._updates = done.updates

    def tell_workers(self, places: Sequence[tuple[str, int]]) -> None:
        """(node, process id) of the workers that are ready now."""
        with self._lock:
            self._places = list(places)

    def wanted(self) -> int | None:
        """Workers that were asked for and that there are not yet."""
        with self._lock:
            return self._target if self._target != self._told else None

    def scaled(self, workers: int) -> dict[str, Any]:
        """It was done; the decision, for the run's events."""
        with self._lock:
            decision = {"before": self._told, "workers": workers, "reason": f"{self._by} asked for {workers}"}
            self._told = workers
            return decision

    # -- the status writer's thread ------------------------------------------------------------------------------------

    def ask(self, workers: int | None, by: str) -> ScaleAnswer:
        """Somebody wants so many workers.

        Raises:
            ConfigError: a number below the least, or none; or Ray has no room for them.
        """
        if workers is None:
            raise ConfigError("a value-based run does not scale by itself: ask for a number")
        least = self._cfg.rollout.min_workers
        if workers < least:
            raise ConfigError(f"{workers} rollout workers are fewer than rollout.min_workers={least}")
        with self._lock:
            before = self._target
            try:
                refuse_without_room(workers - before, self._cfg)
            except PlacementError as error:
                raise ConfigError(str(error)) from error
            self._target, self._by = workers, by
            self._requests += 1
            reason = f"{by} asked for {workers}"
            self._decisions.append({"time": time.time(), "before": before, "workers": workers, "reason": reason})
            return ScaleAnswer(
                accepted=True, message=f"{before} → {workers} rollout workers", target=workers, number=self._requests
            )

    def status(self) -> dict[str, Any]:
        """JSON-able; the keys of every run's status."""
        with self._lock:
            share = self._cfg.resources.rollout
            free = {name: ray.available_resources().get(name, 0.0) for name in ("CPU", "GPU")}
            seconds = time.time() - self._began
            missing = [("", 0)] * (self._told - len(self._places))
            workers = {
                f"env-runner-{i + 1}": {
                    "state": "ready" if pid else "starting",
                    "seconds": seconds,
                    "version": self._updates,
                    "at": None,
                    "groups": 0,
                    "node": node,
                    "pid": pid,
                }
                for i, (node, pid) in enumerate([*self._places, *missing])
            }
            return {
                "step": self._updates,
                "steps": self._cfg.learner.steps,
                "policy_version": self._updates,
                "waiting": "the learner for the workers and they for it, by turns",
                "stopping": None,
                "metrics": {},
                "max_staleness": 0,
                "step_groups": {"arrived": 0, "asked": 0},
                "buffer": {"arrived": 0, "held": 0, "capacity": 0},
                "evaluations": 0,
                "quarantined": 0,
                "throughput": {},
                "pool": {
                    "workers": workers,
                    "ready": len(self._places),
                    "target": self._target,
                    "queued_assignments": 0,
                    "free": free,
                    "demand": f"{{CPU: {share.cpus:g}}}",
                },
                "scaling": {
                    "mode": "fixed",
                    "target": self._target,
                    "min": self._cfg.rollout.min_workers,
                    "max": None,
                    "useful": self._target,
                    "requests": self._requests,
                    "finding": "",
                    "decisions": list(self._decisions),
                },
            }
