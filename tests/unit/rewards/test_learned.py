"""The learned reward as a part: its σ, its pickle, its config, and what it refuses."""

from __future__ import annotations

import json
import math
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mmrl_ray.config.reward import LearnedPart, RewardSection
from mmrl_ray.data.samples import Sample
from mmrl_ray.errors import ModelError, RewardError
from mmrl_ray.metrics.corpus import CorpusStatistics
from mmrl_ray.models.reward_folder import SPEC, save_reward_model
from mmrl_ray.models.vision_source import Pixels
from mmrl_ray.rewards.base import RewardFn
from mmrl_ray.rewards.build import build_reward
from mmrl_ray.rewards.learned import LearnedReward
from tests.unit.models.test_reward_model import CAPTIONS, PICTURES, model

SAMPLES = [Sample(f"s{i}", picture, "") for i, picture in enumerate(PICTURES)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("learned") / "reward"
    save_reward_model(model(), target, {})
    return target


def test_mean_and_sigma(folder: Path) -> None:
    reward = LearnedReward(folder)
    assert isinstance(reward, RewardFn)
    assert reward.has_sigma
    expected = model().score(Pixels(32, 1 << 20), PICTURES, CAPTIONS)
    for i, got in enumerate(reward.score_batch(SAMPLES, CAPTIONS)):
        assert got.total == got.parts["mean"] == pytest.approx(expected.mean[i].item(), rel=1e-6)
        assert got.sigma == pytest.approx(expected.sigma[i].item(), rel=1e-6)
        assert dict(got.weights) == {"mean": 1.0}
    assert reward.score_batch([], []) == []


def test_no_sigma_where_it_was_not_trained(tmp_path: Path) -> None:
    save_reward_model(model(sigma_trained=False), tmp_path / "plain", {})
    reward = LearnedReward(tmp_path / "plain")
    assert not reward.has_sigma
    assert reward.score_batch(SAMPLES[:1], CAPTIONS[:1])[0].sigma is None


def test_pickles_as_its_path(folder: Path) -> None:
    reward = LearnedReward(folder)
    before = reward.score_batch(SAMPLES, CAPTIONS)
    packed = pickle.dumps(reward)
    assert len(packed) < 1000
    again = pickle.loads(packed)
    assert again.has_sigma
    assert again.score_batch(SAMPLES, CAPTIONS) == before


def test_building_it_loads_no_torch(folder: Path) -> None:
    code = (
        "import sys, pickle; from mmrl_ray.rewards.learned import LearnedReward; "
        f"pickle.dumps(LearnedReward({str(folder)!r})); print([m for m in ('torch', 'ray') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"


def test_as_a_part_of_a_config(folder: Path) -> None:
    section = RewardSection.model_validate(
        {"parts": {"seen": {"kind": "learned", "model": str(folder)}}, "weights": {"seen": 2.0}}
    )
    assert isinstance(section.parts["seen"], LearnedPart)
    assert section.needs_images
    assert not section.needs_statistics
    reward = build_reward(section, CorpusStatistics.from_references([("a red circle",)]))
    alone = LearnedReward(folder).score_batch(SAMPLES, CAPTIONS)
    for got, one in zip(reward.score_batch(SAMPLES, CAPTIONS), alone, strict=True):
        assert got.total == pytest.approx(2 * one.total)
        assert got.parts["seen/mean"] == one.total
        assert one.sigma is not None
        assert got.sigma == pytest.approx(2 * one.sigma)


def test_refuses(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match=r"no reward model at .*; train one with `mmrl reward train`"):
        LearnedReward(tmp_path / "nothing")
    (tmp_path / SPEC).write_text(json.dumps({"format": 1}))
    with pytest.raises(ModelError, match="cannot be read: KeyError"):
        LearnedReward(tmp_path)
    reward = LearnedReward(folder)
    with pytest.raises(RewardError, match="needs the picture of sample 'bare'"):
        reward.score_batch([Sample("bare", (), "")], ["a"])
    with pytest.raises(RewardError, match=r"the learned reward .*: .*image"):
        reward.score_batch([Sample("broken", (b"no picture",), "")], ["a"])
    with pytest.raises(RewardError, match="2 samples for 1 captions"):
        reward.score_batch(SAMPLES[:2], CAPTIONS[:1])
    loaded, _ = reward._load()
    monkeypatch.setattr(loaded.means[0][1].bias, "data", torch.full_like(loaded.means[0][1].bias, math.nan))
    with pytest.raises(RewardError, match="gives nan"):
        reward.score_batch(SAMPLES[:1], CAPTIONS[:1])
