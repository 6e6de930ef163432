"""When a run should have more rollout workers, and when fewer: a pure function of what was measured a step.

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

from collections import deque
from dataclasses import dataclass

MARGIN = 0.1
"""Difference of the two shares below which nothing is changed."""
STEPS = 3
"""Steps looked at for one decision; after a change it takes as many new ones for the next."""


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
