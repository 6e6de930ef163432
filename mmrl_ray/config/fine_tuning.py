"""`serving.fine_tuning:` — what clients of the gateway may have trained: an allow-list of models and datasets."""

from __future__ import annotations

import re
from typing import Any, Self

from pydantic import Field, model_validator

from mmrl_ray.config.base import Section, refuse
from mmrl_ray.config.learner import LearnerSection
from mmrl_ray.config.model import ModelSection
from mmrl_ray.config.presets import Algorithm, with_preset
from mmrl_ray.config.resources import ResourcesSection
from mmrl_ray.config.reward import RewardSection
from mmrl_ray.config.rollout import RolloutSection
from mmrl_ray.config.sft import SftSection

_NAME = r"[A-Za-z0-9][A-Za-z0-9._/-]{0,63}"


class RecipeSection(Section):
    """A base model and how it is trained: a config of `mmrl train` without its run and its data."""

    model: ModelSection
    """The checkpoint and its adapter."""
    prompt: str = "Describe the image."
    """The user's turn for rows that bring no prompt of their own."""
    algorithm: Algorithm = "grpo"
    """A preset, as in a config of `mmrl train`."""
    sft: SftSection | None = None
    """A supervised warm start before reinforcement learning; none by default."""
    rollout: RolloutSection = RolloutSection()
    """Sampling and its workers."""
    reward: RewardSection = RewardSection()
    """What a caption earns."""
    learner: LearnerSection
    """Loss, optimiser, and the steps of a job that does not say how many."""
    resources: ResourcesSection = ResourcesSection()
    """What the actors ask Ray for."""

    @model_validator(mode="before")
    @classmethod
    def _apply_preset(cls, value: Any) -> Any:
        return with_preset(value)


class FineTuningSection(Section):
    """Jobs over HTTP, for keys with the role admin. A client chooses among these and sets a few hyperparameters."""

    models: dict[str, RecipeSection]
    """Recipes by the id that clients call them `model`."""
    datasets: dict[str, str]
    """Locations of datasets by the id that clients call them `training_file` or `validation_file`; all nodes see
    them."""
    root: str | None = None
    """Where the runs of jobs lie; by default `serving.adapters_root`, from which they are served once they have
    something to serve. All nodes see it."""
    address: str | None = None
    """HTTP address of the job server; by default that of the Ray that serves."""
    python: str | None = None
    """Interpreter of jobs; by default `python3`, or the gateway's own where the cluster is one machine."""
    max_steps: int = Field(100_000, ge=1)
    """Steps of one job."""
    max_active: int = Field(4, ge=1)
    """Jobs that run or wait at a time; more of them are refused with 503."""

    @model_validator(mode="after")
    def _ids_fit(self) -> Self:
        wrong = [name for name in (*self.models, *self.datasets) if not re.fullmatch(_NAME, name)]
        refuse(
            {
                f"ids {wrong}: an id has up to 64 letters, digits, dots, dashes, slashes and underscores, and begins "
                "with a letter or digit": bool(wrong),
                "models is empty: name at least one": not self.models,
                "datasets is empty: name at least one": not self.datasets,
            }
        )
        return self
