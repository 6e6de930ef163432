"""What a step's rewards come to: those that learning uses, and the figures of them in the metrics line.

`M` groups of `G` completions, `K` parts with a weight. In the order in which learning comes to its rewards:

    total of the parts ─ risk: less κσ ─ normalize: parts by their group instead ─ k1: less the KL penalty ─▶ baseline

    reward/mean, reward/std           of the totals as they were given
    reward/group_std                  mean over groups of the standard deviation of the totals within one
    reward/zero_variance_groups       groups in which all completions earn the same after risk and normalisation
    reward/NAME, reward_weight/NAME   mean of a part, and its weight; parts of parts without one
    reward/sigma                      mean standard deviation of the totals, where they have one
    reward/risk, reward/adjusted      κ where it is not 0, and the mean of total - κσ
    reward/normalized                 1 where parts were normalised by their group
    reward_group_std/NAME             then also: by what each was divided, the mean over groups
    reward/with_kl                    where KL is part of the reward: the mean that the baseline saw
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch

from mmrl_ray.config.learner import LearnerSection
from mmrl_ray.config.reward import Normalization
from mmrl_ray.experience.breakdown import RewardBreakdown
from mmrl_ray.experience.carriers import ScoredGroup
from mmrl_ray.losses.decoupled import decoupled_rewards


def learning_rewards(
    groups: Sequence[ScoredGroup], learner: LearnerSection, normalize: Normalization
) -> tuple[torch.Tensor, dict[str, float]]:
    """float64 [M, G], what the baseline and the advantages are made from; and the figures of it."""
    rewards = _matrix(groups, lambda row: row.adjusted)
    metrics = _figures(groups)
    if normalize == "group":
        parts, weights = _weighted_parts(groups)
        rewards = decoupled_rewards(parts, weights)
        metrics["reward/normalized"] = 1.0
        spreads = parts.std(dim=2).mean(dim=1).tolist()
        metrics.update({f"reward_group_std/{n}": s for n, s in zip(_weighted(groups), spreads, strict=True)})
    metrics["reward/zero_variance_groups"] = int((rewards.amax(dim=1) == rewards.amin(dim=1)).sum())
    if learner.kl.weight and learner.kl.estimator == "k1":
        rewards = rewards - learner.kl.weight * torch.tensor([g.kl1 for g in groups], dtype=torch.float64)
        metrics["reward/with_kl"] = rewards.mean().item()
    return rewards, metrics


def _matrix(groups: Sequence[ScoredGroup], figure: Callable[[RewardBreakdown], float]) -> torch.Tensor:
    return torch.tensor([[figure(row) for row in g.rewards] for g in groups], dtype=torch.float64)


def _weighted(groups: Sequence[ScoredGroup]) -> list[str]:
    """Names of the parts that count."""
    return [name for name, weight in groups[0].rewards[0].weights.items() if weight]


def _weighted_parts(groups: Sequence[ScoredGroup]) -> tuple[torch.Tensor, torch.Tensor]:
    """[K, M, G] and [K]."""
    names, weights = _weighted(groups), groups[0].rewards[0].weights
    parts = [_matrix(groups, partial(_adjusted_part, name=name)) for name in names]
    return torch.stack(parts), torch.tensor([weights[name] for name in names], dtype=torch.float64)


def _adjusted_part(row: RewardBreakdown, name: str) -> float:
    """A part less risk times its own standard deviation, where it has one."""
    return row.parts[name] - row.risk * row.parts.get(f"{name}/sigma", 0.0)


def _figures(groups: Sequence[ScoredGroup]) -> dict[str, float]:
    """Figures of the rewards as they were given."""
    rows = [row for g in groups for row in g.rewards]
    totals = _matrix(groups, lambda row: row.total)
    figures = {
        "reward/mean": totals.mean().item(),
        "reward/std": totals.std(correction=0).item(),
        "reward/group_std": totals.std(dim=1, correction=0).mean().item(),
    }
    for name in rows[0].parts:
        figures[f"reward/{name}"] = _mean([row.parts[name] for row in rows])
    for name, weight in rows[0].weights.items():
        figures[f"reward_weight/{name}"] = weight
    sigmas = [row.sigma for row in rows if row.sigma is not None]
    if sigmas:
        figures["reward/sigma"] = _mean(sigmas)
    if rows[0].risk:
        figures["reward/risk"] = rows[0].risk
        figures["reward/adjusted"] = _mean([row.adjusted for row in rows])
    return figures


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
