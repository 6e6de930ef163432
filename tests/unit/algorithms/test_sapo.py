"""SAPO against literal values of the paper's formula, autograd in float64, and GRPO on-policy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mmrl_ray.algorithms.sapo import SapoSection, soft_gate
from mmrl_ray.config.learner import LearnerSection
from mmrl_ray.learner.step import LearnerStep
from tests.unit.learner.worlds import gradient, make_groups, make_plan, make_policy, make_rewards, payloads


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected", "slope"),
    [
        (1.0, 1.0, 2.0, 1.0),
        (1.0, -1.0, 4 / 1.5 / 2, 1.0),  # at 1 the slope is that of the ratio, whatever the temperature
        (2.0, 1.0, 4 * 0.7310585786300049, 4 * 0.7310585786300049 * 0.2689414213699951),
        (2.0, -1.0, 4 / 1.5 * 0.8175744761936437, 4 * 0.8175744761936437 * 0.1824255238063563),
        (0.0, 1.0, 4 * 0.2689414213699951, 4 * 0.7310585786300049 * 0.2689414213699951),
    ],
)
def test_the_gate(ratio: float, advantage: float, expected: float, slope: float) -> None:
    r = torch.tensor([[ratio]], dtype=torch.float64, requires_grad=True)
    found = soft_gate(r, torch.tensor([[advantage]], dtype=torch.float64), tau_positive=1.0, tau_negative=1.5)
    found.sum().backward()
    assert found.item() == pytest.approx(expected, rel=1e-12)
    assert r.grad is not None
    assert r.grad.item() == pytest.approx(slope, rel=1e-12)


def test_at_the_start_of_a_step_its_gradient_is_grpos(tiny: Path) -> None:
    found = {}
    for loss in ("clipped", "sapo"):
        cfg = LearnerSection(steps=2, loss=loss, aggregation="sequence_mean", max_grad_norm=1e9)
        policy = make_policy(tiny)
        groups = make_groups(policy)
        LearnerStep(policy, cfg).run(make_plan(groups, cfg, rewards=make_rewards(groups)), payloads)
        found[loss] = gradient(policy)
    assert torch.allclose(found["sapo"], found["clipped"], rtol=1e-4, atol=1e-6)


def test_a_second_pass_is_gated(tiny: Path) -> None:
    cfg = LearnerSection(
        steps=2, passes=2, lr=5e-2, loss="sapo", aggregation="token_mean", sapo=SapoSection(tau_positive=2.0)
    )
    policy = make_policy(tiny)
    groups = make_groups(policy)
    metrics = LearnerStep(policy, cfg).run(make_plan(groups, cfg, rewards=make_rewards(groups)), payloads)
    assert metrics["ratio_mean"] != pytest.approx(1.0, abs=1e-3)
    assert 0.0 < metrics["sapo/gate"] < 1.0
    assert np.isfinite(metrics["loss"])
