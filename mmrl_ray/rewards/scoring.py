"""Scoring with a deadline and retries; what cannot be scored is masked with its reason, never turned into 0.

    whole batch ──fails──▶ retries ──fail──▶ one sample at a time ──fails──▶ `RewardFailure` for that sample only

A reward is anybody's code: it may raise anything, hang, or return NaN or too few scores. All of these end up as
`RewardError` here, the one place where a broad `except` is right.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass

from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential

from mmrl_ray.data.samples import Sample
from mmrl_ray.errors import RewardError
from mmrl_ray.rewards.base import RewardBreakdown, RewardFn
from mmrl_ray.rewards.checks import check_breakdowns, check_pairs

_FIRST_WAIT_S = 0.1
_LONGEST_WAIT_S = 2.0
_LONGEST_REASON = 300
"""Characters."""


@dataclass(frozen=True, slots=True)
class RewardFailure:
    """Why a caption has no reward; its sample is masked and counted."""

    reason: str
    """One line."""


def score_with_retry(
    reward: RewardFn,
    samples: Sequence[Sample],
    captions: Sequence[str],
    *,
    timeout_s: float,
    retries: int,
) -> list[RewardBreakdown | RewardFailure]:
    """Score a batch; one entry a caption, in order. Captions of one sample (by id) succeed or fail together.

    The whole batch is tried `1 + retries` times with `timeout_s` each (plus waits of 0.1 to 2 s between them), then
    each sample's captions once, with an equal share of another `timeout_s`: so the call returns within about
    `(retries + 2) * timeout_s`.

    An attempt runs on a daemon thread. Python cannot kill a thread: one that ran past its deadline goes on until the
    reward returns by itself, its result is ignored, and a retry may call the reward beside it. A reward that can
    hang belongs behind a service.

    Raises:
        RewardError: the batch itself is malformed (samples and captions do not pair up).
    """
    check_pairs(samples, captions)
    if not captions:
        return []
    try:
        return list(_score_retrying(reward, samples, captions, timeout_s, retries))
    except RewardError as error:
        by_sample: dict[str, list[int]] = {}
        for index, sample in enumerate(samples):
            by_sample.setdefault(sample.id, []).append(index)
        if len(by_sample) == 1:
            return [RewardFailure(_reason(error))] * len(captions)
    results: dict[int, RewardBreakdown | RewardFailure] = {}
    for indices in by_sample.values():
        scores = _score_sample(
            reward, [samples[i] for i in indices], [captions[i] for i in indices], timeout_s / len(by_sample)
        )
        results.update(zip(indices, scores, strict=True))
    return [results[i] for i in range(len(captions))]


def _score_sample(
    reward: RewardFn, samples: Sequence[Sample], captions: Sequence[str], timeout_s: float
) -> Sequence[RewardBreakdown | RewardFailure]:
    try:
        return score_once(reward, samples, captions, timeout_s)
    except RewardError as error:
        return [RewardFailure(_reason(error))] * len(captions)


def _score_retrying(
    reward: RewardFn, samples: Sequence[Sample], captions: Sequence[str], timeout_s: float, retries: int
) -> list[RewardBreakdown]:
    attempts = Retrying(
        stop=stop_after_attempt(1 + retries),
        wait=wait_exponential(multiplier=_FIRST_WAIT_S, max=_LONGEST_WAIT_S),
        retry=retry_if_exception_type(RewardError),
        reraise=True,
    )
    return attempts(score_once, reward, samples, captions, timeout_s)


def score_once(
    reward: RewardFn, samples: Sequence[Sample], captions: Sequence[str], timeout_s: float
) -> list[RewardBreakdown]:
    """One call under a deadline, its result checked; what the call may leave behind: see `score_with_retry`.

    Raises:
        RewardError: it raised, ran past the deadline, or returned something else than finite scores.
    """
    scores: list[object] = []
    errors: list[Exception] = []

    def call() -> None:
        try:
            scores.append(reward.score_batch(samples, captions))
        except Exception as error:  # noqa: BLE001 - the boundary to anybody's code; becomes a RewardError below
            errors.append(error)

    # Not a ThreadPoolExecutor: the interpreter joins its threads at exit, so that a hanging reward would never end.
    thread = threading.Thread(target=call, name="reward", daemon=True)
    thread.start()
    thread.join(timeout_s)
    if thread.is_alive():
        raise RewardError(
            f"the reward did not score {len(captions)} captions within {timeout_s:g} s; raise reward.timeout_s"
        )
    if errors:
        raise (
            errors[0]
            if isinstance(errors[0], RewardError)
            else RewardError(f"the reward raised {type(errors[0]).__name__}: {errors[0]}")
        ) from errors[0]
    if not scores:
        raise RewardError("the reward ended its thread without returning scores")
    return check_breakdowns(scores[0], len(captions))


def _reason(error: RewardError) -> str:
    return " ".join(str(error).split())[:_LONGEST_REASON]
