"""Reward-weighted regression (Peters & Schaal 2007) as an algorithm of one's own.

Each completion of a group weighs G · softmax(reward / temperature) − 1: the best ones more than the others in a smooth
way, whatever the rewards' scale and offset, and the weights of a group add to 0.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from pydantic import Field

from mmrl_ray.algorithms.base import Algorithm, Objective, Panel
from mmrl_ray.algorithms.policy_gradient import policy_gradient_objective
from mmrl_ray.config.sections import Section
from mmrl_ray.losses.aggregation import StepRewards, StepWeights
from mmrl_ray.policy.model import Policy


class RewardWeightedSection(Section):
    """What `learner.own:` may say."""

    temperature: float = Field(0.1, gt=0)
    """Towards 0 only the best completion counts, far above the rewards' spread all count alike."""


class RewardWeighted(Algorithm):
    """`algorithm: reward_weighted:RewardWeighted`."""

    presets = {"reward_weighted": {"advantage": "none", "aggregation": "token_mean"}}
    section = RewardWeightedSection
    panels = (Panel("Largest weight of a completion", ("own/largest_weight",)),)

    def weigh(self, step: StepRewards) -> StepWeights:
        """From what the completions earned."""
        temperature = self.settings(RewardWeightedSection).temperature
        scores = torch.where(step.counts, step.rewards / temperature, -torch.inf)
        size = step.counts.sum(dim=1, keepdim=True)
        weights = torch.where(step.counts, size * torch.softmax(scores, dim=1) - 1.0, 0.0)
        found = super().weigh(step)  # scales and denominator of `learner.aggregation`
        return replace(found, advantages=weights, metrics={"own/largest_weight": float(weights.max()) + 1.0})

    def objective(self, policy: Policy, seed: int = 0) -> Objective:
        """−weight · log π, with the importance weight of stale groups."""
        return policy_gradient_objective(self.learner, "reward_guided")
