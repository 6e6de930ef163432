"""REINFORCE and its descendants: an advantage, a loss over importance ratios and an aggregation, chosen one by one.

A preset only names defaults of those three and their clips; the losses are `losses/policy_gradient.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmrl_ray.algorithms.base import Algorithm, Objective, policy_gradient_objective

if TYPE_CHECKING:
    from mmrl_ray.policy.model import Policy

__all__ = ["PolicyGradient", "policy_gradient_objective"]


class PolicyGradient(Algorithm):
    """Rollouts, a baseline, and one of four losses."""

    losses = ("reward_guided", "clipped", "gspo", "cispo")
    presets = {
        # Williams 1992, with the batch's mean reward as the baseline.
        "reinforce": {"advantage": "batch_mean", "loss": "reward_guided", "aggregation": "sequence_sum"},
        # Rennie et al. 2017, arXiv:1612.00563: the greedy caption's reward is the baseline.
        "scst": {"advantage": "greedy", "loss": "reward_guided", "aggregation": "sequence_sum"},
        # Ahmadian et al. 2024, arXiv:2402.14740.
        "rloo": {"advantage": "leave_one_out", "loss": "reward_guided", "aggregation": "sequence_sum"},
        # Shao et al. 2024, arXiv:2402.03300.
        "grpo": {
            "advantage": "group",
            "advantage_std": True,
            "loss": "clipped",
            "aggregation": "sequence_mean",
            "kl": {"weight": 0.04, "estimator": "k3"},
        },
        # Liu et al. 2025, arXiv:2503.20783.
        "dr_grpo": {"advantage": "group", "advantage_std": False, "loss": "clipped", "aggregation": "constant"},
        # Yu et al. 2025, arXiv:2503.14476: clip-higher, token-level mean, no KL, dynamic sampling, soft overlong
        # punishment over the last fifth of the limit. Its overlong filtering, which the soft punishment stands in for,
        # is `mask_truncated`.
        "dapo": {
            "advantage": "group",
            "advantage_std": True,
            "loss": "clipped",
            "clip_high": 0.28,
            "aggregation": "token_mean",
            "dynamic_sampling": True,
            "overlong": {"penalty": 1.0, "buffer": 0.2},
        },
        # Zheng et al. 2025, arXiv:2507.18071: the ratio of whole sequences, with its narrow clip range.
        "gspo": {
            "advantage": "group",
            "advantage_std": True,
            "loss": "gspo",
            "clip_low": 3e-4,
            "clip_high": 4e-4,
            "aggregation": "sequence_mean",
        },
        # MiniMax-M1 2025, arXiv:2506.13585: clip the importance weight, keep every token's gradient.
        "cispo": {
            "advantage": "group",
            "advantage_std": True,
            "loss": "cispo",
            "clip_low": 1.0,
            "clip_high": 2.0,
            "aggregation": "token_mean",
        },
    }

    def objective(self, policy: Policy, seed: int = 0) -> Objective:
        """`learner.loss`, with its clips and its cap; of a subclass with another name for it, its preset's."""
        named = next(iter(self.presets.values())).get("loss", "clipped")
        return policy_gradient_objective(self.learner, self.learner.loss if self.learner.loss in self.losses else named)
