"""Deadline, retries and masking: a failing reward never becomes 0 and never takes its neighbours along."""

import math
import threading
from collections.abc import Callable, Iterator, Sequence

import pytest

from mmrl_ray.data.samples import Sample
from mmrl_ray.errors import RewardError
from mmrl_ray.rewards import scoring
from mmrl_ray.rewards.base import RewardBreakdown
from mmrl_ray.rewards.scoring import RewardFailure, score_with_retry

SAMPLES = [Sample(i, (b"",), "", ("a",)) for i in ("x", "x", "y", "y", "z")]
CAPTIONS = ["1", "2", "3", "4", "5"]


@pytest.fixture(autouse=True)
def _no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "_FIRST_WAIT_S", 0.0)


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
        (lambda c, s: s[:-1], "returned 1 scores for 2"),
        (lambda c, s: None, "NoneType instead of a list"),
    ],
)
def test_one_bad_sample_masks_only_itself(fault: Callable[[list[str], list], object], reason: str) -> None:
    reward = Scripted(lambda n, captions, scores: fault(captions, scores) if "4" in captions else scores)
    results = score_with_retry(reward, SAMPLES, CAPTIONS, timeout_s=30, retries=1)
    assert totals(results) == [1, 2, None, None, 5]
    failure = results[2]
    assert isinstance(failure, RewardFailure)
    assert results[3] == failure
    assert reason in failure.reason
    assert "\n" not in failure.reason
    assert reward.calls == [CAPTIONS, CAPTIONS, ["1", "2"], ["3", "4"], ["5"]]


def test_captions_of_one_sample_need_not_be_neighbours() -> None:
    def fault(n: int, captions: list[str], scores: list) -> object:
        if "1" in captions:
            raise RewardError("no references")
        return scores

    samples = [SAMPLES[0], SAMPLES[2], SAMPLES[0]]
    results = score_with_retry(Scripted(fault), samples, ["1", "2", "3"], timeout_s=30, retries=0)
    assert results == [RewardFailure("no references"), RewardBreakdown(2.0, {"p": 2.0}, {"p": 1.0}), results[0]]


def test_a_single_failing_sample_is_not_tried_once_more() -> None:
    reward = Scripted(lambda n, c, s: None)
    results = score_with_retry(reward, SAMPLES[:2], CAPTIONS[:2], timeout_s=30, retries=1)
    assert totals(results) == [None, None]
    assert len(reward.calls) == 2


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    event = threading.Event()
    yield event
    event.set()  # lets the threads that were left behind end


def test_a_hanging_reward_is_left_behind(gate: threading.Event) -> None:
    def hang(n: int, captions: list[str], scores: list) -> object:
        if "4" in captions:
            gate.wait(60)
        return scores

    results = score_with_retry(Scripted(hang), SAMPLES, CAPTIONS, timeout_s=1.5, retries=0)
    assert totals(results) == [1, 2, None, None, 5]
    failure = results[3]
    assert isinstance(failure, RewardFailure)
    assert "did not score 2 captions within 0.5 s" in failure.reason
    assert all(t.daemon for t in threading.enumerate() if t.name == "reward")


def test_unpaired_batch_is_the_callers_error() -> None:
    with pytest.raises(RewardError, match="5 samples for 4 captions"):
        score_with_retry(Scripted(), SAMPLES, CAPTIONS[:4], timeout_s=1, retries=0)
