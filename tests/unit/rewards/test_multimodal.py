"""R = Σ_m w_m R_m, and what the breakdown keeps of it."""

import math
import pickle
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmrl_ray.config.reward import CaptionPart, CiderPart, RewardSection, RougePart
from mmrl_ray.data.samples import Sample
from mmrl_ray.errors import ConfigError, RewardError
from mmrl_ray.metrics.text import CorpusStatistics
from mmrl_ray.rewards.base import RewardBreakdown, RewardFn
from mmrl_ray.rewards.build import build_reward
from mmrl_ray.rewards.captioning import CaptionReward
from mmrl_ray.rewards.multimodal import MultimodalReward

SAMPLES = [Sample(f"s{i}", (b"",), "", ("a red square",)) for i in range(3)]
CAPTIONS = ["a", "a red square", "blue"]


class Fixed:
    """Gives back the scores that it was made with."""

    def __init__(self, totals: Sequence[float], sigma: float | None = None) -> None:
        self.totals, self.sigma, self.calls = list(totals), sigma, 0

    def score_batch(self, samples: Sequence[Sample], captions: Sequence[str]) -> list[RewardBreakdown]:
        self.calls += 1
        return [RewardBreakdown(t, {"whole": t}, {"whole": 1.0}, self.sigma) for t in self.totals]


@settings(deadline=None)
@given(st.integers(1, 5).flatmap(lambda m: st.tuples(
    st.lists(st.floats(0, 10), min_size=m, max_size=m).filter(any),
    st.lists(st.lists(st.floats(-5, 5), min_size=3, max_size=3), min_size=m, max_size=m),
)))  # fmt: skip
def test_equals_the_formula(case: tuple[list[float], list[list[float]]]) -> None:
    weights, rewards = case
    names = [f"m{i}" for i in range(len(weights))]
    composed = MultimodalReward(
        {n: Fixed(r) for n, r in zip(names, rewards, strict=True)}, dict(zip(names, weights, strict=True))
    )
    expected = np.asarray(weights) @ np.asarray(rewards)
    scores = composed.score_batch(SAMPLES, CAPTIONS)
    np.testing.assert_allclose([s.total for s in scores], expected, rtol=1e-12, atol=1e-12)
    for i, score in enumerate(scores):
        assert {n: score.parts[n] for n in names} == {n: r[i] for n, r in zip(names, rewards, strict=True)}
        assert score.weights == dict(zip(names, weights, strict=True))


def test_literal_and_nested_names() -> None:
    inner = MultimodalReward({"x": Fixed([1.0, 2.0, 3.0])}, {"x": 2.0})
    scores = MultimodalReward({"deep": inner, "flat": Fixed([0.5, 0.5, -1.0])}, {"deep": 0.5, "flat": 4.0}).score_batch(
        SAMPLES, CAPTIONS
    )
    assert [s.total for s in scores] == [3.0, 4.0, -1.0]
    assert scores[2].parts == {"deep": 6.0, "deep/x": 3.0, "deep/x/whole": 3.0, "flat": -1.0, "flat/whole": -1.0}
    assert scores[2].weights == {"deep": 0.5, "flat": 4.0}
    assert scores[2].sigma is None


def test_each_part_scores_the_batch_once_also_at_weight_zero() -> None:
    parts = {"a": Fixed([1, 1, 1]), "b": Fixed([7, 8, 9])}
    scores = MultimodalReward(parts, {"a": 1.0, "b": 0.0}).score_batch(SAMPLES, CAPTIONS)
    assert [p.calls for p in parts.values()] == [1, 1]
    assert [s.total for s in scores] == [1.0, 1.0, 1.0]
    assert scores[1].parts["b"] == 8


def test_sigmas_add_as_independent() -> None:
    parts = {"a": Fixed([1, 1, 1], sigma=3.0), "b": Fixed([1, 1, 1], sigma=2.0), "c": Fixed([1, 1, 1])}
    score = MultimodalReward(parts, {"a": 1.0, "b": 2.0, "c": 9.0}).score_batch(SAMPLES, CAPTIONS)[0]
    assert score.sigma == pytest.approx(5.0)


