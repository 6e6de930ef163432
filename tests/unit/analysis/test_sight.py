"""Which samples are looked at, beside whose pictures, and what of it is computed."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from PIL import Image

from mmrl_ray.analysis.sight import Eyes, Seen, arrange, grey_picture, look, turned_picture
from mmrl_ray.data.images import image_hash
from mmrl_ray.data.samples import Sample
from mmrl_ray.errors import ImageError
from mmrl_ray.experience.carriers import Completion, EncodedPrompt, RewardBreakdown, RewardFailure, Score
from tests.unit.rollouts.fakes import png

SAMPLES = [Sample(f"s{i}", (png(i),), "?", (f"thing {i}", f"no. {i}")) for i in range(9)]


def test_each_sample_has_another_with_another_picture_and_other_references() -> None:
    found = arrange(SAMPLES, 6, seed=1)
    assert found == arrange(SAMPLES, 6, seed=1)
    assert [a.id for a, _ in found.pairs] != [a.id for a, _ in arrange(SAMPLES, 6, seed=2).pairs]
    looked = [sample.id for sample, _ in found.pairs]
    assert len(looked) == len(set(looked)) == 6
    assert sorted(other.id for _, other in found.pairs) == sorted(looked), "each picture as often as the others"
    assert found.told == ""

    same_picture = [replace(SAMPLES[0], id="copy", references=("other words",)), SAMPLES[0], SAMPLES[1]]
    pairs = {a.id: b.id for a, b in arrange(same_picture, 9, seed=0).pairs}
    assert pairs["copy"] == pairs["s0"] == "s1"
    same_words = [replace(SAMPLES[0], references=("NO.  1",)), SAMPLES[1]]
    assert arrange(same_words, 9, seed=0).told == (
        "2 samples are left out: no other one has another picture and other references"
    )


@pytest.mark.parametrize(
    ("samples", "without", "alike"),
    [
        ([], 0, 0),
        (SAMPLES[:1], 0, 1),
        ([replace(s, images=()) for s in SAMPLES], 9, 0),
        ([replace(s, images=(png(7),)) for s in SAMPLES], 0, 9),
        ([replace(SAMPLES[0], images=()), *SAMPLES[1:3]], 1, 0),
    ],
)
def test_what_cannot_be_told_apart_is_left_out_and_counted(samples: list[Sample], without: int, alike: int) -> None:
    found = arrange(samples, 48, seed=0)
    assert (found.without_picture, found.alike) == (without, alike)
    assert len(found.pairs) == len(samples) - without - alike


def test_grey_and_turned_pictures_have_the_size_of_the_picture() -> None:
    buffer = io.BytesIO()
    picture = Image.new("RGB", (13, 7), (200, 0, 0))
    picture.putpixel((2, 1), (0, 9, 0))
    picture.save(buffer, "PNG")
    opened = Image.open(io.BytesIO(grey_picture(buffer.getvalue())))
    assert (opened.size, opened.getextrema()) == ((13, 7), ((128, 128),) * 3)
    turned = Image.open(io.BytesIO(turned_picture(buffer.getvalue())))
    assert turned.size == (13, 7)
    assert [turned.getpixel(at) for at in ((10, 5), (2, 1))] == [(0, 9, 0), (200, 0, 0)]
    with pytest.raises(ImageError):
        grey_picture(b"no picture")


class Known:
    """Eyes that know the shade of a picture: a token's log-prob is that over its number, the reward its letters."""

    def __init__(self) -> None:
        self.prompts: list[int] = []
        self.decoded: list[str] = []

    @property
    def eyes(self) -> Eyes:
        return Eyes(self.encode, self.captions, self.tokens, self.logprobs, 3, self.reward)

    def encode(self, sample: Sample) -> EncodedPrompt:
        if sample.images[0] == b"broken":
            raise ImageError("no image")
        shade = Image.open(io.BytesIO(sample.images[0])).getpixel((0, 0))[0]  # type: ignore[index]
        return EncodedPrompt(torch.tensor([1, 2]), {"shade": torch.tensor(shade)}, image_hash(sample.images))

    def captions(self, prompts: Sequence[EncodedPrompt], samples: Sequence[Sample]) -> list[Completion]:
        assert len(prompts) == len(samples)
        shades = [int(p.model_inputs["shade"]) for p in prompts]
        self.decoded += [f"shade {shade}" for shade in shades]
        return [said(f"shade {shade}") for shade in shades]

    def tokens(self, text: str) -> torch.Tensor:
        return torch.arange(1, len(text) + 1)

    def logprobs(self, prompts: Sequence[EncodedPrompt], groups: Any) -> Any:
        self.prompts.append(len(prompts))
        assert max(map(len, groups)) <= 8
        return [
            [-float(p.model_inputs["shade"]) / tokens for tokens in group]
            for p, group in zip(prompts, groups, strict=True)
        ]

    def reward(self, samples: Sequence[Sample], captions: Sequence[str]) -> list[Score]:
        return [
            RewardFailure("no judge") if sample.id == "s2" else RewardBreakdown(len(caption), {}, {})
            for sample, caption in zip(samples, captions, strict=True)
        ]


def said(text: str, tokens: int = 2) -> Completion:
    return Completion(torch.arange(1, tokens + 1), torch.zeros(tokens), text, "stop")


def test_figures_are_means_over_tokens_of_each_caption_beside_each_picture() -> None:
    """Shades are 0 to 3, and 128 of grey; a reference counts its first 3 tokens, the mean of 1 ÷ token is 11/18."""
    known = Known()
    pairs = [(SAMPLES[i], SAMPLES[(i + 1) % 4]) for i in range(4)]
    seen = [
        Seen(a, b, known.encode(a), said(f"caption {a.id}", tokens=2), RewardBreakdown(7.0, {}, {})) for a, b in pairs
    ]
    first, second, third, _ = look(known.eyes, seen)
    third_of_tokens, half = (1 + 1 / 2 + 1 / 3) / 3, (1 + 1 / 2) / 2
    assert second == pytest.approx(
        {
            "reference/own": -third_of_tokens,
            "reference/other": -2 * third_of_tokens,
            "reference/grey": -128 * third_of_tokens,
            "reference/turned": -third_of_tokens,
            "caption/own": -half,
            "caption/other": -2 * half,
            "caption/grey": -128 * half,
            "reward/own": 7.0,
            "reward/other": len("caption s2"),
            "reward/grey": len("shade 128"),
        },
        rel=1e-6,
    )
    assert first["reference/own"] == 0.0
    assert "reward/grey" not in third, "a reward that fails is no 0"
    assert known.decoded == ["shade 128"], "others' captions are there, and one grey picture is as good as four"
    assert known.prompts == [9], "four pictures, each turned, and the grey one for 8 captions"


def test_a_sample_that_cannot_be_looked_at_leaves_the_others(caplog: pytest.LogCaptureFixture) -> None:
    known = Known()
    broken = replace(SAMPLES[2], images=(b"broken",))
    rows = [(SAMPLES[0], broken), (SAMPLES[1], SAMPLES[0]), (replace(SAMPLES[3], references=()), SAMPLES[0])]
    seen = [Seen(a, b, known.encode(a), said("a")) for a, b in rows]
    figures = look(known.eyes, seen)
    assert [bool(each) for each in figures] == [False, True, False]
    assert "sample 's0' is not looked at: no image" in caplog.text
    assert look(known.eyes, seen[:1]) == [{}]
