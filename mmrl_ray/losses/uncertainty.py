"""Likelihoods of a model that predicts a mean and its own noise, log σ² (docs/equations.md 15)."""

from __future__ import annotations

import torch


def gaussian_nll(mean: torch.Tensor, log_variance: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """(1/N) Σ [(y − ŷ)² / (2σ²) + ½ log σ²], a scalar: heteroscedastic regression (Kendall and Gal 2017, eq. 5).

    The constant ½ log 2π is left out, as in the formula. Args are [N] each; the model predicts log σ², so that σ² is
    positive by construction.

    Raises:
        ValueError: the shapes differ, are not [N], or N is 0.
    """
    _check(mean=mean, log_variance=log_variance, target=target)
    return (0.5 * ((target - mean).square() * torch.exp(-log_variance) + log_variance)).sum() / len(mean)


def preference_nll(
    mean: torch.Tensor, log_variance: torch.Tensor, other_mean: torch.Tensor, other_log_variance: torch.Tensor
) -> torch.Tensor:
    """−log Φ((μ_i − μ_j) / √(σ_i² + σ_j²)) of each pair, [N]: i was preferred to j (Thurstone 1927).

    It is the chance that a draw of i's reward is above one of j's. Bradley–Terry would leave σ untrained.

    Raises:
        ValueError: the shapes differ, are not [N], or N is 0.
    """
    _check(mean=mean, log_variance=log_variance, other_mean=other_mean, other_log_variance=other_log_variance)
    log_scale = 0.5 * torch.logaddexp(log_variance, other_log_variance)
    return -torch.special.log_ndtr((mean - other_mean) * torch.exp(-log_scale))


def _check(**given: torch.Tensor) -> None:
    shapes = {name: list(tensor.shape) for name, tensor in given.items()}
    first = next(iter(shapes.values()))
    if len(first) != 1 or first[0] < 1 or any(shape != first for shape in shapes.values()):
        raise ValueError(f"all must be [N] with the same N of at least 1, got {shapes}")
