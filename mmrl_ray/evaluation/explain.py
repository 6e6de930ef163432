"""`mmrl explain`: what a caption of a picture depends on, in figures and as a heat map over the picture.

The map, a PNG, shows the importance of each image token for one caption. `image_grid` says which rectangle of the
picture each token stands for. That is known for one view of the picture in row-major tokens (LLaVA, Gemma 3, InternVL
without tiles) and for Qwen-VL's grids; not for pictures that were cut into tiles, nor for several pictures in one
prompt.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import numpy.typing as npt
import torch
from matplotlib.colorbar import ColorbarBase
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from PIL import Image

from mmrl_ray.analysis.attribution import Importance, caption_importance
from mmrl_ray.data.images import decode_image
from mmrl_ray.data.samples import Sample
from mmrl_ray.evaluation.captioning import read_image, target_captions, write_out
from mmrl_ray.evaluation.model_source import open_target
from mmrl_ray.experience.carriers import MODALITIES, EncodedPrompt
from mmrl_ray.policy.model import Policy
from mmrl_ray.policy.prompts import check_context, encode_caption, encode_prompts
from mmrl_ray.policy.vision import vision_features
from mmrl_ray.telemetry.terminal import visible

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


@dataclass(frozen=True, slots=True)
class Explanation:
    """What one caption of one picture depends on."""

    caption: str
    importance: Importance
    grid: ImageGrid | str
    """Of the image tokens, or why it is not known."""
    notes: tuple[str, ...]

    @property
    def heat_map(self) -> bytes | None:
        """A PNG; None where the places of the image tokens are not known."""
        tokens = self.importance.image_tokens
        if isinstance(self.grid, str) or tokens is None:
            return None
        facts = list(figures(self.importance))
        return heat_map_png(self.grid, tokens, title=self.caption, facts=facts)


def explain_image(
    target: str,
    image: str | Path,
    *,
    caption: str | None = None,
    prompt: str | None = None,
    checkpoint: str | None = None,
) -> Explanation:
    """What a run's policy (or a model) looks at when it says `caption`, or what it says of itself, greedily.

    Args:
        target: a run folder, a model folder or a hub id.
        image: a PNG, JPEG, WebP or GIF file.
        caption: whose words to explain.
        prompt: what to ask; by default what the run asked.
        checkpoint: of a run: `best`, `last` or a step.

    Raises:
        DataError, ImageError: the file is missing or no image, or the caption holds a special token.
        RunError, ModelError: the target cannot be used.
    """
    data = read_image(image)  # before the model is loaded: a typo answers at once
    opened = open_target(target, checkpoint=checkpoint)
    policy = opened.policy
    sample = Sample(str(image), (data,), opened.prompt if prompt is None else prompt)
    if caption is None:
        (caption,) = target_captions(opened, [sample])
    (encoded,) = encode_prompts(policy, [sample])
    tokens = encode_caption(policy, caption)
    check_context(policy, encoded, tokens.numel())
    with torch.no_grad():
        (features,) = vision_features(policy, [encoded])
    importance = caption_importance(policy, encoded, features, tokens, by_token=True)
    return Explanation(caption.strip(), importance, image_grid(policy, encoded, sample.images), opened.notes)


def explain(
    target: str,
    image: Path,
    *,
    caption: str | None = None,
    prompt: str | None = None,
    out: Path | None = None,
    checkpoint: str | None = None,
) -> None:
    """Prints the shares and writes the heat map to `out`, by default `IMAGE-explained.png` in the working folder.

    Raises:
        RunError: the file cannot be written.
    """
    explained = explain_image(target, image, caption=caption, prompt=prompt, checkpoint=checkpoint)
    print(visible(f"caption: {explained.caption}"))
    for line in (*figures(explained.importance), *explained.notes):
        print(line)
    heat_map = explained.heat_map
    if heat_map is None:
        print(f"no heat map: the places of this model's image tokens are not known: {explained.grid}")
        return
    file = out or Path(f"{image.stem}-explained.png")
    write_out(file, heat_map)
    print(f"heat map: {file}")


def figures(importance: Importance) -> Iterator[str]:
    """A line for each modality, and the caption's log-prob."""
    for name in MODALITIES:
        yield f"{name}: share {importance.share[name]:.3f}, RMS {importance.rms[name]:.3g}"
    yield f"log-prob of the caption: {-importance.loss:.2f}"
