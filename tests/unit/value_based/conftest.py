"""A small world: two pictures as made-up features, a reward of words, an environment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from mmrl_ray.algorithms.dqn.environment import CaptionEnv
from mmrl_ray.algorithms.dqn.network import Vocabulary
from mmrl_ray.data.samples import Sample
from mmrl_ray.metrics.text import CorpusStatistics
from mmrl_ray.rewards.captioning import CaptionReward
from mmrl_ray.rewards.multimodal import MultimodalReward

REFERENCES = ("a red circle", "a blue star")
WORDS = ("a", "red", "blue", "circle", "star")


@dataclass(frozen=True)
class World:
    images: np.ndarray
    samples: list[Sample]
    reward: MultimodalReward

    def environment(self, vocabulary: Vocabulary | None = None, **more: Any) -> CaptionEnv:
        return CaptionEnv(self.images, self.samples, self.reward, vocabulary or Vocabulary(WORDS, 4), **more)


@pytest.fixture
def world() -> World:
    images = np.random.default_rng(0).uniform(-1, 1, (2, 3, 4)).astype(np.float32)
    samples = [Sample(str(i), (b"",), "", (text,)) for i, text in enumerate(REFERENCES)]
    idf = CorpusStatistics.from_references([(text,) for text in REFERENCES]).idf
    words = CaptionReward(alpha=0.3, beta=0.7, gamma=0.2, idf=idf, max_words=8)
    return World(images, samples, MultimodalReward({"caption": words}, {"caption": 1.0}))
