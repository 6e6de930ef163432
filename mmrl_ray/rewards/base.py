"""The one protocol of every reward, local, mixed or behind a Serve handle."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from mmrl_ray.data.samples import Sample
from mmrl_ray.experience.breakdown import RewardBreakdown, TruncatedCaption

__all__ = ["RewardBreakdown", "RewardFn", "TruncatedCaption"]


@runtime_checkable
class RewardFn(Protocol):
    """Scores captions; higher is better."""

    def score_batch(self, samples: Sequence[Sample], captions: Sequence[str]) -> list[RewardBreakdown]:
        """One breakdown a caption, in order; `samples[i]` is what `captions[i]` describes.

        A caption that was cut off is a `TruncatedCaption`; any other one ended by itself.

        Raises:
            RewardError: a caption cannot be scored (for example: the sample has no references).
        """
        ...
