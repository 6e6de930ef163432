"""`rollout:` — sampling and its workers."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from mmrl_ray.config.sections import Section, refuse


class WorkersRange(Section):
    """Workers that come and go with what there is to do: the run begins with `min`."""

    min: int = Field(..., ge=1)
    """Rollout workers at least."""
    max: int = Field(..., ge=1)
    """Rollout workers at most."""

    @model_validator(mode="after")
    def _bounds_fit(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"min={self.min} is above max={self.max}")
        return self


class RolloutSection(Section):
    """How completions are drawn, and by how many workers."""

    group_size: int = Field(8, ge=1, le=1024)
    """G, completions an image."""
    temperature: float = Field(1.0, gt=0, allow_inf_nan=False)
    """Sampling temperature; the policy that learns is the softmax at this temperature."""
    max_new_tokens: int = Field(32, ge=1)
    """Completion tokens at most."""
    top_k: int = 0
    """Refused unless 0: a filter would make the recorded log-probs belong to another distribution."""
    top_p: float = 1.0
    """Refused unless 1."""
    min_new_tokens: int = 0
    """Refused unless 0."""
    max_staleness: int = Field(0, ge=0)
    """Policy versions a group may lag behind when the learner consumes it; 0 is strictly on-policy."""
    workers: Annotated[int, Field(ge=1)] | WorkersRange = 1
    """Rollout worker actors: a number, or `{min, max}` to have the run add and retire them itself, by what the learner
    waits for them and they for it. `mmrl scale` changes them while a run goes on."""
    min_workers: int = Field(1, ge=1)
    """Below so many healthy workers for `worker_deadline_s` the run stops."""
    groups_per_assignment: int = Field(8, ge=1)
    """Groups that one worker decodes together: fixed by the step, never by how many workers there are."""
    buffer_groups: int | None = Field(None, ge=1)
    """Scored groups the controller holds at most; by default what `max_staleness` can use."""
    assignment_timeout_s: float = Field(300.0, gt=0)
    """A worker that has not handed an assignment back by then is replaced."""
    worker_deadline_s: float = Field(60.0, gt=0)
    """How long the pool may stay below `min_workers` before the run stops."""
    vision_cache_mb: int = Field(256, ge=0)
    """Bytes of vision features a process keeps."""
    ship_vision_mb: int = Field(64, ge=0)
    """Vision features of one assignment travel to the learner up to this size; beyond it they are made again."""

    @property
    def first_workers(self) -> int:
        """Workers that a run begins with."""
        return self.workers.min if isinstance(self.workers, WorkersRange) else self.workers

    @property
    def most_workers(self) -> int:
        """Workers that a run has at most, unless it is told otherwise while it goes on."""
        return self.workers.max if isinstance(self.workers, WorkersRange) else self.workers

    @model_validator(mode="after")
    def _no_filters(self) -> Self:
        problems = {
            f"{name}={getattr(self, name)} is refused in training rollouts: the recorded log-probs would "
            f"belong to another distribution than the policy that learns; leave it at {neutral}": getattr(self, name)
            != neutral
            for name, neutral in (("top_k", 0), ("top_p", 1.0), ("min_new_tokens", 0))
        }
        refuse(
            {
                **problems,
                f"min_workers={self.min_workers} is above workers={self.first_workers}": (
                    self.min_workers > self.first_workers
                ),
            }
        )
        return self
