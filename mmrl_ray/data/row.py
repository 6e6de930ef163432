"""`Sample`, and the table layout it has in Parquet: the Hugging Face `datasets` image layout.

id           string, optional: otherwise named after shard and row
image        struct<bytes: binary, path: string>      or  images: list<struct<…>>
prompt       string, optional: otherwise `data.prompt`
references   list<string>, also as `captions`; or one string as `caption` or `text`; optional
metadata     struct or a JSON string, optional
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from operator import attrgetter
from typing import Any, TypeVar

import pyarrow as pa

from mmrl_ray.errors import DataError, ImageError

_IMAGE_COLUMNS = ("image", "images")
_REFERENCE_COLUMNS = ("references", "captions", "caption", "text")

T = TypeVar("T")


def pickled_by_fields(cls: type[T]) -> type[T]:
    """Has a frozen, slotted dataclass pickled as a call of itself with its fields.

    What `dataclasses` gives such a class asks for the fields at every object: two to three times the time, which was a
    sixth of what the rollout controller did.
    """
    names = [each.name for each in fields(cls)]  # type: ignore[arg-type]  # of a dataclass
    values = attrgetter(*names) if len(names) > 1 else lambda carrier: (getattr(carrier, names[0]),)
    cls.__reduce__ = lambda self: (cls, values(self))  # type: ignore[method-assign]
    return cls


@pickled_by_fields
@dataclass(frozen=True, slots=True)
class Sample:
    """One dataset row: a picture (or several), what is asked of it, and what people wrote about it.

    Example:
        >>> sample = Sample("img-7", (b"PNG of 40 KB",), "Describe the image.", ("a red circle", "one circle"))
        >>> sample.key
        'img-7'
    """

    id: str
    """What people call it; rows may share one (a row a caption of the same picture, say)."""
    images: tuple[bytes, ...]
    """Encoded image files, at least one; decoded only by `data/images.py`."""
    prompt: str
    """The user's turn, without image placeholders; the chat template adds those."""
    references: tuple[str, ...] = ()
    """Reference captions; rewards that need them raise when there are none."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """JSON-like facts about the row (for scenes: the objects and their attributes)."""
    place: str = field(default="", compare=False)
    """Shard and row, as `ParquetDataset.where` names them; empty where it was not read from a data set."""

    @property
    def key(self) -> str:
        """Which row of its data set this is: told by its place, since ids may repeat."""
        return self.place or self.id


@dataclass(frozen=True, slots=True)
class Columns:
    """Which columns of a data set hold what; None where there is none."""

    image: str
    references: str | None
    id: str | None
    prompt: str | None
    metadata: str | None

    @property
    def names(self) -> list[str]:
        """The columns to read."""
        every = (self.id, self.image, self.prompt, self.references, self.metadata)
        return [name for name in every if name is not None]

    @classmethod
    def of(cls, schema: pa.Schema, source: str) -> Columns:
        """Finds them in a schema; `source` names the data set in errors.

        Raises:
            DataError: no image column (the message names the columns there are), or one of another type.
        """
        there = ", ".join(schema.names) or "none"
        known = {*_IMAGE_COLUMNS, *_REFERENCE_COLUMNS, "id", "prompt", "metadata"}
        twice = next((name for name in schema.names if name in known and schema.names.count(name) > 1), None)
        if twice is not None:
            raise DataError(f"{source} has several columns `{twice}`; keep one. Its columns are: {there}")
        image = _first(_IMAGE_COLUMNS, schema)
        if image is None:
            raise DataError(
                f"{source} has no column `image` (struct<bytes, path>) or `images` (a list of those); "
                f"its columns are: {there}"
            )
        if not _holds_images(schema.field(image).type):
            raise DataError(
                f"column `{image}` of {source} is {schema.field(image).type}; it must be struct<bytes, path>, "
                "binary, or a list of those"
            )
        references = _first(_REFERENCE_COLUMNS, schema)
        if references is not None and not _is_text(_item(schema.field(references).type)):
            raise DataError(
                f"column `{references}` of {source} is {schema.field(references).type}; it must be string or "
                "list<string>"
            )
        optional = {name: name if name in schema.names else None for name in ("id", "prompt", "metadata")}
        return cls(image=image, references=references, **optional)


ReadFile = Callable[[str], bytes]
"""Reads an image that a row names by its path; raises ImageError."""


def sample_from_row(
    row: Mapping[str, Any], columns: Columns, *, sample_id: str, prompt: str, read_file: ReadFile, place: str = ""
) -> Sample:
    """One row as a `Sample`; `sample_id` and `prompt` are for rows that bring none, `place` is where it lies.

    Raises:
        ImageError: an image is absent or its file cannot be read.
        DataError: the metadata is no JSON object, or a text has the wrong type.
    """
    return Sample(
        id=row_id(row, columns, sample_id),
        images=images_from_cell(row[columns.image], read_file),
        prompt=_text(row.get(columns.prompt or ""), "prompt") or prompt,
        references=references_from_cell(row.get(columns.references or "")),
        metadata=_metadata(row.get(columns.metadata or "")),
        place=place,
    )


def row_id(row: Mapping[str, Any], columns: Columns, otherwise: str) -> str:
    """The row's own id as text, or `otherwise`."""
    value = row.get(columns.id or "")
    return otherwise if value is None or value == "" else str(value)


