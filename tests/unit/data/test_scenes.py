"""The scenes: what is drawn, what is said, what is held out, and reading facts back."""

from __future__ import annotations

import io
import re
from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mmrl_ray.config.sections import ScenesSection
from mmrl_ray.data.samples import Sample, dataset_fingerprint, read_split, write_parquet
from mmrl_ray.data.scenes.generator import (
    HELD_OUT,
    AttributeScores,
    attribute_scores,
    generate_scenes,
    parse_caption,
    scenes_vocabulary,
    write_scenes,
)
from mmrl_ray.data.scenes.language import COLOURS, POSITIONS, SHAPES, SIZES, SceneObject, describe
from mmrl_ray.errors import DataError
from tests.unit.data.pictures import sample

CFG = ScenesSection(train=600, eval=150, seed=1)


@pytest.fixture(scope="module")
def splits() -> tuple[list[Sample], list[Sample]]:
    train, held_out = generate_scenes(CFG)
    return list(train), held_out


def looks(each: Sample) -> set[tuple[str, str, str]]:
    return {(o["colour"], o["shape"], o["position"]) for o in each.metadata["objects"]}


def captions_of(each: Sample) -> list[str]:
    return [*each.references, *each.metadata["terse"], *each.metadata["partial"]]


# -- the splits --------------------------------------------------------------------------------------------------------


def test_held_out_combinations_never_occur_in_training(splits: tuple[list[Sample], list[Sample]]) -> None:
    train, held_out = splits
    seen = set().union(*map(looks, train))
    assert not seen & HELD_OUT
    assert all(looks(each) & HELD_OUT for each in held_out)
    assert set().union(*map(looks, held_out)) > HELD_OUT
    # What is held out is only the whole: of its parts, training has every pair.
    for first, second in combinations(range(3), 2):
        assert {(x[first], x[second]) for x in HELD_OUT} <= {(x[first], x[second]) for x in seen}


def test_colour_and_shape_name_one_object_of_a_scene(splits: tuple[list[Sample], list[Sample]]) -> None:
    for each in (*splits[0], *splits[1]):
        names = [(o["colour"], o["shape"]) for o in each.metadata["objects"]]
        assert len(set(names)) == len(names)


def test_every_single_value_occurs_in_training_evenly(splits: tuple[list[Sample], list[Sample]]) -> None:
    objects = [o for each in splits[0] for o in each.metadata["objects"]]
    for key, values in (("shape", SHAPES), ("colour", COLOURS), ("size", SIZES), ("position", POSITIONS)):
        counts = Counter(o[key] for o in objects)
        assert set(counts) == set(values)
        assert min(counts.values()) > 0.5 * len(objects) / len(values)
    assert Counter(len(each.metadata["objects"]) for each in splits[0]).keys() == {1, 2, 3}


def test_generation_follows_from_the_settings(splits: tuple[list[Sample], list[Sample]]) -> None:
    again, held_out = generate_scenes(CFG)
    assert (list(again), held_out) == splits
    shorter, _ = generate_scenes(CFG.model_copy(update={"train": 10}))
    assert list(shorter) == splits[0][:10]
    other, _ = generate_scenes(CFG.model_copy(update={"seed": 2}))
    assert next(other).images != splits[0][0].images


def test_max_objects_and_image_size_are_kept() -> None:
    train, held_out = generate_scenes(ScenesSection(train=30, eval=30, image_size=96, max_objects=1))
    for each in (*train, *held_out):
        assert len(each.metadata["objects"]) == 1
        assert Image.open(io.BytesIO(each.images[0])).size == (96, 96)


# -- the picture, measured without the generator's drawing code ------------------------------------------------------


def test_pictures_show_what_the_metadata_says(splits: tuple[list[Sample], list[Sample]]) -> None:
    """In each quarter the shape's extent and colour, measured in pixels; empty quarters are background."""
    hues = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "yellow": (1, 1, 0), "white": (1, 1, 1)}
    for each in splits[0][:100]:
        pixels = np.asarray(Image.open(io.BytesIO(each.images[0]))).astype(int)
        by_place = {o["position"]: o for o in each.metadata["objects"]}
        for place in POSITIONS:
            row, column = (int(word in ("bottom", "right")) for word in place.split())
            quarter = pixels[32 * row : 32 * row + 32, 32 * column : 32 * column + 32]
            shown = quarter.max(axis=2) > 120
            if place not in by_place:
                assert not shown.any()
                continue
            colour, size = by_place[place]["colour"], by_place[place]["size"]
            extent = max(shown.any(axis=0).sum(), shown.any(axis=1).sum())
            assert extent in (range(19, 29) if size == "large" else range(11, 18)), (each.id, place, extent)
            mean = quarter[shown].mean(axis=0)
            if colour in hues:
                assert tuple((mean > 115).astype(int)) == hues[colour], (each.id, colour, mean)
            else:
                assert mean[2] > mean[0] > mean[1] + 40


