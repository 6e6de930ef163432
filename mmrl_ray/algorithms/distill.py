"""On-policy distillation (Agarwal et al. 2024, arXiv:2306.13649): a teacher scores what the student samples.

    student samples y ──▶ rewards R ──▶ advantage A of each completion, × reward_weight
                     └──▶ teacher's log π_T(y_t | y_<t), where other algorithms have a reference's
                                 d_t = log π_θ(y_t) − log π_T(y_t),   E_{y_t ~ π_θ} d_t = KL(π_θ ‖ π_T) at y_<t

It minimises the reverse KL to the teacher, token by token on captions of the student's own: the paper's on-policy case
(its λ = 1) with the reverse KL for its divergence, and no gradient through the sampling. The paper sums over the
vocabulary; here d_t of the sampled token stands for that sum, which is unbiased and needs one number a token of the
teacher instead of a whole distribution. With w = `weight`, r_t = π_θ/π_prox, and both models at the temperature of the
rollouts,

    signal: reward    A_t = reward_weight · A − w · d_t, at the start of the step; L = −min(r_t A_t, clip(r_t) A_t)
    signal: loss      L = −min(r_t A, clip(r_t) A) · reward_weight + w · ½ d_t²

The gradients of the two are the same on-policy at the first pass: that of ½d² is d·∇log π_θ. `reward` takes part in the
clip and in the correction of stale groups, `loss` in neither. Distillation moves every token, so that no group is
passed over; with `reward_weight: 0` rewards are measured, and teach nothing.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from mmrl_ray.algorithms.base import Algorithm, Objective, Panel
from mmrl_ray.config.sections import Section

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from mmrl_ray.config.learner import LearnerSection
    from mmrl_ray.policy.model import Policy
    from mmrl_ray.policy.scoring.collate import LearnerBatch
    from mmrl_ray.policy.scoring.prefix import Scores


class DistillSection(Section):
    """Keys of `loss: distill` alone (arXiv:2306.13649); the teacher is `teacher:`."""

    signal: Literal["reward", "loss"] = "reward"
    """What the reverse KL of a token is: taken off the token's advantage, or a term of the loss beside it."""
    weight: float = Field(1.0, gt=0)
    """Of the reverse KL."""
    reward_weight: float = Field(0.0, ge=0)
    """Of the advantage of the run's own rewards; 0 distils alone."""


class Distill(Algorithm):
    """Rollouts, and a teacher's log-probs of them."""

    losses = ("distill",)
    presets = {
        "distill": {"advantage": "group", "advantage_std": True, "loss": "distill", "aggregation": "token_mean"},
    }
    section, section_name = DistillSection, "distill"
    has_teacher = True
    panels = (
        Panel("Reverse KL to the teacher, as sampled", ("distill/reverse_kl",), unit="nats a token"),
        Panel("Log-probs of sampled tokens", ("distill/student", "distill/teacher"), unit="nats a token"),
    )
    shown = {"kl": "to the teacher"}

    def learner_problems(self) -> dict[str, bool]:
        """A KL term is refused: the pull is towards the teacher, and there is no other reference."""
        weight = self.learner.kl.weight
        refused = f"kl.weight={weight:g} is refused with loss=distill, whose pull is towards the teacher: leave it at 0"
        return {refused: weight > 0}

    def objective(self, policy: Policy, seed: int = 0) -> Objective:
        """The clipped loss of the rewards and the reverse KL."""
        return _Distilling(self.learner, self.settings(DistillSection))


def token_advantages(
    advantages: torch.Tensor, student: torch.Tensor, teacher: torch.Tensor, weight: float
) -> torch.Tensor:
    """A_t [N, T] = A − weight · (log π_student − log π_teacher), detached.

    Args:
        advantages: [N], of whole completions, weighed already.
        student: log-probs [N, T] of the sampled tokens.
        teacher: the same of the teacher.
        weight: of the reverse KL.
    """
    return (advantages[:, None] - weight * (student - teacher)).detach()


class _Distilling(Objective):
    names = ("tokens", "clipped", "ratio", "behaviour", "reverse", "student", "teacher")
    learns_without_signal = True

    def __init__(self, learner: LearnerSection, cfg: DistillSection) -> None:
        self._learner, self._cfg = learner, cfg

    def share(
        self, batch: LearnerBatch, scores: Scores, proximal: torch.Tensor | None, denominator: float, place: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        from mmrl_ray.errors import LearnerError
        from mmrl_ray.losses.aggregation import masked_mean, masked_sum
        from mmrl_ray.losses.policy_gradient import aligned_logprobs, bounded_ratio, capped_ratio
        from mmrl_ray.losses.regularizers import kl_loss

        if batch.reference_logprobs is None:
            raise LearnerError(f"captions of {', '.join(batch.sample_ids[:4])} came without a teacher's log-probs")
        mask, cfg, learner = scores.mask, self._cfg, self._learner
        theta, prox, mu = aligned_logprobs(
            scores.logprobs, proximal, batch.behaviour_logprobs, batch.advantages, mask, batch.scales
        )
        teacher = torch.where(mask, batch.reference_logprobs, 0.0)
        in_reward = cfg.signal == "reward"
        earned = cfg.reward_weight * batch.advantages
        advantages = token_advantages(earned, prox, teacher, cfg.weight if in_reward else 0.0)
        ratio = bounded_ratio(theta - prox)
        free, bounded = ratio * advantages, ratio.clamp(1.0 - learner.clip_low, 1.0 + learner.clip_high) * advantages
        behaviour = capped_ratio(prox - mu, learner.off_policy_cap)
        weights = behaviour * batch.scales[:, None]
        loss = -masked_mean(torch.minimum(free, bounded) * weights, mask, denominator=denominator)
        if not in_reward:
            pull = kl_loss("k2", scores.logprobs, teacher, mask, scales=batch.scales, denominator=denominator)
            loss = loss + cfg.weight * pull.loss
        with torch.no_grad():
            clipped = (bounded < free).to(theta.dtype)
            sums = (clipped, ratio, behaviour, theta - teacher, theta, teacher)
            told = torch.stack([mask.sum().to(theta.dtype), *(masked_sum(each.detach(), mask) for each in sums)])
        return loss, told

    def figures(self, sums: Mapping[str, float]) -> dict[str, float]:
        if not sums["tokens"]:
            return {"distill/reverse_kl": math.nan}
        mean = {name: sums[name] / sums["tokens"] for name in self.names}
        return {
            "clip_fraction": mean["clipped"],
            "ratio_mean": mean["ratio"],
            "behaviour_ratio_mean": mean["behaviour"],
            "distill/reverse_kl": mean["reverse"],
            "distill/student": mean["student"],
            "distill/teacher": mean["teacher"],
        }
