"""The hosted reward: what it answers is what the reward says, and what it cannot answer is an error, never a 0."""

from __future__ import annotations

import asyncio
import hashlib
import math
import pickle
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mmrl_ray.config.reward import CaptionPart, CiderPart, RewardSection
from mmrl_ray.data.samples import Sample
from mmrl_ray.errors import RewardError, UnknownImageError
from mmrl_ray.experience.carriers import RewardBreakdown, RewardFailure, TruncatedCaption
from mmrl_ray.metrics.text import CorpusStatistics
from mmrl_ray.rewards.build import build_reward
from mmrl_ray.serving.protocols import RewardItem
from mmrl_ray.serving.reward_service import CaptionBatch, HostedReward, reward_name, reward_version

REFERENCES = [["a red circle on the left", "a circle"], ["two blue squares", "blue squares above"], ["a green star"]]
STATISTICS = CorpusStatistics.from_references(REFERENCES)
CFG = RewardSection(
    parts={"caption": CaptionPart(), "cider": CiderPart(kind="cider_d")}, weights={"caption": 0.7, "cider": 0.3}
)


class Watched:
    """Scores a caption by its length, and remembers what it was shown."""

    def __init__(self, change: Callable[[list[RewardBreakdown]], Any] = lambda scores: scores) -> None:
        self.change = change
        self.seen: list[tuple[Sample, str]] = []

    def score_batch(self, samples: Sequence[Sample], captions: Sequence[str]) -> list[RewardBreakdown]:
        self.seen += zip(samples, captions, strict=True)
        return self.change([RewardBreakdown(float(len(c)), {"n": float(len(c))}, {"n": 1.0}) for c in captions])


def hosted(reward: Any, **settings: Any) -> HostedReward:
    settings = {"name": "watched", "version": "v", "timeout_s": 20.0, **settings}
    return HostedReward(reward, **settings)


def built(cfg: RewardSection = CFG) -> HostedReward:
    reward = build_reward(cfg, STATISTICS)
    return hosted(reward, name=reward_name(cfg), timeout_s=cfg.timeout_s, longest_s=cfg.longest_s)


def item(*captions: str, **fields: Any) -> RewardItem:
    return RewardItem(**{"images": (), "captions": captions, "references": ("a",), **fields})


def test_a_batch_of_items_gets_the_scores_of_the_reward_itself() -> None:
    captions = (("a red circle", "a green square"), ("blue squares",), ("star", "", "a green star"))
    items = tuple(item(*c, references=tuple(r)) for c, r in zip(captions, REFERENCES, strict=True))
    scored = asyncio.run(built().score(items))
    alone = build_reward(CFG, STATISTICS)
    for got, texts, references in zip(scored.scores, captions, REFERENCES, strict=True):
        sample = Sample("any", (), "", tuple(references))
        assert list(got) == [alone.score_batch([sample], [text])[0] for text in texts]
    assert scored.reward == "0.7*caption + 0.3*cider"
    assert scored.image_hashes == (None, None, None)


def test_captions_that_were_cut_off_are_so_behind_the_deployment() -> None:
    sample = Sample("s", (), "", ("a red circle on the left",))
    captions = ["a red circle", TruncatedCaption("a red circle")]
    batch = pickle.loads(pickle.dumps(CaptionBatch.of([sample] * 2, captions, images=False)))
    scores = asyncio.run(built().score_batch(batch))
    assert scores == build_reward(CFG, STATISTICS).score_batch([sample] * 2, captions)
    assert scores[0] != scores[1]


def test_one_call_for_the_whole_batch() -> None:
    calls = []
    reward = Watched(lambda scores: calls.append(len(scores)) or scores)  # type: ignore[func-returns-value]
    asyncio.run(hosted(reward).score((item("x", "yy"), item(), item("zzz"))))
    assert calls == [3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda scores: scores[:-1], "1 scores for 2"),
        (lambda scores: [*scores, scores[0]], "3 scores for 2"),
        (lambda scores: [scores[0], replace(scores[1], total=math.nan)], "nan"),
        (lambda scores: [scores[0], replace(scores[1], parts={"n": math.inf})], "inf"),
        (lambda scores: None, "NoneType"),
        (lambda scores: 1 / 0, "ZeroDivisionError"),
    ],
)
def test_whatever_is_wrong_is_an_error(change: Callable[[list[RewardBreakdown]], Any], message: str) -> None:
    service = hosted(Watched(change))
    with pytest.raises(RewardError, match=message):
        asyncio.run(service.score_batch(CaptionBatch.of([Sample("s", (), "")] * 2, ["x", "yy"], images=False)))
    assert service.healthy


def test_a_caption_that_cannot_be_scored_fails_by_itself() -> None:
    def change(scores: list[RewardBreakdown]) -> list[RewardBreakdown]:
        if any(score.total == 2.0 for score in scores):
            raise KeyError("yy")
        return scores

    scored = asyncio.run(hosted(Watched(change)).score((item("x", "yy"), item("zzz"), item("yy"))))
    failure = RewardFailure("the reward raised KeyError: 'yy'")
    assert [[getattr(each, "total", each) for each in scores] for scores in scored.scores] == [
        [1.0, failure],
        [3.0],
        [failure],
    ]


