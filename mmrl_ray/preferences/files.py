"""Preferences in files: Parquet, or JSON lines with the pictures beside them. One schema for both (`schema.py`).

A line of JSON lines has the names of the columns as keys; `image` is a path relative to the file, or
`{"bytes": "BASE64"}`, and `created` is written as in ISO 8601. In both kinds `sha256:HEX` in place of a path names a
picture that the store has already.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import re
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from mmrl_ray.data.images import MAX_BYTES, decode_image, image_extension, image_hash
from mmrl_ray.errors import ImageError, PreferenceError, one_line
from mmrl_ray.preferences.schema import PREFERENCE_SCHEMA, REQUIRED, Pair, Preference

Item = Pair | Preference
OnBad = Callable[[PreferenceError], None]
_KNOWN = re.compile(r"sha256:([0-9a-f]{64})")
_ROWS = 100
"""Of a row group: pictures are large."""
_KINDS = (".parquet", ".jsonl")


def read_preferences(path: str | Path, on_bad: OnBad | None = None) -> Iterator[Item]:
    """What a file holds, in its order: preferences, and pairs where nobody chose yet. Pictures are decoded as a check.

    Raises:
        PreferenceError: there is no such file, it is of another kind, or a column is missing or of another type; for a
            row that cannot be used, which it names, unless `on_bad` is there to hear of it.
    """
    path = Path(path)
    _check_kind(path)
    if not path.is_file():
        raise PreferenceError(f"{path}: there is no such file")
    pictures = _Pictures(path.parent)
    for where, row in _parquet_rows(path) if path.suffix == ".parquet" else _json_rows(path):
        try:
            if isinstance(row, PreferenceError):
                raise row
            yield _item(row, where, pictures)
        except PreferenceError as error:
            if on_bad is None:
                raise
            on_bad(error)


def write_preferences(path: str | Path, items: Iterable[Item]) -> int:
    """Writes a file of preferences, each with its picture, or leaves nothing; returns how many.

    Raises:
        PreferenceError: the file exists already or cannot be written, or there is nothing to write.
    """
    path = Path(path)
    _check_kind(path)
    if path.exists():
        raise PreferenceError(f"{path} exists already: remove it, or write to another place")
    scratch = path.with_name(f".tmp-{uuid.uuid4().hex}{path.suffix}")
    write = _write_parquet if path.suffix == ".parquet" else _write_json
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        count = write(scratch, items)
        if not count:
            raise PreferenceError(f"nothing to write to {path}: there are no such preferences")
        os.replace(scratch, path)
    except (OSError, pa.ArrowException) as error:
        raise PreferenceError(f"{path} cannot be written: {one_line(error)}") from error
    finally:
        scratch.unlink(missing_ok=True)
    return count


# -- reading -----------------------------------------------------------------------------------------------------------


def _item(row: Mapping[str, Any], where: str, pictures: _Pictures) -> Item:
    digest, data = pictures.of(row.get("image"), where)
    texts = {name: row.get(name) or "" for name in ("prompt", "caption_a", "caption_b", "source")}
    pair = Pair(digest, **texts, image=data, where=where)
    if row.get("choice") is None:
        if (said := [n for n in ("rater", "rating_a", "rating_b") if row.get(n) is not None]) != []:
            raise pair.wrong(f"{said[0]} without a choice: write a, b or tie, or leave all of them out")
        return pair
    return Preference(
        pair=pair,
        choice=row["choice"],
        rater=row.get("rater") or "",
        rating_a=row.get("rating_a"),
        rating_b=row.get("rating_b"),
        shown_first=row.get("shown_first"),
        created=row.get("created"),
    )


class _Pictures:
    """Pictures of rows, each decoded once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._decoded: set[str] = set()

    def of(self, cell: Any, where: str) -> tuple[str, bytes | None]:
        """(hash, encoded picture or None where only the hash is given).

        Raises:
            PreferenceError: it is not there, or broken.
        """
        path = cell.get("path") if isinstance(cell, dict) else cell
        data = cell.get("bytes") if isinstance(cell, dict) else None
        try:
            if data is None:
                if not isinstance(path, str) or not path:
                    raise ImageError("the row has neither image bytes nor a path")
                if known := _KNOWN.fullmatch(path):
                    return known[1], None
                data = self._file(path)
            digest = image_hash([data])
            if digest not in self._decoded:
                decode_image(data)
                self._decoded.add(digest)
        except ImageError as error:
            raise PreferenceError(f"{where}: image: {error}") from error
        return digest, data

    def _file(self, name: str) -> bytes:
        root = self._folder.resolve()
        full = (root / name).resolve() if "\0" not in name else root
        if not full.is_relative_to(root):
            raise ImageError(f"path {name!r:.100} is refused: it must be relative and stay inside the file's folder")
        try:
            if full.stat().st_size > MAX_BYTES:
                raise ImageError(f"file {name!r:.100} has more than {MAX_BYTES:,} bytes")
            return full.read_bytes()
        except OSError as error:
            raise ImageError(f"file {name!r:.100} cannot be read: {error.strerror}") from error


