"""What learning uses of a step's rewards, and what the metrics say about them."""

from dataclasses import replace

import numpy as np
import pytest

from mmrl_ray.config.learner import KlSection, LearnerSection
from mmrl_ray.experience.carriers import RewardBreakdown, ScoredGroup, StepPlan
from mmrl_ray.experience.plan import build_step_plan

from .factories import scored


def row(judge: float, text: float, sigma: float, risk: float = 0.0) -> RewardBreakdown:
    parts = {"judge": judge, "judge/sigma": sigma, "text": text}
    return RewardBreakdown(2 * judge + text, parts, {"judge": 2.0, "text": 1.0}, sigma=2 * sigma, risk=risk)


def groups(*rows: list[RewardBreakdown], **keys: object) -> list[ScoredGroup]:
    made = [scored(index=i, totals=[0.0] * len(each), lengths=[2] * len(each)) for i, each in enumerate(rows)]
    return [replace(group, rewards=tuple(each), **keys) for group, each in zip(made, rows, strict=True)]  # type: ignore[arg-type]


def plan(given: list[ScoredGroup], normalize: str = "none", **learner: object) -> StepPlan:
    cfg = LearnerSection(steps=1, **{"advantage": "none", **learner})  # type: ignore[arg-type]
    return build_step_plan(0, given, learner=cfg, max_new_tokens=8, world_size=1, normalize=normalize)  # type: ignore[arg-type]


def test_risk_takes_standard_deviations_off_what_learning_uses_only() -> None:
    found = plan(groups([row(1.0, 0.5, 0.25, risk=2.0), row(1.0, 0.5, 0.0, risk=2.0)]))
    assert found.groups[0].rewards == (2.5 - 2.0 * 0.5, 2.5)
    assert found.groups[0].advantages == found.groups[0].rewards
    wanted = {
        "reward/mean": 2.5,
        "reward/std": 0.0,
        "reward/sigma": 0.25,
        "reward/risk": 2.0,
        "reward/adjusted": 2.0,
        "reward/judge": 1.0,
        "reward/judge/sigma": 0.125,
        "reward/text": 0.5,
        "reward_weight/judge": 2.0,
        "reward_weight/text": 1.0,
        "reward/zero_variance_groups": 0,  # equal means, and still a signal
        "reward/masked": 0.0,
    }
    assert {k: v for k, v in found.metrics.items() if k.startswith("reward")} == pytest.approx(
        {**wanted, "reward/group_std": 0.0}
    )


def test_the_greedy_baseline_bears_the_same_risk() -> None:
    given = groups([row(1.0, 0.0, 0.5, risk=1.0)] * 2, greedy_reward=row(1.0, 0.0, 0.25, risk=1.0))
    assert plan(given, advantage="greedy").groups[0].advantages == (1.0 - 1.5,) * 2


def test_parts_are_normalised_by_their_group_risk_included() -> None:
    """By NumPy, over two groups of three; the part of weight 0 takes no part."""
    rng = np.random.default_rng(4)
    judge, text, sigma = rng.normal(size=(3, 2, 3))
    sigma = abs(sigma)
    rows = [[row(judge[i, j], 100 * text[i, j], sigma[i, j], risk=0.5) for j in range(3)] for i in range(2)]
    found = plan(groups(*rows), "group")
    z = [(p - p.mean(1, keepdims=True)) / (p.std(1, ddof=1, keepdims=True)) for p in (judge - 0.5 * sigma, 100 * text)]
    s = 2 * z[0] + z[1]
    expected = (s - s.mean()) / (s.std(ddof=1))
    np.testing.assert_allclose([g.rewards for g in found.groups], expected, rtol=1e-9)
    assert {g.normalization for g in found.groups} == {"group"}
    assert found.metrics["reward/normalized"] == 1.0
    assert found.metrics["reward_group_std/text"] == pytest.approx((100 * text).std(1, ddof=1).mean())
    assert found.metrics["reward/mean"] == pytest.approx((2 * judge + 100 * text).mean())  # as it was given


def test_the_k1_penalty_comes_after_normalisation() -> None:
    given = groups([row(0.0, 0.0, 0.0), row(1.0, 1.0, 0.0)], kl1=(0.0, 3.0))
    kl = KlSection(weight=0.1, estimator="k1")
    with_kl, without = plan(given, "group", kl=kl), plan(given, "group")
    assert np.subtract(with_kl.groups[0].rewards, without.groups[0].rewards) == pytest.approx([0.0, -0.3])
    assert with_kl.metrics["reward/with_kl"] == pytest.approx(-0.15)
    assert "reward/with_kl" not in without.metrics
