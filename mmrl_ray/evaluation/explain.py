"""`mmrl explain`: what a caption of a picture hangs on, in figures and as a heat map over the picture."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from mmrl_ray.analysis.attribution import Importance, caption_importance
from mmrl_ray.analysis.heat_map import ImageGrid, heat_map_png, image_grid
from mmrl_ray.analysis.states import MODALITIES
from mmrl_ray.data import atomic
from mmrl_ray.data.samples import Sample
from mmrl_ray.errors import RunError
from mmrl_ray.evaluation.captioning import read_image, target_captions
from mmrl_ray.evaluation.model_source import open_target
from mmrl_ray.policy.prompts import check_context, encode_caption, encode_prompts
from mmrl_ray.policy.vision import vision_features
from mmrl_ray.telemetry.terminal import visible


@dataclass(frozen=True, slots=True)
class Explanation:
    """Of one caption of one picture."""

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
    device: torch.device | str | None = None,
) -> Explanation:
    """What a run's policy (or a model) looks at when it says `caption`, or what it says of itself, greedily.

    Args:
        target: a run folder, a model folder or a hub id.
        image: a PNG, JPEG, WebP or GIF file.
        caption: whose words to explain.
        prompt: what to ask; by default what the run asked.
        device: the first GPU by default where there is one.

    Raises:
        DataError, ImageError: the file is missing or no image, or the caption holds a special token.
        RunError, ModelError: the target cannot be used.
    """
    data = read_image(image)  # before the model is loaded: a typo answers at once
    opened = open_target(target, device=device)
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
    target: str, image: Path, *, caption: str | None = None, prompt: str | None = None, out: Path | None = None
) -> None:
    """Prints the shares and writes the heat map to `out`, by default `IMAGE-explained.png` in the working folder.

    Raises:
        RunError: the file cannot be written.
    """
    explained = explain_image(target, image, caption=caption, prompt=prompt)
    print(visible(f"caption: {explained.caption}"))
    for line in (*figures(explained.importance), *explained.notes):
        print(line)
    heat_map = explained.heat_map
    if heat_map is None:
        print(f"no heat map: the places of this model's image tokens are not known: {explained.grid}")
        return
    file = out or Path(f"{image.stem}-explained.png")
    try:
        atomic.write_file(file, heat_map)
    except OSError as error:
        raise RunError(f"{file} cannot be written: {error.strerror or error}; choose another --out") from error
    print(f"heat map: {file}")


def figures(importance: Importance) -> Iterator[str]:
    """A line for each modality, and the caption's log-prob."""
    for name in MODALITIES:
        yield f"{name}: share {importance.share[name]:.3f}, RMS {importance.rms[name]:.3g}"
    yield f"log-prob of the caption: {-importance.loss:.2f}"
