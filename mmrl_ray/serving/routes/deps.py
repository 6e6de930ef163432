"""What the routes are made with."""

from __future__ import annotations

from dataclasses import dataclass

from mmrl_ray.config.serving import ServingSection
from mmrl_ray.feedback.store import PreferenceStore
from mmrl_ray.serving.keys import KeyStore
from mmrl_ray.serving.protocols import JobService, PolicyService, RewardService
from mmrl_ray.telemetry.meter import Meter


@dataclass(frozen=True, slots=True)
class GatewayDeps:
    """The services behind the gateway, and what a user wrote about it."""

    policy: PolicyService
    reward: RewardService | None
    """None where no reward is served."""
    keys: KeyStore | None
    """None where `insecure`."""
    settings: ServingSection
    prompt: str = "Describe the image."
    """The user's turn of a caption that is asked for without one."""
    default_model: str | None = None
    """Answers captions that name no model; by default the first of `policy.models()`."""
    insecure: bool = False
    """Ask for no key; only on a loopback host."""
    meter: Meter | None = None
    """Takes the same measurements as `/metrics`, for a Prometheus that asks Ray."""
    preferences: PreferenceStore | None = None
    """What people think of captions; None where `settings.preferences` is not written."""
    jobs: JobService | None = None
    """Fine-tuning jobs; None where `settings.fine_tuning` is not written."""
