"""Generated preferences: the fault is in the worse caption, the noise is as large as it says, order tells nothing."""

from __future__ import annotations

import random
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import norm

from mmrl_ray.config.sections import ScenesSection
from mmrl_ray.data.scenes.generator import generate_scenes
from mmrl_ray.data.scenes.language import SceneObject, parse_caption, true_facts
from mmrl_ray.errors import PreferenceError
from mmrl_ray.preferences.files import read_preferences
from mmrl_ray.preferences.scene_preferences import (
    FAULTS,
    NOISE,
    faulty_caption,
    scene_preferences,
    true_quality,
    write_scene_preferences,
)
from mmrl_ray.preferences.schema import Preference

SCENES = ScenesSection(train=300, eval=20)


@pytest.fixture(scope="module")
def metadata() -> dict[str, Any]:
    train, held_out = generate_scenes(SCENES)
    return {sample.id: sample.metadata for sample in (*train, *held_out)}


@pytest.fixture(scope="module")
def noisy() -> list[Preference]:
    return list(scene_preferences(SCENES, "train", rated=1.0))


def scene_of(preference: Preference) -> str:
    return preference.pair.source.split("/")[1]


def test_each_picture_has_each_fault_once(noisy: list[Preference]) -> None:
    parts = [p.pair.source.split("/")[0] for p in noisy]
    assert parts == [f"scenes:{fault}" for _ in range(300) for fault in FAULTS]
    assert len({p.pair.image_hash for p in noisy}) == 300


@pytest.mark.parametrize("fault", FAULTS)
def test_the_fault_is_the_one_named(fault: str, metadata: dict[str, Any]) -> None:
    for name, facts in list(metadata.items())[:150]:
        rng = random.Random(name)
        caption = faulty_caption(facts, fault, rng)
        objects = [SceneObject(**each) for each in facts["objects"]]
        false = parse_caption(caption) - true_facts(objects)
        assert true_quality(caption, facts) < true_quality(rng.choice(_full(facts, metadata, name)), facts) == 0.7
        if fault == "missing":
            assert false == set()
        elif fault == "size":
            assert {fact[0] for fact in false} == {"size"}
        elif fault == "relation":
            assert {fact[0] for fact in false} <= {"relation", "position"}
            assert false
        else:
            assert any(fact[0] == "object" for fact in false)


def _full(facts: dict[str, Any], metadata: dict[str, Any], name: str) -> tuple[str, ...]:
    from mmrl_ray.data.scenes.language import describe

    return describe(tuple(SceneObject(**each) for each in facts["objects"]))[0]


def test_noise_is_as_large_as_it_says(noisy: list[Preference], metadata: dict[str, Any]) -> None:
    errors, expected, flipped = defaultdict(list), defaultdict(list), defaultdict(list)
    for each in noisy:
        facts = metadata[scene_of(each)]
        truths = [true_quality(caption, facts) for caption in (each.pair.caption_a, each.pair.caption_b)]
        count = len(facts["objects"])
        errors[count] += [each.rating_a - truths[0], each.rating_b - truths[1]]
        gap = abs(truths[0] - truths[1])
        expected[count].append(norm.cdf(-gap / (NOISE[count] * 2**0.5)))
        flipped[count].append((truths[0] > truths[1]) != (each.choice == "a"))
    for count, sigma in NOISE.items():
        assert np.std(errors[count]) == pytest.approx(sigma, rel=0.1)
        deviation = np.sqrt(np.sum(np.array(expected[count]) * (1 - np.array(expected[count])))) + 1e-9
        assert abs(np.sum(flipped[count]) - np.sum(expected[count])) < 4 * deviation + 1


def test_without_noise_the_better_caption_wins_and_its_place_tells_nothing(metadata: dict[str, Any]) -> None:
    clean = list(scene_preferences(SCENES, "train", rated=0.5, noise=0.0))
    for each in clean:
        a, b = (
            true_quality(caption, metadata[scene_of(each)]) for caption in (each.pair.caption_a, each.pair.caption_b)
        )
        assert each.choice == ("a" if a > b else "b")
        assert each.rating_a is None or (each.rating_a, each.rating_b) == pytest.approx((a, b))
    assert 0.45 < np.mean([each.choice == "a" for each in clean]) < 0.55
    assert 0.42 < np.mean([each.rating_a is not None for each in clean]) < 0.58


def test_files(tmp_path: Path) -> None:
    small = ScenesSection(train=4, eval=2)
    assert write_scene_preferences(small, tmp_path) == {"train": 20, "eval": 10, "clean": 10}
    eval_, clean = (list(read_preferences(tmp_path / f"{name}.parquet")) for name in ("eval", "clean"))
    assert [each.pair for each in eval_] == [each.pair for each in clean]
    assert list(scene_preferences(small, "train")) == list(read_preferences(tmp_path / "train.parquet"))
    with pytest.raises(PreferenceError, match="exists already"):
        write_scene_preferences(small, tmp_path)
    with pytest.raises(ValueError, match="unknown fault 'taste'"):
        faulty_caption({"objects": []}, "taste", random.Random(0))
