"""Rewards whose parts are normalised by their group before they are weighed (GDPO, Liu et al. 2026, arXiv:2601.05242).

    z_k = (r_k - mean of its group) / std of its group        for each part k
    s = Σ_k w_k z_k
    R = (s - mean of the step) / std of the step

Summing first and normalising then, as GRPO does, lets the part with the largest spread decide, and gives different
mixtures of parts the same advantage. `K` parts, `M` groups of the step, `G` completions a group. Standard deviations
are the sample's (ddof = 1); values that differ by no more than the resolution of their magnitude (`spread.py`) are
equal, and 0 after it. Masked completions take no part.
"""

from __future__ import annotations

import torch

from mmrl_ray.losses.advantages import spreads


def decoupled_rewards(parts: torch.Tensor, weights: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """R [M, G] from parts [K, M, G] and weights [K]; mask, bool [M, G], names the completions that count.

    A part that is equal over a group, a step whose sums are all equal, and masked completions give exactly 0.

    Raises:
        ValueError: wrong shapes, a part that counts is not finite, or G below 2.
    """
    if parts.ndim != 3 or not parts.is_floating_point() or weights.shape != parts.shape[:1]:
        raise ValueError(
            f"parts must be floating-point [K, M, G] and weights [K], got {list(parts.shape)} {parts.dtype} and "
            f"{list(weights.shape)}"
        )
    if parts.shape[2] < 2:
        raise ValueError(f"normalising by the group needs 2 completions or more in it, got parts {list(parts.shape)}")
    valid = torch.ones_like(parts[0], dtype=torch.bool) if mask is None else mask
    if valid.dtype != torch.bool or valid.shape != parts.shape[1:]:
        raise ValueError(f"mask must be bool [M, G] for parts {list(parts.shape)}, got {list(valid.shape)}")
    parts = torch.where(valid, parts, 0.0)
    if not torch.isfinite(parts).all():
        raise ValueError("parts that count must be finite; mask the completions whose reward failed")
    weighed = weights.to(parts.dtype)[:, None, None] * _standardised(parts, valid.expand_as(parts), parts.abs())
    sums, sizes = weighed.sum(dim=0), weighed.abs().sum(dim=0)  # sums of parts that cancel are as exact as the parts
    return _standardised(sums.flatten(), valid.flatten(), sizes.flatten()).reshape(sums.shape)


def _standardised(values: torch.Tensor, valid: torch.Tensor, magnitude: torch.Tensor) -> torch.Tensor:
    """Along the last dimension; exactly 0 where masked, and where what counts does not differ."""
    count = valid.sum(dim=-1, keepdim=True)
    mean = torch.where(valid, values, 0.0).sum(dim=-1, keepdim=True) / count.clamp(min=1)
    centred = torch.where(valid, values - mean, 0.0)
    centred = centred / centred.abs().amax(dim=-1, keepdim=True)
    std = (centred.square().sum(dim=-1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
    return torch.where(valid & spreads(values, valid, magnitude), centred / std, 0.0)
