"""How many rollout workers a run should have: who said so, within which bounds, and why. Plain; under its owner's lock.

fixed     as many as were asked for last, by the config or by `mmrl scale`
auto      `rollout.workers: {min, max}`: as many as `AutoscalePolicy` finds right, until somebody asks for a number
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from mmrl_ray.config import Config
from mmrl_ray.config.rollout import WorkersRange
from mmrl_ray.errors import ConfigError
from mmrl_ray.rollouts.autoscale import AutoscalePolicy, StepLoad

_REMEMBERED = 20
"""Decisions that the status tells of; the run's events have all."""


class Scaling:
    """Sets the pool's target."""

    def __init__(self, cfg: Config, resize: Callable[[int], None]) -> None:
        """`resize` is the pool's."""
        rollout = cfg.rollout
        self._range = rollout.workers if isinstance(rollout.workers, WorkersRange) else None
        self._least = self._range.min if self._range else rollout.min_workers
        # Assignments that may be at work at a time: more workers than that find nothing to do.
        self._useful = math.ceil(cfg.learner.groups_per_step / rollout.groups_per_assignment) * (
            1 + rollout.max_staleness
        )
        self._policy = AutoscalePolicy(self._least, rollout.most_workers, self._useful)
        self._resize = resize
        self._auto = self._range is not None
        self._settling = True
        self.target = rollout.first_workers
        self.requests = 0
        """Accepted so far."""
        self._decisions: deque[dict[str, Any]] = deque(maxlen=_REMEMBERED)
        self._events: list[dict[str, Any]] = []

    def request(self, workers: int | None, by: str) -> str:
        """Somebody wants so many workers, or None to leave it to the run; returns what follows from it.

        Raises:
            ConfigError: outside the run's bounds, or there are none to leave it to.
        """
        if workers is None:
            if self._range is None:
                raise ConfigError("rollout.workers is a number in this run, not {min, max}: ask for a number")
            self._auto = True
            self.requests += 1
            self._policy.forget()
            self._decide(self.target, f"{by}: the run scales by itself between {self._range.min} and {self._range.max}")
            return f"the run scales by itself, from {self.target} rollout workers"
        if workers < self._least:
            key = "rollout.workers.min" if self._range else "rollout.min_workers"
            raise ConfigError(f"{workers} rollout workers are fewer than {key}={self._least}")
        if self._range is not None and workers > self._range.max:
            raise ConfigError(f"{workers} rollout workers are more than rollout.workers.max={self._range.max}")
        self._resize(workers)
        before, self._auto = self.target, False
        self.requests += 1
        self._decide(workers, f"{by} asked for {workers}")
        if workers <= self._useful:
            return f"{before} → {workers} rollout workers"
        return (
            f"{before} → {workers} rollout workers, of which {self._useful} can work at a time: lower "
            "rollout.groups_per_assignment to have more of them work"
        )

    def after_step(self, line: Mapping[str, Any], workers: int) -> None:
        """A step was finished, with its line of figures, while so many workers were ready."""
        settling, self._settling = self._settling, False
        if not self._auto or settling or workers < 1:
            return  # the first step after a change, and of a run, measures that change
        load = StepLoad(
            step=line["step"],
            seconds=line["seconds/step"],
            learner_waited=line["seconds/wait_plan"],
            workers=workers,
            workers_idle=line["seconds/workers_idle"],
        )
        decision = self._policy.look(load, self.target)
        if decision is not None:
            self._resize(decision.workers)
            self._decide(decision.workers, decision.reason)

    def began(self) -> None:
        """The run (re)starts somewhere: its first step measures that."""
        self._settling = True
        self._policy.forget()

    def events(self) -> list[dict[str, Any]]:
        """Decisions since the last call, for the run's event log."""
        events, self._events = self._events, []
        return events

    def status(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "mode": "auto" if self._auto else "fixed",
            "target": self.target,
            "min": self._least,
            "max": self._range.max if self._range else None,
            "useful": self._useful,
            "requests": self.requests,
            "finding": self._policy.finding if self._auto else "",
            "decisions": list(self._decisions),
        }

    def _decide(self, workers: int, reason: str) -> None:
        decision = {"before": self.target, "workers": workers, "reason": reason}
        self._settling = self._settling or workers != self.target
        self.target = workers
        self._decisions.append({"time": time.time(), **decision})
        self._events.append({"kind": "workers_scaled", **decision})