@pytest.mark.parametrize(
    ("names", "weights"),
    [
        ([], {}),
        (["a"], {"b": 1.0}),
        (["a"], {"a": 1.0, "b": 1.0}),
        (["a", "b"], {"a": 1.0}),
        (["a"], {"a": -1.0}),
        (["a", "b"], {"a": 0.0, "b": 0.0}),
        (["a"], {"a": math.nan}),
        (["a/b"], {"a/b": 1.0}),
    ],
)
def test_refuses(names: list[str], weights: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="multimodal reward"):
        MultimodalReward({n: Fixed([0]) for n in names}, weights)


def test_a_part_with_too_few_scores_is_named() -> None:
    with pytest.raises(RewardError, match="'short' returned 2 scores for 3"):
        MultimodalReward({"short": Fixed([1, 2])}, {"short": 1.0}).score_batch(SAMPLES, CAPTIONS)


class Watching:
    """Remembers the samples that it was given."""

    def __init__(self) -> None:
        self.seen: list[Sample] = []

    def score_batch(self, samples: Sequence[Sample], captions: Sequence[str]) -> list[RewardBreakdown]:
        self.seen = list(samples)
        return [RewardBreakdown(0.0, {}, {})] * len(captions)


def test_each_part_gets_the_state_of_its_modality_and_nothing_else() -> None:
    whole = Sample("s", (b"png",), "Say it.", ("a red square",), {"hint": 1})
    parts = {name: Watching() for name in ("image", "text", "reference", "unnamed")}
    modalities = {"image": "image", "text": "text", "reference": "reference"}
    reward = MultimodalReward(parts, dict.fromkeys(parts, 1.0), modalities=modalities)  # type: ignore[arg-type]
    reward.score_batch([whole, whole], ["a", "b"])
    assert {name: part.seen for name, part in parts.items()} == {
        "image": [Sample("s", (b"png",), "", ())] * 2,
        "text": [Sample("s", (), "Say it.", ())] * 2,
        "reference": [Sample("s", (), "", ("a red square",))] * 2,
        "unnamed": [whole, whole],
    }
    assert parts["image"].seen[0] is parts["image"].seen[1]  # one picture, encoded once


class TestRisk:
    def test_mean_sigma_and_what_learning_uses(self) -> None:
        parts = {"a": Fixed([1, 2, 3], sigma=3.0), "b": Fixed([1, 1, 1], sigma=2.0), "c": Fixed([1, 1, 1])}
        reward = MultimodalReward(parts, {"a": 1.0, "b": 2.0, "c": 1.0}, risk=0.5)
        score = pickle.loads(pickle.dumps(reward.score_batch(SAMPLES, CAPTIONS)[1]))
        assert (score.total, score.sigma, score.risk) == (5.0, 5.0, 0.5)
        assert score.adjusted == 5.0 - 0.5 * 5.0
        assert (score.parts["a/sigma"], score.parts["b/sigma"]) == (3.0, 2.0)
        assert "c/sigma" not in score.parts

    def test_without_risk_learning_uses_the_mean(self) -> None:
        reward = MultimodalReward({"a": Fixed([1, 2, 3], sigma=3.0)}, {"a": 1.0})
        assert [s.adjusted for s in reward.score_batch(SAMPLES, CAPTIONS)] == [1.0, 2.0, 3.0]

    def test_a_reward_that_gives_no_sigma_after_all_is_an_error(self) -> None:
        with pytest.raises(RewardError, match="risk=1 needs a standard deviation"):
            MultimodalReward({"a": Fixed([1, 2, 3])}, {"a": 1.0}, risk=1.0).score_batch(SAMPLES, CAPTIONS)

    def test_a_negative_sigma_is_an_error(self) -> None:
        with pytest.raises(RewardError, match=r"reward part .a. has sigma=-1\.0"):
            MultimodalReward({"a": Fixed([1, 2, 3], sigma=-1.0)}, {"a": 1.0}).score_batch(SAMPLES, CAPTIONS)

    @pytest.mark.parametrize("risk", [-0.5, math.nan, math.inf])
    def test_refuses(self, risk: float) -> None:
        with pytest.raises(ConfigError, match="risk"):
            MultimodalReward({"a": Fixed([0])}, {"a": 1.0}, risk=risk)

    def test_a_config_without_a_part_that_can_know_its_sigma_is_refused(self) -> None:
        with pytest.raises(ValueError, match=r"risk=0.5 needs .* none of \['caption'\] is one: add a part of kind"):
            RewardSection(risk=0.5)


