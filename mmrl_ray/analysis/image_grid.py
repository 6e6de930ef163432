"""Image tokens back to their places: which rectangle of the picture each of them stands for, where that is known.

Known for one view of the picture in row-major tokens (LLaVA, Gemma 3, InternVL without tiles) and for Qwen-VL's grids;
not for pictures that were cut into tiles, nor for several pictures in one prompt.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from mmrl_ray.data.images import decode_image
from mmrl_ray.experience.carriers import EncodedPrompt
from mmrl_ray.policy.load import Policy


@dataclass(frozen=True, slots=True)
class ImageGrid:
    """Rows and columns of image tokens over what the model saw of the picture."""

    rows: int
    columns: int
    view: Image.Image
    """RGB: the picture after the processor's resizing and cropping."""


def image_grid(policy: Policy, prompt: EncodedPrompt, images: Sequence[bytes]) -> ImageGrid | str:
    """The grid of a prompt's image tokens, or why it is not known.

    Args:
        policy: whose processor made the prompt.
        prompt: with its pixels.
        images: the encoded files behind it.

    Raises:
        ImageError: an image cannot be decoded.
    """
    tokens = int((prompt.input_ids == policy.placeholder_id).sum())
    if len(images) != 1:
        return f"the prompt has {len(images)} pictures"
    grid = prompt.model_inputs.get("image_grid_thw")
    if grid is not None:
        return _of_qwen(policy, grid, tokens, images[0])
    pixels = prompt.model_inputs.get("pixel_values")
    if pixels is None or pixels.ndim not in (4, 5) or pixels.shape[:-3].numel() != 1:
        shape = "no pixels" if pixels is None else f"pixels of shape {list(pixels.shape)}"
        return f"the processor cuts the picture into tiles ({shape}, {tokens} image tokens)"
    return _of_one_view(policy, pixels.reshape(pixels.shape[-3:]), tokens)


def _of_qwen(policy: Policy, grid: torch.Tensor, tokens: int, image: bytes) -> ImageGrid | str:
    """Patches [1, rows, columns], `merge_size`² of which become one token; the picture is resized, never cropped."""
    _, rows, columns = grid.reshape(-1, 3)[0].tolist()
    processor = policy.processor.image_processor
    merge, patch = int(processor.merge_size), int(processor.patch_size)
    if (rows // merge) * (columns // merge) != tokens:
        return f"{tokens} image tokens are no {rows // merge} x {columns // merge} grid"
    view = decode_image(image).resize((columns * patch, rows * patch), Image.Resampling.BICUBIC)
    return ImageGrid(rows // merge, columns // merge, view)


def _of_one_view(policy: Policy, pixels: torch.Tensor, tokens: int) -> ImageGrid | str:
    """A token for each patch, or for each square of patches: pixels are [3, H, W]."""
    patch = getattr(policy.hf_model.config.vision_config, "patch_size", None)
    high, wide = (patch, patch) if isinstance(patch, int) else tuple(patch or (1, 1))
    rows, columns = pixels.shape[1] // high, pixels.shape[2] // wide
    pooled = math.isqrt(rows * columns // tokens) if tokens else 0
    if not pooled or rows % pooled or columns % pooled or tokens * pooled**2 != rows * columns:
        return f"{tokens} image tokens do not fit {rows} x {columns} patches"
    return ImageGrid(rows // pooled, columns // pooled, _picture(policy, pixels))


def _picture(policy: Policy, pixels: torch.Tensor) -> Image.Image:
    """The processor's normalisation taken back."""
    processor = policy.processor.image_processor
    if getattr(processor, "do_normalize", False):
        mean, std = (torch.tensor(getattr(processor, name)).reshape(-1, 1, 1) for name in ("image_mean", "image_std"))
        pixels = pixels * std + mean
    levels = (pixels.clamp(0, 1) * 255).round().to(torch.uint8)
    return Image.fromarray(np.ascontiguousarray(levels.permute(1, 2, 0).numpy()))
