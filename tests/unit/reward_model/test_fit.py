"""Training a reward: the shipped config on generated preferences, and the likelihoods by themselves."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from mmrl_ray.config.load import load_as
from mmrl_ray.config.reward_model import RewardDataSection, RewardModelConfig
from mmrl_ray.config.sections import ScenesSection
from mmrl_ray.data.scenes.generator import generate_scenes
from mmrl_ray.errors import DataError, ModelError, NonFiniteError
from mmrl_ray.preferences.files import read_preferences, write_preferences
from mmrl_ray.preferences.scene_preferences import label_noise, write_scene_preferences
from mmrl_ray.reward_model.data import Judgement, RewardData
from mmrl_ray.reward_model.fit import train_reward_model
from mmrl_ray.reward_model.model import RewardModel, load_reward_model
from mmrl_ray.reward_model.run import evaluate_reward, evaluate_reward_model, train_reward
from mmrl_ray.reward_model.vision_source import Pixels
from mmrl_ray.rewards.learned import LearnedReward
from tests.unit.cli.program import mmrl
from tests.unit.reward_model.test_model import PICTURES, spec

CONFIG = Path(__file__).parents[3] / "configs" / "reward-model.yaml"
SCENES = ScenesSection(train=2000, eval=100)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with generated preferences under the paths of the shipped config."""
    folder = tmp_path_factory.mktemp("reward")
    write_scene_preferences(SCENES, folder / "data")
    return folder


def config(place: Path, out: str, *overrides: str) -> RewardModelConfig:
    data = [f"data.train={place}/data/train.parquet", f"data.eval={place}/data/eval.parquet"]
    return load_as(RewardModelConfig, CONFIG, [f"out={place / out}", *data, *overrides])


@pytest.fixture(scope="module")
def trained(place: Path) -> tuple[Path, dict[str, Any]]:
    """The shipped config with fewer steps: half a minute of one core."""
    return place / "whole", train_reward(config(place, "whole", "training.steps=750"))


def test_it_learns_the_order_and_the_noise(place: Path, trained: tuple[Path, dict[str, Any]]) -> None:
    """Held-out pictures, each with a combination that training never showed: 19 of 20 clean pairs are right although
    the labels were noisy, and σ is larger where the rater's noise is. `benchmarks/reward_model.py` has the whole."""
    folder, report = trained
    clean = evaluate_reward(folder, RewardDataSection(train=f"{place}/data/clean.parquet"))["held_out"]["pairs"]
    assert clean["accuracy"] >= 0.95, clean
    assert set(clean["parts"]) == {f"scenes:{fault}" for fault in ("colour", "shape", "size", "relation", "missing")}
    _, held_out = generate_scenes(SCENES)
    noise = {sample.id: label_noise(sample.metadata) for sample in held_out}
    samples = {sample.id: sample for sample in held_out}
    names, captions = [], []
    for each in read_preferences(place / "data" / "eval.parquet"):
        pair = each.pair
        names += [pair.source.split("/")[1]] * 2
        captions += [pair.caption_a, pair.caption_b]
    scores = LearnedReward(folder).score_batch([samples[name] for name in names], captions)
    assert spearmanr([score.sigma for score in scores], [noise[name] for name in names]).statistic >= 0.5
    ratings = report["held_out"]["ratings"]
    low, high = ratings["rmse_interval"]
    assert low < ratings["rmse"] < high
    half = 1.96 * ratings["rmse"] / math.sqrt(2 * ratings["count"])  # of normal errors
    assert high - low == pytest.approx(2 * half, rel=0.35)
    coverage = ratings["coverage"]
    assert all(abs(coverage[share] - float(share)) < 0.15 for share in ("0.5", "0.8", "0.95")), coverage
    assert json.loads((folder / "report.json").read_text()) == json.loads(json.dumps(report))


def small(place: Path, out: str, *overrides: str) -> RewardModelConfig:
    few = ["training.steps=3", "training.warmup_steps=0", "net.width=16", "net.image_size=32"]
    return config(place, out, *few, *overrides)


def test_the_same_seed_gives_the_same_weights(place: Path) -> None:
    for out in ("one", "two"):
        train_reward(small(place, out, "net.heads=2", "net.fusion=attention"))
    train_reward(small(place, "other", "net.heads=2", "net.fusion=attention", "seed=1"))
    one, two, other = (load_reward_model(place / name) for name in ("one", "two", "other"))
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))
    assert not torch.equal(one.members[0].text.words.weight, other.members[0].text.words.weight)
    assert not torch.equal(one.members[0].means[0][1].weight, one.members[0].means[1][1].weight)
    with pytest.raises(ModelError, match="exists already"):
        train_reward(small(place, "one"))


