"""Rewards whose parts are normalised by their group before they are weighed (GDPO, Liu et al. 2026, arXiv:2601.05242).

    z_k = (r_k - mean of its group) / (std of its group + ε)        for each part k
    s = Σ_k w_k z_k
    R = (s - mean of the step) / (std of the step + ε)

Summing first and normalising then, as GRPO does, lets the part with the largest spread decide, and gives different
mixtures of parts the same advantage. `K` parts, `M` groups of the step, `G` completions a group. Standard deviations
are the sample's (ddof = 1), ε is that of the group advantages.
"""

from __future__ import annotations

import torch

from mmrl_ray.losses.advantages import STD_EPSILON


def decoupled_rewards(parts: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """R [M, G] from parts [K, M, G] and weights [K].

    A part that is equal over a group, and a step whose sums are all equal, give exactly 0.

    Raises:
        ValueError: wrong shapes, a part that is not finite, or G below 2.
    """
    if parts.ndim != 3 or not parts.is_floating_point() or weights.shape != parts.shape[:1]:
        raise ValueError(
            f"parts must be floating-point [K, M, G] and weights [K], got {list(parts.shape)} {parts.dtype} and "
            f"{list(weights.shape)}"
        )
    if parts.shape[2] < 2:
        raise ValueError(f"normalising by the group needs 2 completions or more in it, got parts {list(parts.shape)}")
    if not torch.isfinite(parts).all():
        raise ValueError("parts must be finite; mask the samples whose reward failed")
    sums = (weights.to(parts.dtype)[:, None, None] * _standardised(parts)).sum(dim=0)
    return _standardised(sums.flatten()).reshape(sums.shape)


def _standardised(values: torch.Tensor) -> torch.Tensor:
    """Along the last dimension; exactly 0 where all its values are equal."""
    scaled = (values - values.mean(dim=-1, keepdim=True)) / (values.std(dim=-1, keepdim=True) + STD_EPSILON)
    equal = values.amax(dim=-1, keepdim=True) == values.amin(dim=-1, keepdim=True)
    return torch.where(equal, 0.0, scaled)
