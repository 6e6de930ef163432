"""The one protocol of every reward, local, mixed or behind a Serve handle."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from mmrl_ray.data.samples import Sample
from mmrl_ray.experience.breakdown import RewardBreakdown, RewardFailure, Score, TruncatedCaption

__all__ = [
    "RewardBreakdown",
    "RewardFailure",
    "RewardFn",
    "Score",
    "TimedReward",
    "TruncatedCaption",
    "score_within",
]


@runtime_checkable
class RewardFn(Protocol):
    """Scores captions; higher is better."""

    def score_batch(self, samples: Sequence[Sample], captions: Sequence[str]) -> Sequence[Score]:
        """A list of one score a caption, in order; `samples[i]` is what `captions[i]` describes.

        A breakdown, or a `RewardFailure` for a caption that cannot be scored where the others can.

        A caption that was cut off is a `TruncatedCaption`; any other one ended by itself.

        Raises:
            RewardError: the batch cannot be scored (for example: a sample has no references); whoever calls finds out
                which captions are to blame.
        """
        ...


@runtime_checkable
class TimedReward(RewardFn, Protocol):
    """A reward that ends what hangs."""

    def score_within(self, samples: Sequence[Sample], captions: Sequence[str], timeout_s: float) -> Sequence[Score]:
        """`score_batch` with so much time for the batch, and as much again for what it hangs on."""
        ...


def score_within(
    reward: RewardFn, samples: Sequence[Sample], captions: Sequence[str], timeout_s: float
) -> Sequence[Score]:
    """Scores in the time given, where the reward can tell."""
    if isinstance(reward, TimedReward):
        return reward.score_within(samples, captions, timeout_s)
    return reward.score_batch(samples, captions)