def test_a_part_that_raises_is_named() -> None:
    class Raising:
        def score_batch(self, samples: Sequence[Sample], captions: Sequence[str]) -> list[RewardBreakdown]:
            raise ZeroDivisionError("by zero")

    reward = MultimodalReward({"fine": Fixed([1, 2, 3]), "bad": Raising()}, {"fine": 1.0, "bad": 1.0})
    with pytest.raises(RewardError, match="reward part 'bad' failed: ZeroDivisionError: by zero"):
        reward.score_batch(SAMPLES, CAPTIONS)


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_a_part_that_gives_no_number_is_named(wrong: float) -> None:
    with pytest.raises(RewardError, match="score 1 of reward part 'bad' has total="):
        MultimodalReward({"bad": Fixed([1, wrong, 3])}, {"bad": 1.0}).score_batch(SAMPLES, CAPTIONS)


class TestBuild:
    STATISTICS = CorpusStatistics.from_references([["a red square"], ["a blue circle"], ["two red circles"]])

    def test_default_is_the_caption_reward(self) -> None:
        built = build_reward(RewardSection(), self.STATISTICS)
        assert isinstance(built, RewardFn)
        score = built.score_batch(SAMPLES, CAPTIONS)[1]
        plain = CaptionReward(0.5, 0.5, 0.1, self.STATISTICS.idf, 30).score(CAPTIONS[1], SAMPLES[1].references)
        assert score.total == pytest.approx(plain.total)
        assert score.parts == {"caption": plain.total, **{f"caption/{k}": v for k, v in plain.parts.items()}}

    def test_all_kinds(self) -> None:
        section = RewardSection(
            parts={
                "caption": CaptionPart(alpha=1.0, beta=0.0, gamma=0.0, max_words=5, grounded=False),
                "consensus": CiderPart(kind="cider_d"),
                "overlap": RougePart(kind="rouge_l"),
            },
            weights={"caption": 1.0, "consensus": 0.1, "overlap": 2.0},
        )
        score = pickle.loads(pickle.dumps(build_reward(section, self.STATISTICS))).score_batch(SAMPLES, CAPTIONS)[1]
        assert score.parts["caption"] == score.parts["caption/bleu"] == 1.0
        assert score.parts["consensus/cider_d"] == pytest.approx(10.0)  # three words and their end: one 4-gram
        assert score.parts["overlap"] == pytest.approx(1.0)
        assert score.total == pytest.approx(1.0 + 0.1 * 10.0 + 2.0)

    @pytest.mark.parametrize(
        "section",
        [
            {"parts": {}, "weights": {}},
            {"parts": {"a": {"kind": "rouge_l"}}, "weights": {"b": 1.0}},
            {"parts": {"a": {"kind": "rouge_l"}}, "weights": {"a": -1.0}},
            {"parts": {"a": {"kind": "rouge_l"}}, "weights": {"a": 0.0}},
            {"parts": {"a/b": {"kind": "rouge_l"}}, "weights": {"a/b": 1.0}},
            {"parts": {"a": {"kind": "no_such"}}, "weights": {"a": 1.0}},
            {"parts": {"a": {"kind": "caption", "gamma": -0.1}}, "weights": {"a": 1.0}},
            {"parts": {"mean": {"kind": "rouge_l"}}, "weights": {"mean": 1.0}},
            {"parts": {"a": {"kind": "rouge_l"}}, "weights": {"a": 1.0}, "risk": -1.0},
            {"parts": {"a": {"kind": "rouge_l"}}, "weights": {"a": 1.0}, "normalize": "batch"},
        ],
    )
    def test_config_refuses(self, section: dict) -> None:
        with pytest.raises(ValueError, match="RewardSection"):
            RewardSection.model_validate(section)
