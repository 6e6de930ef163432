"""Rewards of the caption as text, by literal values."""

import math

import pytest

from mmrl_ray.config.reward import RewardSection
from mmrl_ray.data.samples import Sample
from mmrl_ray.errors import ConfigError
from mmrl_ray.metrics.corpus import CorpusStatistics
from mmrl_ray.rewards.build import build_reward
from mmrl_ray.rewards.text import FormatReward, LengthReward, RepetitionReward

SAMPLE = Sample("s", (b"",), "Describe.", ("a red square",))


@pytest.mark.parametrize(
    ("order", "caption", "expected"),
    [
        (2, "a red square", 0.0),
        (2, "red red red red", -2 / 3),  # 3 bigrams, 1 of them new
        (2, "a red a red a blue", -2 / 5),
        (1, "a red a red", -0.5),
        (2, "red", 0.0),
        (3, "", 0.0),
        (2, "Red, RED red", -0.5),
    ],
)
def test_repetition(order: int, caption: str, expected: float) -> None:
    score = RepetitionReward(order).score(caption)
    assert score.total == pytest.approx(expected, abs=1e-12)
    assert score.total == pytest.approx(sum(score.weights[k] * v for k, v in score.parts.items()))
    assert score.parts["repeated"] == pytest.approx(-expected, abs=1e-12)


@pytest.mark.parametrize(
    ("caption", "expected"),
    [("A red square.", 1.0), ("a red square.", 0.0), ("A red square. And more", 0.0), ("", 0.0), ("A\nline.", 0.0)],
)
def test_format_is_of_the_whole_caption(caption: str, expected: float) -> None:
    assert FormatReward(r"[A-Z][^.\n]*\.").score(caption).total == expected


@pytest.mark.parametrize(
    ("count", "expected"), [(0, 0.0), (1, 0.25), (3, 0.75), (4, 1.0), (6, 1.0), (9, 0.5), (12, 0.0), (50, 0.0)]
)
def test_length_falls_off_outside_its_bounds(count: int, expected: float) -> None:
    assert LengthReward(4, 6).score(" ".join(["word"] * count)).total == pytest.approx(expected)


def test_all_of_them_from_a_config_and_none_needs_references() -> None:
    section = RewardSection.model_validate(
        {
            "parts": {
                "fluent": {"kind": "fluency", "order": 2, "smoothing": 0.5},
                "fresh": {"kind": "repetition"},
                "asked": {"kind": "format", "pattern": "[a-z ]+"},
                "size": {"kind": "length", "min_words": 2, "max_words": 4},
            },
            "weights": {"fluent": 1.0, "fresh": 0.5, "asked": 0.25, "size": 2.0},
        }
    )
    statistics = CorpusStatistics.from_references([["a red square"]] * 3, language_order=section.language_order)
    bare = Sample("s", (), "", ())
    (score,) = build_reward(section, statistics).score_batch([bare], ["a red square"])
    # V = 5: a red square </s> <unk>; every word follows its context 3 times of 3.
    fluency = 1 + math.log(3.5 / 5.5) / math.log(5)
    assert score.parts["fluent"] == pytest.approx(fluency)
    assert score.total == pytest.approx(fluency + 0.25 + 2.0)
    assert not section.needs_images
    assert section.needs_statistics


def test_fluency_says_what_statistics_it_lacks() -> None:
    section = RewardSection.model_validate({"parts": {"f": {"kind": "fluency", "order": 3}}, "weights": {"f": 1.0}})
    for order, said in ((0, "hold no n-grams"), (2, "n-grams of 3 words were not counted")):
        statistics = CorpusStatistics.from_references([["a red square"]], language_order=order)
        with pytest.raises(ConfigError, match=rf"reward\.parts\.f: .*{said}"):
            build_reward(section, statistics)


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ({"kind": "format", "pattern": "(["}, "no regular expression"),
        ({"kind": "format"}, "pattern"),
        ({"kind": "length", "min_words": 5, "max_words": 4}, "min_words=5 is above max_words=4"),
        ({"kind": "fluency", "smoothing": 0.0}, "greater than 0"),
        ({"kind": "fluency", "order": 5}, "less than or equal to 4"),
        ({"kind": "repetition", "order": 0}, "greater than or equal to 1"),
    ],
)
def test_config_refuses(part: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        RewardSection.model_validate({"parts": {"x": part}, "weights": {"x": 1.0}})
