"""`resources:` — what each kind of actor asks Ray for."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from mmrl_ray.config.base import Section


class ActorResources(Section):
    """One actor's share."""

    cpus: float = Field(1.0, ge=0)
    """CPUs Ray reserves for one actor; 0 reserves none."""
    gpus: float = Field(0.0, ge=0)
    """GPUs of one actor; a fraction shares a GPU."""
    threads: int | None = Field(None, ge=1)
    """Torch threads; by default `cpus`, and on a single machine where learner and workers take turns all its cores."""


class ResourcesSection(Section):
    """Learner and rollout workers on different devices, or sharing them."""

    placement: Literal["shared", "split"] = "shared"
    """`shared`: learner and workers share the same devices; `split`: each has its own."""
    learner: ActorResources = ActorResources()
    """Each learner worker's share."""
    rollout: ActorResources = ActorResources()
    """Each rollout worker's share."""
    placement_timeout_s: float = Field(300.0, gt=0)
    """An actor that Ray has not placed by then is an error."""
    object_store_mb: int | None = Field(None, ge=80)
    """Size of a local Ray's object store; ignored on an existing cluster."""
