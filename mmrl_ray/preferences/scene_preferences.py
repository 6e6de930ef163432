"""Preferences about generated scenes, from a rater whose noise is known: what a learned reward is tried on.

A pair is a full description of a scene against one with a single fault: a wrong colour, shape, size or relation (of a
single object: place), or a missing detail. The rater's true opinion of a caption, on a scale from 0 to 1, is 0.7 where
it says all that a full description does and nothing false, 0.6 where it only leaves something out, and 0.4 where
something in it is false. What it says (in choices, and apart from them in ratings) is that plus Gaussian noise whose σ
is known for each picture: `NOISE` by the number of objects, since a crowded picture is harder to judge. The same seed
gives the same preferences.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from mmrl_ray.config.sections import ScenesSection
from mmrl_ray.data.images import image_hash
from mmrl_ray.data.row import Sample
from mmrl_ray.data.scenes.generator import generate_scenes
from mmrl_ray.data.scenes.language import COLOURS, POSITIONS, SHAPES, SIZES, SceneObject, attribute_scores, describe
from mmrl_ray.preferences.files import write_preferences
from mmrl_ray.preferences.schema import Choice, Pair, Preference

FAULTS = ("colour", "shape", "size", "relation", "missing")
"""What is wrong with the worse caption of a pair."""
NOISE = {1: 0.03, 2: 0.08, 3: 0.15}
"""σ of what the rater says about one caption, by the number of objects in the picture."""
RATER = "generated"
_VERSION = 1
"""Raised when the same settings come to mean other preferences."""


def scene_preferences(
    cfg: ScenesSection, split: str, *, rated: float = 0.5, noise: float = 1.0
) -> Iterator[Preference]:
    """One preference for each fault of each picture of a split, in the order of the pictures.

    Their `source` is `scenes:FAULT/SAMPLE`.

    Args:
        cfg: the pictures.
        split: "train", or "eval" with combinations that training never shows.
        rated: the share of pairs whose captions are rated, too.
        noise: times `NOISE`; 0 gives the true opinion.
    """
    train, held_out = generate_scenes(cfg)
    for sample in train if split == "train" else held_out:
        rng = random.Random(f"{_VERSION}/{cfg.seed}/{split}/{sample.id}")
        for fault in FAULTS:
            yield _preference(sample, fault, rng, rated, noise)


def write_scene_preferences(cfg: ScenesSection, folder: str | Path, *, rated: float = 0.5) -> dict[str, int]:
    """Writes `train`, `eval` (held-out pictures) and `clean` (the same pairs, judged without noise) as Parquet files.

    Returns the rows of each.

    Raises:
        PreferenceError: a file is there already, or cannot be written.
    """
    splits = {
        "train": scene_preferences(cfg, "train", rated=rated),
        "eval": scene_preferences(cfg, "eval", rated=rated),
        "clean": scene_preferences(cfg, "eval", rated=rated, noise=0.0),
    }
    return {name: write_preferences(Path(folder) / f"{name}.parquet", rows) for name, rows in splits.items()}


def true_quality(caption: str, metadata: Mapping[str, Any]) -> float:
    """What the rater thinks of a caption before noise; `metadata` is that of a scene."""
    scores = attribute_scores(caption, metadata)
    if scores.correct < scores.claimed:
        return 0.4
    return 0.7 if scores.covered == scores.required else 0.6


def label_noise(metadata: Mapping[str, Any]) -> float:
    """σ of what the rater says about a caption of this scene."""
    return NOISE[len(metadata["objects"])]


def faulty_caption(metadata: Mapping[str, Any], fault: str, rng: random.Random) -> str:
    """A caption of a scene with one fault of `FAULTS`, in one of the wordings of a true one."""
    objects = [SceneObject(**each) for each in metadata["objects"]]
    if fault == "missing":
        return rng.choice(metadata["partial"])
    if fault == "relation":
        return _described(_misplaced(objects, rng), rng)
    if fault not in FAULTS:
        raise ValueError(f"unknown fault {fault!r}; choose one of {', '.join(FAULTS)}")
    choices: tuple[str, ...] = {"colour": COLOURS, "shape": SHAPES, "size": SIZES}[fault]
    at = rng.randrange(len(objects))
    changed = [replace(objects[at], **{fault: value}) for value in choices if value != getattr(objects[at], fault)]
    others = {each.key for i, each in enumerate(objects) if i != at}
    objects[at] = rng.choice([each for each in changed if each.key not in others])
    return _described(objects, rng)


def _misplaced(objects: list[SceneObject], rng: random.Random) -> list[SceneObject]:
    """The single object elsewhere, or the first two in each other's place."""
    first, *rest = objects
    if not rest:
        return [replace(first, position=rng.choice([each for each in POSITIONS if each != first.position]))]
    second, *others = rest
    return [replace(second, position=first.position), replace(first, position=second.position), *others]


def _described(objects: list[SceneObject], rng: random.Random) -> str:
    return rng.choice(describe(tuple(objects))[0])


def _preference(sample: Sample, fault: str, rng: random.Random, rated: float, noise: float) -> Preference:
    good, bad = rng.choice(sample.references), faulty_caption(sample.metadata, fault, rng)
    captions = (good, bad) if rng.random() < 0.5 else (bad, good)  # which is the better one must not show
    sigma = noise * label_noise(sample.metadata)
    heard = [true_quality(caption, sample.metadata) + rng.gauss(0.0, 1.0) * sigma for caption in captions]
    # Another day, another opinion: ratings have noise of their own.
    ratings = [true_quality(caption, sample.metadata) + rng.gauss(0.0, 1.0) * sigma for caption in captions]
    is_rated = rng.random() < rated
    choice: Choice = "a" if heard[0] > heard[1] else "b"
    hashed = image_hash(sample.images)
    return Preference(
        pair=Pair(hashed, "", *captions, source=f"scenes:{fault}/{sample.id}", image=sample.images[0]),
        choice=choice,
        rater=RATER,
        rating_a=min(max(ratings[0], 0.0), 1.0) if is_rated else None,
        rating_b=min(max(ratings[1], 0.0), 1.0) if is_rated else None,
    )