def test_held_out_pictures_are_no_training_pictures(place: Path) -> None:
    whole = {"data.eval": "null", "data.held_out": "0.2"}
    report = train_reward(small(place, "share", *(f"{key}={value}" for key, value in whole.items())))
    assert report["held_out"]["pictures"] + report["training"]["pictures"] == SCENES.train
    assert 0.17 < report["held_out"]["pictures"] / SCENES.train < 0.23
    with pytest.raises(DataError, match=r"100 pictures of .*clean.parquet are in .*eval.parquet, too"):
        train_reward(
            small(place, "x", f"data.train={place}/data/eval.parquet", f"data.eval={place}/data/clean.parquet")
        )


def judge(model: RewardModel, data: RewardData, **training: Any) -> dict[str, Any]:
    settings = {"steps": 150, "lr": 5e-3, "warmup_steps": 0, **training}
    cfg = load_as(RewardModelConfig, CONFIG, [f"training={json.dumps(settings)}"]).training
    source = Pixels(32, 1 << 20)
    losses = train_reward_model(model, source, data, cfg, seed=0)
    assert losses[-1] < losses[0]
    return evaluate_reward_model(model, source, data)


def preferences(share: dict[tuple[str, str], float], count: int = 100) -> RewardData:
    """For each two captions of one picture, `share` of `count` raters prefer the first."""
    return RewardData.of_judgements(
        Judgement(PICTURES[0], a, b, 1.0 if i < round(wins * count) else 0.0)
        for (a, b), wins in share.items()
        for i in range(count)
    )


def test_pairs_alone_teach_how_sure_raters_are() -> None:
    """Without ratings the prior anchors the scale, and the chance of a win is the share of raters."""
    data = preferences({("red", "blue"): 0.9, ("circle", "square"): 0.6})
    torch.manual_seed(0)
    model = RewardModel(spec(heads=1, center=0.0, spread=1.0))
    figures = judge(model, data)["pairs"]
    entropy = -np.mean([p * np.log(p) + (1 - p) * np.log(1 - p) for p in (0.9, 0.6)])
    assert figures["nll"] == pytest.approx(entropy, rel=0.02)
    assert figures["accuracy"] == pytest.approx(0.75)
    assert figures["expected"] == pytest.approx(0.75, abs=0.03)


def test_ties_say_that_neither_is_better() -> None:
    ties = [Judgement(PICTURES[0], "red", "blue", 0.5), Judgement(PICTURES[0], "circle", "square", 1.0)]
    torch.manual_seed(0)
    model = RewardModel(spec(heads=1, center=0.0, spread=1.0))
    judge(model, RewardData.of_judgements(ties))
    mean = model.score(Pixels(32, 1 << 20), [PICTURES[0]] * 4, ["red", "blue", "circle", "square"]).mean
    assert abs(mean[0] - mean[1]) < 0.1 * (mean[2] - mean[3])


def test_ratings_alone_teach_mean_and_spread() -> None:
    rng = np.random.default_rng(0)
    truth = {"red": (0.2, 0.02), "blue": (0.8, 0.1)}
    rows = [
        Judgement(PICTURES[0], "red", "blue", None, *(float(rng.normal(*truth[word])) for word in ("red", "blue")))
        for _ in range(200)
    ]
    data = RewardData.of_judgements(rows)
    center, spread = data.center_and_spread()
    torch.manual_seed(0)
    model = RewardModel(spec(heads=1, center=center, spread=spread))
    figures = judge(model, data, steps=300)["ratings"]
    got = model.score(Pixels(32, 1 << 20), [PICTURES[0]] * 2, list(truth))
    assert got.mean.tolist() == pytest.approx([0.2, 0.8], abs=0.03)
    assert got.sigma.tolist() == pytest.approx([0.02, 0.1], rel=0.25)
    assert figures["coverage"]["0.8"] == pytest.approx(0.8, abs=0.06)


def test_heads_come_to_differ_where_nothing_was_said() -> None:
    data = preferences({("red", "blue"): 0.9})
    torch.manual_seed(0)
    model = RewardModel(spec(heads=4, center=0.0, spread=1.0))
    judge(model, data)
    source = Pixels(32, 1 << 20)
    words = model.vocabulary.encode(["red", "circle above square"], 8)
    outputs = model(source.inputs([PICTURES[0]], model.device), torch.tensor([0, 0]), words)
    assert (outputs.mean.var(dim=1, unbiased=False) > 0).all()


