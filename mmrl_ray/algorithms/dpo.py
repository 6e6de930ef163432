"""Direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290): pairs in place of rollouts.

The two captions of a labelled pair of `data.preferences` are a group, and what each "earned" is the probability that
it is liked better. The loss is `losses/dpo.py`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from pydantic import Field

from mmrl_ray.algorithms.base import Algorithm, Objective, Panel, SumsObjective
from mmrl_ray.config.sections import Section

if TYPE_CHECKING:
    import torch

    from mmrl_ray.config.schema import Config
    from mmrl_ray.losses.aggregation import StepRewards, StepWeights
    from mmrl_ray.losses.dpo import DpoStats
    from mmrl_ray.policy.model import Policy
    from mmrl_ray.policy.scoring.collate import LearnerBatch
    from mmrl_ray.policy.scoring.prefix import Scores


class DpoSection(Section):
    """Keys of `loss: dpo` alone (arXiv:2305.18290)."""

    beta: float = Field(0.1, gt=0)
    """How dear it is to leave the policy that training started from; small values let it go far."""
    label_smoothing: float = Field(0.0, ge=0, lt=0.5)
    """The probability that a label is wrong, as far as the loss is concerned."""


class Dpo(Algorithm):
    """Learns from labelled pairs of captions, without a reward."""

    losses = ("dpo",)
    presets = {"dpo": {"advantage": "none", "loss": "dpo", "aggregation": "sequence_sum"}}
    section, section_name, written_always = DpoSection, "dpo", True
    samples = "pairs"
    panels = (
        Panel("Preferences", ("dpo/accuracy", "dpo/confidence"), unit="share of the step's pairs"),
        Panel("Implicit rewards", ("dpo/reward_chosen", "dpo/reward_rejected", "dpo/margin")),
    )
    shown = {"dpo/accuracy": "accuracy"}

    @property
    def needs_reference(self) -> bool:
        """Always: the loss compares the policy with its reference."""
        return True

    @property
    def implicit_reward_scale(self) -> float:
        """β of the loss."""
        return self.settings(DpoSection).beta

    def learner_problems(self) -> dict[str, bool]:
        """A KL term is refused: the loss has its own pull towards the reference."""
        weight = self.learner.kl.weight
        refused = f"kl.weight={weight:g} is refused with loss=dpo, which has its own pull, dpo.beta: leave it at 0"
        return {refused: weight > 0}

    def problems(self, cfg: Config) -> dict[str, bool]:
        """A group size other than 2 is refused: a group is a pair."""
        size = cfg.rollout.group_size
        return {
            f"rollout.group_size={size} must be 2 with learner.loss=dpo: the captions of a pair are a group": size != 2
        }

    def weigh(self, step: StepRewards) -> StepWeights:
        """As the base class, with the mean over pairs."""
        return replace(super().weigh(step), denominator=float(len(step.rewards)))

    def objective(self, policy: Policy, seed: int = 0) -> Objective:
        """The paper's, with label smoothing."""
        from mmrl_ray.losses.dpo import DpoStats

        return _DpoObjective(DpoStats, self.settings(DpoSection))


class _DpoObjective(SumsObjective["DpoStats"]):
    def __init__(self, stats: type[DpoStats], cfg: DpoSection) -> None:
        super().__init__(stats)
        self._cfg = cfg

    def share(
        self, batch: LearnerBatch, scores: Scores, proximal: torch.Tensor | None, denominator: float, place: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        from mmrl_ray.errors import LearnerError
        from mmrl_ray.losses.dpo import dpo_loss

        if batch.reference_logprobs is None:
            raise LearnerError(f"pairs {', '.join(batch.sample_ids[:4])} came without reference log-probs")
        found = dpo_loss(
            scores.logprobs,
            batch.reference_logprobs,
            batch.advantages,
            scores.mask,
            denominator=denominator,
            beta=self._cfg.beta,
            label_smoothing=self._cfg.label_smoothing,
        )
        return found.loss, found.stats.to_tensor()
