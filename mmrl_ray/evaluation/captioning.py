"""Captions by a run or a model: of samples for an evaluation (`samples.py`), of pictures for `mmrl caption`."""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from PIL import Image, ImageOps

from mmrl_ray.data import atomic
from mmrl_ray.data.images import decode_image, encode_png
from mmrl_ray.data.samples import Sample
from mmrl_ray.errors import ConfigError, DataError, ImageError, RunError
from mmrl_ray.evaluation.model_source import ModelSource, open_target
from mmrl_ray.evaluation.samples import BATCH, caption_samples
from mmrl_ray.experience.carriers import CaptionState, SamplingParams
from mmrl_ray.policy.generation.decode import Decoder, DecodeRequest, decode_groups
from mmrl_ray.policy.generation.rules import generation_rules
from mmrl_ray.policy.prompts import encode_prompts
from mmrl_ray.telemetry.terminal import ProgressFn, RunProgress

logger = logging.getLogger(__name__)

ImageLike = str | os.PathLike[str] | bytes | Image.Image
"""A file, its bytes, or a picture of Pillow."""
_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")


def target_captions(
    target: ModelSource,
    samples: Sequence[Sample],
    *,
    max_new_tokens: int | None = None,
    beta: float | None = None,
    states: list[CaptionState] | None = None,
    progress: ProgressFn | None = None,
    as_served: bool = False,
) -> list[str]:
    """`caption_samples` by whatever the target captions with; an agent's captions have its own length, and no states.

    `beta` is by default that of the target's value heads, where it has any. `as_served` obeys the checkpoint's
    generation config, as `mmrl serve` does; an evaluation measures the policy alone.

    Raises:
        ConfigError: a `beta` above 0, of a target without value heads.
        DataError, ImageError: a sample cannot be encoded.
        ContextLengthError: a prompt leaves no room for `max_new_tokens`.
    """
    beta = target.beta(beta)
    if target.agent is not None:
        return target.agent.captions(target.policy, samples, progress)
    return caption_samples(
        target.policy,
        samples,
        max_new_tokens=max_new_tokens or target.max_new_tokens,
        beta=beta,
        states=states,
        progress=progress,
        rules=generation_rules(target.policy) if as_served else None,
    )


def caption_images(
    target: str,
    images: Sequence[ImageLike],
    *,
    prompt: str | None = None,
    max_new_tokens: int | None = None,
    beta: float | None = None,
    n: int = 1,
    temperature: float | None = None,
    checkpoint: str | None = None,
    shown: RunProgress | None = None,
) -> list[list[str]]:
    """`n` captions of each image, in order, by a run or a model. No caption is made if one of them is no image.

    Args:
        target: a run folder, a model folder or a hub id.
        images: PNG, JPEG, WebP or GIF: files, their bytes, or pictures of Pillow.
        prompt: what to ask; by default what the run asked.
        max_new_tokens: by default the run's.
        beta: of decoding with value heads; by default the run's.
        n: captions an image.
        temperature: 0 is greedy; by default 0 for one caption and 1 for more, as of the gateway.
        checkpoint: of a run: `best`, `last` or a step.
        shown: says where it is; of few images only if that takes long.

    Raises:
        ConfigError: a `beta` above 0, of a target without value heads; or samples of an agent, which has none.
        DataError: a file is missing or cannot be read.
        ImageError: a file is no image of an accepted format; the message names it.
        RunError, ModelError: the target cannot be used.
    """
    encoded = [
        image_bytes(image, i) for i, image in enumerate(images)
    ]  # before the model is loaded: a typo answers at once
    busy = nullcontext if shown is None else shown.busy
    with busy("loading the model"):
        opened = open_target(target, checkpoint=checkpoint, shown=shown)
    asked = opened.prompt if prompt is None else prompt
    samples = [Sample(_name(image, i), (encoded[i],), asked) for i, image in enumerate(images)]
    if temperature is None:
        temperature = 0.0 if n == 1 else 1.0
    progress = None if shown is None or len(images) <= BATCH else shown.phase("caption")
    with busy("captioning"):
        if n == 1 and temperature == 0:
            captions = target_captions(
                opened, samples, max_new_tokens=max_new_tokens, beta=beta, progress=progress, as_served=True
            )
            return [[text] for text in captions]
        longest = max_new_tokens or opened.max_new_tokens
        return _drawn(opened, samples, n, temperature, longest, opened.beta(beta), progress)


def _drawn(
    target: ModelSource,
    samples: Sequence[Sample],
    n: int,
    temperature: float,
    max_new_tokens: int,
    beta: float,
    progress: ProgressFn | None,
) -> list[list[str]]:
    """`n` captions of each sample, other ones each time."""
    if target.agent is not None:
        raise ConfigError(
            f"{target.name} is a value-based run, whose captions are not sampled: leave out -n and --temperature"
        )
    policy = target.policy
    decoder = Decoder(policy, rules=generation_rules(policy))
    sampling = SamplingParams(
        greedy=temperature == 0,
        temperature=temperature or 1.0,
        max_new_tokens=max_new_tokens,
        min_new_tokens=None,
        value_beta=beta,
    )
    found: list[list[str]] = []
    for start in range(0, len(samples), BATCH):
        prompts = encode_prompts(policy, samples[start : start + BATCH])
        asked = [DecodeRequest(p, n, replace(sampling, seed=secrets.randbits(31))) for p in prompts]
        found += [[each.caption for each in output.completions] for output in decode_groups(decoder, asked)]
        if progress is not None:
            progress(len(found), len(samples), {})
    return found


def write_out(file: Path, content: bytes) -> None:
    """Writes what a command was asked to leave; a RunError where it cannot."""
    try:
        atomic.write_file(file, content)
    except OSError as error:
        raise RunError(f"{file} cannot be written: {error.strerror or error}; choose another --out") from error


def image_bytes(image: ImageLike, place: int = 0) -> bytes:
    """An encoded picture, found to be one.

    Args:
        place: of it among others, by which errors call one that is no file.

    Raises:
        DataError: a file is missing or cannot be read, or it is nothing that holds a picture.
        ImageError: it is no image of an accepted format.
    """
    if isinstance(image, str | os.PathLike):
        return read_image(image)
    name = _name(image, place)
    try:
        if isinstance(image, Image.Image):
            upright = ImageOps.exif_transpose(image)
            return encode_png(upright if upright.mode in _PNG_MODES else upright.convert("RGB"))
        if isinstance(image, bytes | bytearray | memoryview):
            decode_image(bytes(image))
            return bytes(image)
    except ImageError as error:
        raise ImageError(f"{name}: {error}") from error
    raise DataError(f"{name} is a {type(image).__name__}: give a path, encoded bytes or a picture of Pillow")


def _name(image: ImageLike, place: int) -> str:
    """What errors call it."""
    return os.fspath(image) if isinstance(image, str | os.PathLike) else f"image {place} of those given"


def read_image(path: str | os.PathLike[str]) -> bytes:
    """An image file's bytes, found to be an image.

    Raises:
        DataError: the file is missing or cannot be read.
        ImageError: it is no image of an accepted format; the message names it.
    """
    try:
        data = Path(path).expanduser().read_bytes()
    except OSError as error:
        raise DataError(f"image {path} cannot be read: {error.strerror or error}") from error
    try:
        decode_image(data)
    except ImageError as error:
        raise ImageError(f"{path}: {error}") from error
    return data
