"""KL(π_θ || π_ref) from sampled tokens (Schulman, "Approximating KL divergence", 2020).

With d = log π_θ − log π_ref on tokens drawn from π_θ:

| name | a token         | value      | gradient, as a loss term                                                     |
|------|-----------------|------------|------------------------------------------------------------------------------|
| `k1` | d               | unbiased   | mean 0: it would push nowhere, so it enters the reward and is refused here   |
| `k2` | d² ÷ 2          | biased     | unbiased for the gradient of KL(π_θ || π_ref)                                |
| `k3` | exp(−d) − 1 + d | unbiased   | biased: it is the gradient of the other direction, KL(π_ref || π_θ)          |

The expectation is over the tokens as sampled; no importance weight corrects it for stale groups.
`B` completions, `T` tokens a completion.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mmrl_ray.losses.aggregation import check_tokens, masked_mean, masked_sum


@dataclass(frozen=True, slots=True)
class KlLoss:
    """One micro-batch's share of the step's KL term, before its weight."""

    loss: torch.Tensor
    """Scalar with gradient, already over the step's denominator."""
    value: torch.Tensor
    """Detached sum of k3 over valid tokens: the unbiased figure of low variance for the metrics line."""
    count: torch.Tensor
    """Valid tokens."""


def kl_per_token(estimator: str, logprobs: torch.Tensor, reference_logprobs: torch.Tensor) -> torch.Tensor:
    """The estimator's value on every token, in the shape of `logprobs`; differentiable.

    Raises:
        ValueError: an unknown estimator, or the shapes differ.
    """
    if logprobs.shape != reference_logprobs.shape:
        raise ValueError(
            f"logprobs {list(logprobs.shape)} and reference log-probs {list(reference_logprobs.shape)} must match"
        )
    d = logprobs - reference_logprobs
    if estimator == "k1":
        return d
    if estimator == "k2":
        return 0.5 * d.square()
    if estimator == "k3":
        return torch.expm1(-d) + d  # exp(-d) - 1 would lose small d to rounding
    raise ValueError(f"unknown KL estimator {estimator!r}; choose k1, k2 or k3")


def kl_loss(
    estimator: str,
    logprobs: torch.Tensor,
    reference_logprobs: torch.Tensor,
    mask: torch.Tensor,
    *,
    scales: torch.Tensor,
    denominator: float | torch.Tensor,
) -> KlLoss:
    """Σ scale·KL(token) ÷ denominator over valid tokens, with the scales and denominator of the policy loss.

    Args:
        estimator: k2 or k3.
        logprobs: [B, T], with gradient.
        reference_logprobs: [B, T], detached here.
        mask: bool [B, T].
        scales: [B].
        denominator: of the whole step.

    Raises:
        ValueError: `k1` (see the module), an unknown name, shapes that do not fit, or a denominator not above 0.
    """
    if estimator == "k1":
        raise ValueError("KL estimator 'k1' has a gradient of mean 0 as a loss term; use kl_penalty inside the reward")
    check_tokens(logprobs, mask)
    if scales.shape != logprobs.shape[:1] or reference_logprobs.shape != logprobs.shape:
        raise ValueError(
            f"logprobs {list(logprobs.shape)} need reference log-probs of that shape and scales [B], got "
            f"{list(reference_logprobs.shape)} and {list(scales.shape)}"
        )
    theta = torch.where(mask, logprobs, 0.0)
    reference = torch.where(mask, reference_logprobs.detach(), 0.0)
    loss = masked_mean(kl_per_token(estimator, theta, reference) * scales[:, None], mask, denominator=denominator)
    value = masked_sum(kl_per_token("k3", theta.detach(), reference), mask)
    return KlLoss(loss, value, mask.sum().to(value.dtype))


def kl_penalty(behaviour_logprobs: torch.Tensor, reference_logprobs: torch.Tensor) -> float:
    """k1 of one whole completion: Σ over its tokens [T] of log μ − log π_ref, in float64. The reward loses `kl.weight`
    times it.

    Raises:
        ValueError: the shapes differ.
    """
    return float(kl_per_token("k1", behaviour_logprobs.double(), reference_logprobs.double()).sum())
