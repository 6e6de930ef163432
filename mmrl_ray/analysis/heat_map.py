"""A heat map over a picture, as PNG: how much each image token mattered to one caption."""

from __future__ import annotations

import io
from collections.abc import Sequence

import matplotlib
import numpy as np
import numpy.typing as npt
import torch
from matplotlib.colorbar import ColorbarBase
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from PIL import Image

from mmrl_ray.analysis.image_grid import ImageGrid

_COLOURS = "inferno"
_SIDE_INCHES = 4.2
_DPI = 130
_COARSE = 128
"""Pictures of fewer pixels a side are shown with their pixels."""
_DARKEST, _STRENGTH = 0.25, 0.75


def heat_map_png(grid: ImageGrid, weights: torch.Tensor, *, title: str, facts: Sequence[str] = ()) -> bytes:
    """The view on the left, and on the right the same under its heat, with a scale; words above and below.

    Args:
        grid: of the image tokens.
        weights: [rows x columns], 0 or more, row-major; drawn relative to the largest.
        title: the caption that they are about.
        facts: lines for below.

    Raises:
        ValueError: the weights are not one a token.
    """
    if weights.shape != (grid.rows * grid.columns,):
        raise ValueError(f"{grid.rows} x {grid.columns} tokens have one weight each, got shape {list(weights.shape)}")
    heat = weights.float().reshape(grid.rows, grid.columns).numpy()
    relative = heat / heat.max() if heat.max() > 0 else heat
    aspect = grid.view.height / grid.view.width
    height = min(max(_SIDE_INCHES * aspect, 1.2), 2 * _SIDE_INCHES)
    figure = Figure(figsize=(2 * _SIDE_INCHES + 0.9, height + 0.9 + 0.22 * len(facts)), layout="constrained", dpi=_DPI)
    left, right, scale = figure.subplots(1, 3, width_ratios=(1, 1, 0.035))
    resampling = "nearest" if max(grid.view.size) <= _COARSE else "lanczos"
    for axes, picture, name in (
        (left, grid.view, "what the model saw"),
        (right, _blend(grid.view, relative), "what the caption hangs on"),
    ):
        axes.imshow(picture, interpolation=resampling)
        axes.set_title(name, fontsize=9)
        axes.set_axis_off()
    ColorbarBase(scale, cmap=matplotlib.colormaps[_COLOURS], norm=Normalize(0, float(heat.max()) or 1.0))
    scale.tick_params(labelsize=7)
    scale.set_ylabel("gradient norm of an image token", fontsize=7)
    figure.suptitle(title, fontsize=10, wrap=True, parse_math=False)
    if facts:
        figure.supxlabel("\n".join(facts), fontsize=8, parse_math=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _blend(view: Image.Image, relative: npt.NDArray[np.float32]) -> Image.Image:
    """The picture in grey under the heat: the darker a place, the less hangs on it."""
    colours = (matplotlib.colormaps[_COLOURS](relative)[..., :3] * 255).astype(np.uint8)
    layer = Image.fromarray(colours).resize(view.size, Image.Resampling.NEAREST)
    grey = view.convert("L").convert("RGB")
    return Image.blend(Image.blend(Image.new("RGB", view.size), grey, 1 - _DARKEST), layer, _STRENGTH * 0.8)
