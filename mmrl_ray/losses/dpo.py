"""Direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290): a policy learns from pairs, with no reward.

A caption's implicit reward is r = β·(log π_θ(y|x) − log π_ref(y|x)), summed over its tokens. With p the probability
that a is liked better than b (1 or 0 for one rater, between them for several who differ, ½ for a tie) and ε the label
smoothing,

    L = −[q·log σ(r_a − r_b) + (1 − q)·log σ(r_b − r_a)],  q = (1 − 2ε)·p + ε,  averaged over pairs.

At p = 1 and ε = 0 it is equation 7 of the paper; ε > 0 is the conservative loss for labels that are wrong with that
probability. `B` = 2·pairs captions, those of a pair one after the other; `T` tokens a caption.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import logsigmoid

from mmrl_ray.losses.aggregation import Sums, check_denominator, check_tokens, masked_sum


@dataclass(frozen=True, slots=True)
class DpoStats(Sums):
    """Detached sums, which add over micro-batches and ranks. Pairs at p = ½ are counted in `pairs` alone."""

    pairs: torch.Tensor
    decided: torch.Tensor
    """Pairs of which one caption is liked better."""
    correct: torch.Tensor
    """Decided pairs whose better caption has the larger implicit reward; one of equal rewards counts ½."""
    chosen: torch.Tensor
    """Sum of the implicit rewards of the better captions."""
    rejected: torch.Tensor
    """Of the other ones."""
    confidence: torch.Tensor
    """Sum of the probability σ(r_chosen − r_rejected) that the policy gives the raters' choice."""

    def metrics(self) -> dict[str, float]:
        """Means over decided pairs for the metrics line; NaN where there is none."""
        decided = self.decided.item()
        mean = {name: getattr(self, name).item() / decided if decided else float("nan") for name in _MEANS}
        return {
            "dpo/accuracy": mean["correct"],
            "dpo/confidence": mean["confidence"],
            "dpo/margin": mean["chosen"] - mean["rejected"],
            "dpo/reward_chosen": mean["chosen"],
            "dpo/reward_rejected": mean["rejected"],
        }


_MEANS = ("correct", "chosen", "rejected", "confidence")


@dataclass(frozen=True, slots=True)
class DpoLoss:
    """One micro-batch's share of the step's loss."""

    loss: torch.Tensor
    """Scalar with gradient, already over the step's denominator."""
    stats: DpoStats


def dpo_loss(
    logprobs: torch.Tensor,
    reference_logprobs: torch.Tensor,
    preferred: torch.Tensor,
    mask: torch.Tensor,
    *,
    denominator: float | torch.Tensor,
    beta: float,
    label_smoothing: float = 0.0,
) -> DpoLoss:
    """Σ over pairs of the loss above ÷ denominator.

    Args:
        logprobs: [B, T] under π_θ, with gradient.
        reference_logprobs: [B, T] under π_ref, detached here.
        preferred: [B], the probability that this caption of its pair is the better one; the two of a pair add to 1.
        mask: bool [B, T].
        denominator: pairs of the whole step.
        beta: β, above 0.
        label_smoothing: ε, at least 0 and below ½.

    Raises:
        ValueError: shapes that do not fit, an odd B, probabilities that do not add to 1, β, ε or the denominator out of
            range.
    """
    check_tokens(logprobs, mask)
    rows = logprobs.shape[0]
    if reference_logprobs.shape != logprobs.shape or preferred.shape != (rows,) or rows % 2:
        raise ValueError(
            f"logprobs {list(logprobs.shape)} must have two rows a pair, reference log-probs of the same shape and "
            f"preferred [B], got {list(reference_logprobs.shape)} and {list(preferred.shape)}"
        )
    if not beta > 0 or not 0 <= label_smoothing < 0.5:
        raise ValueError(f"beta={beta} must be above 0, and label_smoothing={label_smoothing} in [0, 0.5)")
    p, other = preferred.detach().view(-1, 2).unbind(dim=1)
    if not torch.allclose(p + other, torch.ones_like(p)) or bool((p < 0).any()) or bool((p > 1).any()):
        raise ValueError(f"the captions of a pair are preferred with probabilities that add to 1, got {preferred}")
    reference = torch.where(mask, reference_logprobs.detach(), 0.0)
    rewards = beta * masked_sum(torch.where(mask, logprobs, 0.0) - reference, mask, dim=1).view(-1, 2)
    margin = rewards[:, 0] - rewards[:, 1]
    q = (1.0 - 2.0 * label_smoothing) * p + label_smoothing
    losses = -(q * logsigmoid(margin) + (1.0 - q) * logsigmoid(-margin))
    return DpoLoss(losses.sum() / check_denominator(denominator), _stats(rewards.detach(), p))


def _stats(rewards: torch.Tensor, p: torch.Tensor) -> DpoStats:
    decided = p != 0.5
    first = p > 0.5
    chosen = torch.where(first, rewards[:, 0], rewards[:, 1])
    rejected = torch.where(first, rewards[:, 1], rewards[:, 0])
    margin = chosen - rejected
    correct = (margin > 0).to(margin.dtype) + 0.5 * (margin == 0).to(margin.dtype)

    def total(values: torch.Tensor) -> torch.Tensor:
        return masked_sum(values, decided)

    return DpoStats(
        pairs=torch.full_like(margin, 1.0).sum(),
        decided=total(torch.ones_like(margin)),
        correct=total(correct),
        chosen=total(chosen),
        rejected=total(rejected),
        confidence=total(torch.sigmoid(margin)),
    )
