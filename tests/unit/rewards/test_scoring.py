"""Retries and masking: a failing reward never becomes 0 and never takes its neighbours along."""

import math
from collections.abc import Callable, Sequence

import pytest

from mmrl_ray.data.samples import Sample
from mmrl_ray.errors import RewardError
from mmrl_ray.rewards import base
from mmrl_ray.rewards.base import RewardBreakdown, RewardFailure, score_with_retry

SAMPLES = [Sample(i, (b"",), "", ("a",)) for i in ("x", "x", "y", "y", "z")]
CAPTIONS = ["1", "2", "3", "4", "5"]


@pytest.fixture(autouse=True)
def _no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "_FIRST_WAIT_S", 0.0)


class Scripted:
    """Scores a caption by its number; `misbehave` may raise, block or change the result of a call."""

    def __init__(self, misbehave: Callable[[int, list[str], list], object] = lambda n, c, r: r) -> None:
        self.misbehave = misbehave
        self.calls: list[list[str]] = []

    def score_batch(self, samples: Sequence[Sample], captions: Sequence[str]) -> list[RewardBreakdown]:
        self.calls.append(list(captions))
        scores = [RewardBreakdown(float(c), {"p": float(c)}, {"p": 1.0}) for c in captions]
        return self.misbehave(len(self.calls), list(captions), scores)  # type: ignore[return-value]


def totals(results: Sequence[object]) -> list[float | None]:
    return [r.total if isinstance(r, RewardBreakdown) else None for r in results]


def test_one_call_when_all_is_well() -> None:
    reward = Scripted()
    assert totals(score_with_retry(reward, SAMPLES, CAPTIONS, timeout_s=30, retries=2)) == [1, 2, 3, 4, 5]
    assert reward.calls == [CAPTIONS]
    assert score_with_retry(reward, [], [], timeout_s=30, retries=2) == []


def test_a_passing_fault_is_retried() -> None:
    def fail_twice(n: int, captions: list[str], scores: list) -> object:
        if n <= 2:
            raise ConnectionError("service is away")
        return scores

    reward = Scripted(fail_twice)
    assert totals(score_with_retry(reward, SAMPLES, CAPTIONS, timeout_s=30, retries=2)) == [1, 2, 3, 4, 5]
    assert len(reward.calls) == 3


def _raise(captions: list[str], scores: list) -> object:
    raise ZeroDivisionError("by\nzero")


def _nan(captions: list[str], scores: list) -> object:
    return [RewardBreakdown(math.nan, {}, {}) if c == "4" else s for c, s in zip(captions, scores, strict=True)]


def _infinite_part(captions: list[str], scores: list) -> object:
    return [RewardBreakdown(1.0, {"p": math.inf}, {}) if c == "4" else s for c, s in zip(captions, scores, strict=True)]


def _number(captions: list[str], scores: list) -> object:
    return [0.5 if c == "4" else s for c, s in zip(captions, scores, strict=True)]


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (_raise, "raised ZeroDivisionError: by zero"),
        (_nan, "total=nan"),
        (_infinite_part, "p=inf"),
        (_number, "is float instead of RewardBreakdown"),
        (lambda c, s: s[:-1], "returned 0 scores for 1"),
        (lambda c, s: None, "NoneType instead of a list"),
    ],
)
def test_one_bad_caption_masks_only_itself(fault: Callable[[list[str], list], object], reason: str) -> None:
    reward = Scripted(lambda n, captions, scores: fault(captions, scores) if "4" in captions else scores)
    results = score_with_retry(reward, SAMPLES, CAPTIONS, timeout_s=30, retries=1)
    assert totals(results) == [1, 2, 3, None, 5]
    failure = results[3]
    assert isinstance(failure, RewardFailure)
    assert reason in failure.reason
    assert "\n" not in failure.reason
    assert reward.calls == [CAPTIONS, CAPTIONS, ["1", "2"], ["3", "4", "5"], ["3"], ["4", "5"], ["4"], ["5"]]


def test_what_a_reward_says_of_a_caption_is_not_asked_again() -> None:
    """A part that has no number for a caption has answered."""
    reward = Scripted(lambda n, captions, scores: [*scores[:3], RewardFailure("none for\nit"), scores[4]])
    results = score_with_retry(reward, SAMPLES, CAPTIONS, timeout_s=30, retries=2)
    assert totals(results) == [1, 2, 3, None, 5]
    assert results[3] == RewardFailure("none for it")
    assert reward.calls == [CAPTIONS]


def test_a_single_failing_caption_is_not_tried_once_more() -> None:
    reward = Scripted(lambda n, c, s: None)
    assert totals(score_with_retry(reward, SAMPLES[:1], CAPTIONS[:1], timeout_s=30, retries=1)) == [None]
    assert len(reward.calls) == 2


def test_no_try_begins_after_the_deadline() -> None:
    reward = Scripted(lambda n, c, s: None)
    assert totals(score_with_retry(reward, SAMPLES, CAPTIONS, timeout_s=0.0, retries=9)) == [None] * 5
    assert len(reward.calls) == 1


def test_unpaired_batch_is_the_callers_error() -> None:
    with pytest.raises(RewardError, match="5 samples for 4 captions"):
        score_with_retry(Scripted(), SAMPLES, CAPTIONS[:4], timeout_s=1, retries=0)
