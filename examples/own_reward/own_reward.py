"""A reward of one's own: a caption earns 1 for naming the colour that covers most of its picture, 0 otherwise.

The config beside it says `kind: function`, this function's path, and `state: image`: it is called with captions and,
for each, the encoded pictures of its sample. It may load models, use a GPU, print and raise: it has a process of its
own, and a caption that it fails on is left out of learning, never given 0.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence

from PIL import Image

COLOURS = {
    "red": (214, 40, 40),
    "green": (44, 160, 44),
    "blue": (50, 90, 230),
    "yellow": (245, 215, 45),
    "purple": (150, 60, 190),
    "white": (245, 245, 245),
}


def names_the_colour(
    captions: Sequence[str], states: Sequence[Sequence[bytes]], *, least_saturation: int = 90
) -> list[float]:
    """One number a caption, higher is better.

    Args:
        captions: what the policy said.
        states: for each caption the encoded files of its sample's pictures.
        least_saturation: how far apart a pixel's channels are, or how bright it is, at least to count as colourful.
    """
    return [
        float(main_colour(images[0], least_saturation) in caption.lower().split())
        for caption, images in zip(captions, states, strict=True)
    ]


def main_colour(image: bytes, least_saturation: int) -> str:
    """The nearest name of most colourful pixels."""
    picture = Image.open(io.BytesIO(image)).convert("RGB")
    picture.thumbnail((32, 32))
    pixels = [p for p in picture.get_flattened_data() if max(p) - min(p) >= least_saturation or min(p) > 200]
    return Counter(map(nearest, pixels)).most_common(1)[0][0] if pixels else "black"


def nearest(pixel: tuple[int, int, int]) -> str:
    """The name of the colour with the least squared distance."""
    return min(COLOURS, key=lambda name: sum((a - b) ** 2 for a, b in zip(COLOURS[name], pixel, strict=True)))
