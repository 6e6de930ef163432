"""What goes into a reward and what comes out of it. Plain Python, so that rewards need no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


class TruncatedCaption(str):
    """A caption that ran into the limit of tokens: it has no end of its own. Any other text has ended by itself.

    A `str` like any other for whoever does not care.
    """

    __slots__ = ()


@dataclass(frozen=True, slots=True)
class RewardBreakdown:
    """What one caption earned, and from what.

    `total` equals the sum of `weights[k] * parts[k]` over the keys of `weights`. A composed reward keeps the parts of
    its parts beside them, under `outer/inner` names that have no weight of their own, and the standard deviation of a
    part that has one under `outer/sigma`.
    """

    total: float
    parts: Mapping[str, float]
    weights: Mapping[str, float]
    sigma: float | None = None
    """Standard deviation of the total where the reward has a model of its own noise."""
    risk: float = 0.0
    """kappa: how many standard deviations learning takes off the total."""
    missing: Mapping[str, str] = field(default_factory=dict)
    """Parts of weight 0 that could not score this caption, each with its reason; they are not among `parts`."""

    @property
    def adjusted(self) -> float:
        """What learning uses: total - risk * sigma."""
        return self.total if self.sigma is None else self.total - self.risk * self.sigma

    @property
    def magnitude(self) -> float:
        """Of the numbers that `adjusted` is the sum of, which says how exact it is."""
        return sum(abs(weight * self.parts.get(name, 0.0)) for name, weight in self.weights.items())


@dataclass(frozen=True, slots=True)
class RewardFailure:
    """Why a caption has no reward; it is masked and counted, never scored 0."""

    reason: str
    """One line."""


Score = RewardBreakdown | RewardFailure
"""What one caption earned, or why nobody knows."""
