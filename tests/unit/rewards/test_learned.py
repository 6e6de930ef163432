"""The learned reward as a part: its σ, its pickle, its config, and what it refuses."""

from __future__ import annotations

import json
import math
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from mmrl_ray.config import Config
from mmrl_ray.config.reward import LearnedPart, RewardSection
from mmrl_ray.config.sections import ModelSection
from mmrl_ray.data.samples import Sample
from mmrl_ray.errors import ConfigError, ModelError, RewardError
from mmrl_ray.metrics.text import CorpusStatistics
from mmrl_ray.policy.model import Policy
from mmrl_ray.reward_model import vision_source
from mmrl_ray.reward_model.model import SPEC, save_reward_model
from mmrl_ray.reward_model.vision_source import Pixels
from mmrl_ray.rewards.base import RewardFn
from mmrl_ray.rewards.build import NOTHING, build_reward, check_reward
from mmrl_ray.rewards.learned import LearnedReward
from mmrl_ray.rewards.multimodal import MultimodalReward
from mmrl_ray.rollouts.factory import PolicyEngineFactory
from tests.support.tiny_models import build_family
from tests.unit.reward_model.test_model import CAPTIONS, PICTURES, model

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


def test_it_scores_where_it_is_told_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also the tower that it looks through, and also when it was sent to another process."""
    section_of_reward = seeing(build_family("qwen2_5_vl", tmp_path / "policy"), tmp_path / "reward")
    asked: list[Any] = []
    load = vision_source.load_policy

    def watched(cfg: ModelSection, *, device: Any = None) -> Policy:
        asked.append(device)
        return load(cfg, device="cpu")

    monkeypatch.setattr(vision_source, "load_policy", watched)
    for device in ("cpu", None):
        reward = pickle.loads(pickle.dumps(build_reward(section_of_reward, NOTHING, device=device)))
        reward.score_batch(SAMPLES[:1], CAPTIONS[:1])
    assert asked == ["cpu", None]


def seeing(folder: Path, target: Path) -> RewardSection:
    """A reward trained on the features of a policy, scored where completions are sampled."""
    section = ModelSection(path=str(folder), dtype="float32")
    source = vision_source.PolicyVision.load(section, 1 << 20)
    scorer = model(vision=section, vision_key=source.policy.revision_key, feature_dim=source.feature_dim)
    save_reward_model(scorer, target, {})
    parts = {"seen": {"kind": "learned", "model": str(target)}}
    return RewardSection.model_validate({"parts": parts, "weights": {"seen": 1.0}, "host": "inline"})


@pytest.mark.parametrize("other", [False, True])
def test_beside_a_policy_it_looks_through_that_one_s_tower_where_it_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: bool
) -> None:
    """In a rollout worker: all weights that it sees by are the worker's own, and scores are what they were."""
    monkeypatch.setattr(vision_source, "_shared", [])
    folder = build_family("qwen2_5_vl", tmp_path / "policy")
    section = seeing(folder, tmp_path / "reward")
    reward = build_reward(section, NOTHING)
    expected = [score.total for score in reward.score_batch(SAMPLES, CAPTIONS)]
    mine = build_family("qwen2_5_vl", tmp_path / "mine", seed=1) if other else folder
    sections = {"run": {"name": "r"}, "data": {"train": "unused"}, "learner": {"steps": 1}}
    sections["model"] = {"path": str(mine), "dtype": "float32"}
    cfg = Config.model_validate({**sections, "reward": section.model_dump()})
    engine = PolicyEngineFactory(cfg, pickle.loads(pickle.dumps(reward)))("worker")
    loaded: list[str] = []
    load = vision_source.load_policy

    def watched(cfg: ModelSection, **options: Any) -> Policy:
        loaded.append(cfg.path)
        return load(cfg, **options)

    monkeypatch.setattr(vision_source, "load_policy", watched)
    part = cast(MultimodalReward, engine._reward)._parts["seen"]
    assert [score.total for score in engine._reward.score_batch(SAMPLES, CAPTIONS)] == pytest.approx(expected)
    assert loaded == ([str(folder)] if other else [])
    policy = engine._scorer.policy
    assert isinstance(part, LearnedReward)
    seen_by = part._load()[1].policy.model  # type: ignore[attr-defined]
    places = {p.data_ptr() for p in policy.model.parameters()}
    own = sum(p.nbytes for p in seen_by.parameters() if p.data_ptr() not in places)
    assert (own > 0) == other
    assert len(policy.decoder.layers) > 0, "the policy keeps its language model"  # type: ignore[arg-type]


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


def test_risk_is_refused_where_sigma_was_never_trained(folder: Path, tmp_path: Path) -> None:
    spec = json.loads((folder / SPEC).read_text())
    (tmp_path / SPEC).write_text(json.dumps({**spec, "sigma_trained": False}))

    def section(path: Path, **weights: float) -> RewardSection:
        parts = {"seen": {"kind": "learned", "model": str(path)}, "size": {"kind": "length"}}
        return RewardSection.model_validate({"parts": parts, "weights": weights, "risk": 0.5})

    check_reward(section(folder, seen=1.0, size=1.0))
    for make in (check_reward, lambda cfg: build_reward(cfg, NOTHING)):
        with pytest.raises(ConfigError, match=r"reward\.risk=0\.5 needs a trained sigma.* 'seen' was never trained"):
            make(section(tmp_path, seen=1.0, size=1.0))
        with pytest.raises(ConfigError, match=r"reward\.parts\.seen: no reward model at"):
            make(section(tmp_path / "nothing", seen=1.0, size=1.0))
    with pytest.raises(ValueError, match=r"risk=0\.5 needs a part with a trained sigma and a weight above 0"):
        section(folder, seen=0.0, size=1.0)


def test_risk_takes_its_sigma_off(folder: Path) -> None:
    parts = {"seen": {"kind": "learned", "model": str(folder)}}
    section = RewardSection.model_validate({"parts": parts, "weights": {"seen": 2.0}, "risk": 0.5})
    alone = LearnedReward(folder).score_batch(SAMPLES, CAPTIONS)
    for got, one in zip(build_reward(section, NOTHING).score_batch(SAMPLES, CAPTIONS), alone, strict=True):
        assert one.sigma is not None
        assert got.parts["seen/sigma"] == one.sigma
        assert got.total == pytest.approx(2 * one.total)
        assert got.adjusted == pytest.approx(2 * one.total - 0.5 * 2 * one.sigma)


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
    bias = loaded.members[0].means[0][1].bias
    monkeypatch.setattr(bias, "data", torch.full_like(bias, math.nan))
    with pytest.raises(RewardError, match="gives nan"):
        reward.score_batch(SAMPLES[:1], CAPTIONS[:1])
