"""Policy-gradient losses, pure functions over token log-probs.

`B` completions, `T` tokens a completion (padded; `mask` True on real tokens). Three policies meet here:

- π_θ, `logprobs`: the one that learns, with gradient;
- π_prox, `proximal_logprobs`: π_θ at the start of the step, detached. None stands for π_θ itself, which is exact at
  one pass a step and needs no extra forward;
- μ, `behaviour_logprobs`: the one that sampled, as recorded by the sampler.

`scales` [B] weigh every token of a completion (`aggregation.py`), `denominator` is the whole step's, so that losses
and their `LossStats` add up over micro-batches and ranks. Off-policy, each loss is multiplied by a detached
importance weight capped at c (`off_policy_cap`): min(π_θ/μ, c) for `reward_guided`, min(π_prox/μ, c) for the others.
At π_θ = π_prox = μ all of them have the gradient of `reward_guided_loss`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from mmrl_ray.losses.aggregation import LossStats, PolicyLoss, check_tokens, masked_mean, masked_sum

_LARGEST_LOG_RATIO = 20.0
"""Bounds ratios: e^20 is far outside any clip, and far below what float32 holds."""


def reward_guided_loss(
    logprobs: torch.Tensor, weights: torch.Tensor, mask: torch.Tensor, *, denominator: float | torch.Tensor
) -> torch.Tensor:
    """L = −Σ R·log f_θ(a|s) ÷ denominator over valid tokens (docs/equations.md 14; Williams 1992).

    Args:
        logprobs: [B, T].
        weights: [B] or [B, T]; R as the advantage after the chosen baseline. Never differentiated.
        mask: bool [B, T].
        denominator: of the whole step; its number of tokens gives the formula's mean.

    Raises:
        ValueError: the shapes do not fit, or the denominator is not above 0.
    """
    check_tokens(logprobs, mask)
    if weights.shape not in (logprobs.shape, logprobs.shape[:1]):
        raise ValueError(
            f"weights must be [B] or [B, T] for logprobs {list(logprobs.shape)}, got {list(weights.shape)}"
        )
    weights = (weights[:, None] if weights.ndim == 1 else weights).detach()
    # Masked here too: the gradient of NaN · weight at a masked position would be NaN · 0.
    return -masked_mean(_valid(logprobs, mask) * weights, mask, denominator=denominator)


def policy_loss(
    name: str,
    logprobs: torch.Tensor,
    proximal_logprobs: torch.Tensor | None,
    behaviour_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    *,
    scales: torch.Tensor,
    denominator: float | torch.Tensor,
    off_policy_cap: float,
    clip_low: float,
    clip_high: float,
) -> PolicyLoss:
    """The loss by its name in the config: reward_guided (which knows no clip), clipped, gspo or cispo.

    Args:
        logprobs: [B, T] of π_θ, with gradient.
        proximal_logprobs: [B, T] of π_prox, or None for π_θ itself.
        behaviour_logprobs: [B, T] of μ.
        advantages: [B].
        mask: bool [B, T].
        scales: [B], per-token weight of each completion.
        denominator: of the whole step.
        off_policy_cap: c, at least 1; `math.inf` for no cap.
        clip_low: the ratio is clipped below 1 − clip_low.
        clip_high: the ratio is clipped above 1 + clip_high.

    Raises:
        ValueError: an unknown name, shapes that do not fit, or a denominator that is not above 0.
    """
    if name not in _LOSSES:
        raise ValueError(f"unknown loss {name!r}; choose {', '.join(_LOSSES)}")
    theta, prox, mu = aligned_logprobs(logprobs, proximal_logprobs, behaviour_logprobs, advantages, mask, scales)
    columns = advantages[:, None], scales[:, None]
    return _LOSSES[name](_Batch(theta, prox, mu, mask, *columns, denominator, off_policy_cap, clip_low, clip_high))


@dataclass(frozen=True, slots=True)
class _Batch:
    """What every loss is made of: log-probs [B, T] of π_θ, π_prox and μ as `aligned_logprobs` gives them."""

    theta: torch.Tensor
    prox: torch.Tensor
    mu: torch.Tensor
    mask: torch.Tensor
    advantages: torch.Tensor
    """[B, 1], and so are `scales`."""
    scales: torch.Tensor
    denominator: float | torch.Tensor
    cap: float
    low: float
    high: float


def _reward_guided(batch: _Batch) -> PolicyLoss:
    """`reward_guided_loss` with each token's weight multiplied by min(π_θ/μ, c), detached; π_prox plays no part."""
    log_ratio = batch.theta.detach() - batch.mu
    weights = capped_ratio(log_ratio, batch.cap) * (batch.advantages * batch.scales)
    loss = reward_guided_loss(batch.theta, weights, batch.mask, denominator=batch.denominator)
    return PolicyLoss(loss, _stats(batch.mask, log_ratio, log_ratio, torch.zeros_like(batch.mask), batch.cap))


def _clipped(batch: _Batch) -> PolicyLoss:
    """−min(r·A, clip(r, 1 − low, 1 + high)·A) a token, r = π_θ/π_prox (PPO, arXiv:1707.06347; clip-higher: DAPO).

    Times min(π_prox/μ, c), detached, as in decoupled PPO (arXiv:2110.00641).
    """
    log_ratio = batch.theta - batch.prox
    surrogate, clipped = _clip(bounded_ratio(log_ratio), batch)
    log_behaviour = batch.prox - batch.mu
    weights = capped_ratio(log_behaviour, batch.cap) * batch.scales
    loss = -masked_mean(surrogate * weights, batch.mask, denominator=batch.denominator)
    return PolicyLoss(loss, _stats(batch.mask, log_ratio, log_behaviour, clipped, batch.cap))


