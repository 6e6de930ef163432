"""Where a finished step goes: its line in `metrics.jsonl`, TensorBoard, and the rollout log."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from mmrl_ray.experience.carriers import StepPlan
from mmrl_ray.rollouts.step_book import TakenStep
from mmrl_ray.run_records.rollout_log import Recorder, StepRecord
from mmrl_ray.run_records.run_dir import RunDir
from mmrl_ray.run_records.step_log import RECENT_STEPS, StepLog, StepMeter, recent_throughput, rollout_metrics


@dataclass(frozen=True, slots=True)
class PlannedStep:
    """A step whose plan is out."""

    plan: StepPlan
    taken: TakenStep
    world_size: int
    waited_s: float
    """What the learner waited for the plan."""


class StepWriter:
    """Puts what plan, rollouts, clock and learner say about a step together, and writes it down."""

    def __init__(self, run: RunDir, clock: Callable[[], float]) -> None:
        self.last_line: Mapping[str, Any] = {}
        self._recent: deque[Mapping[str, Any]] = deque(maxlen=RECENT_STEPS)
        self._recorder = Recorder(run)
        self._log = StepLog(run)
        self._meter = StepMeter(clock)

    def begin(self, step: int, totals: Mapping[str, Any]) -> None:
        """A (re)start at `step`: what was written about it and later steps is taken back."""
        self._meter.begin(**totals)
        self._recent.clear()
        self._log.rewind(step)

    def line(
        self, done: PlannedStep, learner: Mapping[str, Any], totals: Mapping[str, Any], workers: int
    ) -> dict[str, Any]:
        """The step's line; `policy_version` is the one that the step made. Ends the step for the clock."""
        plan, taken = done.plan, done.taken
        rollouts = rollout_metrics(plan, taken.groups, taken.timings)
        completions = sum(len(group.completion_tokens) for group in plan.groups)
        line = {
            "step": plan.step,
            "policy_version": plan.step + 1,
            **plan.metrics,
            **rollouts,
            **self._meter.lap(completions=completions, workers=workers, **totals),
            "seconds/wait_plan": done.waited_s,
            **learner,
            "shared_prefix": bool(rollouts["shared_prefix"]) and bool(learner.get("shared_prefix", True)),
        }
        self._recent.append({**line, "groups": len(taken.groups)})
        return line

    def throughput(self) -> dict[str, Any]:
        """Of the last few steps; see `recent_throughput`."""
        return recent_throughput(self._recent)

    def write(self, done: PlannedStep, line: Mapping[str, Any]) -> None:
        """Writes the line now, the groups in the background.

        Raises:
            RunError: the run folder cannot be written.
            RolloutError: the rollout log is stuck.
        """
        self._log.write(line)
        self._recorder.record(
            StepRecord(
                step=done.plan.step,
                keys=frozenset(group.key for group in done.taken.groups),
                tables=done.taken.tables,
                # Without payloads: the object store is free of them however long the disk takes.
                planned={group.key: replace(group, payload=None) for group in done.plan.groups},
                samples=done.taken.samples,
            )
        )
        self.last_line = line

    def flush(self) -> None:
        """Returns when all steps given so far are in the run folder; raises as `write`."""
        self._recorder.flush()

    def close(self, timeout_s: float) -> None:
        """Writes what is left and ends the background thread; raises as `write`."""
        try:
            self._recorder.close(timeout_s)
        finally:
            self._log.close()
