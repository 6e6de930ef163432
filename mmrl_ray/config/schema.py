"""`Config`: everything a user writes for one run."""

from __future__ import annotations

from typing import Any, Self

from pydantic import model_validator

from mmrl_ray.config.base import Section
from mmrl_ray.config.data import DataSection
from mmrl_ray.config.learner import LearnerSection
from mmrl_ray.config.model import ModelSection
from mmrl_ray.config.presets import PRESETS, Algorithm
from mmrl_ray.config.resources import ResourcesSection
from mmrl_ray.config.reward import RewardSection
from mmrl_ray.config.rollout import RolloutSection
from mmrl_ray.config.run import RunSection
from mmrl_ray.config.sft import SftSection


class Config(Section):
    """One run, whole. Keys of `learner:` that are not written take the preset's value."""

    run: RunSection
    model: ModelSection
    data: DataSection
    algorithm: Algorithm = "grpo"
    sft: SftSection | None = None
    rollout: RolloutSection = RolloutSection()
    reward: RewardSection = RewardSection()
    learner: LearnerSection
    resources: ResourcesSection = ResourcesSection()

    @model_validator(mode="before")
    @classmethod
    def _apply_preset(cls, value: Any) -> Any:
        if not isinstance(value, dict) or not isinstance(value.get("learner"), dict):
            return value  # the ordinary validation says what is wrong
        preset = PRESETS.get(value.get("algorithm", "grpo"))
        return value if preset is None else {**value, "learner": {**preset, **value["learner"]}}

    @model_validator(mode="after")
    def _no_deadlock(self) -> Self:
        if self.rollout.buffer_groups is not None and self.rollout.buffer_groups < self.learner.groups_per_step:
            raise ValueError(
                f"rollout.buffer_groups={self.rollout.buffer_groups} is smaller than one step "
                f"(learner.groups_per_step={self.learner.groups_per_step}): the run would wait for ever"
            )
        if self.learner.groups_per_step < self.learner.workers:
            raise ValueError(
                f"learner.groups_per_step={self.learner.groups_per_step} is smaller than "
                f"learner.workers={self.learner.workers}: some learners would never work"
            )
        if self.learner.advantage in ("leave_one_out", "group") and self.rollout.group_size < 2:
            raise ValueError(
                f"learner.advantage={self.learner.advantage} needs rollout.group_size of 2 or more, "
                f"not {self.rollout.group_size}"
            )
        return self