def _gspo(batch: _Batch) -> PolicyLoss:
    """`_clipped` with the whole completion's ratio s = (π_θ(y)/π_prox(y))^(1/|y|) (GSPO, arXiv:2507.18071).

    In the token form of its section 4.3: each token's ratio is sg[s]·π_θ/sg[π_θ], whose value is s. With scales
    1 ÷ |y| (`sequence_mean`) value and gradient are those of the sequence form s·A; other aggregations stay defined.
    The importance weight is the completion's too: the capped geometric mean min((π_prox(y)/μ(y))^(1/|y|), c).
    """
    mask = batch.mask
    lengths = mask.sum(dim=1).clamp(min=1)
    log_sequence = (masked_sum(batch.theta.detach() - batch.prox, mask, dim=1) / lengths)[:, None]
    ratio = bounded_ratio(log_sequence + (batch.theta - batch.theta.detach()))
    surrogate, clipped = _clip(ratio, batch)
    log_behaviour = (masked_sum(batch.prox - batch.mu, mask, dim=1) / lengths)[:, None]
    weights = capped_ratio(log_behaviour, batch.cap) * batch.scales
    loss = -masked_mean(surrogate * weights, mask, denominator=batch.denominator)
    counted = mask.any(dim=1, keepdim=True)
    clipped = (clipped & mask).any(dim=1, keepdim=True)
    return PolicyLoss(loss, _stats(counted, log_sequence, log_behaviour, clipped, batch.cap))


def _cispo(batch: _Batch) -> PolicyLoss:
    """−sg[clip(r, 1 − low, 1 + high)]·A·log π_θ a token, r = π_θ/π_prox (CISPO: MiniMax-M1, arXiv:2506.13585).

    The weight is clipped, never the token: every token keeps its gradient. Times min(π_prox/μ, c), detached.
    """
    log_ratio = batch.theta.detach() - batch.prox
    ratio = log_ratio.exp()
    kept = ratio.clamp(1.0 - batch.low, 1.0 + batch.high)
    log_behaviour = batch.prox - batch.mu
    weights = kept * capped_ratio(log_behaviour, batch.cap) * (batch.advantages * batch.scales)
    loss = reward_guided_loss(batch.theta, weights, batch.mask, denominator=batch.denominator)
    return PolicyLoss(loss, _stats(batch.mask, log_ratio, log_behaviour, kept != ratio, batch.cap))


_LOSSES: dict[str, Callable[[_Batch], PolicyLoss]] = {
    "reward_guided": _reward_guided,
    "clipped": _clipped,
    "gspo": _gspo,
    "cispo": _cispo,
}


def _valid(logprobs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return torch.where(mask, logprobs, torch.zeros_like(logprobs))


def aligned_logprobs(
    logprobs: torch.Tensor,
    proximal: torch.Tensor | None,
    behaviour: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    scales: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probs of π_θ, π_prox and μ with 0 at masked positions, the last two detached; checks all shapes."""
    check_tokens(logprobs, mask)
    others = [t for t in (proximal, behaviour) if t is not None]
    rows = logprobs.shape[:1]
    if any(t.shape != logprobs.shape for t in others) or advantages.shape != rows or scales.shape != rows:
        raise ValueError(
            f"logprobs {list(logprobs.shape)} need other log-probs of that shape and advantages and scales [B], got "
            f"{[list(t.shape) for t in others]}, {list(advantages.shape)} and {list(scales.shape)}"
        )
    theta = _valid(logprobs, mask)
    prox = theta.detach() if proximal is None else _valid(proximal.detach(), mask)
    return theta, prox, _valid(behaviour.detach(), mask)


def bounded_ratio(log_ratio: torch.Tensor) -> torch.Tensor:
    """exp(log_ratio), constant from e^20 on.

    An infinite ratio would make the gradient NaN even where a clip or a gate takes no notice of it: 0 · ∞.
    """
    return log_ratio.clamp(max=_LARGEST_LOG_RATIO).exp()


def capped_ratio(log_ratio: torch.Tensor, cap: float) -> torch.Tensor:
    """min(exp(log_ratio), cap), which cannot overflow."""
    return log_ratio.clamp(max=math.log(cap)).exp()


def _clip(ratio: torch.Tensor, batch: _Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """The pessimistic surrogate min(r·A, clip(r)·A), and where the clip took the gradient away."""
    free, bounded = ratio * batch.advantages, ratio.clamp(1.0 - batch.low, 1.0 + batch.high) * batch.advantages
    return torch.minimum(free, bounded), bounded.detach() < free.detach()


def _stats(
    counted: torch.Tensor, log_ratio: torch.Tensor, log_behaviour: torch.Tensor, clipped: torch.Tensor, cap: float
) -> LossStats:
    # Sums go to the metrics line, which has no room for infinity.
    behaviour = bounded_ratio(log_behaviour.detach())
    return LossStats(
        count=counted.sum().to(behaviour.dtype),
        clipped=(clipped & counted).sum().to(behaviour.dtype),
        ratio=masked_sum(bounded_ratio(log_ratio.detach()), counted),
        behaviour=masked_sum(behaviour, counted),
        behaviour_squared=masked_sum(behaviour.square(), counted),
        capped=((behaviour > cap) & counted).sum().to(behaviour.dtype),
    )