def test_edges_are_antialiased(splits: tuple[list[Sample], list[Sample]]) -> None:
    circle = next(s for s in splits[0] if [o["shape"] for o in s.metadata["objects"]] == ["circle"])
    colours = Image.open(io.BytesIO(circle.images[0])).getcolors(4096)
    assert colours is not None
    assert len(colours) > 5  # a hard edge has two


# -- the words ---------------------------------------------------------------------------------------------------------


def test_five_full_descriptions_in_different_words(splits: tuple[list[Sample], list[Sample]]) -> None:
    for each in (*splits[0], *splits[1]):
        assert len(set(each.references)) == 5
        assert all(len(reference.split()) <= 20 for reference in each.references)
        for reference in each.references:
            words = Counter(reference.split())
            for o in each.metadata["objects"]:
                assert all(words[o[key]] for key in ("shape", "colour", "size"))


def test_terse_and_partial_captions_are_true_and_leave_something_out(
    splits: tuple[list[Sample], list[Sample]],
) -> None:
    for each in splits[0][:200]:
        assert each.metadata["terse"]
        assert each.metadata["partial"]
        longest = max(len(reference.split()) for reference in each.references)
        for caption in each.metadata["terse"] + each.metadata["partial"]:
            scores = attribute_scores(caption, each.metadata)
            assert scores.precision == 1
            assert 0 < scores.recall < 1
            assert len(caption.split()) < longest


def test_the_vocabulary_is_every_word_and_no_other(splits: tuple[list[Sample], list[Sample]]) -> None:
    said = {word for each in (*splits[0], *splits[1]) for caption in captions_of(each) for word in caption.split()}
    vocabulary = scenes_vocabulary()
    assert set(vocabulary) == said
    assert len(vocabulary) == len(said) <= 120
    assert all(re.fullmatch(r"[a-z]+", word) for word in vocabulary)


def test_references_are_complete_and_true(splits: tuple[list[Sample], list[Sample]]) -> None:
    for each in (*splits[0], *splits[1]):
        for reference in each.references:
            scores = attribute_scores(reference, each.metadata)
            assert (scores.precision, scores.recall) == (1.0, 1.0), reference


# -- reading facts out of free text ------------------------------------------------------------------------------------

SCENE = (
    SceneObject("circle", "red", "large", "top left"),
    SceneObject("square", "blue", "small", "bottom right"),
)
METADATA = describe(SCENE)[1]
RED_CIRCLE, BLUE_SQUARE = ("object", "red", "circle"), ("object", "blue", "square")


@pytest.mark.parametrize(
    ("caption", "facts"),
    [
        ("", set()),
        ("a photo of a dog", set()),
        ("A big, RED circle!", {RED_CIRCLE, ("size", "large", "red", "circle")}),
        ("circle red", set()),
        ("a circle that is red", {RED_CIRCLE}),
        ("a circle which is large and red", {RED_CIRCLE, ("size", "large", "red", "circle")}),
        ("two red circles", {RED_CIRCLE}),
        ("a red blue circle", {RED_CIRCLE, ("object", "blue", "circle")}),
        ("a circle is red square", {("object", "red", "square")}),
        (
            "a red circle over a blue square",
            {RED_CIRCLE, BLUE_SQUARE, ("relation", "red", "circle", "above", "blue", "square")},
        ),
        (
            "a blue square is below and to the right of the red circle",
            {
                RED_CIRCLE,
                BLUE_SQUARE,
                ("relation", "red", "circle", "above", "blue", "square"),
                ("relation", "red", "circle", "left of", "blue", "square"),
            },
        ),
        (
            "in the upper left of the picture there is a red circle",
            {RED_CIRCLE, ("position", "top left", "red", "circle")},
        ),
        (
            "a red circle in the top left corner and a blue square at the lower right",
            {
                RED_CIRCLE,
                BLUE_SQUARE,
                ("position", "top left", "red", "circle"),
                ("position", "bottom right", "blue", "square"),
            },
        ),
        (
            "a red circle and in the bottom right there is a blue square",
            {RED_CIRCLE, BLUE_SQUARE, ("position", "bottom right", "blue", "square")},
        ),
    ],
)
def test_facts_in_free_text(caption: str, facts: set[tuple[str, ...]]) -> None:
    assert parse_caption(caption) == facts


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        # Required of SCENE: two objects, two sizes, one relation ("above": the rows differ).
        ("", AttributeScores(0, 0, 0, 5)),
        ("a red circle", AttributeScores(1, 1, 1, 5)),
        ("a green circle", AttributeScores(0, 1, 0, 5)),
        ("a small red circle", AttributeScores(1, 2, 1, 5)),
        ("a large red circle above a small blue square", AttributeScores(5, 5, 5, 5)),
        ("a large red circle below a small blue square", AttributeScores(4, 5, 4, 5)),
        # True of a diagonal, but not what a full description says.
        ("a red circle left of a blue square", AttributeScores(3, 3, 2, 5)),
        ("a red circle in the top left", AttributeScores(2, 2, 1, 5)),
        ("a red green blue yellow circle", AttributeScores(1, 4, 1, 5)),
    ],
)
def test_attribute_scores(caption: str, expected: AttributeScores) -> None:
    assert attribute_scores(caption, METADATA) == expected


