"""How good a learned reward is on data that it was not trained on: order, likelihood, and whether its σ holds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import Any

import torch

from mmrl_ray.losses.uncertainty import gaussian_nll, preference_nll
from mmrl_ray.metrics.bootstrap import bootstrap_mean
from mmrl_ray.models.reward_data import RewardData
from mmrl_ray.models.reward_model import MODALITIES, RewardModel, Scores
from mmrl_ray.models.vision_source import VisionSource

COVERAGES = (0.5, 0.8, 0.95)
"""Of the central intervals whose coverage is counted."""
_RESAMPLES = 2000


def evaluate_reward_model(model: RewardModel, source: VisionSource, data: RewardData) -> dict[str, Any]:
    """JSON-able figures, over all and by part.

    `pairs`: count, decided (those that are no ties), accuracy of the decided, nll (mean −log Φ(z)), expected (the
    accuracy that the model itself expects, the mean of Φ(|z|); near the accuracy where σ fits). `ratings`: count, rmse
    and rmse_interval (95 %, by bootstrap), nll (docs/equations.md 15, in units of the ratings), coverage of the central
    50, 80 and 95 % intervals. What a split has none of is left out.
    """
    scores = model.score(source, [data.pictures[i] for i in data.of], data.captions)
    figures: dict[str, Any] = {"pictures": len(data.pictures), "captions": len(data.captions)}
    if data.pairs:
        figures["pairs"] = _with_parts(data.pair_parts, lambda rows: _pair_figures(scores, data, rows))
    if data.ratings:
        trained = model.spec.sigma_trained
        figures["ratings"] = _with_parts(
            data.rating_parts, lambda rows: _rating_figures(scores, data, rows, sigma_trained=trained)
        )
    if model.spec.sigma_trained:
        figures["sigma"] = {"mean": float(scores.sigma.mean()), "least": float(scores.sigma.min())}
        figures["sigma"]["greatest"] = float(scores.sigma.max())
    if scores.weights is not None:
        means = scores.weights.mean(dim=0).tolist()
        figures["fusion_weights"] = dict(zip(MODALITIES, means, strict=True))
    return figures


def _with_parts(parts: Sequence[str], figures: Callable[[list[int]], dict[str, Any]]) -> dict[str, Any]:
    rows: dict[str, list[int]] = {}
    for row, part in enumerate(parts):
        rows.setdefault(part, []).append(row)
    return {**figures(list(range(len(parts)))), "parts": {part: figures(rows[part]) for part in sorted(rows)}}


def _pair_figures(scores: Scores, data: RewardData, rows: list[int]) -> dict[str, Any]:
    first, second = torch.tensor([data.pairs[row] for row in rows]).unbind(1)
    preferred = torch.tensor([data.preferred[row] for row in rows], dtype=torch.float64)
    mean, sigma = scores.mean.double(), scores.sigma.double()
    log_variance = 2 * sigma.log()
    won = preference_nll(mean[first], log_variance[first], mean[second], log_variance[second])
    lost = preference_nll(mean[second], log_variance[second], mean[first], log_variance[first])
    decided = preferred != 0.5
    right = (mean[first] > mean[second]) == (preferred == 1.0)
    return {
        "count": len(rows),
        "decided": int(decided.sum()),
        "accuracy": float(right[decided].double().mean()) if decided.any() else None,
        "nll": float((preferred * won + (1 - preferred) * lost).mean()),
        "expected": float(torch.exp(-torch.minimum(won, lost)).mean()),
    }


def _rating_figures(scores: Scores, data: RewardData, rows: list[int], *, sigma_trained: bool) -> dict[str, Any]:
    captions = torch.tensor([data.rated[row] for row in rows])
    target = torch.tensor([data.ratings[row] for row in rows], dtype=torch.float64)
    mean, sigma = scores.mean[captions].double(), scores.sigma[captions].double()
    squares = bootstrap_mean((target - mean).square().tolist(), resamples=_RESAMPLES)
    figures: dict[str, Any] = {"count": len(rows), "rmse": math.sqrt(squares.mean)}
    if squares.known:
        figures["rmse_interval"] = [math.sqrt(squares.low), math.sqrt(squares.high)]
    if sigma_trained:
        distance = (target - mean).abs() / sigma
        figures["nll"] = float(gaussian_nll(mean, 2 * sigma.log(), target))
        figures["coverage"] = {
            f"{share:g}": float((distance <= NormalDist().inv_cdf(0.5 + share / 2)).double().mean())
            for share in COVERAGES
        }
    return figures
