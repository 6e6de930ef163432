"""`evaluate` and `caption`: what a run or a model says of pictures, and what that is worth."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, overload

from mmrl_ray.api.host import leaves_no_trace
from mmrl_ray.config.paths import refuse_unknown

if TYPE_CHECKING:
    from mmrl_ray.api.run import Run
    from mmrl_ray.evaluation.captioning import ImageLike
    from mmrl_ray.evaluation.evaluate import TargetEvaluation

__all__ = ["caption", "evaluate"]


@leaves_no_trace
def evaluate(
    target: str | os.PathLike[str] | Run,
    data: str | os.PathLike[str] | None = None,
    *,
    limit: int | None = None,
    prompt: str | None = None,
    max_new_tokens: int | None = None,
    beta: float | None = None,
    checkpoint: str | int | None = None,
    show: bool = False,
) -> TargetEvaluation:
    """Captions a split greedily and scores it: BLEU-1 to 4, CIDEr-D, ROUGE-L, the run's reward and its parts.

    Its `table` has each measure with its 95 % interval, its `captions()` each caption with its picture and scores.

    Args:
        target: a run, a model folder or a hub id.
        data: Parquet shards with references; by default the run's own held-out split.
        limit: only the first so many rows.
        prompt: for rows that bring none; by default the run's.
        max_new_tokens: by default the run's.
        beta: of decoding with value heads (`algorithm: ilql`); by default the run's.
        checkpoint: of a run: `best`, `last` or a step; by default what the run delivers.
        show: prints the tables, as `mmrl evaluate` does.

    Raises:
        ConfigError: no data is given and the target has none, or there is no such target.
        DataError, ModelError, RunError: what is read cannot be used.
    """
    name = os.fspath(target)
    refuse_unknown(name)  # before anything that takes seconds to import
    from mmrl_ray.evaluation.evaluate import evaluate_target, present

    found = evaluate_target(
        name,
        data=None if data is None else os.fspath(data),
        limit=limit,
        prompt=prompt,
        max_new_tokens=max_new_tokens,
        beta=beta,
        checkpoint=None if checkpoint is None else str(checkpoint),
    )
    if show:
        present(found)
    return found


@overload
def caption(  # type: ignore[overload-overlap]  # a text is of texts, too
    target: str | os.PathLike[str] | Run,
    images: ImageLike,
    *,
    prompt: str | None = None,
    max_new_tokens: int | None = None,
    beta: float | None = None,
    n: None = None,
    temperature: float | None = None,
    checkpoint: str | int | None = None,
) -> str: ...
@overload
def caption(  # type: ignore[overload-overlap]  # a text is of texts, too
    target: str | os.PathLike[str] | Run,
    images: ImageLike,
    *,
    prompt: str | None = None,
    max_new_tokens: int | None = None,
    beta: float | None = None,
    n: int,
    temperature: float | None = None,
    checkpoint: str | int | None = None,
) -> list[str]: ...
@overload
def caption(
    target: str | os.PathLike[str] | Run,
    images: Iterable[ImageLike],
    *,
    prompt: str | None = None,
    max_new_tokens: int | None = None,
    beta: float | None = None,
    n: None = None,
    temperature: float | None = None,
    checkpoint: str | int | None = None,
) -> list[str]: ...
@overload
def caption(
    target: str | os.PathLike[str] | Run,
    images: Iterable[ImageLike],
    *,
    prompt: str | None = None,
    max_new_tokens: int | None = None,
    beta: float | None = None,
    n: int,
    temperature: float | None = None,
    checkpoint: str | int | None = None,
) -> list[list[str]]: ...
@leaves_no_trace
def caption(
    target: str | os.PathLike[str] | Run,
    images: ImageLike | Iterable[ImageLike],
    *,
    prompt: str | None = None,
    max_new_tokens: int | None = None,
    beta: float | None = None,
    n: int | None = None,
    temperature: float | None = None,
    checkpoint: str | int | None = None,
) -> str | list[str] | list[list[str]]:
    """What a run or a model says of pictures: a text of one, a list of several, and with `n` a list of texts of each.

    The model is loaded anew by every call, so give all pictures at once.

    Args:
        target: a run, a model folder or a hub id.
        images: one or several: paths of PNG, JPEG, WebP or GIF files, their bytes, or pictures of Pillow.
        prompt: what to ask; by default what the run asked.
        max_new_tokens: by default the run's.
        beta: of decoding with value heads (`algorithm: ilql`); by default the run's.
        n: texts of each picture.
        temperature: 0 is greedy; by default 0 without `n` or for one text, and 1 for more.
        checkpoint: of a run: `best`, `last` or a step; by default what the run delivers.

    Raises:
        ConfigError: there is no such target, or it cannot be asked that.
        DataError: a file cannot be read. ImageError: it is no image of an accepted format.
        ModelError, RunError: the target cannot be used.
    """
    name = os.fspath(target)
    refuse_unknown(name)  # before anything that takes seconds to import
    from PIL import Image

    from mmrl_ray.evaluation.captioning import caption_images
    from mmrl_ray.telemetry.terminal import RunProgress

    is_one = isinstance(images, str | os.PathLike | bytes | bytearray | memoryview | Image.Image)
    given: list[ImageLike] = [images] if is_one else [*images]  # type: ignore[list-item, misc]
    if not given:
        return []
    with RunProgress() as shown:
        made = caption_images(
            name,
            given,
            prompt=prompt,
            max_new_tokens=max_new_tokens,
            beta=beta,
            n=1 if n is None else n,
            temperature=temperature,
            checkpoint=None if checkpoint is None else str(checkpoint),
            shown=shown,
        )
    if n is None:
        return made[0][0] if is_one else [text for (text,) in made]
    return made[0] if is_one else made
