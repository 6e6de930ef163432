"""What a learner does differently on a CUDA GPU, as far as it can be told without one: context and clock."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from mmrl_ray.config.learner import LearnerSection
from mmrl_ray.experience.carriers import SamplingParams
from mmrl_ray.learner.objective import Clock
from mmrl_ray.learner.step import LearnerStep
from mmrl_ray.policy.generation.decode import Decoder, DecodeRequest, decode_groups
from mmrl_ray.policy.lora.adapter import reference_policy
from mmrl_ray.policy.model import Acceleration, Policy
from mmrl_ray.policy.parity import choose_path
from mmrl_ray.policy.scoring.prefix import score_completions
from mmrl_ray.policy.vision import vision_features
from tests.unit.learner.worlds import make_groups, make_plan, make_policy, payloads


def test_sampler_learner_reference_and_judge_compute_in_one_context(tiny: Path) -> None:
    policy = make_policy(tiny)
    groups = make_groups(policy)
    entered: list[bool] = []
    seen: list[bool] = []

    @contextmanager
    def forward(given: Policy) -> Iterator[None]:
        assert given is policy or given.model is policy.model
        entered.append(True)
        yield
        entered.pop()

    policy.acceleration = Acceleration(forward=forward)
    towers = [policy.core.vision_tower, policy.decoder]
    for module in towers:
        module.register_forward_hook(lambda *_: seen.append(bool(entered)))

    prompts = [group.prompt for group in groups]
    uses = {
        "tower": lambda: vision_features(policy, prompts),
        "sampler": lambda: decode_groups(
            Decoder(policy), [DecodeRequest(p, 2, SamplingParams(max_new_tokens=3)) for p in prompts]
        ),
        "judge": lambda: choose_path(policy, prompts[:1]),
        "learner": lambda: LearnerStep(policy, section()).run(make_plan(groups, section()), payloads),
    }
    with torch.no_grad(), reference_policy(policy.model):
        score_completions(policy, prompts, None, [[c.token_ids for c in g.completions] for g in groups], 1.0)
    for name, use in uses.items():
        before = len(seen)
        use()
        assert len(seen) > before, name
    assert all(seen)
    assert not entered


def section() -> LearnerSection:
    return LearnerSection(steps=4)


class FakeEvent:
    """A mark in the queue of a GPU, with the time at which the queue gets there."""

    host = 0.0
    queue = 0.0

    def __init__(self, enable_timing: bool = False) -> None:
        assert enable_timing

    def record(self) -> None:
        FakeEvent.queue = self.at = max(FakeEvent.queue, FakeEvent.host)

    def synchronize(self) -> None:
        FakeEvent.host = max(FakeEvent.host, self.at)

    def elapsed_time(self, end: FakeEvent) -> float:
        return 1000 * (end.at - self.at)


def test_a_phase_has_the_seconds_that_the_gpu_worked_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host queues ten seconds of work in one, and waits for them in the next phase."""
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    clock = Clock(torch.device("cuda"))
    with clock.phase("seconds/fetch"):
        FakeEvent.host += 2.0
    for _ in range(2):
        with clock.phase("seconds/forward_backward"):
            FakeEvent.host += 1.0
            FakeEvent.queue = max(FakeEvent.queue, FakeEvent.host) + 5.0
    with clock.phase("seconds/reduce"):
        FakeEvent.host = FakeEvent.queue = FakeEvent.queue + 0.5
    with clock.phase("seconds/optimizer"):
        pass
    assert clock.seconds() == {
        "seconds/fetch": 2.0,
        "seconds/forward_backward": 11.0,  # the first second, in which nothing was queued yet, is its own, too
        "seconds/reduce": 0.5,
        "seconds/optimizer": 0.0,
    }
    assert FakeEvent.host == 13.5
