"""Sums over valid positions, and their quotient by one explicit denominator.

A mean over whatever a micro-batch or a rank happens to hold does not add up to the mean of the step; a sum over one
denominator of the whole step does. `B` completions, `T` tokens a completion; masks are bool, True counts.
"""

from __future__ import annotations

import torch


def masked_sum(values: torch.Tensor, mask: torch.Tensor, dim: int | None = None) -> torch.Tensor:
    """Sum of `values` where `mask`; what is masked (NaN included) reaches neither the sum nor its gradient.

    Raises:
        ValueError: the shapes differ, or the mask is not bool.
    """
    check_mask(values, mask)
    kept = torch.where(mask, values, torch.zeros_like(values))
    return kept.sum() if dim is None else kept.sum(dim=dim)


def masked_mean(values: torch.Tensor, mask: torch.Tensor, *, denominator: float | torch.Tensor) -> torch.Tensor:
    """`masked_sum(values, mask) / denominator`, a scalar; the denominator is that of the whole step.

    Raises:
        ValueError: as `masked_sum`, or the denominator is not above 0.
    """
    return masked_sum(values, mask) / check_denominator(denominator)


def check_mask(values: torch.Tensor, mask: torch.Tensor) -> None:
    """Raises ValueError, with the shapes received, unless `mask` is bool and of the shape of `values`."""
    if values.shape != mask.shape or mask.dtype != torch.bool:
        raise ValueError(
            f"mask must be bool and of the values' shape {list(values.shape)}, got {list(mask.shape)} {mask.dtype}"
        )


def check_tokens(logprobs: torch.Tensor, mask: torch.Tensor) -> None:
    """Raises ValueError, with the shapes received, unless both are [B, T] and the mask is bool."""
    if logprobs.ndim != 2:
        raise ValueError(f"logprobs must be [B, T], got {list(logprobs.shape)}")
    check_mask(logprobs, mask)


def check_denominator(denominator: float | torch.Tensor) -> float | torch.Tensor:
    """The denominator, if it is above 0 (a NaN is not); ValueError otherwise."""
    if not denominator > 0:
        raise ValueError(f"denominator must be above 0, got {denominator}")
    return denominator
