"""What one assignment says about the rollout worker that did it."""

from __future__ import annotations

from mmrl_ray.rollouts.assignments import AssignmentResult
from mmrl_ray.telemetry import table
from mmrl_ray.telemetry.meter import Meter


def measure_assignment(meter: Meter, result: AssignmentResult) -> None:
    """Once an assignment, in the worker's process."""
    for phase, seconds in result.timings.items():
        meter.add(table.WORKER_SECONDS, seconds, phase=phase)
    meter.observe(table.ASSIGNMENT_SECONDS, sum(result.timings.values()))
    meter.set(table.WORKER_VERSION, result.version)
    meter.add(table.WORKER_GROUPS, len(result.groups))
    meter.add(table.WORKER_TOKENS, sum(group.prompt_tokens for group in result.groups), kind="prompt")
    meter.add(table.WORKER_TOKENS, sum(sum(group.completion_tokens) for group in result.groups), kind="completion")
    for name, found in (("vision_hits", "hit"), ("vision_misses", "miss")):
        meter.add(table.WORKER_VISION, sum(group.counters.get(name, 0) for group in result.groups), result=found)
    meter.add(table.WORKER_REWARD_FAILURES, sum(len(group.failures) for group in result.groups))
    meter.add(table.WORKER_BROKEN_SAMPLES, len(result.failures))