def test_members_know_what_training_never_showed() -> None:
    """How far their means are apart on words that no caption of training had, over that on those that it had: above 20
    for members (44 to 61 when measured), 3 to 6 for heads that share encoders. Priors keep members further apart."""
    rng = np.random.default_rng(0)
    truth = {"red": 0.2, "blue": 0.8, "a red circle": 0.3, "a blue circle": 0.7}
    data = RewardData.of_judgements(
        Judgement(PICTURES[i % 3], *pair, None, *(float(rng.normal(truth[text], 0.02)) for text in pair))
        for i in range(100)
        for pair in (("red", "blue"), ("a red circle", "a blue circle"))
    )
    center, spread = data.center_and_spread()
    apart = {}
    for name, ensemble, prior in (("members", "members", 0.0), ("priors", "members", 3.0), ("heads", "heads", 0.0)):
        torch.manual_seed(0)
        model = RewardModel(spec(heads=4, ensemble=ensemble, prior=prior, center=center, spread=spread))
        judge(model, data, steps=60)
        pictures = Pixels(32, 1 << 20).inputs(PICTURES, model.device)
        for kind, captions in (("shown", truth), ("never", ("square", "above", "a square", "a zebra above a square"))):
            ids = model.vocabulary.encode(list(captions), 8)
            outputs = [model(pictures, torch.full((len(ids),), place), ids) for place in range(len(PICTURES))]
            apart[name, kind] = torch.cat([each.mean.std(dim=1) for each in outputs]).mean().item()
    assert apart["members", "never"] > 20 * apart["members", "shown"], apart
    assert apart["members", "never"] > 4 * apart["heads", "never"], apart
    assert apart["priors", "never"] > 2 * apart["members", "never"], apart
    assert apart["priors", "never"] > 20 * apart["priors", "shown"], apart


def test_members_are_trained_apart() -> None:
    """Each on batches in an order of its own; what the others do is nothing to it."""
    data = RewardData.of_judgements(
        Judgement(PICTURES[i % 3], "red", "blue", 1.0, 0.8 + 0.01 * i, 0.2) for i in range(12)
    )
    torch.manual_seed(0)
    three = RewardModel(spec(heads=3, ensemble="members"))
    started = [copy.deepcopy(member.state_dict()) for member in three.members]
    told: list[tuple[int, int]] = []
    cfg = load_as(RewardModelConfig, CONFIG, ['training={"steps": 4, "images_per_step": 2}']).training
    source = Pixels(32, 1 << 20)
    losses = train_reward_model(three, source, data, cfg, seed=0, progress=lambda at, of, _: told.append((at, of)))
    assert (len(losses), told) == (4, [(1, 12), (12, 12)])
    again = RewardModel(spec(heads=3, ensemble="members"))
    for member, state in zip(again.members, started, strict=True):
        member.load_state_dict(state)
    with torch.no_grad():
        again.members[0].text.words.weight.zero_()
    train_reward_model(again, source, data, cfg, seed=0)
    for k, (member, other) in enumerate(zip(three.members, again.members, strict=True)):
        ended, other_ended = member.state_dict(), other.state_dict()
        assert all(torch.equal(ended[name], other_ended[name]) for name in ended) == (k > 0)
        assert not torch.equal(ended["text.words.weight"], started[k]["text.words.weight"])
    for member in again.members:
        member.load_state_dict(started[0])
    train_reward_model(again, source, data, cfg, seed=0)
    assert not torch.equal(*(again.members[k].text.words.weight for k in (0, 1)))


def test_divergence_stops_it() -> None:
    data = RewardData.of_judgements([Judgement(PICTURES[0], "red", "blue", None, float("1e30"), 0.0)])
    with pytest.raises(NonFiniteError, match="reward step 0: loss is inf"):
        judge(RewardModel(spec(heads=1, center=0.0, spread=1.0)), data)


def test_commands(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = mmrl("data", "preferences", "data/scene-preferences", "--train", "20", "--eval", "5")
    assert done.exit_code == 0, done.output
    assert "100 pairs in train.parquet, 25 pairs in eval.parquet, 25 pairs in clean.parquet" in done.output
    done = mmrl("reward", "train", CONFIG, "--set", "net.prior=3", "--set", "net.heads=5")
    assert (done.exit_code, "net: prior=3 needs ensemble=members" in done.output) == (2, True), done.output
    few = ["--set", "training.steps=2", "--set", "training.warmup_steps=0"]
    done = mmrl("reward", "train", CONFIG, *few)
    assert done.exit_code == 0, done.output
    assert "held-out pairs" in done.output
    assert done.output.rstrip().endswith("rewards/scenes")
    done = mmrl(
        "reward", "evaluate", "rewards/scenes", "--data", "data/scene-preferences/clean.parquet", "--out", "x.json"
    )
    assert done.exit_code == 0, done.output
    assert json.loads(Path("x.json").read_text())["held_out"]["pairs"]["count"] == 25
    done = mmrl("reward", "train", CONFIG, *few)
    assert (done.exit_code, "exists already" in done.output) == (1, True)
    done = mmrl("reward", "train", CONFIG, "--set", "net.fusion=sum")
    assert (done.exit_code, "net.fusion" in done.output) == (2, True)
    write_preferences(tmp_path / "one.parquet", list(read_preferences("data/scene-preferences/eval.parquet"))[:1])
    done = mmrl("reward", "evaluate", "rewards/scenes", "--data", "one.parquet")
    assert done.exit_code == 0, done.output
