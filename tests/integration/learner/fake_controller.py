"""A controller of ready-made groups: what learners are told and what they tell, without a single rollout."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import ray

from mmrl_ray.config.learner import LearnerSection
from mmrl_ray.errors import MMRLError
from mmrl_ray.experience.carriers import RolloutGroup, StepPlan
from mmrl_ray.rollouts.controller_actor import ControllerClient
from mmrl_ray.rollouts.types import Wait
from mmrl_ray.rollouts.weights import decode_state
from tests.unit.learner.worlds import make_plan


class Grenade:
    """A payload that kills the process that fetches it, the first time it is fetched."""

    def __init__(self, group: RolloutGroup, pin: Path) -> None:
        self.group, self.pin = group, pin

    def __reduce__(self) -> Any:
        return _pull, (self.group, self.pin)


def _pull(group: RolloutGroup, pin: Path) -> RolloutGroup:
    if not pin.exists():
        pin.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return group


class FakeController:
    """The methods of a controller that learners call, and a book of the calls."""

    def __init__(self, cfg: LearnerSection, groups: Sequence[RolloutGroup]) -> None:
        self.cfg, self.groups = cfg, list(groups)
        self.payloads: dict[int, list[Any]] = {}
        self.calls: list[str] = []
        self.metrics: dict[int, dict[str, Any]] = {}
        self.versions: dict[int, dict[str, Any]] = {}
        self.worlds: set[int] = set()
        self.asked = 0
        self.due = 0

    def call(self, method: str, *args: Any) -> Any:
        return getattr(self, method)(*args)

    def book(self) -> dict[str, Any]:
        return {"calls": self.calls, "metrics": self.metrics, "versions": self.versions, "worlds": self.worlds}

    def replace_payloads(self, step: int, payloads: Sequence[Any]) -> None:
        self.payloads[step] = [ray.put(p) for p in payloads]

    def arm(self, step: int, pin: Path) -> None:
        self.replace_payloads(step, [Grenade(group, pin) for group in self.groups])

    def next_plan(self, step: int, world_size: int, wait_s: float) -> StepPlan | Wait:
        assert step == self.due
        self.worlds.add(world_size)
        self.asked += 1
        if self.asked == 1:
            return Wait("not yet")
        if step not in self.payloads:
            self.replace_payloads(step, self.groups)
        plan = make_plan(self.groups, self.cfg, step=step, world_size=world_size)
        groups = [replace(g, payload=p) for g, p in zip(plan.groups, self.payloads[step], strict=True)]
        return replace(plan, groups=tuple(groups))

    def publish(self, version: int, encoded: np.ndarray) -> None:
        assert version in (self.due, self.due + 1)
        self.versions[version] = decode_state(encoded)

    def finish_step(self, step: int, metrics: Mapping[str, Any]) -> None:
        assert step == self.due
        self.metrics[step] = dict(metrics)
        self.due = step + 1

    def checkpoint_state(self, step: int) -> dict[str, Any]:
        assert step == self.due
        return {"next_step": step, "buffer": b"groups"}

    def restore(self, state: Mapping[str, Any]) -> None:
        assert state["buffer"] == b"groups"
        self.due = int(state["next_step"])
        self.calls.append(f"restore {self.due}")

    def rewind(self, step: int) -> None:
        self.due = step
        self.calls.append(f"rewind {step}")

    def failure(self) -> MMRLError | None:
        return None


def start(cfg: LearnerSection, groups: Sequence[RolloutGroup]) -> tuple[Any, ControllerClient]:
    handle: Any = ray.remote(FakeController).options(num_cpus=0, max_concurrency=8).remote(cfg, groups)
    return handle, ControllerClient(handle)
