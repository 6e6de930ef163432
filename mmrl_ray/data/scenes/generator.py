"""The generated data set: a few coloured shapes a picture, five references each, and a held-out split.

The held-out split shows combinations of colour, shape and place that training never does, though training has every
colour, shape and place and every pair of them: what a captioner gets right there it composed. Places and not sizes,
since a small star is no enlarged large star to a patch of 16 pixels: with pairs of colour and shape, or those with
sizes, held out, a million-parameter captioner that named 80 % of facts right on training-like pictures named 30 % on
held-out ones. With places it is 69 % and 65 % at the same stage.

Everything follows from the settings; only the bytes of the PNG files depend on the zlib that Pillow was built with.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from mmrl_ray.config.sections import ScenesSection
from mmrl_ray.data.images import encode_png
from mmrl_ray.data.row import Sample
from mmrl_ray.data.scenes.language import (
    COLOURS,
    POSITIONS,
    SHAPES,
    SIZES,
    AttributeScores,
    Fact,
    SceneObject,
    attribute_scores,
    describe,
    parse_caption,
    scenes_vocabulary,
)
from mmrl_ray.data.shards import ParquetDataset, is_occupied, locate
from mmrl_ray.data.writing import write_parquet
from mmrl_ray.errors import DataError

__all__ = [
    "HELD_OUT",
    "AttributeScores",
    "Fact",
    "attribute_scores",
    "draw_scene",
    "generate_scenes",
    "parse_caption",
    "scenes_vocabulary",
    "write_scenes",
]

HELD_OUT = frozenset(
    (colour, shape, POSITIONS[(i + j) % len(POSITIONS)])
    for i, colour in enumerate(COLOURS)
    for j, shape in enumerate(SHAPES)
)
"""(colour, shape, position) of the held-out split alone: for each colour and shape one place."""

_VERSION = 1
"""Raised when the same settings come to mean other pictures or captions."""
_SETTINGS_KEY = "mmrl.scenes"
_RGB = {
    "red": (220, 40, 40),
    "green": (45, 175, 70),
    "blue": (50, 90, 235),
    "yellow": (240, 215, 50),
    "purple": (165, 65, 205),
    "white": (240, 240, 240),
}
_BACKGROUND = (32, 32, 40)
_RADIUS = {"large": 0.19, "small": 0.12}
"""Of the circle around a shape, in picture sides; a quarter of the picture is 0.5 wide."""
_JITTER = 0.035
"""A shape's centre lies so far from its quarter's, at most, in picture sides."""
_COLOUR_JITTER = 10
_SUPERSAMPLING = 4


def generate_scenes(cfg: ScenesSection) -> tuple[Iterator[Sample], list[Sample]]:
    """(training samples, made one by one; held-out samples). Their prompt is empty: `data.prompt` fills it in."""
    return _samples(cfg, "train"), list(_samples(cfg, "eval"))


def write_scenes(cfg: ScenesSection, train_path: str | Path, eval_path: str | Path | None) -> bool:
    """Writes both splits as Parquet where they are not there yet; returns whether anything was written.

    Raises:
        DataError: a split is there but made with other settings, or something else is, or it cannot be written.
    """
    written = False
    for split, path in (("train", train_path), ("eval", eval_path)):
        if path is None:
            continue
        settings = _settings(cfg, split)
        if _is_there(path, settings):
            continue
        try:
            write_parquet(path, _samples(cfg, split), metadata={_SETTINGS_KEY: settings})
            written = True
        except DataError:
            # Another process may have made the same data set meanwhile.
            if not _is_there(path, settings):
                raise
    return written


def draw_scene(objects: tuple[SceneObject, ...], size: int, rng: random.Random) -> Image.Image:
    """An antialiased RGB picture of `size` × `size` pixels; `rng` jitters places and colours a little."""
    side = size * _SUPERSAMPLING
    image = Image.new("RGB", (side, side), _BACKGROUND)
    draw = ImageDraw.Draw(image)
    for each in objects:
        row, column = each.position.split()
        x = (0.25 if column == "left" else 0.75) + rng.uniform(-_JITTER, _JITTER)
        y = (0.25 if row == "top" else 0.75) + rng.uniform(-_JITTER, _JITTER)
        red, green, blue = (c + rng.randint(-_COLOUR_JITTER, _COLOUR_JITTER) for c in _RGB[each.colour])
        _draw_shape(draw, each.shape, x * side, y * side, _RADIUS[each.size] * side, (red, green, blue))
    return image.reduce(_SUPERSAMPLING)


def _draw_shape(
    draw: ImageDraw.ImageDraw, shape: str, x: float, y: float, radius: float, colour: tuple[int, int, int]
) -> None:
    if shape == "circle":
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
        return
    # Corners on the circle, clockwise from the top: (angle in turns, distance in radii).
    corners = {
        "square": [(1 / 8 + i / 4, 1.15) for i in range(4)],
        "triangle": [(i / 3, 1.15) for i in range(3)],
        "star": [(i / 10, 1.15 if i % 2 == 0 else 0.48) for i in range(10)],
    }[shape]
    points = [
        (x + radius * far * math.sin(2 * math.pi * turn), y - radius * far * math.cos(2 * math.pi * turn))
        for turn, far in corners
    ]
    draw.polygon(points, fill=colour)


def _samples(cfg: ScenesSection, split: str) -> Iterator[Sample]:
    for index in range(cfg.train if split == "train" else cfg.eval):
        # Each picture has a generator of its own, so that a larger data set begins with the smaller one.
        rng = random.Random(f"{_VERSION}/{cfg.seed}/{split}/{index}")
        objects = _objects(rng, rng.randint(1, cfg.max_objects), held_out=split == "eval")
        picture = encode_png(draw_scene(objects, cfg.image_size, rng))
        references, metadata = describe(objects)
        yield Sample(f"{split}-{index:06d}", (picture,), "", references, metadata)


def _objects(rng: random.Random, count: int, *, held_out: bool) -> tuple[SceneObject, ...]:
    """In reading order; training never has a held-out combination, the held-out split has at least one a scene."""
    while True:
        # Colour and shape name an object, so no two share both; and each has a place of its own.
        looks = rng.sample(tuple(product(COLOURS, SHAPES)), count)
        places = sorted(rng.sample(range(len(POSITIONS)), count))
        objects = tuple(
            SceneObject(shape, colour, rng.choice(SIZES), POSITIONS[place])
            for (colour, shape), place in zip(looks, places, strict=True)
        )
        if held_out == any((each.colour, each.shape, each.position) in HELD_OUT for each in objects):
            return objects


def _settings(cfg: ScenesSection, split: str) -> str:
    settings: dict[str, Any] = {
        "version": _VERSION,
        "split": split,
        "images": cfg.train if split == "train" else cfg.eval,
        **cfg.model_dump(include={"image_size", "seed", "max_objects"}),
    }
    return json.dumps(settings, sort_keys=True)


def _is_there(path: str | Path, settings: str) -> bool:
    """Whether a data set of just these settings is at `path`; anything else there is an error."""
    filesystem, target = locate(path)
    try:
        if not is_occupied(filesystem, target):
            return False
    except OSError as error:
        raise DataError(f"{path} cannot be opened: {error}") from error
    found = ParquetDataset(path).key_value_metadata.get(_SETTINGS_KEY)
    if found != settings:
        made = "is no generated scenes data set" if found is None else f"was made with {found}"
        raise DataError(f"{path} {made}, but data.scenes asks for {settings}: remove it or name another place")
    return True
