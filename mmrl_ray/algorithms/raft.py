"""RAFT, reward-ranked fine-tuning (Dong et al. 2023, arXiv:2304.06767): sample G captions, clone the best of them.

Of each group those completions are kept whose reward is at or above a quantile of the group's and above its worst, and
the loss is −log π of their tokens. A group whose rewards are all alike says nothing of what is better: it is passed
over. No ratio and no clip: what was sampled is data here, as in supervised fine-tuning.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from pydantic import Field

from mmrl_ray.algorithms.base import Algorithm, Objective, Panel
from mmrl_ray.config.sections import Section

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from mmrl_ray.config.schema import Config
    from mmrl_ray.losses.aggregation import StepRewards, StepWeights
    from mmrl_ray.policy.model import Policy
    from mmrl_ray.policy.scoring.collate import LearnerBatch
    from mmrl_ray.policy.scoring.prefix import Scores


class RaftSection(Section):
    """Keys of `loss: raft` alone (arXiv:2304.06767)."""

    quantile: float = Field(0.75, ge=0, le=1)
    """Completions at or above this quantile of their group's rewards are cloned: 0.75 keeps the best quarter, 1 only
    the best."""


class Raft(Algorithm):
    """Rollouts, of which the best are cloned."""

    losses = ("raft",)
    presets = {"raft": {"advantage": "none", "loss": "raft", "aggregation": "token_mean"}}
    section, section_name = RaftSection, "raft"
    panels = (
        Panel("Share of completions that were cloned", ("raft/kept",)),
        Panel("Cloned tokens: −log π", ("raft/nll",), unit="nats a token"),
    )
    shown = {"raft/nll": "nll"}

    def learner_problems(self) -> dict[str, bool]:
        """The quantile is the baseline."""
        name = self.learner.advantage
        return {f"advantage={name} has no meaning with loss=raft: write advantage: none": name != "none"}

    def problems(self, cfg: Config) -> dict[str, bool]:
        """One caption is no choice."""
        size = cfg.rollout.group_size
        return {f"rollout.group_size={size} is too small: learner.loss=raft needs 2 or more": size < 2}

    def weigh(self, step: StepRewards) -> StepWeights:
        """1 for what is cloned. What is not takes no part, so that no pass is made over it."""
        from mmrl_ray.losses.aggregation import StepWeights, scales_of

        kept = best_of_groups(step, self.settings(RaftSection).quantile)
        if step.masked is not None:  # a group whose best were cut off is passed over
            kept = kept & ~step.masked
        silent = step.counts & ~kept.any(dim=1, keepdim=True)
        scales, denominator = scales_of(step, self.learner.aggregation, kept | silent)
        share = float(kept.sum() / step.counts.sum())
        return StepWeights(kept.to(step.rewards.dtype), scales, denominator, {"raft/kept": share})

    def objective(self, policy: Policy, seed: int = 0) -> Objective:
        """−log π of what is kept."""
        return _Cloning()


def best_of_groups(step: StepRewards, quantile: float) -> torch.Tensor:
    """bool [M, G]: completions at or above the quantile of their group's rewards, and above its worst."""
    import torch

    from mmrl_ray.metrics.statistics import resolution

    rewards = torch.where(step.counts, step.rewards, math.nan)
    threshold = torch.nanquantile(rewards, quantile, dim=1, keepdim=True)
    worst = torch.where(step.counts, step.rewards, math.inf).amin(dim=1, keepdim=True)
    sizes = torch.maximum(step.rewards.abs(), step.magnitude)
    noise = resolution(torch.where(step.counts, sizes, 0.0).amax(dim=1, keepdim=True))
    return step.counts & (step.rewards >= threshold - noise) & (step.rewards > worst + noise)


class _Cloning(Objective):
    names = ("tokens", "nll")

    def share(
        self, batch: LearnerBatch, scores: Scores, proximal: torch.Tensor | None, denominator: float, place: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        from mmrl_ray.losses.aggregation import masked_sum
        from mmrl_ray.losses.policy_gradient import reward_guided_loss

        loss = reward_guided_loss(
            scores.logprobs, batch.advantages * batch.scales, scores.mask, denominator=denominator
        )
        cloned = scores.mask & (batch.advantages > 0)[:, None]
        return loss, torch.stack([cloned.sum().to(loss.dtype), -masked_sum(scores.logprobs.detach(), cloned)])

    def figures(self, sums: Mapping[str, float]) -> dict[str, float]:
        return {"raft/nll": sums["nll"] / sums["tokens"] if sums["tokens"] else math.nan}
