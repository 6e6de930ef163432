import pickle

import pytest

from mmrl_ray.config.reward import RewardSection
from mmrl_ray.data.samples import Sample
from mmrl_ray.errors import RewardError
from mmrl_ray.metrics.overlap import CiderD, rouge_l
from mmrl_ray.metrics.text import CorpusStatistics
from mmrl_ray.rewards.base import TruncatedCaption
from mmrl_ray.rewards.build import build_reward
from mmrl_ray.rewards.text import CiderReward, RougeReward

STATISTICS = CorpusStatistics.from_references([["a red square"], ["a blue circle", "one circle"]])
SAMPLES = [Sample("x", (b"",), "", ("a red square",)), Sample("y", (b"",), "", ("a blue circle", "one circle"))]
CAPTIONS = ["a red circle", "a blue circle"]


def test_cider_reward_is_the_metric() -> None:
    scores = CiderReward(STATISTICS).score_batch(SAMPLES, CAPTIONS)
    expected = [CiderD(STATISTICS).score(text, s.references) for text, s in zip(CAPTIONS, SAMPLES, strict=True)]
    assert [s.total for s in scores] == expected
    assert scores[1].parts == {"cider_d": expected[1]}
    assert scores[1].weights == {"cider_d": 1.0}


@pytest.mark.parametrize("eos", [True, False])
def test_ends_count_by_default_unless_the_caption_was_cut_off(eos: bool) -> None:
    part = {"kind": "cider_d"} if eos else {"kind": "cider_d", "eos": False}
    section = RewardSection.model_validate({"parts": {"c": part}, "weights": {"c": 1.0}})
    reward = pickle.loads(pickle.dumps(build_reward(section, STATISTICS)))
    whole, cut = reward.score_batch(SAMPLES[:1] * 2, ["a red", TruncatedCaption("a red")])
    metric, references = CiderD(STATISTICS), SAMPLES[0].references
    standard = metric.score("a red", references)
    if eos:
        assert whole.total == metric.score("a red", references, ended=True) != standard
        assert cut.total == metric.score("a red", references, ended=False) != standard
    else:
        assert whole.total == cut.total == standard


def test_rouge_reward_is_the_metric() -> None:
    scores = RougeReward().score_batch(SAMPLES, CAPTIONS)
    assert [s.total for s in scores] == [rouge_l(c, s.references) for c, s in zip(CAPTIONS, SAMPLES, strict=True)]
    assert scores[0].parts == {"rouge_l": pytest.approx(2 / 3)}


@pytest.mark.parametrize("reward", [CiderReward(STATISTICS), RougeReward()])
def test_refusals(reward: CiderReward | RougeReward) -> None:
    with pytest.raises(RewardError, match="'lonely'"):
        reward.score_batch([Sample("lonely", (b"",), "")], ["a"])
    with pytest.raises(RewardError, match="captions"):
        reward.score_batch(SAMPLES, ["a"])