def _parquet_rows(path: Path) -> Iterator[tuple[str, dict[str, Any] | PreferenceError]]:
    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            _check_columns(schema, path)
            names = [name for name in PREFERENCE_SCHEMA.names if name in schema.names]
            wanted = pa.schema([PREFERENCE_SCHEMA.field(name) for name in names])
            number = 0
            for batch in file.iter_batches(batch_size=_ROWS, columns=names):
                table = pa.Table.from_batches([batch]).select(names).cast(wanted)
                for row in table.to_pylist():
                    number += 1
                    yield f"{path.name}, row {number}", row
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise PreferenceError(f"{path} cannot be read as Parquet: {one_line(error)}") from error


def _check_columns(schema: pa.Schema, path: Path) -> None:
    missing = [name for name in REQUIRED if name not in schema.names]
    if missing:
        raise PreferenceError(
            f"{path}: column {missing[0]} is missing; a file of preferences has {', '.join(PREFERENCE_SCHEMA.names)}, "
            f"and this one {', '.join(schema.names)}"
        )
    for field in PREFERENCE_SCHEMA:
        if field.name not in schema.names:
            continue
        try:
            pa.schema([schema.field(field.name)]).empty_table().cast(pa.schema([field]))
        except (pa.ArrowException, ValueError):
            found = schema.field(field.name).type
            raise PreferenceError(f"{path}: column {field.name} is {found}; it must be {field.type}") from None


def _json_rows(path: Path) -> Iterator[tuple[str, dict[str, Any] | PreferenceError]]:
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    where = f"{path.name}, line {number}"
                    try:
                        yield where, _json_row(line, where)
                    except PreferenceError as error:
                        yield where, error
    except OSError as error:
        raise PreferenceError(f"{path} cannot be read: {error.strerror}") from error


def _json_row(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise PreferenceError(f"{where}: no JSON: {error}") from error
    if not isinstance(row, dict):
        raise PreferenceError(f"{where}: {row!r:.60} is no JSON object")
    if unknown := sorted(row.keys() - set(PREFERENCE_SCHEMA.names)):
        raise PreferenceError(
            f"{where}: unknown key {unknown[0]!r:.60}; there are {', '.join(PREFERENCE_SCHEMA.names)}"
        )
    try:
        if isinstance(row.get("image"), dict) and row["image"].get("bytes") is not None:
            row["image"]["bytes"] = base64.b64decode(row["image"]["bytes"], validate=True)
        if row.get("created") is not None:
            row["created"] = datetime.fromisoformat(row["created"])
    except (binascii.Error, TypeError, ValueError) as error:
        raise PreferenceError(f"{where}: image or created cannot be read: {error}") from error
    return row


# -- writing -----------------------------------------------------------------------------------------------------------


def _row(item: Item) -> dict[str, Any]:
    pair = item if isinstance(item, Pair) else item.pair
    row: dict[str, Any] = {
        "id": item.id,
        "image": {"bytes": pair.image, "path": None},
        **{name: getattr(pair, name) for name in ("prompt", "caption_a", "caption_b", "source")},
    }
    if isinstance(item, Pair):
        # Whoever labels the file reads it from left to right; the choice that comes back then says what was first.
        return row | {"shown_first": "a"}
    names = ("choice", "rater", "rating_a", "rating_b", "shown_first", "created")
    return row | {name: getattr(item, name) for name in names}


def _write_parquet(path: Path, items: Iterable[Item]) -> int:
    count = 0
    with pq.ParquetWriter(path, PREFERENCE_SCHEMA, compression="zstd", write_page_checksum=True) as writer:
        rows: list[dict[str, Any]] = []
        for item in items:
            rows.append(_row(item))
            count += 1
            if len(rows) == _ROWS:
                writer.write_table(pa.Table.from_pylist(rows, schema=PREFERENCE_SCHEMA))
                rows = []
        if rows:
            writer.write_table(pa.Table.from_pylist(rows, schema=PREFERENCE_SCHEMA))
    return count


def _write_json(path: Path, items: Iterable[Item]) -> int:
    count = 0
    with path.open("w", encoding="utf-8") as lines:
        for item in items:
            row = _row(item)
            image = row["image"]["bytes"]
            name = f"images/{image_hash([image])}.{image_extension(image)}"
            if not (file := path.parent / name).exists():
                file.parent.mkdir(exist_ok=True)
                file.write_bytes(image)
            row["image"] = name
            if row.get("created") is not None:
                row["created"] = row["created"].isoformat()
            lines.write(json.dumps({k: v for k, v in row.items() if v is not None}, ensure_ascii=False) + "\n")
            count += 1
    return count


def _check_kind(path: Path) -> None:
    if path.suffix not in _KINDS:
        raise PreferenceError(f"{path}: a file of preferences ends in {' or '.join(_KINDS)}")