def test_scores_add_up_over_captions() -> None:
    total = AttributeScores(1, 2, 1, 5) + AttributeScores(3, 3, 2, 5)
    assert (total.precision, total.recall) == (0.8, 0.3)
    assert (AttributeScores(0, 0, 0, 5).precision, AttributeScores(0, 0, 0, 0).recall) == (0.0, 0.0)


@given(st.lists(st.sampled_from([*scenes_vocabulary(), "dog", "über", ",", "tiny"]), max_size=25))
def test_any_string_of_words_can_be_scored(words: list[str]) -> None:
    scores = attribute_scores(" ".join(words), METADATA)
    assert 0 <= scores.correct <= scores.claimed
    assert 0 <= scores.covered <= min(scores.correct, scores.required)


# -- writing -----------------------------------------------------------------------------------------------------------


def write(folder: Path, **changes: Any) -> bool:
    cfg = ScenesSection(**{"train": 20, "eval": 5, **changes})
    return write_scenes(cfg, folder / "train", folder / "eval")


def test_writes_once(tmp_path: Path) -> None:
    assert write(tmp_path)
    before = [dataset_fingerprint(tmp_path / split) for split in ("train", "eval")]
    assert not write(tmp_path)
    assert [dataset_fingerprint(tmp_path / split) for split in ("train", "eval")] == before
    train, held_out = generate_scenes(ScenesSection(train=20, eval=5))
    found = read_split(tmp_path / "train", prompt="P")
    assert [each.prompt for each in found] == ["P"] * 20
    assert [(s.id, s.images, s.references, s.metadata) for s in found] == [
        (s.id, s.images, s.references, s.metadata) for s in train
    ]
    assert [s.id for s in read_split(tmp_path / "eval", prompt="")] == [s.id for s in held_out]


@pytest.mark.parametrize("change", [{"seed": 1}, {"train": 21}, {"image_size": 32}, {"max_objects": 2}])
def test_other_settings_are_refused(tmp_path: Path, change: dict[str, int]) -> None:
    write(tmp_path)
    with pytest.raises(DataError, match=r"train was made with .* but data.scenes asks for .*remove it"):
        write(tmp_path, **change)


def test_a_missing_split_is_written_and_a_foreign_one_refused(tmp_path: Path) -> None:
    write_parquet(tmp_path / "eval", [sample(0)])
    with pytest.raises(DataError, match="eval is no generated scenes data set"):
        write(tmp_path)
    assert [s.id for s in read_split(tmp_path / "eval", prompt="")] == ["s0"]
    cfg = ScenesSection(train=20, eval=5)
    assert not write_scenes(cfg, tmp_path / "train", None)
    assert write_scenes(cfg, tmp_path / "train", tmp_path / "held_out.parquet")


def test_two_writers_at_once_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other process finishes between our look and our write."""

    def slow_write(path: Path, samples: Any, **options: Any) -> int:
        rows = list(samples)
        write_parquet(path, rows, **options)
        return write_parquet(path, rows, **options)

    monkeypatch.setattr("mmrl_ray.data.scenes.generator.write_parquet", slow_write)
    write(tmp_path)
    assert len(read_split(tmp_path / "train", prompt="")) == 20
