"""PPO with a critic (Schulman et al. 2017, arXiv:1707.06347; of language models Ouyang et al. 2022, arXiv:2203.02155).

    hidden states ──critic──▶ V(s_t)          what a caption earned comes with its last token
           │                      │
           │              δ_t = r_t + γ V(s_t+1) − V(s_t)
           │              A_t = Σ_l (γλ)^l δ_t+l             R_t = A_t + V(s_t)        (GAE, arXiv:1506.02438)
           ▼                      ▼
    L = −min(r·A, clip(r)·A)  +  value_weight · ½ max((V − R)², (V_clipped − R)²)

A token has a baseline of its own, and groups may be of one caption. The critic is one linear layer in float32 that
begins at 0 and reads the policy's hidden states without moving them: its loss trains it alone. Values and advantages
are those of the critic at the start of the step, in every pass over it. The critic lives in the learner, is no part of
the adapter, and goes into the checkpoint beside the optimiser's state.
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

    from mmrl_ray.config.learner import LearnerSection
    from mmrl_ray.policy.model import Policy
    from mmrl_ray.policy.scoring.collate import LearnerBatch
    from mmrl_ray.policy.scoring.prefix import Scores


class PpoSection(Section):
    """Keys of `loss: ppo` alone (arXiv:1707.06347)."""

    gamma: float = Field(1.0, ge=0, le=1)
    """Discount a token."""
    gae_lambda: float = Field(0.95, ge=0, le=1)
    """λ: at 1 the advantage is what was earned less the value, at 0 one step of temporal difference."""
    value_weight: float = Field(0.5, gt=0)
    """Of the critic's loss."""
    value_clip: float | None = Field(0.2, gt=0)
    """How far a value may move from that at the start of the step before its gradient ends; null for any distance."""


class Ppo(Algorithm):
    """Rollouts, a critic, and the clipped loss with an advantage a token."""

    losses = ("ppo",)
    presets = {"ppo": {"advantage": "none", "loss": "ppo", "aggregation": "token_mean"}}
    section, section_name = PpoSection, "ppo"
    panels = (
        Panel("Values and returns", ("ppo/value", "ppo/return")),
        Panel("Loss of the critic, a token", ("ppo/value_loss",)),
        Panel("Variance of returns that the critic explains", ("ppo/explained_variance",)),
        Panel("Share of values clipped", ("ppo/value_clipped",)),
    )
    shown = {"ppo/value_loss": "value loss"}

    def learner_problems(self) -> dict[str, bool]:
        """The critic is the baseline, and it is whole on every rank."""
        name, sharding = self.learner.advantage, self.learner.sharding
        return {
            f"advantage={name} has no meaning with loss=ppo, whose critic is the baseline: write advantage: none": (
                name != "none"
            ),
            f"sharding={sharding} is refused with loss=ppo: its critic is not split": sharding != "none",
        }

    def objective(self, policy: Policy, seed: int = 0) -> Objective:
        """With a fresh critic, the same on every rank."""
        return PpoObjective(self.learner, self.settings(PpoSection), policy)


