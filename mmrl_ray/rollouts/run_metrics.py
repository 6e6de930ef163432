"""Where a finished step goes: its line in `metrics.jsonl`, the rollout log, and Prometheus.

`RunMetrics` exports the controller's steps, workers and queues as metrics and logs its events. Every number of a step's
line goes somewhere.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from mmrl_ray.config.reward import RESERVED_NAMES
from mmrl_ray.experience.carriers import RewardBreakdown, RewardFailure, StepPlan
from mmrl_ray.rollouts.steps import TakenStep
from mmrl_ray.run_records.rollout_log import Recorder, StepRecord
from mmrl_ray.run_records.run_dir import RunDir
from mmrl_ray.run_records.step_log import RECENT_STEPS, StepLog, StepMeter, recent_throughput, rollout_metrics
from mmrl_ray.telemetry import table
from mmrl_ray.telemetry.logs import CONTEXT
from mmrl_ray.telemetry.meter import Meter, Totals
from mmrl_ray.telemetry.table import Metric

logger = logging.getLogger(__name__)

_STATES = ("placing", "starting", "ready", "busy", "retiring")
_WARNINGS = frozenset(
    (
        "worker_lost",
        "worker_unplaced",
        "learner_restarted",
        "dynamic_sampling_bound",
        "reward_failed",
        "reward_part_missing",
        "sample_quarantined",
        "scale_refused",
        "nodes_not_asked_for",
    )
)
_SHOWN = {"reward/mean": "reward", "loss": "loss", "kl": "kl", "seconds/step": "seconds"}
_GAUGES: Mapping[str, Metric] = {
    "policy_version": table.POLICY_VERSION,
    "reward/mean": table.REWARD_MEAN,
    "reward/std": table.REWARD_STD,
    "loss": table.LOSS,
    "kl": table.KL,
    "entropy": table.ENTROPY,
    "grad_norm": table.GRAD_NORM,
    "lr": table.LEARNING_RATE,
    "sampler_gap/max": table.SAMPLER_GAP_MAX,
    "sampler_gap/mean": table.SAMPLER_GAP_MEAN,
    "staleness/mean": table.STALENESS_MEAN,
    "staleness/max": table.STALENESS_MAX,
    "completion/length_mean": table.COMPLETION_LENGTH,
    "completion/finish_fraction": table.COMPLETION_FINISHED,
    "shared_prefix": table.SHARED_PREFIX,
}
_COUNTERS: Mapping[str, Metric] = {
    "masked": table.MASKED_GROUPS,
    "masked_captions": table.MASKED_CAPTIONS,
    "dropped": table.DROPPED_GROUPS,
    "quarantined": table.QUARANTINED_SAMPLES,
}


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
        """Completions a second over the last few steps (`recent_throughput`)."""
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
        self._recorder.close(timeout_s)


class RunMetrics:
    """Measures with a `Meter`, and says the same in words. Its methods may be called from any thread."""

    def __init__(self, meter: Meter, steps: int) -> None:
        """`steps` is how many the run is to take."""
        self._meter = meter
        self._totals = Totals(meter)
        self._steps = steps

    def begin(self, step: int) -> None:
        """Goes on with `step`."""
        CONTEXT.put(step=step)
        self._meter.set(table.PLANNED_STEPS, self._steps)
        self._meter.set(table.FINISHED_STEPS, step)

    def step(self, done: PlannedStep, line: Mapping[str, Any]) -> None:
        """A step is finished, with its line of figures."""
        meter, groups = self._meter, done.plan.groups
        export_step_metrics(meter, line)
        meter.set(table.FINISHED_STEPS, done.plan.step + 1)
        meter.add(table.GROUPS, len(done.taken.groups))
        meter.add(table.COMPLETIONS, sum(len(group.learned) for group in groups))
        meter.add(table.LEARNED_TOKENS, sum(sum(group.learned_tokens) for group in groups), kind="completion")
        meter.add(table.LEARNED_TOKENS, sum(group.prompt_tokens for group in groups), kind="prompt")
        figures = (f"{name} {line[key]:.4g}" for key, name in _SHOWN.items() if isinstance(line.get(key), int | float))
        logger.info("step %d of %d: %s", done.plan.step + 1, self._steps, "  ".join(figures))
        CONTEXT.put(step=done.plan.step + 1)

    def evaluated(self, line: Mapping[str, Any]) -> None:
        """Held-out captions were judged."""
        figures = {name: value for name, value in line.items() if name.startswith(("eval/", "blind/"))}
        export_step_metrics(self._meter, figures)
        told = "  ".join(f"{name} {value:.4g}" for name, value in figures.items())
        verdict = f"best {line['best']}" if "best" in line else "blind" if line["blind"] else "it looks"
        logger.info("evaluation of step %d: %s  %s", line["step"], told, verdict)

    def event(self, event: Mapping[str, Any]) -> None:
        """Something was written to the run's events."""
        kind = str(event["kind"])
        self._meter.add(table.EVENTS, kind=kind)
        told = ", ".join(f"{name} {value}" for name, value in event.items() if name not in ("kind", "time"))
        logger.log(logging.WARNING if kind in _WARNINGS else logging.INFO, "%s: %s", kind.replace("_", " "), told)

    def look(self, status: Mapping[str, Any]) -> None:
        """What the controller's status says at this moment."""
        meter, pool = self._meter, status["pool"]
        states = Counter(worker["state"] for worker in pool["workers"].values())
        for state in _STATES:
            meter.set(table.WORKERS, states[state], state=state)
        meter.set(table.WORKERS_TARGET, pool["target"])
        meter.set(table.QUEUED_ASSIGNMENTS, pool["queued_assignments"])
        if status["policy_version"] is not None:
            meter.set(table.POLICY_VERSION, status["policy_version"])
        for state in ("arrived", "held"):
            meter.set(table.BUFFERED_GROUPS, status["buffer"][state], state=state)
        for outcome, total in pool["assignments"].items():
            self._totals.reach(table.ASSIGNMENTS, total, outcome=outcome)


