"""Pairs and preferences to test with."""

from __future__ import annotations

import io
from functools import cache

from PIL import Image

from mmrl_ray.data.images import image_hash
from mmrl_ray.preferences.schema import Choice, Pair, Preference, Side


@cache
def picture(shade: int = 0) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (shade % 256, shade // 256, 7)).save(file, "PNG")
    return file.getvalue()


def pair(a: str = "a red square", b: str = "a square", *, shade: int = 0, where: str = "") -> Pair:
    image = picture(shade)
    return Pair(image_hash([image]), "describe", a, b, "again@3/s1", image, where)


def preference(
    choice: Choice = "a",
    rater: str = "ann",
    *,
    shade: int = 0,
    ratings: tuple[float | None, float | None] = (None, None),
    first: Side | None = None,
    where: str = "",
) -> Preference:
    return Preference(pair(shade=shade, where=where), choice, rater, *ratings, shown_first=first)
