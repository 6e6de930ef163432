"""Held-out pictures that were trained on: by the content of their encoded files.

What a run is measured on must not be what it learned. Pictures are compared as files, byte for byte, by the hash that
the rollout log and the store of preferences keep too; the same photograph saved anew is another file.

The cost is reading the training pictures, once: a hash is made only of those of the length of a held-out one. So no
more than `READ_BYTES` of embedded pictures are read, row groups drawn evenly, and it is said how many rows that were:
of COCO's 118,000 photographs, 19 GB, about one in nine. Pictures beside the shards are looked at by their files' sizes,
and read only where those match.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmrl_ray.data.images import image_hash
from mmrl_ray.data.row import Sample
from mmrl_ray.data.samples import shuffled, some
from mmrl_ray.data.shards import ParquetDataset, is_local, locate
from mmrl_ray.errors import DataError

READ_BYTES = 2 << 30
"""About ten seconds of a local disk."""
_PATH_BYTES, _FAR_FILE = 1024, 1 << 20
"""Rows smaller than that name their pictures by path; asking an object store for the size of one counts as so much."""


@dataclass(frozen=True, slots=True)
class Overlap:
    """Which of N held-out samples show a picture that training has."""

    trained_on: str
    """Where training's pictures are: a setting, or a path."""
    samples: int
    found: tuple[str, ...]
    """Ids of those held-out samples, in order."""
    looked_at: int
    """Rows of training that were compared."""
    rows: int
    """Of training in all."""

    @property
    def share(self) -> float:
        """The part of the held-out samples that training has, as far as was looked."""
        return len(self.found) / self.samples if self.samples else 0.0

    def __str__(self) -> str:
        covered = (
            f"all {self.rows:,} rows"
            if self.looked_at == self.rows
            else f"{self.looked_at:,} of {self.rows:,} rows, as many as are read for this"
        )
        if not self.found:
            return f"none of {self.samples:,} held-out pictures is in {self.trained_on} ({covered} compared)"
        if len(self.found) == self.samples:
            told = f"nothing is held out: all {self.samples:,} held-out pictures are trained on"
        else:
            told = f"{len(self.found):,} of {self.samples:,} held-out pictures ({self.share:.0%}) are trained on"
        return (
            f"{told}: {some(self.found)}; figures on them do not show what was learned. They are in {self.trained_on} "
            f"({covered} compared): take them out of one of the two"
        )

    def to_json(self) -> dict[str, Any]:
        """For summary and events."""
        return {
            "trained_on": self.trained_on,
            "samples": self.samples,
            "found": len(self.found),
            "share": self.share,
            "ids": [*self.found[:20]],
            "looked_at": self.looked_at,
            "rows": self.rows,
        }


def overlap_with_hashes(held_out: Sequence[Sample], hashes: Iterable[str], trained_on: str) -> Overlap:
    """By the hashes (`image_hash`) of training's pictures, one a row."""
    by_hash = _by_hash(held_out)
    seen, rows = set(), 0
    for rows, digest in enumerate(hashes, start=1):  # noqa: B007 - their count is read below
        if digest in by_hash:
            seen.add(digest)
    return _overlap(trained_on, held_out, by_hash, seen, rows, rows)


def overlap_with_data(held_out: Sequence[Sample], location: str, *, read_bytes: int = READ_BYTES) -> Overlap:
    """By the pictures of a data set, of which at most `read_bytes` (and a row group) are read.

    Raises:
        DataError: the data set cannot be read. A row's picture that cannot is passed over.
    """
    dataset = ParquetDataset(location)
    by_hash = _by_hash(held_out)
    lengths = {sum(map(len, sample.images)) for sample in held_out}
    seen: set[str] = set()
    looked_at = read = 0
    for number in shuffled(len(dataset.groups), "held out"):
        group = dataset.groups[number]
        if read >= read_bytes:
            break
        for images in dataset.iter_images(group, lengths):
            if (digest := image_hash(images)) in by_hash:
                seen.add(digest)
        read += group.nbytes
        if not dataset.is_local and group.nbytes < _PATH_BYTES * group.rows:
            read += _FAR_FILE * group.rows
        looked_at += group.rows
    return _overlap(location, held_out, by_hash, seen, looked_at, dataset.rows)


def same_place(one: str, other: str) -> bool:
    """Whether two locations are the same file or folder, as far as their names say."""
    try:
        (first, path), (second, other_path) = locate(one), locate(other)
    except DataError:
        return one == other
    if is_local(first) and is_local(second):
        return os.path.realpath(path) == os.path.realpath(other_path)
    return first == second and path == other_path


def _by_hash(samples: Sequence[Sample]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for place, sample in enumerate(samples):
        found.setdefault(image_hash(sample.images), []).append(place)
    return found


def _overlap(
    trained_on: str,
    held_out: Sequence[Sample],
    by_hash: Mapping[str, Sequence[int]],
    seen: Iterable[str],
    looked_at: int,
    rows: int,
) -> Overlap:
    places = sorted(place for digest in seen for place in by_hash[digest])
    return Overlap(trained_on, len(held_out), tuple(held_out[place].id for place in places), looked_at, rows)