def reward_failures(done: PlannedStep) -> list[dict[str, Any]]:
    """The events of a step some of whose captions have no reward, or none of a part of weight 0.

    `groups` are those left out of learning, `detail` has up to three of the reasons.
    """
    step, groups = done.plan.step, done.taken.groups
    reasons = Counter(reason for group in groups for reason in group.failures)
    reasons += Counter(g.greedy_reward.reason for g in groups if isinstance(g.greedy_reward, RewardFailure))
    missing: dict[str, Counter[str]] = {}
    for row in (score for group in groups for score in group.rewards if isinstance(score, RewardBreakdown)):
        for part, reason in row.missing.items():
            missing.setdefault(part, Counter())[reason] += 1
    left_out = len(groups) - len(done.plan.groups)
    failed = {"kind": "reward_failed", "step": step, "groups": left_out, **_told(reasons)}
    parts = [{"kind": "reward_part_missing", "step": step, "part": part, **_told(why)} for part, why in missing.items()]
    return [failed, *parts] if reasons else parts


def _told(reasons: Counter[str]) -> dict[str, Any]:
    return {"captions": reasons.total(), "detail": "; ".join(reason for reason, _ in reasons.most_common(3))}


def export_step_metrics(meter: Meter, line: Mapping[str, Any]) -> None:
    """What a step's line says, but for its `step`."""
    for name, value in line.items():
        if name != "step" and isinstance(value, int | float):
            _measure(meter, name, float(value))


def _measure(meter: Meter, name: str, value: float) -> None:
    group, _, rest = name.partition("/")
    if name in _GAUGES:
        meter.set(_GAUGES[name], value)
    elif name in _COUNTERS:
        meter.add(_COUNTERS[name], value)
    elif name == "seconds/step":
        meter.observe(table.STEP_SECONDS, value)
    elif group == "seconds":
        meter.add(table.PHASE_SECONDS, value, phase=rest)
    elif group == "loss":
        meter.set(table.LOSS_TERM, value, term=rest)
    elif group == "reward" and rest not in RESERVED_NAMES:
        meter.set(table.REWARD_PART, value, part=rest)
    else:
        meter.set(table.FIGURE, value, name=name)
