"""`Config`: everything a user writes for one run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

from pydantic import create_model, model_validator

from mmrl_ray.config.deploy import DeploySection
from mmrl_ray.config.learner import LearnerSection
from mmrl_ray.config.presets import Algorithm, registry, section_fields, with_preset
from mmrl_ray.config.reward import RewardSection
from mmrl_ray.config.rollout import RolloutSection
from mmrl_ray.config.sections import (
    DataSection,
    ModelSection,
    ResourcesSection,
    RunSection,
    Section,
    SftSection,
    refuse,
)
from mmrl_ray.config.serving import ServingSection

if TYPE_CHECKING:
    from mmrl_ray.algorithms.base import Algorithm as Family


class _Sections(Section):
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


if TYPE_CHECKING:

    class _WithAgents(_Sections):
        value_based: Any = None

else:
    _WithAgents = create_model(
        "_WithAgents", __base__=_Sections, __module__=__name__, **section_fields("top", optional=True)
    )


class Config(_WithAgents):
    """One run, whole. Keys of `learner:` that are not written take the preset's value."""

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

    @property
    def family(self) -> Family:
        """How the run learns."""
        found: Family = registry().family_of_algorithm(self.algorithm, self.learner)
        return found

    @property
    def agent(self) -> Any | None:
        """The section of an algorithm whose samples come from an environment; None of any other run."""
        family = self.family
        return getattr(self, family.section_name or "") if family.samples == "environment" else None

    @model_validator(mode="after")
    def _sections_fit(self) -> Self:
        family = self.family
        refuse(
            {
                **self._section_problems(),
                **({} if family.samples == "environment" else self._step_problems()),
                **family.problems(self),
                **self._stored_problems("pairs", "data.preferences", "{store: 'sqlite:///preferences.db'}"),
                **self._stored_problems("stored", "data.rollouts", "{run: runs/quickstart}"),
                **({} if family.samples == "environment" else self._normalization_problems()),
            }
        )
        return self

    def _section_problems(self) -> dict[str, bool]:
        """Sections of agents that this is no run of."""
        return {
            f"{name}: is the section of algorithm: {name}, and this is algorithm: {self.algorithm}": (
                getattr(self, name) is not None and self.algorithm != name
            )
            for name in section_fields("top", optional=True)
        }

    def _step_problems(self) -> dict[str, bool]:
        """Of a run whose steps are made of groups."""
        rollout, learner, groups = self.rollout, self.learner, self.learner.groups_per_step
        return {
            f"rollout.buffer_groups={rollout.buffer_groups} is smaller than one step "
            f"(learner.groups_per_step={groups}): the run would wait for ever": (rollout.buffer_groups or groups)
            < groups,
            f"learner.workers={learner.max_workers} is above learner.groups_per_step={groups}: "
            "some learners would never work": groups < learner.max_workers,
            f"rollout.group_size={rollout.group_size} is too small: learner.advantage={learner.advantage} "
            "needs 2 or more": learner.advantage in ("leave_one_out", "group") and rollout.group_size < 2,
        }

    def _stored_problems(self, source: str, key: str, example: str) -> dict[str, bool]:
        """Data that something has to read, and what reads it."""
        family, readers = self.family, registry().readers_of(source)
        found = getattr(self.data, key.removeprefix("data."))
        said = (
            f"algorithm: {self.algorithm}" if family.samples == "environment" else f"learner.loss={self.learner.loss}"
        )
        where = "its store" if source == "pairs" else "the run whose rollouts it learns from"
        instead = "" if family.samples == "environment" else f", or write algorithm: {readers}"
        return {
            f"{said} needs {key}: write {where}, as in {example}": family.samples == source and found is None,
            f"{key} is read by learner.loss={readers} alone, not by {said}: take it away{instead}": (
                family.samples != source and found is not None
            ),
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