def test_a_call_past_its_deadline_is_an_error_and_marks_the_replica_until_one_returns() -> None:
    blocked = threading.Event()
    service = hosted(Watched(lambda scores: blocked.wait() and scores), timeout_s=0.05)
    with pytest.raises(RewardError, match=r"within 0\.05 s"):
        asyncio.run(service.score((item("x"),)))
    assert not service.healthy
    assert not asyncio.run(service.ready())
    blocked.set()
    asyncio.run(service.score((item("x"),)))
    assert service.healthy


def test_a_function_that_hangs_on_a_caption_costs_neither_the_others_nor_the_replica(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a regular expression, which no thread can be interrupted in."""
    (tmp_path / "hanging.py").write_text(
        "import re\ndef fn(captions, states):\n    return [float(bool(re.fullmatch('(a+)+', c))) for c in captions]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    part = {"kind": "function", "path": "hanging:fn", "state": "text"}
    cfg = RewardSection.model_validate({"parts": {"mine": part}, "weights": {"mine": 1.0}, "timeout_s": 1.0})
    service = built(cfg)
    before = set(threading.enumerate())
    found = asyncio.run(service.score((item("aa", "a" * 60 + "b", "b"), item("aaa")))).scores
    assert [[getattr(score, "total", None) for score in scores] for scores in found] == [[1.0, None, 0.0], [1.0]]
    assert service.healthy
    left = set(threading.enumerate()) - before
    for thread in left:
        thread.join(10)
    assert not any(thread.is_alive() for thread in left)


def test_a_picture_that_came_once_goes_by_its_hash() -> None:
    reward = Watched()
    service = hosted(reward)
    first = asyncio.run(service.score((item("x", images=(b"one",)), item("y", images=(b"two", b"three")))))
    one, both = first.image_hashes
    assert one == hashlib.sha256(b"one").hexdigest()
    again = asyncio.run(service.score((item("z", image_hash=one), item("w", image_hash=both))))
    assert again.image_hashes == (one, both)
    assert [sample.images for sample, _ in reward.seen[2:]] == [(b"one",), (b"two", b"three")]


def test_an_unknown_hash_is_refused_before_anything_is_scored() -> None:
    reward = Watched()
    with pytest.raises(UnknownImageError, match="f00d"):
        asyncio.run(hosted(reward).score((item("x"), item("y", image_hash="f00d"))))
    assert reward.seen == []


def test_the_memory_for_pictures_keeps_its_budget_and_the_most_recently_used() -> None:
    service = hosted(Watched(), image_bytes=10)

    def score(data: bytes | None = None, key: str | None = None) -> str:
        done = asyncio.run(service.score((item("x", images=(data,) if data else (), image_hash=key),)))
        assert done.image_hashes[0] is not None
        return done.image_hashes[0]

    a, b = score(b"aaaa"), score(b"bbbb")
    score(key=a)
    c = score(b"cccc")
    assert score(key=a) == a
    assert score(key=c) == c
    with pytest.raises(UnknownImageError):
        score(key=b)
    score(b"x" * 11)  # larger than the whole budget: scored all the same, and not kept
    with pytest.raises(UnknownImageError):
        score(key=hashlib.sha256(b"x" * 11).hexdigest())


def test_the_version_changes_with_the_reward_and_with_nothing_else() -> None:
    version = reward_version(CFG, STATISTICS)
    assert version == reward_version(CFG.model_copy(update={"timeout_s": 1.0, "host": "inline"}), STATISTICS)
    others = [
        reward_version(CFG.model_copy(update={"weights": {"caption": 0.6, "cider": 0.4}}), STATISTICS),
        reward_version(RewardSection(), STATISTICS),
        reward_version(CFG, CorpusStatistics.from_references(REFERENCES[:2])),
    ]
    assert len({version, *others}) == 4


def test_a_batch_for_training_names_each_sample_once_and_leaves_pictures_behind() -> None:
    first, second = (Sample(i, (b"png" * 99,), "p", ("r",), {"k": 1}) for i in "ab")
    batch = CaptionBatch.of([first, first, second, first], ["1", "2", "3", "4"], images=False)
    assert [s.id for s in batch.samples] == ["a", "b"]
    assert batch.sample_of == (0, 0, 1, 0)
    assert batch.samples[0] == replace(first, images=())
    assert b"png" not in pickle.dumps(batch)
    assert CaptionBatch.of([first], ["1"], images=True).samples == (first,)


def test_a_batch_for_training_is_scored_in_the_order_of_its_captions() -> None:
    reward = Watched()
    samples = [Sample(i, (), "", ("r",)) for i in "ab"]
    batch = CaptionBatch.of([samples[1], samples[0], samples[1]], ["1", "22", "333"], images=False)
    scores = asyncio.run(hosted(reward).score_batch(batch))
    assert [s.total for s in scores] == [1, 2, 3]
    assert [(s.id, c) for s, c in reward.seen] == [("b", "1"), ("a", "22"), ("b", "333")]


def test_no_captions_no_call() -> None:
    reward = Watched(lambda scores: 1 / 0)
    scored = asyncio.run(hosted(reward).score((item(),)))
    assert scored.scores == ((),)