def references_from_cell(cell: Any) -> tuple[str, ...]:
    """What people wrote, stripped; nulls and blanks left out."""
    if cell is None:
        return ()
    texts = [cell] if isinstance(cell, str) else cell
    return tuple(text for text in (_text(each, "reference") for each in texts) if text)


def sample_schema(*, several_images: bool, extra: Mapping[str, str] | None = None) -> pa.Schema:
    """The schema of written data sets, with the feature description by which HF `datasets` decodes the images."""
    image: pa.DataType = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    image_feature: dict[str, Any] = {"_type": "Image"}
    name = "image"
    if several_images:
        # "Sequence" rather than "List": `datasets` before 4.0 knows only that name, later ones read both.
        name, image, image_feature = "images", pa.list_(image), {"feature": image_feature, "_type": "Sequence"}
    text_feature = {"dtype": "string", "_type": "Value"}
    fields = [
        ("id", pa.string(), text_feature),
        (name, image, image_feature),
        ("prompt", pa.string(), text_feature),
        ("references", pa.list_(pa.string()), {"feature": text_feature, "_type": "Sequence"}),
        ("metadata", pa.string(), text_feature),
    ]
    features = {name: feature for name, _, feature in fields}
    metadata: dict[bytes | str, bytes | str] = {"huggingface": json.dumps({"info": {"features": features}})}
    metadata.update(extra or {})
    return pa.schema([(name, kind) for name, kind, _ in fields], metadata=metadata)


def table_from_samples(samples: Iterable[tuple[Sample, tuple[str, ...] | None]], schema: pa.Schema) -> pa.Table:
    """Rows of `sample_schema`; with paths beside a sample, those are stored instead of its bytes."""
    several = "images" in schema.names
    rows = []
    for sample, paths in samples:
        cells: list[dict[str, bytes | str | None]]
        if paths is None:
            cells = [{"bytes": image, "path": None} for image in sample.images]
        else:
            cells = [{"bytes": None, "path": path} for path in paths]
        rows.append(
            {
                "id": sample.id,
                ("images" if several else "image"): cells if several else cells[0],
                "prompt": sample.prompt or None,
                "references": list(sample.references),
                "metadata": json.dumps(dict(sample.metadata), ensure_ascii=False) if sample.metadata else None,
            }
        )
    return pa.Table.from_pylist(rows, schema=schema)


def _first(names: Iterable[str], schema: pa.Schema) -> str | None:
    return next((name for name in names if name in schema.names), None)


def _item(kind: pa.DataType) -> pa.DataType:
    """What a list holds; anything else is itself."""
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return kind.value_type if is_list else kind


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        return _is_text(kind.value_type)
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _is_bytes(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def _holds_images(kind: pa.DataType) -> bool:
    kind = _item(kind)
    if not pa.types.is_struct(kind):
        return _is_bytes(kind)
    members = {member.name: member.type for member in kind.fields}
    known = {"bytes": _is_bytes, "path": _is_text}
    # A column that is null in every row of a shard has the null type in some writers' files.
    found = [pa.types.is_null(kind) or known[name](kind) for name, kind in members.items() if name in known]
    return bool(found) and all(found)


def images_from_cell(cell: Any, read_file: ReadFile) -> tuple[bytes, ...]:
    """The encoded pictures of a row.

    Raises:
        ImageError: one is absent or its file cannot be read.
    """
    cells = cell if isinstance(cell, list) else [cell]
    images = tuple(_image(each, read_file) for each in cells)
    if not images:
        raise ImageError("the row's list of images is empty")
    return images


def images_length(cell: Any, file_size: Callable[[str], int]) -> int:
    """Bytes of a row's pictures together, of which none is read from a file; raises as `images_from_cell`."""
    cells = cell if isinstance(cell, list) else [cell]
    return sum(
        file_size(each["path"])
        if isinstance(each, dict) and not each.get("bytes") and each.get("path")
        else len(_image(each, _no_file))
        for each in cells
    )


def _no_file(path: str) -> bytes:
    raise AssertionError(f"{path} is not to be read")


def _image(cell: Any, read_file: ReadFile) -> bytes:
    if isinstance(cell, bytes):
        return cell
    if cell is not None and cell.get("bytes") is not None and (cell["bytes"] or not cell.get("path")):
        return cell["bytes"]
    if cell is None or not cell.get("path"):
        raise ImageError("the row has neither image bytes nor a path")
    return read_file(cell["path"])


def _text(value: Any, what: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f"{what} {value!r} is no text")
    return value.strip()


def _metadata(value: Any) -> dict[str, Any]:
    if value is None or value == "":
        return {}
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (json.JSONDecodeError, RecursionError) as error:
            raise DataError(f"metadata is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise DataError(f"metadata must be a JSON object, not {type(value).__name__}")
    return value
