"""`resources:` — what each kind of actor asks Ray for."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from mmrl_ray.config.base import Section


class ActorResources(Section):
    """One actor's share."""

    cpus: float = Field(1.0, ge=0)
    """CPUs Ray reserves for one actor; 0 reserves none."""
    gpus: float = Field(0.0, ge=0)
    """GPUs of one actor; a fraction shares a GPU."""
    threads: int | None = Field(None, ge=1)
    """Torch threads; by default a node's cores ÷ the run's processes that calculate on CPUs, and at least `cpus`. The
    dry run says how many. Several runs on one machine: give each its part."""
    node_labels: dict[str, str] = {}
    """Only nodes with these labels take the actor (`ray start --labels`); any node by default. What `mmrl deploy
    render` writes has a label for each group of pods and names it here."""


class ResourcesSection(Section):
    """Learner and rollout workers on different devices, or sharing them."""

    placement: Literal["shared", "split"] = "shared"
    """`shared`: a learner and a rollout worker take turns on one GPU, each with a fraction of it; `split`: every actor
    has whole GPUs of its own. Without GPUs it changes nothing."""
    learner: ActorResources = ActorResources()
    """Each learner worker's share."""
    rollout: ActorResources = ActorResources()
    """Each rollout worker's share."""
    reward: ActorResources = ActorResources(cpus=0.0)
    """Each replica's share where `reward.host` is `serve`. A reward of words needs no CPU of its own: the worker whose
    captions it scores waits meanwhile."""
    placement_timeout_s: float = Field(300.0, gt=0)
    """An actor that Ray has not placed by then is an error."""
    object_store_mb: int | None = Field(None, ge=80)
    """Size of a local Ray's object store; ignored on an existing cluster."""

    @model_validator(mode="after")
    def _placement_fits(self) -> Self:
        learner, rollout = self.learner.gpus, self.rollout.gpus
        if self.placement == "shared" and learner > 0 and rollout > 0 and learner + rollout > 1:
            raise ValueError(
                f"placement=shared puts a learner and a rollout worker on one GPU, but learner.gpus={learner:g} and "
                f"rollout.gpus={rollout:g} add up to more than 1: write fractions, or placement: split"
            )
        if self.placement == "split" and (learner % 1 or rollout % 1):
            raise ValueError(
                f"placement=split gives every actor whole GPUs, but learner.gpus={learner:g} and "
                f"rollout.gpus={rollout:g}: write whole numbers, or placement: shared"
            )
        return self
