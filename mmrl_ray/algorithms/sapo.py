"""SAPO, soft adaptive policy optimisation (Gao et al. 2025, arXiv:2511.20347): GRPO with a soft gate for the hard clip.

With r = π_θ/π_prox a token and A the advantage of its completion,

    L = −f(r)·A,   f(r) = (4/τ)·σ(τ·(r − 1)),   τ = τ_pos where A > 0, else τ_neg.

Its gradient is that of r·A times 4·σ(1 − σ), which is 1 at r = 1 and fades on both sides: the further a token has gone,
the less it moves, and none is cut off. τ_neg > τ_pos fades tokens of bad captions sooner, as their gradient raises
every other token of the vocabulary. Off-policy it is multiplied by min(π_prox/μ, c), detached, as the other losses are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from mmrl_ray.algorithms.base import Algorithm, Objective, Panel
from mmrl_ray.config.sections import Section

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from mmrl_ray.policy.model import Policy
    from mmrl_ray.policy.scoring.collate import LearnerBatch
    from mmrl_ray.policy.scoring.prefix import Scores


class SapoSection(Section):
    """Keys of `loss: sapo` alone (arXiv:2511.20347)."""

    tau_positive: float = Field(1.0, gt=0)
    """Temperature of the gate where the advantage is above 0; the larger, the sooner a token fades."""
    tau_negative: float = Field(1.05, gt=0)
    """The same where it is below."""


class Sapo(Algorithm):
    """Rollouts, advantages of groups, and a soft gate."""

    losses = ("sapo",)
    presets = {
        "sapo": {"advantage": "group", "advantage_std": True, "loss": "sapo", "aggregation": "sequence_mean"},
    }
    section, section_name = SapoSection, "sapo"
    panels = (Panel("Soft gate: what is left of a token's gradient", ("sapo/gate",)),)

    def objective(self, policy: Policy, seed: int = 0) -> Objective:
        """The loss of the gated ratio."""
        return _SoftGate(self.settings(SapoSection), self.learner.off_policy_cap)


def soft_gate(ratio: torch.Tensor, advantages: torch.Tensor, tau_positive: float, tau_negative: float) -> torch.Tensor:
    """f(r) of each token; `ratio` [N, T], `advantages` [N, 1] or [N, T]."""
    tau = (advantages > 0).to(ratio.dtype) * (tau_positive - tau_negative) + tau_negative
    return 4.0 / tau * (tau * (ratio - 1.0)).sigmoid()


class _SoftGate(Objective):
    names = ("tokens", "gate", "ratio", "behaviour")

    def __init__(self, cfg: SapoSection, off_policy_cap: float) -> None:
        self._cfg, self._cap = cfg, off_policy_cap

    def share(
        self, batch: LearnerBatch, scores: Scores, proximal: torch.Tensor | None, denominator: float, place: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        import torch

        from mmrl_ray.losses.aggregation import masked_mean, masked_sum
        from mmrl_ray.losses.policy_gradient import aligned_logprobs, bounded_ratio, capped_ratio

        mask, advantages = scores.mask, batch.advantages[:, None]
        theta, prox, mu = aligned_logprobs(
            scores.logprobs, proximal, batch.behaviour_logprobs, batch.advantages, mask, batch.scales
        )
        ratio = bounded_ratio(theta - prox)
        gated = soft_gate(ratio, advantages, self._cfg.tau_positive, self._cfg.tau_negative)
        behaviour = capped_ratio(prox - mu, self._cap)
        loss = -masked_mean(gated * advantages * behaviour * batch.scales[:, None], mask, denominator=denominator)
        with torch.no_grad():
            tau = torch.where(advantages > 0, self._cfg.tau_positive, self._cfg.tau_negative)
            opened = (tau * (ratio - 1.0)).sigmoid()
            sums = [masked_sum(each, mask) for each in (4.0 * opened * (1.0 - opened), ratio, behaviour)]
        return loss, torch.stack([mask.sum().to(loss.dtype), *sums])

    def figures(self, sums: Mapping[str, float]) -> dict[str, float]:
        tokens = max(sums["tokens"], 1.0)
        return {
            "sapo/gate": sums["gate"] / tokens,
            "ratio_mean": sums["ratio"] / tokens,
            "behaviour_ratio_mean": sums["behaviour"] / tokens,
        }
