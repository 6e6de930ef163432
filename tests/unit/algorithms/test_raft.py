"""RAFT against literal values and plain transformers: what is kept, what is cloned, what takes no part."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mmrl_ray.algorithms.raft import RaftSection, best_of_groups
from mmrl_ray.config.learner import LearnerSection
from mmrl_ray.learner.step import LearnerStep
from mmrl_ray.losses.aggregation import StepRewards
from tests.unit.learner.worlds import make_groups, make_plan, make_policy, payloads, reference_logprobs


def section(quantile: float = 0.75, **keys: object) -> LearnerSection:
    raft = RaftSection(quantile=quantile)
    return LearnerSection(steps=4, loss="raft", advantage="none", aggregation="token_mean", raft=raft, **keys)  # type: ignore[arg-type]


def step_of(rewards: list[list[float]]) -> StepRewards:
    found = torch.tensor(rewards, dtype=torch.float64)
    counts = ~found.isnan()
    clean = found.nan_to_num()
    return StepRewards(clean, counts, clean.abs(), None, torch.full_like(clean, 3.0), 8)


@pytest.mark.parametrize(
    ("rewards", "quantile", "kept"),
    [
        ([0.9, 0.5, 0.2, 0.1], 0.75, [1, 0, 0, 0]),  # the quantile is 0.6
        ([0.9, 0.5, 0.2, 0.1], 0.5, [1, 1, 0, 0]),
        ([0.9, 0.5, 0.2, 0.1], 0.0, [1, 1, 1, 0]),  # never the worst
        ([1.0, 1.0, 0.0, 0.0], 0.75, [1, 1, 0, 0]),  # equals are treated alike
        ([1.0, 0.0, 0.0, 0.0], 0.5, [1, 0, 0, 0]),  # the quantile is the worst
        ([0.3, 0.3, 0.3, 0.3], 0.75, [0, 0, 0, 0]),
        ([0.3, math.nan, 0.4, 0.1], 1.0, [0, 0, 1, 0]),  # one without a reward
    ],
)
def test_what_is_kept(rewards: list[float], quantile: float, kept: list[int]) -> None:
    assert best_of_groups(step_of([rewards]), quantile).int().tolist() == [kept]


def test_weights_leave_out_what_is_not_cloned() -> None:
    step = step_of([[0.9, 0.5, 0.2, 0.1], [0.3, 0.3, 0.3, 0.3]])
    found = section().family.weigh(step)
    assert found.advantages.tolist() == [[1, 0, 0, 0], [0, 0, 0, 0]]
    assert found.scales.tolist() == [[1, 0, 0, 0], [1, 1, 1, 1]]  # a silent group stays, with nothing to learn from
    assert found.denominator == 5 * 3
    assert found.metrics == {"raft/kept": 1 / 8}


def test_a_group_whose_best_is_masked_is_passed_over() -> None:
    cut = torch.tensor([[True, False, False, False], [False, False, False, True]])
    step = replace(step_of([[0.9, 0.5, 0.2, 0.1], [0.8, 0.1, 0.2, 0.3]]), masked=cut)
    found = section().family.weigh(step)
    assert found.advantages.tolist() == [[0, 0, 0, 0], [1, 0, 0, 0]]
    assert found.scales.tolist() == [[0, 1, 1, 1], [1, 0, 0, 0]]
    assert found.denominator == 4 * 3


def test_the_loss_is_the_likelihood_of_the_best(tiny: Path) -> None:
    cfg = section(kl={"weight": 0.0})
    policy = make_policy(tiny)
    groups = make_groups(policy, noise=0.3)
    rewards = np.array([[0.1, 0.9, 0.2, 0.3], [0.8, 0.1, 0.7, 0.2], [0.5, 0.5, 0.5, 0.5]])
    cloned = [(0, 1), (1, 0)]
    with torch.no_grad():
        logprobs = [reference_logprobs(policy, groups[i], groups[i].completions[j].token_ids) for i, j in cloned]
    silent = sum(c.token_ids.numel() for c in groups[2].completions)
    tokens = sum(len(row) for row in logprobs)
    nll = -float(torch.cat(logprobs).sum())
    metrics = LearnerStep(policy, cfg).run(make_plan(groups, cfg, rewards=rewards), payloads)
    assert metrics["loss/policy"] == pytest.approx(nll / (tokens + silent), rel=1e-5)
    assert metrics["raft/nll"] == pytest.approx(nll / tokens, rel=1e-5)
    assert metrics["tokens/scored"] == tokens  # no pass over what is not cloned


def test_a_baseline_is_refused() -> None:
    with pytest.raises(ValueError, match="advantage=group has no meaning with loss=raft"):
        LearnerSection(steps=1, loss="raft", advantage="group")