def advantages_and_returns(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, gamma: float, gae_lambda: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """A and R [N, T] by generalised advantage estimation, 0 where `mask` is False.

    Args:
        rewards: [N], earned with a completion's last token, behind which no value is looked up: one that was cut off
            at the limit counts as ended.
        values: [N, T], V(s_t) before each token.
        mask: bool [N, T], True at completion tokens, from the first place on.
        gamma: the discount a token.
        gae_lambda: λ.
    """
    import torch
    from torch.nn.functional import pad

    goes_on = pad(mask[:, 1:], (0, 1))
    values = torch.where(mask, values, 0.0)
    earned = torch.where(mask & ~goes_on, rewards[:, None].to(values.dtype), 0.0)
    delta = torch.where(mask, earned + gamma * pad(values[:, 1:], (0, 1)) - values, 0.0)
    advantages = torch.zeros_like(delta)
    following = torch.zeros_like(delta[:, 0])
    for t in reversed(range(delta.shape[1])):
        following = delta[:, t] + gamma * gae_lambda * following
        advantages[:, t] = following
    return advantages, advantages + values


class PpoObjective(Objective):
    """One learner's critic, and values at the start of the step."""

    names = (
        *("tokens", "clipped", "ratio", "value_loss", "value_clipped"),
        *("value", "return", "return_squared", "error", "error_squared"),
    )
    needs_hidden = True
    learns_without_signal = True
    """What earned 0 tells the critic something, and with a critic it has an advantage."""

    def __init__(self, learner: LearnerSection, cfg: PpoSection, policy: Policy) -> None:
        import torch

        self._learner, self._cfg = learner, cfg
        self.critic = torch.nn.Linear(policy.hidden_size, 1, dtype=torch.float32, device=policy.device)
        torch.nn.init.zeros_(self.critic.weight)
        torch.nn.init.zeros_(self.critic.bias)
        self._old: dict[int, torch.Tensor] = {}

    def parameters(self) -> list[torch.nn.Parameter]:
        """The critic's weight and bias."""
        return list(self.critic.parameters())

    def begin_step(self) -> None:
        """Values of another step's tokens are none of this one's."""
        self._old.clear()

    def share(
        self, batch: LearnerBatch, scores: Scores, proximal: torch.Tensor | None, denominator: float, place: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The clipped loss of the policy and the critic's, with the sums of both."""
        import torch

        from mmrl_ray.losses.aggregation import masked_mean, masked_sum
        from mmrl_ray.losses.policy_gradient import aligned_logprobs, bounded_ratio, capped_ratio

        mask, scales, cfg = scores.mask, batch.scales[:, None], self._cfg
        assert scores.hidden is not None
        flat = self.critic(scores.hidden.detach().float())[:, 0]
        values = flat.new_zeros(mask.shape).masked_scatter(mask, flat)
        old = self._old.setdefault(place, values.detach())
        advantages, returns = advantages_and_returns(batch.advantages, old, mask, cfg.gamma, cfg.gae_lambda)

        theta, prox, mu = aligned_logprobs(
            scores.logprobs, proximal, batch.behaviour_logprobs, batch.advantages, mask, batch.scales
        )
        ratio = bounded_ratio(theta - prox)
        free = ratio * advantages
        bounded = ratio.clamp(1.0 - self._learner.clip_low, 1.0 + self._learner.clip_high) * advantages
        weights = capped_ratio(prox - mu, self._learner.off_policy_cap) * scales
        policy_term = -masked_mean(torch.minimum(free, bounded) * weights, mask, denominator=denominator)

        squared = (values - returns).square()
        near = squared
        if cfg.value_clip is not None:
            near = (old + (values - old).clamp(-cfg.value_clip, cfg.value_clip) - returns).square()
        per_token = 0.5 * torch.maximum(squared, near)
        value_term = masked_mean(per_token * scales, mask, denominator=denominator)

        with torch.no_grad():
            error = returns - values
            clipped = (bounded < free).to(values.dtype)
            value_clipped = (near > squared).to(values.dtype)
            sums = (clipped, ratio, per_token, value_clipped, values, returns, returns.square(), error, error.square())
            told = torch.stack([mask.sum().to(values.dtype), *(masked_sum(each.detach(), mask) for each in sums)])
        return policy_term + cfg.value_weight * value_term, told

    def figures(self, sums: Mapping[str, float]) -> dict[str, float]:
        """The sums as means over tokens, and the critic's explained variance."""
        mean = {name: sums[name] / max(sums["tokens"], 1.0) for name in self.names}
        spread = mean["return_squared"] - mean["return"] ** 2
        unexplained = mean["error_squared"] - mean["error"] ** 2
        return {
            "clip_fraction": mean["clipped"],
            "ratio_mean": mean["ratio"],
            "ppo/value": mean["value"],
            "ppo/return": mean["return"],
            "ppo/value_loss": mean["value_loss"],
            "ppo/value_clipped": mean["value_clipped"],
            "ppo/explained_variance": 1.0 - unexplained / spread if spread > 1e-12 else math.nan,
        }

    def state(self) -> dict[str, torch.Tensor]:
        """The tensors of the critic."""
        return {f"critic.{name}": tensor.detach() for name, tensor in self.critic.state_dict().items()}

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Puts the tensors of a checkpoint into the critic, in place.

        Raises:
            CheckpointError: there is no critic of this width in it.
        """
        from mmrl_ray.errors import CheckpointError

        found = {name.removeprefix("critic."): tensor for name, tensor in state.items()}
        wanted = {name: tensor.shape for name, tensor in self.critic.state_dict().items()}
        if {name: tensor.shape for name, tensor in found.items()} != wanted:
            raise CheckpointError("the checkpoint has no critic of this model's width: it is of another kind of run")
        self.critic.load_state_dict(found)
