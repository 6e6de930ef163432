"""`Config`: everything a user writes for one run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from pydantic import model_validator

from mmrl_ray.config.base import Section, refuse
from mmrl_ray.config.data import DataSection
from mmrl_ray.config.deploy import DeploySection
from mmrl_ray.config.learner import LearnerSection
from mmrl_ray.config.model import ModelSection
from mmrl_ray.config.presets import Algorithm, with_preset
from mmrl_ray.config.resources import ResourcesSection
from mmrl_ray.config.reward import RewardSection
from mmrl_ray.config.rollout import RolloutSection
from mmrl_ray.config.run import RunSection
from mmrl_ray.config.serving import ServingSection
from mmrl_ray.config.sft import SftSection
from mmrl_ray.config.value_based import USED_OF_LEARNER, USED_OF_ROLLOUT, ValueBasedSection, unused_keys


class Config(Section):
    """One run, whole. Keys of `learner:` that are not written take the preset's value."""

    run: RunSection
    """Name, seed and place of the run."""
    model: ModelSection
    """The checkpoint and its adapter."""
    data: DataSection
    """The datasets."""
    algorithm: Algorithm = "grpo"
    """A preset: it only names defaults of `learner:` keys, each of which can be written instead."""
    sft: SftSection | None = None
    """A supervised warm start before reinforcement learning; none by default."""
    rollout: RolloutSection = RolloutSection()
    """Sampling and its workers."""
    reward: RewardSection = RewardSection()
    """What a caption earns."""
    learner: LearnerSection
    """Loss, optimiser and steps."""
    value_based: ValueBasedSection | None = None
    """The agent of `algorithm: value_based`."""
    resources: ResourcesSection = ResourcesSection()
    """What the actors ask Ray for."""
    serving: ServingSection | None = None
    """How the policy is served, while it trains or after; the defaults of `mmrl serve` where it is not written."""
    deploy: DeploySection = DeploySection()
    """Where the run's pods get what they need, on Kubernetes."""

    @model_validator(mode="before")
    @classmethod
    def _apply_preset(cls, value: Any) -> Any:
        return with_preset(value)

    @model_validator(mode="after")
    def _sections_fit(self) -> Self:
        rollout, learner, groups = self.rollout, self.learner, self.learner.groups_per_step
        if self.algorithm == "value_based" or self.value_based is not None:
            return self._value_based_fits()
        refuse(
            {
                f"rollout.buffer_groups={rollout.buffer_groups} is smaller than one step "
                f"(learner.groups_per_step={groups}): the run would wait for ever": (rollout.buffer_groups or groups)
                < groups,
                f"learner.workers={learner.max_workers} is above learner.groups_per_step={groups}: "
                "some learners would never work": groups < learner.max_workers,
                f"rollout.group_size={rollout.group_size} is too small: learner.advantage={learner.advantage} "
                "needs 2 or more": learner.advantage in ("leave_one_out", "group") and rollout.group_size < 2,
                f"rollout.group_size={rollout.group_size} must be 2 with learner.loss=dpo: the captions of a pair "
                "are a group": learner.loss == "dpo" and rollout.group_size != 2,
                "learner.loss=dpo needs data.preferences: write its store, as in "
                "{store: 'sqlite:///preferences.db'}": learner.loss == "dpo" and self.data.preferences is None,
                f"data.preferences is read by learner.loss=dpo alone, not by learner.loss={learner.loss}: "
                "take it away, or write algorithm: dpo": learner.loss != "dpo" and self.data.preferences is not None,
                **self._rollouts_problems(),
                **self._normalization_problems(),
            }
        )
        return self

    def _rollouts_problems(self) -> dict[str, bool]:
        """Stored rollouts, and what reads them."""
        learner, stored = self.learner, self.data.rollouts
        return {
            "learner.loss=ilql needs data.rollouts: write the run whose rollouts it learns from, as in "
            "{run: runs/quickstart}": learner.loss == "ilql" and stored is None,
            f"data.rollouts is read by learner.loss=ilql alone, not by learner.loss={learner.loss}: take it away, or "
            "write algorithm: ilql": learner.loss != "ilql" and stored is not None,
        }

    def _normalization_problems(self) -> dict[str, bool]:
        """Where parts are normalised by their group, what would undo or contradict it."""
        rollout, learner = self.rollout, self.learner
        on = self.reward.normalize == "group"
        return {
            f"reward.normalize=group needs rollout.group_size of 2 or more, not {rollout.group_size}": on
            and rollout.group_size < 2,
            "reward.normalize=group divides by standard deviations already: set learner.advantage_std to false": on
            and learner.advantage == "group"
            and learner.advantage_std,
            "reward.normalize=group has no place for the greedy caption, which is in no group: choose another "
            "learner.advantage": on and learner.advantage == "greedy",
        }

    def _value_based_fits(self) -> Self:
        agent, learner = self.value_based, self.learner
        updates = agent.updates if agent is not None else 1
        unused = {f"learner.{name}": value for name, value in unused_keys(learner, USED_OF_LEARNER).items()}
        unused |= {f"rollout.{name}": value for name, value in unused_keys(self.rollout, USED_OF_ROLLOUT).items()}
        parts = self.reward.weights
        refuse(
            {
                "algorithm: value_based needs a section `value_based:`": agent is None,
                f"value_based: is the section of algorithm: value_based, and this is algorithm: {self.algorithm}": (
                    self.algorithm != "value_based"
                ),
                f"learner.steps={learner.steps} is no multiple of value_based.updates={updates}": (
                    learner.steps % updates != 0
                ),
                "algorithm: value_based makes no use of "
                + ", ".join(f"{name}={value}" for name, value in unused.items())
                + "; leave that out": bool(unused),
                f"value_based.shaping names no part of the reward ({', '.join(parts)}) but "
                f"{', '.join(_unknown(agent, parts))}": bool(_unknown(agent, parts)),
                f"reward.normalize={self.reward.normalize} is of groups, and algorithm: value_based has none: leave it "
                "out": self.reward.normalize != "none",
                "data.preferences is read by learner.loss=dpo alone, not by algorithm: value_based: take it away": (
                    self.data.preferences is not None
                ),
                "data.rollouts is read by learner.loss=ilql alone, not by algorithm: value_based: take it away": (
                    self.data.rollouts is not None
                ),
                "algorithm: value_based has a number of rollout.workers, no range": (
                    not isinstance(self.rollout.workers, int)
                ),
                "algorithm: value_based is not served while it trains: leave serving.live_policy out": (
                    self.serving is not None and self.serving.live_policy
                ),
            }
        )
        return self


def _unknown(agent: ValueBasedSection | None, parts: Mapping[str, float]) -> list[str]:
    """Names in `shaping` whose part, or part of a part, the reward lacks."""
    shaping = {} if agent is None else agent.shaping
    return [name for name in shaping if name.split("/", 1)[0] not in parts]
