"""From what a step's completions earned to one loss: advantages, a weight for each token, one denominator, statistics.

`M` groups of `G` completions, all of those that the step learns from.

| name            | scale of each token | denominator               | used by              |
|-----------------|---------------------|---------------------------|----------------------|
| `token_mean`    | 1                   | tokens                    | DAPO, CISPO          |
| `sequence_mean` | 1 ÷ its length      | completions               | GRPO, GSPO           |
| `sequence_sum`  | 1                   | completions               | REINFORCE, SCST, RLOO|
| `constant`      | 1                   | completions × max tokens  | Dr. GRPO             |

Lengths and denominators are those of the whole step, over all ranks and micro-batches, groups without signal included.
A completion without a reward counts nowhere: its scale is 0, and neither its tokens nor itself are in a denominator.
Nor are those of one that is masked, whose reward is still part of its group's baseline.

`masked_mean` is a sum over valid positions divided by one explicit denominator.

A mean over whatever a micro-batch or a rank happens to hold does not add up to the mean of the step; a sum over one
denominator of the whole step does. `B` completions, `T` tokens a completion; masks are bool, True counts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Self

import torch

from mmrl_ray.losses.advantages import advantages


def completion_scales(
    aggregation: str,
    lengths: torch.Tensor | Sequence[int],
    *,
    max_new_tokens: int | None = None,
    mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, float]:
    """Scales [N] (float64) and the denominator for N completions of `lengths` [N] tokens.

    `mask`, bool [N], names those that count, all by default; the result is that of the others left out, with 0 in
    their places.

    Raises:
        ValueError: an unknown name, no completions, a negative length, no token at all, or `constant` without
            `max_new_tokens`, or with one below the longest completion.
    """
    tokens = torch.as_tensor(lengths, dtype=torch.int64)
    if mask is not None:
        if mask.shape != tokens.shape or mask.dtype != torch.bool:
            raise ValueError(f"mask must be bool [N] = {list(tokens.shape)}, got {list(mask.shape)} {mask.dtype}")
        kept, denominator = completion_scales(aggregation, tokens[mask], max_new_tokens=max_new_tokens)
        return torch.zeros(tokens.shape, dtype=torch.float64).masked_scatter(mask, kept), denominator
    if tokens.ndim != 1 or tokens.numel() == 0 or bool((tokens < 0).any()) or int(tokens.sum()) == 0:
        raise ValueError(f"lengths must be [N], N >= 1, at least 0 and not all 0, got {tokens.tolist()}")
    ones = torch.ones(tokens.shape, dtype=torch.float64)
    count = float(tokens.numel())
    if aggregation == "token_mean":
        return ones, float(tokens.sum())
    if aggregation == "sequence_mean":
        return torch.where(tokens > 0, 1.0 / tokens.clamp(min=1).to(torch.float64), 0.0), count
    if aggregation == "sequence_sum":
        return ones, count
    if aggregation == "constant":
        if max_new_tokens is None or max_new_tokens < int(tokens.max()):
            raise ValueError(
                f"aggregation 'constant' needs max_new_tokens of at least the longest completion "
                f"({int(tokens.max())} tokens), got {max_new_tokens}"
            )
        return ones, count * max_new_tokens
    raise ValueError(f"unknown aggregation {aggregation!r}; choose token_mean, sequence_mean, sequence_sum or constant")


def masked_sum(values: torch.Tensor, mask: torch.Tensor, dim: int | None = None) -> torch.Tensor:
    """Sum of `values` where `mask`; what is masked (NaN included) reaches neither the sum nor its gradient.

    Raises:
        ValueError: the shapes differ, or the mask is not bool.
    """
    check_mask(values, mask)
    kept = torch.where(mask, values, torch.zeros_like(values))
    return kept.sum() if dim is None else kept.sum(dim=dim)


def masked_mean(values: torch.Tensor, mask: torch.Tensor, *, denominator: float | torch.Tensor) -> torch.Tensor:
    """`masked_sum` over the denominator of the whole step, a scalar; raises as it and as `check_denominator`."""
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


@dataclass(frozen=True, slots=True)
class StepRewards:
    """What is known of a step, over all ranks."""

    rewards: torch.Tensor
    """float64 [M, G], after risk, normalisation and the k1 penalty; 0 where there is none."""
    counts: torch.Tensor
    """bool [M, G], False at a completion whose reward failed."""
    magnitude: torch.Tensor
    """[M, G], how large the numbers were that each reward was summed from."""
    greedy: torch.Tensor | None
    """[M], rewards of the greedy completions, where the baseline needs them."""
    lengths: torch.Tensor
    """[M, G], tokens of each completion."""
    max_new_tokens: int
    masked: torch.Tensor | None = None
    """bool [M, G], True at a completion of whose tokens nothing is learnt, though its reward is part of the baselines
    (`learner.mask_truncated`); none by default."""


@dataclass(frozen=True, slots=True)
class StepWeights:
    """What the learner makes of it."""

    advantages: torch.Tensor
    """[M, G]; 0 where nothing counts."""
    scales: torch.Tensor
    """[M, G], each completion's weight a token; one at 0 takes no part in the step."""
    denominator: float
    """Of every term of the loss, over all ranks and micro-batches; above 0."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Figures of the choice, for the step's metrics line."""


