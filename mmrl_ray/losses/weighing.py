"""From what a step's completions earned to what each weighs: advantages, per-token weights, and one denominator.

`M` groups of `G` completions, all of those that the step learns from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from mmrl_ray.losses.advantages import advantages
from mmrl_ray.losses.aggregation import completion_scales


@dataclass(frozen=True, slots=True)
class StepRewards:
    """What is known of a step, over all ranks."""

    rewards: torch.Tensor
    """float64 [M, G], after risk, normalisation and the k1 penalty; 0 where there is none."""
    counts: torch.Tensor
    """bool [M, G], False at a completion whose reward failed."""
    magnitude: torch.Tensor
    """[M, G], how large the numbers were that each reward was summed from."""
    greedy: torch.Tensor | None
    """[M], rewards of the greedy completions, where the baseline needs them."""
    lengths: torch.Tensor
    """[M, G], tokens of each completion."""
    max_new_tokens: int


@dataclass(frozen=True, slots=True)
class StepWeights:
    """What the learner makes of it."""

    advantages: torch.Tensor
    """[M, G]; 0 where nothing counts."""
    scales: torch.Tensor
    """[M, G], each completion's weight a token; one at 0 takes no part in the step."""
    denominator: float
    """Of every term of the loss, over all ranks and micro-batches; above 0."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Figures of the choice, for the step's metrics line."""


def weigh(step: StepRewards, advantage: str, aggregation: str, *, divide_by_std: bool = True) -> StepWeights:
    """Weights by the names of a baseline (`advantages.py`) and an aggregation (`aggregation.py`).

    Raises:
        ValueError: of these two.
    """
    weights = advantages(
        advantage,
        step.rewards,
        mask=step.counts,
        greedy=step.greedy,
        divide_by_std=divide_by_std,
        magnitude=step.magnitude,
    )
    scales, denominator = scales_of(step, aggregation, step.counts)
    return StepWeights(weights, scales, denominator)


def scales_of(step: StepRewards, aggregation: str, counts: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Per-token weights [M, G] of the completions that count, bool [M, G], and their denominator."""
    flat = step.lengths.flatten()
    scales, denominator = completion_scales(
        aggregation, flat, max_new_tokens=step.max_new_tokens, mask=counts.flatten()
    )
    return scales.reshape(step.lengths.shape), float(denominator)
