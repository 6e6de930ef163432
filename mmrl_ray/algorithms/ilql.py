"""Implicit language Q-learning (Snell et al. 2022, arXiv:2206.11871): values of tokens from another run's rollouts.

Each stored completion weighs what it earned, with no baseline. Two Q heads and a V head on the policy's hidden states
learn (`policy/heads.py`, `losses/ilql.py`), and decoding adds β(Q − V) to log π.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from mmrl_ray.algorithms.base import Algorithm, Objective, Panel, SumsObjective
from mmrl_ray.config.sections import Section

if TYPE_CHECKING:
    import torch

    from mmrl_ray.losses.ilql import IlqlStats
    from mmrl_ray.policy.model import Policy
    from mmrl_ray.policy.scoring.collate import LearnerBatch
    from mmrl_ray.policy.scoring.prefix import Scores


class IlqlSection(Section):
    """Keys of `loss: ilql` alone (arXiv:2206.11871): values of next tokens, learnt from the rollouts of another run."""

    beta: float = Field(4.0, ge=0)
    """How much decoding makes of the values: log π + β(Q − V). 0 is π alone; it can be chosen anew when captioning."""
    gamma: float = Field(1.0, ge=0, le=1)
    """Discount a token; the reward comes with the last one."""
    expectile: float = Field(0.8, gt=0, lt=1)
    """τ: at 0.5 V is the mean of what was said in a state, towards 1 the best of it."""
    conservative: float = Field(0.1, ge=0)
    """α: how much tokens that were not said are pulled down."""
    target_rate: float = Field(0.05, gt=0, le=1)
    """How far the targets follow the learning Qs, an update."""
    bc_weight: float = Field(0.0, ge=0)
    """w: above 0 the adapter learns, too, by the likelihood of the stored tokens and through the values; at 0 the
    policy stays as it is, and the heads read its hidden states."""
    width: int | None = Field(None, ge=1)
    """Of the layer inside each head; twice the model's hidden width by default. A head over the vocabulary has
    width × vocabulary weights, and there are four of them in a learner."""


class Ilql(Algorithm):
    """Stored rollouts, values, and by default an adapter that stays as it is."""

    losses = ("ilql",)
    presets = {"ilql": {"advantage": "none", "loss": "ilql", "aggregation": "token_mean"}}
    section, section_name, written_always = IlqlSection, "ilql", True
    samples = "stored"
    panels = (
        Panel("Values of the stored tokens, and what they were better than V", ("ilql/q", "ilql/v", "ilql/advantage")),
        Panel("Terms of the values' loss, a token", ("ilql/td", "ilql/expectile", "ilql/conservative", "ilql/nll")),
    )
    shown = {"ilql/td": "td", "ilql/v": "V"}

    @property
    def trains_adapter(self) -> bool:
        """Only with `ilql.bc_weight` above 0, where it also clones the stored completions."""
        return self.settings(IlqlSection).bc_weight > 0

    @property
    def decoding_beta(self) -> float:
        """β of the config, `ilql.beta`."""
        return self.settings(IlqlSection).beta

    def value_width(self, hidden: int) -> int | None:
        """Width of the layer inside each head: `ilql.width`, or twice the hidden width."""
        return self.settings(IlqlSection).width or 2 * hidden

    def learner_problems(self) -> dict[str, bool]:
        """Refuses a KL term (nothing is sampled), sharding (heads stay whole), regularisers of a fixed adapter."""
        cfg = self.learner
        return {
            f"kl.weight={cfg.kl.weight:g} is refused with loss=ilql, which samples nothing: leave it at 0": (
                cfg.kl.weight > 0
            ),
            f"sharding={cfg.sharding} is refused with loss=ilql: its heads are not split": cfg.sharding != "none",
            "adapter_l2 and l2_to_pretrained have nothing to hold where ilql.bc_weight=0 leaves the adapter as it "
            "is: leave them at 0": not self.trains_adapter and cfg.adapter_l2 + cfg.l2_to_pretrained > 0,
        }

    def prepare(self, policy: Policy, seed: int) -> None:
        """Puts fresh Q and V heads on the policy."""
        from mmrl_ray.policy.heads import add_learning_heads

        cfg = self.settings(IlqlSection)
        add_learning_heads(policy, beta=cfg.beta, width=cfg.width, seed=seed)

    def objective(self, policy: Policy, seed: int = 0) -> Objective:
        """Over the heads that are on the policy.

        Raises:
            ValueError: it has none that learn.
        """
        from mmrl_ray.losses.ilql import IlqlStats

        return _IlqlObjective(IlqlStats, self.settings(IlqlSection), policy)


class _IlqlObjective(SumsObjective["IlqlStats"]):
    needs_hidden = True
    learns_without_signal = True
    """A completion that earned 0 says as much about values as any other."""

    def __init__(self, stats: type[IlqlStats], cfg: IlqlSection, policy: Policy) -> None:
        from mmrl_ray.policy.heads import learning_heads

        super().__init__(stats)
        self._cfg, self._policy, self._heads = cfg, policy, learning_heads(policy)

    def parameters(self) -> list[torch.nn.Parameter]:
        return self._heads.learnt()

    def share(
        self, batch: LearnerBatch, scores: Scores, proximal: torch.Tensor | None, denominator: float, place: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        from mmrl_ray.losses.ilql import ilql_loss
        from mmrl_ray.policy.heads import values_of

        found = ilql_loss(
            values_of(self._heads, self._policy, batch, scores),
            scores.logprobs,
            batch.advantages,  # with no baseline, what each completion earned
            scores.mask,
            scales=batch.scales,
            denominator=denominator,
            gamma=self._cfg.gamma,
            expectile=self._cfg.expectile,
            conservative_weight=self._cfg.conservative,
            bc_weight=self._cfg.bc_weight,
        )
        return found.loss, found.stats.to_tensor()

    def after_update(self) -> None:
        self._heads.follow(self._cfg.target_rate)
