"""What a step's rewards come to: those that learning uses, and the figures of them in the metrics line.

`M` groups of `G` completions, `K` parts with a weight. In the order in which learning comes to its rewards:

    total of the parts ─ risk: less κσ ─ normalize: parts by their group instead ─ k1: less the KL penalty ─▶ baseline

    reward/mean, reward/std           of the totals as they were given, of the completions that have one
    reward/group_std                  mean over groups of the standard deviation of the totals within one
    reward/zero_variance_groups       groups in which all completions earn the same after risk and normalisation
    reward/NAME, reward_weight/NAME   mean of a part, and its weight; parts of parts without one
    reward/masked                     share of the step's completions without a reward
    masked, masked_captions           groups left out of learning; completions without a reward
    reward_missing/NAME               completions that a part of weight 0 could not score, where there are any
    reward/sigma                      mean standard deviation of the totals, where they have one
    reward/risk, reward/adjusted      κ where it is not 0, and the mean of total - κσ
    reward/normalized                 1 where parts were normalised by their group
    reward_group_std/NAME             then also: by what each was divided, the mean over groups
    reward/with_kl                    where KL is part of the reward: the mean that the baseline saw
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from mmrl_ray.config.learner import LearnerSection
from mmrl_ray.config.reward import Normalization
from mmrl_ray.experience.breakdown import RewardBreakdown
from mmrl_ray.experience.carriers import ScoredGroup
from mmrl_ray.losses.advantages import spreads
from mmrl_ray.losses.decoupled import decoupled_rewards


@dataclass(frozen=True, slots=True)
class LearningRewards:
    """What the baseline and the advantages are made from; all [M, G]."""

    rewards: torch.Tensor
    """float64; 0 where `counts` is False."""
    counts: torch.Tensor
    """bool, whether a completion has a reward."""
    magnitude: torch.Tensor
    """float64, of the numbers that each reward is the sum of."""
    metrics: dict[str, float]


def learning_rewards(
    groups: Sequence[ScoredGroup], learner: LearnerSection, normalize: Normalization
) -> LearningRewards:
    """From groups of one size, in each of which at least one completion has a reward."""
    counts = torch.tensor([[isinstance(row, RewardBreakdown) for row in g.rewards] for g in groups])
    rewards = _matrix(groups, lambda row: row.adjusted)
    magnitude = _matrix(groups, lambda row: row.magnitude)
    metrics = _figures(groups, counts)
    if normalize == "group":
        parts, weights = _weighted_parts(groups)
        rewards = decoupled_rewards(parts, weights, counts)
        magnitude = rewards.abs()
        metrics["reward/normalized"] = 1.0
        spread = _deviations(parts, counts, correction=1).mean(dim=1).tolist()
        metrics.update({f"reward_group_std/{n}": s for n, s in zip(_weighted(groups), spread, strict=True)})
    differ = spreads(rewards, counts, torch.maximum(rewards.abs(), magnitude))
    metrics["reward/zero_variance_groups"] = int((~differ).sum())
    if learner.kl.weight and learner.kl.estimator == "k1":
        penalty = learner.kl.weight * torch.tensor([g.kl1 for g in groups], dtype=torch.float64)
        rewards, magnitude = torch.where(counts, rewards - penalty, 0.0), magnitude + penalty.abs()
        metrics["reward/with_kl"] = rewards[counts].mean().item()
    return LearningRewards(rewards, counts, magnitude, metrics)


def masked_figures(groups: Sequence[ScoredGroup], learned: int) -> dict[str, float]:
    """What a step lost to rewards that failed, `learned` of its groups being left."""
    masked, completions = sum(len(g.failures) for g in groups), sum(len(g.completion_tokens) for g in groups)
    missing = Counter(
        name for g in groups for row in g.rewards if isinstance(row, RewardBreakdown) for name in row.missing
    )
    return {
        "masked": len(groups) - learned,
        "masked_captions": masked,
        "reward/masked": masked / completions,
        **{f"reward_missing/{name}": count for name, count in sorted(missing.items())},
    }


def _rows(groups: Sequence[ScoredGroup]) -> list[RewardBreakdown]:
    return [row for g in groups for row in g.rewards if isinstance(row, RewardBreakdown)]


def _matrix(groups: Sequence[ScoredGroup], figure: Callable[[RewardBreakdown], float]) -> torch.Tensor:
    """0 where there is no reward."""
    return torch.tensor(
        [[figure(row) if isinstance(row, RewardBreakdown) else 0.0 for row in g.rewards] for g in groups],
        dtype=torch.float64,
    )


def _weighted(groups: Sequence[ScoredGroup]) -> list[str]:
    """Names of the parts that count."""
    return [name for name, weight in _rows(groups)[0].weights.items() if weight]


def _weighted_parts(groups: Sequence[ScoredGroup]) -> tuple[torch.Tensor, torch.Tensor]:
    """[K, M, G] and [K]."""
    names, weights = _weighted(groups), _rows(groups)[0].weights
    parts = [_matrix(groups, partial(_adjusted_part, name=name)) for name in names]
    return torch.stack(parts), torch.tensor([weights[name] for name in names], dtype=torch.float64)


def _adjusted_part(row: RewardBreakdown, name: str) -> float:
    """A part less risk times its own standard deviation, where it has one."""
    return row.parts[name] - row.risk * row.parts.get(f"{name}/sigma", 0.0)


def _deviations(values: torch.Tensor, counts: torch.Tensor, *, correction: int) -> torch.Tensor:
    """Standard deviation over the last dimension of what counts; NaN where no more than `correction` do."""
    number = counts.sum(dim=-1)
    mean = torch.where(counts, values, 0.0).sum(dim=-1) / number
    squares = torch.where(counts, values - mean[..., None], 0.0).square().sum(dim=-1)
    return (squares / (number - correction)).sqrt()


def _figures(groups: Sequence[ScoredGroup], counts: torch.Tensor) -> dict[str, float]:
    """Figures of the rewards as they were given."""
    rows = _rows(groups)
    totals = _matrix(groups, lambda row: row.total)
    figures = {
        "reward/mean": totals[counts].mean().item(),
        "reward/std": totals[counts].std(correction=0).item(),
        "reward/group_std": _deviations(totals, counts, correction=0).mean().item(),
    }
    for name in dict.fromkeys(name for row in rows for name in row.parts):
        figures[f"reward/{name}"] = _mean([row.parts[name] for row in rows if name in row.parts])
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
