"""Checks that every reward shares: what goes in, and what came out."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mmrl_ray.data.samples import Sample
from mmrl_ray.errors import RewardError
from mmrl_ray.rewards.base import RewardBreakdown, RewardFailure, Score


def check_pairs(samples: Sequence[Sample], captions: Sequence[str]) -> None:
    """Refuse batches whose samples and captions do not pair up.

    Raises:
        RewardError: the lengths differ.
    """
    if len(samples) != len(captions):
        raise RewardError(
            f"a reward got {len(samples)} samples for {len(captions)} captions; pass one sample a caption"
        )


def check_references(references: Sequence[str], reward: str) -> None:
    """Refuse missing references, and a bare string, whose characters would pass for references.

    Raises:
        RewardError: either.
    """
    if isinstance(references, str) or not references:
        raise RewardError(f"{reward} needs a list of at least one reference, got {references!r}")


def check_breakdowns(scores: object, samples: Sequence[Sample]) -> list[RewardBreakdown]:
    """What a reward returned for one caption of each sample, if all have a score: for those who need them all.

    Raises:
        RewardError: as `check_scores`, or a caption has no score.
    """
    found = check_scores(scores, len(samples))
    for sample, score in zip(samples, found, strict=True):
        if isinstance(score, RewardFailure):
            raise RewardError(f"the caption of sample {sample.id!r} has no reward: {score.reason}")
    return [score for score in found if isinstance(score, RewardBreakdown)]


def check_scores(scores: object, expected: int, what: str = "the reward") -> list[Score]:
    """What a reward returned, if it is `expected` finite breakdowns or failures; errors call it `what`.

    Raises:
        RewardError: not a list, the wrong count, a wrong type, or a NaN or infinite figure.
    """
    if not isinstance(scores, list):
        raise RewardError(f"{what} returned {type(scores).__name__} instead of a list of RewardBreakdown")
    if len(scores) != expected:
        raise RewardError(f"{what} returned {len(scores)} scores for {expected} captions")
    for index, score in enumerate(scores):
        if isinstance(score, RewardFailure):
            continue
        if not isinstance(score, RewardBreakdown):
            raise RewardError(f"score {index} of {what} is {type(score).__name__} instead of RewardBreakdown")
        figures = {"total": score.total, **score.parts, **{f"weight of {k}": v for k, v in score.weights.items()}}
        if score.sigma is not None:
            figures["sigma"] = score.sigma
        for name, value in figures.items():
            if not isinstance(value, float | int) or not math.isfinite(value):
                raise RewardError(f"score {index} of {what} has {name}={value!r}, which is no finite number")
        if score.sigma is not None and score.sigma < 0:
            raise RewardError(f"score {index} of {what} has sigma={score.sigma!r}, which must not be negative")
    return scores