def weigh(step: StepRewards, advantage: str, aggregation: str, *, divide_by_std: bool = True) -> StepWeights:
    """Weights by the names of a baseline (`advantages.py`) and an aggregation (`aggregation.py`).

    Raises:
        ValueError: of these two.
    """
    weights = advantages(
        advantage,
        step.rewards,
        mask=step.counts,
        greedy=step.greedy,
        divide_by_std=divide_by_std,
        magnitude=step.magnitude,
    )
    scales, denominator = scales_of(step, aggregation, step.counts)
    return StepWeights(weights, scales, denominator)


def scales_of(step: StepRewards, aggregation: str, counts: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Per-token weights [M, G] of the completions that count, and their denominator; `counts` is bool [M, G], of which
    `step.masked` is taken away."""
    if step.masked is not None:
        counts = counts & ~step.masked
    flat = step.lengths.flatten()
    scales, denominator = completion_scales(
        aggregation, flat, max_new_tokens=step.max_new_tokens, mask=counts.flatten()
    )
    return scales.reshape(step.lengths.shape), float(denominator)


@dataclass(frozen=True, slots=True)
class Sums:
    """Detached scalar sums, one a field, which add over micro-batches and ranks."""

    def __add__(self, other: Self) -> Self:
        return self._of(getattr(self, f.name) + getattr(other, f.name) for f in fields(self))

    def to_tensor(self) -> torch.Tensor:
        """All sums as one tensor, [fields], for a single reduction over ranks."""
        return torch.stack([getattr(self, f.name) for f in fields(self)])

    @classmethod
    def from_tensor(cls, sums: torch.Tensor) -> Self:
        """The inverse of `to_tensor`."""
        return cls._of(sums.unbind())

    @classmethod
    def _of(cls, values: Iterable[torch.Tensor]) -> Self:
        return cls(**{f.name: value for f, value in zip(fields(cls), values, strict=True)})


@dataclass(frozen=True, slots=True)
class LossStats(Sums):
    """Detached sums, which add over micro-batches and ranks; ratios are counted a token (a completion for gspo)."""

    count: torch.Tensor
    """Ratios counted."""
    clipped: torch.Tensor
    """How many of them gave no gradient, or for cispo a clipped weight."""
    ratio: torch.Tensor
    """Sum of π_θ/π_prox (π_θ/μ for reward_guided)."""
    behaviour: torch.Tensor
    """Sum of the importance weight before its cap."""
    behaviour_squared: torch.Tensor
    capped: torch.Tensor
    """How many importance weights were above the cap."""

    def metrics(self) -> dict[str, float]:
        """Means for the metrics line; all 0 when nothing was counted.

        `effective_samples` is (Σw)² ÷ (n·Σw²) of the importance weights: 1 on-policy, towards 0 off it.
        """
        count = max(self.count.item(), 1.0)
        squared = self.behaviour_squared.item()
        return {
            "clip_fraction": self.clipped.item() / count,
            "ratio_mean": self.ratio.item() / count,
            "behaviour_ratio_mean": self.behaviour.item() / count,
            "behaviour_capped_fraction": self.capped.item() / count,
            "effective_samples": self.behaviour.item() ** 2 / (count * squared) if squared > 0 else 0.0,
        }


@dataclass(frozen=True, slots=True)
class PolicyLoss:
    """One micro-batch's share of the step's loss."""

    loss: torch.Tensor
    """Scalar with gradient, already over the step's denominator."""
    stats: LossStats
