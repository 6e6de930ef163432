"""What one step says about one learner."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmrl_ray.experience.carriers import StepPlan
from mmrl_ray.telemetry import table
from mmrl_ray.telemetry.meter import Meter


def measure_learner(meter: Meter, plan: StepPlan, rank: int, metrics: Mapping[str, Any]) -> None:
    """Once a step, on every rank: its own seconds, and the tokens of its own groups."""
    for name, value in metrics.items():
        if name.startswith("seconds/"):
            meter.add(table.LEARNER_SECONDS, value, phase=name.removeprefix("seconds/"))
    meter.add(table.LEARNER_STEPS)
    groups = [plan.groups[index] for batch in plan.micro_batches[rank] for index in batch]
    meter.add(table.LEARNER_TOKENS, sum(group.prompt_tokens for group in groups), kind="prompt")
    meter.add(table.LEARNER_TOKENS, sum(sum(group.learned_tokens) for group in groups), kind="completion")


def measure_checkpoint(meter: Meter, seconds: float) -> None:
    """A checkpoint was written, by rank 0."""
    meter.add(table.CHECKPOINTS)
    meter.observe(table.CHECKPOINT_SECONDS, seconds)
