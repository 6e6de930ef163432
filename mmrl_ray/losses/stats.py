"""What a policy-gradient loss returns: its value, and diagnostics that add over micro-batches and ranks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Self

import torch


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
