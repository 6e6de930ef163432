"""What a reward model learns from: captions of pictures, which of two is preferred, how some are rated.

`N` captions (each of a picture once), `P` pairs, `R` ratings, `I` pictures.

`read_judgements` reads Parquet with the columns of `preferences/schema.py`; broken rows are left out and counted. A row
is broken, and says why, where its image is unknown or cannot be decoded, both captions are equal or one is null, the
choice is none of a, b and tie, a rating is NaN or outside of the scale, or it holds neither a choice nor a rating.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from mmrl_ray.config.reward_model import RewardDataSection
from mmrl_ray.data.images import decode_image, image_hash
from mmrl_ray.data.samples import Quarantine
from mmrl_ray.data.shards import ParquetDataset
from mmrl_ray.errors import DataError, ImageError, PreferenceError
from mmrl_ray.experience.carriers import derive_seed
from mmrl_ray.metrics.statistics import resolution
from mmrl_ray.metrics.text import words
from mmrl_ray.preferences.schema import REQUIRED, Pair
from mmrl_ray.reward_model.vision_source import Picture

_COLUMNS = ["id", "image", "prompt", "caption_a", "caption_b", "choice", "rating_a", "rating_b", "source"]
_PREFERRED = {"a": 1.0, "b": 0.0, "tie": 0.5}
_KNOWN = "sha256:"


@dataclass(frozen=True, slots=True)
class Judgement:
    """One row: two captions of a picture, and what was said of them."""

    picture: Picture = field(repr=False)
    caption_a: str
    caption_b: str
    preferred: float | None
    """1 for a, 0 for b, ½ for a tie; None where nobody said."""
    rating_a: float | None = None
    rating_b: float | None = None
    part: str = ""
    """Where its captions are from: figures are given for each part."""


@dataclass(slots=True)
class RewardData:
    """Judgements as arrays."""

    pictures: list[Picture] = field(default_factory=list)
    """I."""
    captions: list[str] = field(default_factory=list)
    """N."""
    of: list[int] = field(default_factory=list)
    """[N], the picture of each caption."""
    pairs: list[tuple[int, int]] = field(default_factory=list)
    """[P], captions."""
    preferred: list[float] = field(default_factory=list)
    """[P], 1 for the first, 0 for the second, ½ for a tie."""
    pair_parts: list[str] = field(default_factory=list)
    """[P]."""
    rated: list[int] = field(default_factory=list)
    """[R], captions."""
    ratings: list[float] = field(default_factory=list)
    """[R]."""
    rating_parts: list[str] = field(default_factory=list)
    """[R]."""

    @classmethod
    def of_judgements(cls, judgements: Iterable[Judgement]) -> RewardData:
        """Pictures and captions that come again are kept once."""
        data = cls()
        pictures: dict[Picture, int] = {}
        captions: dict[tuple[int, str], int] = {}

        def place(picture: int, caption: str) -> int:
            if (picture, caption) not in captions:
                captions[picture, caption] = len(data.captions)
                data.captions.append(caption)
                data.of.append(picture)
            return captions[picture, caption]

        for row in judgements:
            picture = pictures.setdefault(row.picture, len(pictures))
            both = place(picture, row.caption_a), place(picture, row.caption_b)
            if row.preferred is not None:
                data.pairs.append(both)
                data.preferred.append(row.preferred)
                data.pair_parts.append(row.part)
            for caption, rating in zip(both, (row.rating_a, row.rating_b), strict=True):
                if rating is not None:
                    data.rated.append(caption)
                    data.ratings.append(rating)
                    data.rating_parts.append(row.part)
        data.pictures = list(pictures)
        return data

    def vocabulary(self, most: int) -> tuple[str, ...]:
        """Its `most` most frequent words, ties in alphabetical order."""
        counts = Counter(word for caption in self.captions for word in words(caption))
        return tuple(sorted(counts, key=lambda word: (-counts[word], word))[:most])

    def liked(self) -> list[bool]:
        """[N], the captions that won more often than they lost; a rating above the mean is a win, one below a loss."""
        won = np.zeros(len(self.captions))
        for (first, second), preferred in zip(self.pairs, self.preferred, strict=True):
            won[first] += 2 * preferred - 1
            won[second] -= 2 * preferred - 1
        center, _ = self.center_and_spread()
        for caption, rating in zip(self.rated, self.ratings, strict=True):
            if abs(rating - center) > resolution(max(abs(rating), abs(center))):
                won[caption] += np.sign(rating - center)
        return (won > 0).tolist()

    def center_and_spread(self) -> tuple[float, float]:
        """Mean and standard deviation of the ratings; (0, 1) without, or where all are the same."""
        if not self.ratings:
            return 0.0, 1.0
        differ = np.ptp(self.ratings) > resolution(np.abs(self.ratings).max())
        return float(np.mean(self.ratings)), float(np.std(self.ratings)) if differ else 1.0


@dataclass(frozen=True, slots=True)
class Batch:
    """Some pictures with all that was said of their captions; places count within the batch."""

    pictures: list[Picture]
    of: torch.Tensor
    """int64 [n]."""
    captions: torch.Tensor
    """int64 [n], places in the data."""
    pairs: torch.Tensor
    """int64 [p, 2]."""
    pair_rows: torch.Tensor
    """int64 [p], places in the data."""
    rated: torch.Tensor
    """int64 [r]."""
    rating_rows: torch.Tensor
    """int64 [r], places in the data."""


class Batches:
    """Batches of whole pictures, in an order that follows from the seed: epochs of a shuffle each."""

    def __init__(self, data: RewardData, images_per_step: int, seed: int) -> None:
        self._data = data
        self._size = min(images_per_step, len(data.pictures))
        self._random = np.random.default_rng(derive_seed(seed, "reward batches"))
        self._captions = _by(data.of, len(data.pictures))
        of = np.asarray(data.of)
        self._pairs = _by([int(of[first]) for first, _ in data.pairs], len(data.pictures))
        self._ratings = _by([int(of[caption]) for caption in data.rated], len(data.pictures))
        self._order = np.array([], dtype=np.int64)

    def next(self) -> Batch:
        """The next batch."""
        if len(self._order) < self._size:
            self._order = np.concatenate([self._order, self._random.permutation(len(self._data.pictures))])
        chosen, self._order = self._order[: self._size].tolist(), self._order[self._size :]
        return self._batch(list(dict.fromkeys(chosen)))

    def _batch(self, chosen: list[int]) -> Batch:
        data = self._data
        captions = [caption for picture in chosen for caption in self._captions[picture]]
        of = [i for i, picture in enumerate(chosen) for _ in self._captions[picture]]
        places = {caption: i for i, caption in enumerate(captions)}
        pair_rows = [row for picture in chosen for row in self._pairs[picture]]
        rating_rows = [row for picture in chosen for row in self._ratings[picture]]
        pairs = [[places[caption] for caption in data.pairs[row]] for row in pair_rows]
        return Batch(
            pictures=[data.pictures[picture] for picture in chosen],
            of=torch.tensor(of),
            captions=torch.tensor(captions),
            pairs=torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2),
            pair_rows=torch.tensor(pair_rows, dtype=torch.int64),
            rated=torch.tensor([places[data.rated[row]] for row in rating_rows], dtype=torch.int64),
            rating_rows=torch.tensor(rating_rows, dtype=torch.int64),
        )


def _by(owners: Sequence[int], count: int) -> list[list[int]]:
    """Places by owner."""
    found: list[list[int]] = [[] for _ in range(count)]
    for place, owner in enumerate(owners):
        found[owner].append(place)
    return found


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
