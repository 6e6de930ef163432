"""How many rollout workers a run should have: who said so, within which bounds, and why. Plain; under its owner's lock.

fixed     as many as were asked for last, by the config or by `mmrl scale`
auto      `rollout.workers: {min, max}`: as many as `AutoscalePolicy` finds right, until somebody asks for a number

`AutoscalePolicy` says when there should be more of them and when fewer: a pure function of what was measured a step.

A step has two shares that are lost: `wait`, of the learner's time, in which it had no plan to learn from, and `idle`,
of the workers' time, in which they had nothing to sample. More workers trade the one for the other; the run is in
balance when both are equal. What n' workers would bring is foreseen from what n did:

    busy    = n · step − idle seconds                  worker-seconds of sampling in a step: these stay
    wait'   = max(wait · n / n', busy / n' − learning)      learning = step − wait
    idle'   = 1 − busy / (n' · step'),  step' = learning + wait'

Up, when waiting exceeds idling by `MARGIN`, to the fewest workers of which that is not foreseen any more; down, when
idling exceeds waiting by as much, to the fewest with which waiting is foreseen to be the smaller still. So a number
that was chosen once is not taken back at the next look (the margin is the hysteresis), and no decision more than
doubles or halves the workers.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mmrl_ray.config import Config
from mmrl_ray.config.learner import WorkersRange
from mmrl_ray.errors import ConfigError

_REMEMBERED = 20
"""Decisions that the status tells of; the run's events have all."""
MARGIN = 0.1
"""Difference of the two shares below which nothing is changed."""
STEPS = 3
"""Steps looked at for one decision; after a change it takes as many new ones for the next."""


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
        """What the status file says of scaling: plain values."""
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


@dataclass(frozen=True, slots=True)
class StepLoad:
    """What one step measured, in seconds."""

    step: int
    seconds: float
    """Wall time."""
    learner_waited: float
    """Of it, what the learner waited for its plan."""
    workers: int
    """Ready all the while."""
    workers_idle: float
    """Worker-seconds without an assignment."""


@dataclass(frozen=True, slots=True)
class Decision:
    """How many workers there should be from now on, and why, in a sentence with its numbers."""

    step: int
    before: int
    workers: int
    reason: str


@dataclass(frozen=True, slots=True)
class _Mean:
    """The same figures, of a mean step."""

    step: float
    wait: float
    workers: int
    busy: float

    def shares(self, workers: int) -> tuple[float, float]:
        """(wait, idle) foreseen with so many workers, each as a share of its side's time."""
        learning = self.step - self.wait
        wait = max(self.wait * self.workers / workers, self.busy / workers - learning, 0.0)
        step = max(learning + wait, 1e-9)
        return wait / step, max(0.0, 1 - self.busy / (workers * step))


class AutoscalePolicy:
    """Decides after each step; remembers the last few only."""

    def __init__(self, least: int, most: int, useful: int) -> None:
        """`least` and `most` bound the workers; `useful` is how many can work at a time, by what a step is made of."""
        self._least, self._most, self._useful = least, most, max(useful, least)
        self._loads: deque[StepLoad] = deque(maxlen=STEPS)
        self._workers: int | None = None
        self.finding = "no step was measured yet"
        """What the last look found, whether or not anything followed from it."""

    def forget(self) -> None:
        """What was measured so far was measured under other circumstances."""
        self._loads.clear()

    def look(self, load: StepLoad, target: int) -> Decision | None:
        """Takes in a step; `target` is how many workers there should be at present."""
        before, self._workers = self._workers, load.workers
        if before not in (None, load.workers):  # one came or went in the middle of this step
            self.forget()
            self.finding = f"{before} workers became {load.workers}"
            return None
        self._loads.append(load)
        if len(self._loads) < STEPS:
            self.finding = f"{len(self._loads)} of {STEPS} steps with {load.workers} workers were measured"
            return None
        mean = self._mean()
        wait, idle = mean.shares(mean.workers)
        measured = (
            f"of steps {self._loads[0].step} to {load.step}, {mean.step:.2f} s each with {mean.workers} workers, the "
            f"learner waited {wait:.0%} and the workers idled {idle:.0%}"
        )
        wanted, why = self._wanted(mean, target, wait - idle)
        self.finding = f"{measured}: {why}"
        if wanted == target:
            return None
        self.forget()
        foreseen = "waiting {:.0%}, idling {:.0%}".format(*mean.shares(wanted))
        return Decision(load.step, target, wanted, f"{self.finding}, {target} → {wanted} (foreseen: {foreseen})")

    def _mean(self) -> _Mean:
        count, workers = len(self._loads), self._loads[-1].workers
        step = sum(load.seconds for load in self._loads) / count
        idle = sum(load.workers_idle for load in self._loads) / count
        wait = sum(load.learner_waited for load in self._loads) / count
        return _Mean(step, min(wait, step), workers, max(0.0, workers * step - idle))

    def _wanted(self, mean: _Mean, target: int, difference: float) -> tuple[int, str]:
        """(workers, in a word why)."""
        if difference > MARGIN:
            if mean.workers < target:
                return target, f"too few, and {target - mean.workers} more are on their way"
            most = min(self._most, self._useful)
            if target >= most:
                limit = f"rollout.workers.max={self._most}" if most == self._most else f"{most} can work at a time"
                return target, f"too few, but {limit}"
            choices = range(target + 1, min(2 * target, most) + 1)
            fitting = [n for n in choices if mean.shares(n)[0] - mean.shares(n)[1] <= MARGIN]
            return (fitting[0] if fitting else choices[-1]), "too few"
        if difference < -MARGIN:
            choices = range(max(self._least, -(-target // 2)), target)
            fitting = [n for n in choices if mean.shares(n)[0] - mean.shares(n)[1] <= 0]
            return (fitting[0], "too many") if fitting else (target, "one fewer would be too few")
        return target, "in balance"
