"""Rewards of the caption as text, by literal values."""

import math
import pickle

import pytest

from mmrl_ray.config.reward import RewardSection
from mmrl_ray.data.samples import Sample
from mmrl_ray.errors import ConfigError
from mmrl_ray.metrics.text import CorpusStatistics
from mmrl_ray.rewards.base import RewardBreakdown, RewardFailure, TruncatedCaption, score_with_retry
from mmrl_ray.rewards.build import NOTHING, build_reward
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


THOUGHT = r"<think>.+</think>\s*<answer>.+</answer>"


@pytest.mark.parametrize(
    ("caption", "prefix", "expected"),
    [
        ("<think>two shapes</think><answer>a star</answer>", "", 1.0),
        ("<think>\n- blue\n- round\n</think>\n\n<answer>a ball</answer>", "", 1.0),
        ("<think>x</think><answer>y</answer> \n\n", "", 1.0),
        ("- blue\n</think>\n<answer>a ball</answer>", "", 0.0),
        ("- blue\n</think>\n<answer>a ball</answer>", "<think>\n", 1.0),
        ("<think>x</think><answer>y</answer>", "<think>\n", 1.0),
        ("<answer>a ball</answer>", "<think>\n", 0.0),
        ("<answer>a ball</answer> and more", "", 0.0),
    ],
)
def test_format_over_several_lines_and_after_what_the_template_writes(
    caption: str, prefix: str, expected: float
) -> None:
    section = RewardSection.model_validate(
        {"parts": {"f": {"kind": "format", "pattern": THOUGHT, "prefix": prefix}}, "weights": {"f": 1.0}}
    )
    (score,) = build_reward(section, NOTHING).score_batch([SAMPLE], [TruncatedCaption(caption)])
    assert score.total == expected


def test_a_match_that_would_never_end_is_no_answer_and_costs_the_others_nothing() -> None:
    section = RewardSection.model_validate(
        {
            "parts": {"f": {"kind": "format", "pattern": "(?:a|aa)+"}},  # of 41 letters there are 10^8 ways
            "weights": {"f": 1.0},
            "timeout_s": 40.0,
            "retries": 0,
        }
    )
    reward = pickle.loads(pickle.dumps(build_reward(section, NOTHING)))
    samples = [Sample(str(i), (), "") for i in range(4)]
    captions = ["a" * 40, "a" * 40 + "!", "b", "aa"]
    one, hangs, none, other = score_with_retry(reward, samples, captions, timeout_s=40.0, retries=0)
    assert isinstance(one, RewardBreakdown)
    assert isinstance(none, RewardBreakdown)
    assert isinstance(other, RewardBreakdown)
    assert (one.total, none.total, other.total) == (1.0, 0.0, 1.0)
    assert isinstance(hangs, RewardFailure)
    assert "reward part 'f' failed: pattern '(?:a|aa)+' did not come to an end" in hangs.reason


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
        ({"kind": "format", "pattern": "ab(["}, r"'ab\(\[' is no regular expression: .* at position 4"),
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
