"""The one protocol of every reward, local, mixed or behind a Serve handle; scoring with retries, and its checks.

A reward part is given the state of one modality of a sample, no more (`views`: s^m of docs/equations.md 10). A caption
that cannot be scored is masked with its reason, never turned into 0:

    whole batch ──fails──▶ retries ──fail──▶ one half, the other half, … ──fail──▶ `RewardFailure` for that caption only

A reward is anybody's code: it may raise anything, or return NaN or too few scores. All of these end up as `RewardError`
here, the one place where a broad `except` is right. What may hang has its own deadline where it can be ended: a user's
function in its process (`function.py`), a pattern in its engine, a service at its handle. Parts of our own compute.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, stop_before_delay, wait_exponential

from mmrl_ray.config.reward import Modality
from mmrl_ray.data.samples import Sample
from mmrl_ray.errors import RewardError
from mmrl_ray.experience.carriers import RewardBreakdown, RewardFailure, Score, TruncatedCaption

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
_FIRST_WAIT_S = 0.1
_LONGEST_WAIT_S = 2.0
_LONGEST_REASON = 300
"""Characters."""


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


def score_with_retry(
    reward: RewardFn,
    samples: Sequence[Sample],
    captions: Sequence[str],
    *,
    timeout_s: float,
    retries: int,
) -> list[Score]:
    """Score a batch; one entry a caption, in order. Each caption succeeds or fails by itself.

    A batch that raises is tried `1 + retries` times (with waits of 0.1 to 2 s between them), then in halves, each once,
    down to the captions that raise. No try begins later than `(retries + 2) * timeout_s` after the first; each has
    `timeout_s` for a batch, and as much again where that hangs (see `FunctionReward`). What a reward says of a single
    caption, that it has no number for it or hangs on it, is not asked again.

    Raises:
        RewardError: the batch itself is malformed (samples and captions do not pair up).
    """
    check_pairs(samples, captions)
    if not captions:
        return []
    deadline = time.monotonic() + (retries + 2) * timeout_s
    attempts = Retrying(
        stop=stop_after_attempt(1 + retries) | stop_before_delay((retries + 1) * timeout_s),
        wait=wait_exponential(multiplier=_FIRST_WAIT_S, max=_LONGEST_WAIT_S),
        retry=retry_if_exception_type(RewardError),
        reraise=True,
    )
    try:
        return _short(attempts(score_once, reward, samples, captions, timeout_s))
    except RewardError as error:
        return _in_halves(reward, samples, captions, timeout_s, deadline, error)


def _in_halves(
    reward: RewardFn,
    samples: Sequence[Sample],
    captions: Sequence[str],
    timeout_s: float,
    deadline: float,
    error: RewardError,
) -> list[Score]:
    """Of a batch that failed with `error`."""
    if len(captions) == 1 or time.monotonic() >= deadline:
        return _short([RewardFailure(str(error))] * len(captions))
    scores: list[Score] = []
    middle = len(captions) // 2
    for half in (slice(None, middle), slice(middle, None)):
        try:
            scores += _short(score_once(reward, samples[half], captions[half], timeout_s))
        except RewardError as again:
            scores += _in_halves(reward, samples[half], captions[half], timeout_s, deadline, again)
    return scores


def score_once(reward: RewardFn, samples: Sequence[Sample], captions: Sequence[str], timeout_s: float) -> list[Score]:
    """One call, its result checked; `timeout_s` is for rewards that can end what hangs.

    Raises:
        RewardError: it raised, or returned something else than finite scores and failures.
    """
    try:
        scores = score_within(reward, samples, captions, timeout_s)
    except RewardError:
        raise
    except Exception as error:  # the boundary to anybody's code
        raise RewardError(f"the reward raised {type(error).__name__}: {error}") from error
    return check_scores(scores, len(captions))


def _short(scores: Sequence[Score]) -> list[Score]:
    """Reasons in one line."""
    return [
        RewardFailure(" ".join(score.reason.split())[:_LONGEST_REASON]) if isinstance(score, RewardFailure) else score
        for score in scores
    ]


def check_pairs(samples: Sequence[Sample], captions: Sequence[str]) -> None:
    """Refuses, with a RewardError, batches whose samples and captions do not pair up."""
    if len(samples) != len(captions):
        raise RewardError(
            f"a reward got {len(samples)} samples for {len(captions)} captions; pass one sample a caption"
        )


def check_references(references: Sequence[str], reward: str) -> None:
    """Refuses, with a RewardError, missing references, and a bare string, whose characters would pass for some."""
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
