"""The reward behind its deployment: a `RewardFn` with checks, a deadline, a memory for pictures, a version. No Ray."""

from __future__ import annotations

import asyncio
import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from typing import Self

from mmrl_ray.config.reward import RewardSection
from mmrl_ray.data.images import image_hash
from mmrl_ray.data.samples import Sample
from mmrl_ray.errors import RewardError, UnknownImageError
from mmrl_ray.experience.carriers import Score
from mmrl_ray.metrics.text import CorpusStatistics
from mmrl_ray.rewards.base import RewardFn, score_once, score_with_retry
from mmrl_ray.serving.protocols import RewardItem, Scored

IMAGE_BYTES = 256 * 2**20
"""Pictures that one replica remembers, by default."""
_VERSION_DIGITS = 12


@dataclass(frozen=True, slots=True)
class CaptionBatch:
    """What `RewardFn.score_batch` is called with, each sample once however many captions it has."""

    samples: tuple[Sample, ...]
    sample_of: tuple[int, ...]
    """For each caption, the place of its sample."""
    captions: tuple[str, ...]

    @classmethod
    def of(cls, samples: Sequence[Sample], captions: Sequence[str], *, images: bool) -> Self:
        """Packs paired samples and captions; without `images` the pictures, nearly all of the bytes, stay behind."""
        places: dict[int, int] = {}
        distinct: list[Sample] = []
        for sample in samples:
            if id(sample) not in places:
                places[id(sample)] = len(distinct)
                distinct.append(sample if images else replace(sample, images=()))
        return cls(tuple(distinct), tuple(places[id(sample)] for sample in samples), tuple(captions))


class HostedReward:
    """`RewardService` over any `RewardFn`.

    Calls run beside each other on threads, each with the same deadline; a user's function has its own process and
    deadline within it, so that only parts of our own can leave a thread behind. A picture that came once may be named
    by its hash afterwards, as long as the byte budget has room for it; the memory is this replica's own, so a client
    that is told of an unknown picture sends the picture again.
    """

    def __init__(
        self,
        reward: RewardFn,
        *,
        name: str,
        version: str,
        timeout_s: float,
        longest_s: float | None = None,
        image_bytes: int = IMAGE_BYTES,
    ) -> None:
        """`timeout_s` is for a batch of a part; a call is given up after `longest_s`, by default the same."""
        self._reward = reward
        self._name = name
        self._version = version
        self._timeout_s = timeout_s
        self._longest_s = timeout_s if longest_s is None else longest_s
        self._image_budget = image_bytes
        self._image_bytes = 0
        self._images: OrderedDict[str, tuple[bytes, ...]] = OrderedDict()
        self._stuck = False
        self._answered = 0

    @property
    def healthy(self) -> bool:
        """False from a call that ran past its deadline, as all beside it did, until one that did not.

        Whoever hosts this replaces it then.
        """
        return not self._stuck

    async def score(self, items: tuple[RewardItem, ...]) -> Scored:
        """One score a caption, in order; raises as `RewardService` says."""
        hashes: list[str | None] = []
        samples: list[Sample] = []
        captions: list[str] = []
        for number, item in enumerate(items):
            key, images = self._pictures(item)
            hashes.append(key)
            sample = Sample(f"input {number}", images, item.prompt, item.references)
            samples += [sample] * len(item.captions)
            captions += item.captions
        found = await self._score(partial(score_with_retry, retries=0), samples, captions)
        scores = iter(found)
        by_item = tuple(tuple(next(scores) for _ in item.captions) for item in items)
        return Scored(by_item, reward=self._name, version=self._version, image_hashes=tuple(hashes))

    async def score_batch(self, batch: CaptionBatch) -> list[Score]:
        """`RewardFn.score_batch` of what was packed, for training, which itself tries again what raises.

        Raises:
            RewardError: the batch cannot be scored; see `RewardFn`.
        """
        return await self._score(score_once, [batch.samples[place] for place in batch.sample_of], batch.captions)

    async def describe(self) -> Mapping[str, str]:
        """The reward's name and version."""
        return {"reward": self._name, "version": self._version}

    async def ready(self) -> bool:
        """Whether the reward answers."""
        return self.healthy

    async def _score(
        self, score: Callable[..., list[Score]], samples: Sequence[Sample], captions: Sequence[str]
    ) -> list[Score]:
        if not captions:
            return []
        done: Future[list[Score]] = Future()
        done.set_running_or_notify_cancel()
        answered = self._answered

        def work() -> None:
            try:
                done.set_result(score(self._reward, samples, captions, timeout_s=self._timeout_s))
            except Exception as error:  # noqa: BLE001 - the boundary of the thread; raised where it is waited for
                done.set_exception(error)

        # Not an executor's: the interpreter joins those at exit, so that a replica that hangs would never end.
        threading.Thread(target=work, name="reward", daemon=True).start()
        try:
            scores = await asyncio.wait_for(asyncio.wrap_future(done), self._longest_s)
        except TimeoutError:
            self._stuck = self._answered == answered
            late = f"the reward did not score {len(captions)} captions within {self._longest_s:g} s"
            raise RewardError(f"{late}; raise reward.timeout_s") from None
        self._answered += 1
        self._stuck = False
        return scores

    def _pictures(self, item: RewardItem) -> tuple[str | None, tuple[bytes, ...]]:
        """An item's pictures and the hash they go by."""
        if item.images:
            key = image_hash(item.images)
            self._remember(key, item.images)
            return key, item.images
        if item.image_hash is None:
            return None, ()
        images = self._images.get(item.image_hash)
        if images is None:
            raise UnknownImageError(
                f"no picture with hash {item.image_hash[:64]!r} is remembered here (any more): send the picture itself"
            )
        self._images.move_to_end(item.image_hash)
        return item.image_hash, images

    def _remember(self, key: str, images: tuple[bytes, ...]) -> None:
        if key not in self._images:
            self._images[key] = images
            self._image_bytes += sum(map(len, images))
        self._images.move_to_end(key)
        while self._image_bytes > self._image_budget:
            _, gone = self._images.popitem(last=False)
            self._image_bytes -= sum(map(len, gone))


def reward_name(cfg: RewardSection) -> str:
    """Its parts with their weights, for people: `0.7*caption + 0.3*cider`."""
    return " + ".join(f"{weight:g}*{name}" for name, weight in sorted(cfg.weights.items()))


def reward_version(cfg: RewardSection, statistics: CorpusStatistics) -> str:
    """Changes with whatever can change a score: parts, weights, risk, statistics of the references."""
    what = cfg.model_dump(mode="json", include={"parts", "weights", "risk"})
    text = json.dumps(what, sort_keys=True) + statistics.to_json()
    return hashlib.sha256(text.encode()).hexdigest()[:_VERSION_DIGITS]
