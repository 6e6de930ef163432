"""What annotation files say of each sample: COCO captions, Karpathy's `dataset_coco.json`, JSONL. No image is read.

An id stands for one picture: a file that gives it to two is refused, since nobody could say whose the captions are.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmrl_ray.errors import DataError, one_line

KARPATHY_SPLITS = ("train", "restval", "val", "test")
_CAPTION_KEYS = ("references", "captions", "caption", "text")
_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)
"""How files begin whose lines cannot be told apart by their bytes; UTF-32 in the other order begins as UTF-16 does."""
_JSONL_KEYS = ("id", "image", "images", "prompt", "metadata", *_CAPTION_KEYS)


@dataclass(frozen=True, slots=True)
class Annotation:
    """One sample before its images are read."""

    id: str
    where: str
    """File and line or image id, for people."""
    images: tuple[tuple[Path, ...], ...]
    """For each image the places where it may lie; the first that exists counts."""
    references: tuple[str, ...] = ()
    prompt: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    several: bool = False
    """It was written as a list of images, if only of one."""
    problem: str = ""
    """Why it cannot be used, where that is known already."""


@dataclass(frozen=True, slots=True)
class Unlisted:
    """Captions of images that the same file does not list."""

    captions: int = 0
    image_ids: tuple[str, ...] = ()


def coco_annotations(file: Path, images: Path) -> tuple[list[Annotation], Unlisted]:
    """Every image of a COCO captions file, in the file's order, and the captions that belong to none of them.

    Raises:
        DataError: the file is missing, no JSON, or not in COCO's layout; a caption is no text; an id is that of two
            images.
    """
    content = _load_json(file)
    try:
        captions: dict[str, list[str]] = {}
        for number, entry in enumerate(content["annotations"]):
            key = _id(entry["image_id"])
            what = f"annotation {entry.get('id', f'number {number + 1}')} of image {key}"
            captions.setdefault(key, []).append(_caption(entry["caption"], f"{file}, {what}"))
        names: dict[str, str] = {}
        for entry in content["images"]:
            _one_picture(names, _id(entry["id"]), _text(entry["file_name"]), file)
        found = [
            _coco_annotation(key, f"{file} image {key}", [name], captions.pop(key, None), images)
            for key, name in names.items()
        ]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"{file} is no COCO captions file (images[].id, .file_name; annotations[].image_id, .caption): "
            f"{_reason(error)}"
        ) from error
    if not found:
        raise DataError(f"{file} lists no images")
    return found, Unlisted(sum(map(len, captions.values())), tuple(captions))


def karpathy_annotations(file: Path, images: Path, split: str) -> list[Annotation]:
    """The images of one of Karpathy's splits, or of several joined by "+", in the file's order.

    Raises:
        DataError: the file is missing, no JSON or not in that layout, or no image is of that split; a caption is no
            text; an id is that of two images.
    """
    wanted = set(split.split("+"))
    if not wanted <= set(KARPATHY_SPLITS):
        raise DataError(f"no split {split!r}: choose of {', '.join(KARPATHY_SPLITS)}, joined by +")
    content = _load_json(file)
    found: list[Annotation] = []
    pictures: dict[str, str] = {}
    try:
        for entry in content["images"]:
            if entry["split"] not in wanted:
                continue
            sample_id = _id(entry.get("cocoid", entry.get("imgid", entry["filename"])))
            name = _text(entry["filename"])
            what = f"{file}, image {sample_id} ({name})"
            captions = [_caption(sentence["raw"], f"{what}: a sentence") for sentence in entry["sentences"]]
            _one_picture(pictures, sample_id, f"{entry.get('filepath') or ''}/{name}".lstrip("/"), file)
            # Flickr8k and Flickr30k in the same layout have no filepath, and some keep COCO in one flat folder.
            places = [f"{entry['filepath']}/{name}", name] if entry.get("filepath") else [name]
            found.append(_coco_annotation(sample_id, f"{file} image {sample_id}", places, captions, images))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"{file} is not in the layout of dataset_coco.json (images[].split, .filename, .sentences[].raw): "
            f"{_reason(error)}"
        ) from error
    if not found:
        raise DataError(f"{file} has no image of split {split!r}")
    return found


def jsonl_annotations(file: Path, images: Path) -> Iterator[Annotation]:
    """One sample a line, read as it is asked for.

    Raises:
        DataError: the file cannot be read, or a line is not as `import_jsonl` says; the message has its number.
    """
    lines: dict[str, int] = {}
    try:
        with file.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                if number == 1 and line.startswith(_UTF_16):
                    raise DataError(f"{file} is not UTF-8 but UTF-16 or UTF-32: save it as UTF-8")
                if not line.strip():
                    continue
                annotation = _jsonl_annotation(line, number, file, images)
                if annotation.id in lines:
                    raise DataError(f"{annotation.where}: id {annotation.id!r} is that of line {lines[annotation.id]}")
                lines[annotation.id] = number
                yield annotation
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror}") from error


def _coco_annotation(
    sample_id: str, where: str, names: list[str], captions: list[str] | None, images: Path
) -> Annotation:
    references = tuple(caption.strip() for caption in captions or () if caption.strip())
    places, problem = _places(names, images)
    if not references:
        problem = problem or f"image {names[0]} has no caption"
    return Annotation(sample_id, where, (places,), references, problem=problem)


def _jsonl_annotation(line: bytes, number: int, file: Path, images: Path) -> Annotation:
    where = f"{file} line {number}"
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is no JSON: {_reason(error)}") from error
    if not isinstance(row, dict):
        raise DataError(f"{where} is {type(row).__name__}, not an object with an image and captions")
    unknown = sorted(set(row) - set(_JSONL_KEYS))
    if unknown:
        raise DataError(f"{where}: unknown key {unknown[0]!r}; put other facts under `metadata`. Keys: {_JSONL_KEYS}")
    try:
        names = _jsonl_images(row)
        references = _jsonl_references(row)
        prompt = _text(row["prompt"]).strip() if row.get("prompt") is not None else ""
        metadata = row.get("metadata") or {}
        if not isinstance(metadata, dict):
            raise TypeError(f"metadata is {type(metadata).__name__}, not an object")
        _text(json.dumps(metadata, ensure_ascii=False))
        sample_id = f"{file.stem}-{number:07d}" if row.get("id") in (None, "") else _text(str(row["id"]))
    except (TypeError, ValueError) as error:
        raise DataError(f"{where}: {_reason(error)}") from error
    found = [_places([name], images) for name in names]
    return Annotation(
        id=sample_id,
        where=where,
        images=tuple(places for places, _ in found),
        references=references,
        prompt=prompt,
        metadata=metadata,
        several="images" in row,
        problem=next((problem for _, problem in found if problem), ""),
    )


def _jsonl_images(row: Mapping[str, Any]) -> list[str]:
    if ("image" in row) == ("images" in row):
        raise ValueError("it must have either `image` (a path) or `images` (a list of paths)")
    names = row["images"] if "images" in row else [row["image"]]
    if not isinstance(names, list) or not names:
        raise TypeError("`images` must be a list of paths, with one at least")
    return [_text(name) for name in names]


def _jsonl_references(row: Mapping[str, Any]) -> tuple[str, ...]:
    keys = [key for key in _CAPTION_KEYS if row.get(key) is not None]
    if len(keys) > 1:
        raise ValueError(f"captions stand under both {keys[0]!r} and {keys[1]!r}; keep one")
    if not keys:
        return ()
    value = row[keys[0]]
    texts = value if isinstance(value, list) else [value]
    return tuple(text for text in (_text(each).strip() for each in texts) if text)


def _places(names: list[str], images: Path) -> tuple[tuple[Path, ...], str]:
    """Where an image may lie, and what is wrong with that: annotation files must not reach outside the folder."""
    places = tuple(images / name for name in names)
    root = images.resolve()
    for name, place in zip(names, places, strict=True):
        try:
            inside = "\0" not in name and place.resolve().is_relative_to(root)
        except (OSError, RuntimeError):  # a name that is too long, a link that leads to itself
            return places, f"image {name!r} is no usable path"
        if not inside:
            return places, f"image {name!r} is refused: it lies outside {images}"
    return places, ""


def _id(value: Any) -> str:
    """An image's id as text: files that tools wrote give one picture's as 7, "7" or 7.0."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise TypeError(f"the image id {value!r} is neither a whole number nor text")
    return _text(str(value))


def _one_picture(names: dict[str, str], key: str, name: str, file: Path) -> None:
    """Notes which picture an id stands for."""
    if names.setdefault(key, name) != name:
        raise DataError(
            f"{file}: image id {key} is that of two pictures, {names[key]} and {name}: whose its captions are cannot "
            "be told; give each an id of its own"
        )


def _caption(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{what} has the caption {value!r}: it must be text; write one or take it out")
    return _text(value)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} should be text")
    # JSON can hold half of a surrogate pair, which no UTF-8 file can: a UnicodeEncodeError is a ValueError.
    value.encode()
    return value


def _load_json(file: Path) -> Any:
    try:
        return json.loads(file.read_bytes())
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file} is no JSON: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    return f"{one_line(error)} is missing" if isinstance(error, KeyError) else one_line(error)
