"""The one protocol of every reward, local, mixed or behind a Serve handle.

The state of one modality: what a reward part is given of a sample, no more (s^m of docs/equations.md 10).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from mmrl_ray.config.reward import Modality
from mmrl_ray.data.samples import Sample
from mmrl_ray.experience.breakdown import RewardBreakdown, RewardFailure, Score, TruncatedCaption

__all__ = ["RewardBreakdown", "RewardFailure", "RewardFn", "Score", "TimedReward", "TruncatedCaption", "score_within"]

_VIEWS: Mapping[Modality, Callable[[Sample], Sample]] = {
    "image": lambda s: Sample(s.id, s.images, "", ()),
    "text": lambda s: Sample(s.id, (), s.prompt, ()),
    "reference": lambda s: Sample(s.id, (), "", s.references),
    "sample": lambda s: s,
}
_VALUES: Mapping[Modality, Callable[[Sample], Any]] = {
    "image": lambda s: s.images,
    "text": lambda s: s.prompt,
    "reference": lambda s: s.references,
    "sample": lambda s: s,
}


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


def views(samples: Sequence[Sample], modality: Modality) -> list[Sample]:
    """Samples with their id and this modality alone; one that comes several times stays one object."""
    made: dict[int, Sample] = {}
    for sample in samples:
        if id(sample) not in made:
            made[id(sample)] = _VIEWS[modality](sample)
    return [made[id(sample)] for sample in samples]


def state_value(sample: Sample, modality: Modality) -> Any:
    """The state by itself: encoded image files, the prompt, a tuple of references, or the whole sample."""
    return _VALUES[modality](sample)
