"""Preferences and ratings from Parquet to what a reward model learns from; broken rows are left out and counted.

The columns are those of `feedback/schema.py`. A row is broken, and says why, where its image is unknown or cannot be
decoded, both captions are equal or one is null, the choice is none of a, b and tie, a rating is NaN or outside of
the scale, or nobody said anything about it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from mmrl_ray.config.reward_model import RewardDataSection
from mmrl_ray.data.images import decode_image, image_hash
from mmrl_ray.data.quarantine import Quarantine
from mmrl_ray.data.shards import ParquetDataset
from mmrl_ray.errors import DataError, ImageError, PreferenceError
from mmrl_ray.feedback.schema import REQUIRED, Pair
from mmrl_ray.models.reward_data import Judgement
from mmrl_ray.models.vision_source import Picture

_COLUMNS = ["id", "image", "prompt", "caption_a", "caption_b", "choice", "rating_a", "rating_b", "source"]
_PREFERRED = {"a": 1.0, "b": 0.0, "tie": 0.5}
_KNOWN = "sha256:"


def read_judgements(location: str, cfg: RewardDataSection, quarantine: Quarantine) -> list[Judgement]:
    """The good rows of a file or folder, in order; `quarantine` hears of the others.

    Raises:
        DataError: it cannot be read, lacks a column, or has no good row.
        QuarantineError: more broken rows than the budget.
    """
    dataset = ParquetDataset(location)
    names = {name for shard in dataset.shards for name in shard.metadata.schema.to_arrow_schema().names}
    missing = [name for name in REQUIRED if name not in names]
    if missing or not names & {"choice", "rating_a", "rating_b"}:
        lacking = missing[0] if missing else "choice` or `rating_a` and `rating_b"
        raise DataError(f"{location} has no column `{lacking}`; its columns are: {', '.join(sorted(names))}")
    pictures = _Pictures(dataset)
    judgements = []
    for where, row in dataset.iter_rows(_COLUMNS):
        try:
            judgements.append(_judgement(row, pictures, cfg.rating_scale))
        except (PreferenceError, DataError) as error:
            quarantine.add(str(row.get("id") or where), str(error), f"{location}, {where}")
    if not judgements:
        raise DataError(f"{location} has no good row; the first is left out because: {quarantine.records[0].reason}")
    return judgements


def part_of(source: str | None) -> str:
    """What figures are given by: a source up to its sample, such as `scenes:colour`, or a run, whatever its step."""
    part = (source or "").split("/", 1)[0]
    run, at, step = part.rpartition("@")
    return (run if at and step.isdecimal() else part) or "unnamed"


class _Pictures:
    """Each picture of a data set decoded once as a check, and held once."""

    def __init__(self, dataset: ParquetDataset) -> None:
        self._dataset = dataset
        self._known: dict[str, Picture] = {}
        self._by_path: dict[str, str] = {}
        self._broken: dict[str, str] = {}

    def of(self, cell: Any) -> tuple[str, Picture]:
        """(hash, picture) of an image cell; raises ImageError where there is none."""
        data: Any = cell.get("bytes") if isinstance(cell, Mapping) else cell
        path: Any = cell.get("path") if isinstance(cell, Mapping) else None
        if data is None and path is None:
            raise ImageError("the row has no image")
        if data is None and path.startswith(_KNOWN):
            key = path.removeprefix(_KNOWN)
            if key not in self._known:
                raise ImageError(f"unknown image {path}: no row before it brings the picture")
            return key, self._known[key]
        if data is None:
            if path in self._by_path:
                key = self._by_path[path]
                return key, self._known[key]
            data = self._dataset.read_file(path)
        key = image_hash((data,))
        if key in self._broken:
            raise ImageError(self._broken[key])
        if key not in self._known:
            try:
                decode_image(data)
            except ImageError as error:
                self._broken[key] = str(error)
                raise
            self._known[key] = (data,)
        if path is not None and not isinstance(cell.get("bytes"), bytes):
            self._by_path[path] = key
        return key, self._known[key]


def _judgement(row: Mapping[str, Any], pictures: _Pictures, scale: tuple[float, float]) -> Judgement:
    key, picture = pictures.of(row["image"])
    for name in ("caption_a", "caption_b"):
        if row[name] is None:  # an empty one is what a policy may have written
            raise DataError(f"{name} is null")
    pair = Pair(key, row.get("prompt") or "", row["caption_a"], row["caption_b"], row.get("source") or "")
    choice = row.get("choice")
    if choice is not None and choice not in _PREFERRED:
        raise DataError(f"choice {choice!r:.40} is none of a, b and tie")
    ratings = {name: _rating(row.get(name), name, scale) for name in ("rating_a", "rating_b")}
    if choice is None and all(rating is None for rating in ratings.values()):
        raise DataError("the row has neither a choice nor a rating")
    return Judgement(
        picture,
        pair.caption_a,
        pair.caption_b,
        None if choice is None else _PREFERRED[choice],
        part=part_of(pair.source),
        **ratings,
    )


def _rating(value: Any, name: str, scale: tuple[float, float]) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise DataError(f"{name} is {value!r:.40}, which is no finite number")
    if not scale[0] <= value <= scale[1]:
        raise DataError(f"{name}={value:g} is outside the scale from {scale[0]:g} to {scale[1]:g} (data.rating_scale)")
    return float(value)
