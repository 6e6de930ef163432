"""REINFORCE and its descendants: an advantage, a loss over importance ratios and an aggregation, chosen one by one.

A preset only names defaults of those three and their clips; the losses are `losses/policy_gradient.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmrl_ray.algorithms.base import Algorithm, Objective, SumsObjective

if TYPE_CHECKING:
    import torch

    from mmrl_ray.config.learner import LearnerSection
    from mmrl_ray.losses.aggregation import LossStats
    from mmrl_ray.policy.model import Policy
    from mmrl_ray.policy.scoring.collate import LearnerBatch
    from mmrl_ray.policy.scoring.prefix import Scores


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
        # Yu et al. 2025, arXiv:2503.14476: clip-higher, token-level mean, no KL.
        "dapo": {
            "advantage": "group",
            "advantage_std": True,
            "loss": "clipped",
            "clip_high": 0.28,
            "aggregation": "token_mean",
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


def policy_gradient_objective(cfg: LearnerSection, loss: str) -> Objective:
    """One of the losses over importance ratios, by its name."""
    from mmrl_ray.losses.aggregation import LossStats

    return _PolicyGradientObjective(LossStats, cfg, loss)


class _PolicyGradientObjective(SumsObjective["LossStats"]):
    def __init__(self, stats: type[LossStats], cfg: LearnerSection, loss: str) -> None:
        super().__init__(stats)
        self._cfg, self._loss = cfg, loss

    def share(
        self, batch: LearnerBatch, scores: Scores, proximal: torch.Tensor | None, denominator: float, place: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        from mmrl_ray.losses.policy_gradient import policy_loss

        found = policy_loss(
            self._loss,
            scores.logprobs,
            proximal,
            batch.behaviour_logprobs,
            batch.advantages,
            scores.mask,
            scales=batch.scales,
            denominator=denominator,
            off_policy_cap=self._cfg.off_policy_cap,
            clip_low=self._cfg.clip_low,
            clip_high=self._cfg.clip_high,
        )
        return found.loss, found.stats.to_tensor()
