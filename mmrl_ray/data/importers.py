"""COCO captions, Karpathy's splits and JSONL with image paths → Parquet data sets.

Each importer streams: one image is in memory at a time, beside the row group being filled. An image that is missing,
broken or without its caption is left out, with its reason, within a budget; a file that is not what it should be is
an error at once. What is written appears whole or not at all. What annotation files hold is read in
`annotations.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from mmrl_ray.data.annotations import Annotation, Unlisted, coco_annotations, jsonl_annotations, karpathy_annotations
from mmrl_ray.data.images import MAX_BYTES, decode_image, image_extension, image_hash
from mmrl_ray.data.row import Sample
from mmrl_ray.data.samples import Quarantine, QuarantineRecord
from mmrl_ray.data.writing import ShardWriter
from mmrl_ray.errors import DataError, ImageError

ROWS_PER_SHARD = 5000
"""About 800 MB of COCO photographs."""
DEFAULT_BUDGET = 20
"""Samples that may be left out."""

Progress = Callable[[int, int | None], None]
"""(rows done, rows in all or None where that is not known), after each row."""


@dataclass(frozen=True, slots=True)
class ImportSummary:
    """What an import did."""

    out: str
    rows: int
    """Written."""
    references: int
    quarantined: tuple[QuarantineRecord, ...]
    unlisted: Unlisted = field(default_factory=Unlisted)
    """What a captions file says of images that it does not list."""


def import_coco(
    annotations: Path | None,
    images: Path,
    out: Path,
    *,
    karpathy: Path | None = None,
    split: str | None = None,
    embed: bool = True,
    rows_per_shard: int = ROWS_PER_SHARD,
    max_quarantined: int = DEFAULT_BUDGET,
    progress: Progress | None = None,
) -> ImportSummary:
    """Imports `captions_*.json` with its image folder, or one split of Karpathy's `dataset_coco.json`.

    With `karpathy`, captions and file names come from that file (`annotations` is None), `images` is the folder that
    holds `train2014/` and `val2014/`, and `split` is train, restval, val, test or several joined by "+"; by default
    "train+restval", the 113,287 pictures that the literature trains on. `embed=False` copies the images beside the
    shards, named by content, instead of putting their bytes into them.

    Raises:
        DataError: a file is missing or not what it should be, no such split, or `out` exists or cannot be written.
        QuarantineError: more than `max_quarantined` images are missing, broken or have no caption.
    """
    if (annotations is None) == (karpathy is None):
        raise DataError("name either a captions file or Karpathy's dataset_coco.json: the latter has captions too")
    _check_folder(images)
    unlisted = Unlisted()
    if karpathy is not None:
        found = karpathy_annotations(karpathy, images, split or "train+restval")
    elif annotations is not None:
        if split is not None:
            raise DataError(f"split {split!r} needs Karpathy's dataset_coco.json: a captions file is one split")
        found, unlisted = coco_annotations(annotations, images)
    writer = _writer(out, rows_per_shard, several_images=False)
    summary = _import(iter(found), len(found), writer, embed, Quarantine(max_quarantined), progress)
    return replace(summary, unlisted=unlisted)


def import_jsonl(
    file: Path,
    out: Path,
    *,
    images: Path | None = None,
    embed: bool = True,
    rows_per_shard: int = ROWS_PER_SHARD,
    max_quarantined: int = DEFAULT_BUDGET,
    progress: Progress | None = None,
) -> ImportSummary:
    """Imports one sample a line: {"image": path | "images": [paths], "captions": …, "id", "prompt", "metadata"}.

    Captions are a string or a list of strings under references, captions, caption or text, and may be absent. Paths
    are relative to `images` (by default the file's own folder) and must lie inside of it. Blank lines are passed over.

    Raises:
        DataError: a line is no such object (the message has its number), or `out` exists or cannot be written.
        QuarantineError: more than `max_quarantined` images are missing or broken.
    """
    root = images if images is not None else file.parent
    _check_folder(root)
    # The column's type is fixed by the first line; `_import` holds the others to it.
    first = next(jsonl_annotations(file, root), None)
    if first is None:
        raise DataError(f"{file} has no lines")
    writer = _writer(out, rows_per_shard, several_images=first.several)
    return _import(jsonl_annotations(file, root), None, writer, embed, Quarantine(max_quarantined), progress)


def _check_folder(images: Path) -> None:
    if not images.is_dir():
        raise DataError(f"no image folder {images}")


def _writer(out: Path, rows_per_shard: int, *, several_images: bool) -> ShardWriter:
    one_file = out.name.endswith(".parquet")
    return ShardWriter(out, rows_per_shard=None if one_file else rows_per_shard, several_images=several_images)


def _import(
    annotations: Iterator[Annotation],
    total: int | None,
    writer: ShardWriter,
    embed: bool,
    quarantine: Quarantine,
    progress: Progress | None,
) -> ImportSummary:
    references = 0
    with writer:
        for done, annotation in enumerate(annotations, start=1):
            if annotation.several != writer.several_images:
                raise DataError(f"{annotation.where}: every line must have the same key, `image` or `images`")
            try:
                images = _read_images(annotation)
            except ImageError as error:
                quarantine.add(annotation.id, str(error), annotation.where)
            else:
                paths = None if embed else tuple(_add_image(writer, image) for image in images)
                writer.write(
                    Sample(annotation.id, images, annotation.prompt, annotation.references, annotation.metadata), paths
                )
                references += len(annotation.references)
            if progress is not None:
                progress(done, total)
        if not writer.rows:
            reason = f": {quarantine.records[0].reason}" if len(quarantine) else ""
            raise DataError(f"nothing to import, no sample is whole{reason}")
    return ImportSummary(writer.location, writer.rows, references, quarantine.records)


def _read_images(annotation: Annotation) -> tuple[bytes, ...]:
    if annotation.problem:
        raise ImageError(annotation.problem)
    return tuple(_read_image(places) for places in annotation.images)


def _read_image(places: tuple[Path, ...]) -> bytes:
    path = places[0]
    try:
        found = [place for place in places if place.is_file()]
        if not found:
            raise ImageError(f"image {path} is missing")
        path = found[0]
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise ImageError(f"image {path} has {size:,} bytes: at most {MAX_BYTES:,} are accepted")
        data = path.read_bytes()
    except OSError as error:
        raise ImageError(f"image {path} cannot be read: {error.strerror}") from error
    try:
        decode_image(data)
    except ImageError as error:
        raise ImageError(f"image {path}: {error}") from error
    return data


def _add_image(writer: ShardWriter, image: bytes) -> str:
    """Puts an image beside the shards, once however often it comes; returns the path that its rows name."""
    name = f"images/{image_hash([image])}.{image_extension(image)}"
    writer.add_file(name, image)
    return name
