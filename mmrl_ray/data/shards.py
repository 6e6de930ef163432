"""A Parquet data set on any `pyarrow.fs` location: its path or URI, shards, row groups, rows and fingerprint."""

from __future__ import annotations

import hashlib
import os
import posixpath
import re
from collections import OrderedDict
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from mmrl_ray.data.images import MAX_BYTES
from mmrl_ray.data.row import Columns, Sample, images_from_cell, images_length, row_id, sample_from_row
from mmrl_ray.errors import DataError, ImageError, one_line

_FOOTER_TAIL = 8
"""Bytes at the end of a Parquet file: length of the footer (int32), then "PAR1"."""
_FOOTER_READERS = 8
_OF = re.compile(r"-(\d+)-of-(\d+)\.parquet$")


@dataclass(frozen=True, slots=True)
class Shard:
    """One Parquet file: where it lies, what its footer says."""

    name: str
    path: str
    metadata: pq.FileMetaData
    footer_hash: str
    size: int


@dataclass(frozen=True, slots=True)
class RowGroup:
    """What is read at once."""

    shard: int
    index: int
    first_row: int
    """Of the group, counted within its shard."""
    rows: int
    nbytes: int
    """Uncompressed."""


class ParquetDataset:
    """Opens a file or a folder of `*.parquet` shards (sorted by name); reads nothing but footers until asked.

    A folder whose names say `-00000-of-00004` must hold all four: an upload that is not finished is an error.
    """

    def __init__(self, location: str | Path, *, cached_groups: int = 1) -> None:
        """`cached_groups` row groups stay in memory.

        Raises:
            DataError: nothing there, no rows, an unreadable footer, columns missing.
        """
        self.location = str(location)
        self._filesystem, root = locate(location)
        info, files = _list_shards(self._filesystem, root, self.location)
        self.folder = root if info.type == fs.FileType.Directory else posixpath.dirname(root)
        with ThreadPoolExecutor(_FOOTER_READERS) as pool:
            self.shards = tuple(pool.map(self._open_shard, files))
        self.columns = self._common_columns()
        self.groups = tuple(_row_groups(self.shards))
        self.rows = sum(group.rows for group in self.groups)
        if self.rows == 0:
            raise DataError(f"{self.location} has no rows")
        self._cached_groups = cached_groups
        self._cache: OrderedDict[tuple[int, int], pa.Table] = OrderedDict()

    @cached_property
    def fingerprint(self) -> str:
        """Hex SHA-256 over each shard's name, size and footer.

        A footer holds schema, row counts, sizes and offsets of every column chunk, and least and greatest values, so
        nearly any change of content changes it without a pass over the images; those that `ShardWriter` wrote also
        hold a hash of all images. Not seen in others: image files that rows name by path and that changed since, and
        a column rewritten to the same compressed sizes with the same extremes.
        """
        digest = hashlib.sha256()
        for shard in self.shards:
            digest.update(f"{shard.name}\0{shard.size}\0{shard.footer_hash}\n".encode())
        return digest.hexdigest()

    @property
    def key_value_metadata(self) -> dict[str, str]:
        """The metadata of the first shard's schema, as text."""
        pairs = self.shards[0].metadata.metadata or {}
        return {key.decode(errors="replace"): value.decode(errors="replace") for key, value in pairs.items()}

    def load(self, group: RowGroup) -> pa.Table:
        """A row group, from memory if it is still there; a DataError where it cannot be read."""
        key = (group.shard, group.index)
        if key not in self._cache:
            while len(self._cache) >= self._cached_groups:
                self._cache.popitem(last=False)
            self._cache[key] = self._read(group, self.columns.names)
        self._cache.move_to_end(key)
        return self._cache[key]

    def forget(self) -> None:
        """Frees the row groups in memory."""
        self._cache.clear()

    def where(self, group: RowGroup, offset: int) -> str:
        """Names a row, for people and as its key: shard and row within it."""
        return f"{self.shards[group.shard].name} row {group.first_row + offset}"

    def row(self, group: RowGroup, offset: int) -> dict[str, Any]:
        """One row as plain Python.

        Raises:
            DataError: the row group cannot be read, or the row's text is not UTF-8.
        """
        table = self.load(group)
        try:
            return table.slice(offset, 1).to_pylist()[0]
        except UnicodeDecodeError as error:
            raise DataError(f"text that is not UTF-8: {error}") from error

    def sample_id(self, row: dict[str, Any] | None, group: RowGroup, offset: int) -> str:
        """The row's id, or one made of its place."""
        made = f"{self.shards[group.shard].name.removesuffix('.parquet')}:{group.first_row + offset}"
        return made if row is None else row_id(row, self.columns, made)

    def sample(self, row: dict[str, Any], group: RowGroup, offset: int, prompt: str) -> Sample:
        """A row as a sample; raises as `row.sample_from_row` does. The images are not decoded."""
        return sample_from_row(
            row,
            self.columns,
            sample_id=self.sample_id(row, group, offset),
            prompt=prompt,
            read_file=self.read_file,
            place=self.where(group, offset),
        )

    def iter_column(self, name: str) -> Iterator[Any]:
        """One column's cells in order, without reading the others."""
        for group in self.groups:
            yield from self._read(group, [name]).column(name).to_pylist()

    def iter_rows(self, columns: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
        """(where it is, the cells of these columns that are there) of every row, in order.

        Raises:
            DataError: a row group cannot be read, or its text is not UTF-8.
        """
        for group in self.groups:
            table = self._read(group, columns)
            try:
                rows = table.to_pylist()
            except UnicodeDecodeError as error:
                raise DataError(f"{self.location}, {self.where(group, 0)} ff.: text that is not UTF-8") from error
            for offset, row in enumerate(rows):
                yield self.where(group, offset), row

    def iter_images(self, group: RowGroup, lengths: Collection[int]) -> Iterator[tuple[bytes, ...]]:
        """The pictures of those rows whose files are together as long as one of `lengths`; no other column is read.

        Rows whose pictures cannot be read are passed over.

        Raises:
            DataError: the row group cannot be read.
        """
        for cell in self._read(group, [self.columns.image]).column(self.columns.image):
            try:
                value = cell.as_py()
                if images_length(value, self._file_size) in lengths:
                    yield images_from_cell(value, self.read_file)
            except ImageError:  # whoever trains on the row will say so
                continue

    def _read(self, group: RowGroup, columns: list[str]) -> pa.Table:
        shard = self.shards[group.shard]
        try:
            with (
                self._filesystem.open_input_file(shard.path) as source,
                pq.ParquetFile(source, metadata=shard.metadata, page_checksum_verification=True) as file,
            ):
                # `columns` may name a column that this shard lacks (a null prompt, say): those cells are null then.
                present = [name for name in columns if name in file.schema_arrow.names]
                return file.read_row_group(group.index, columns=present)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"row group {group.index} of {shard.path} cannot be read: {one_line(error)}") from error

    def _open_shard(self, file: fs.FileInfo) -> Shard:
        try:
            with self._filesystem.open_input_file(file.path) as source:
                source.seek(max(0, file.size - _FOOTER_TAIL))
                length = int.from_bytes(source.read(4), "little")
                source.seek(max(0, file.size - _FOOTER_TAIL - length))
                footer = source.read(length)
                metadata = pq.read_metadata(source)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{file.path} cannot be read as Parquet: {one_line(error)}") from error
        return Shard(file.base_name, file.path, metadata, hashlib.sha256(footer).hexdigest(), file.size)

    def _common_columns(self) -> Columns:
        """Those of the first shard; every other shard must hold its images and references under the same names."""
        first, *others = (
            Columns.of(shard.metadata.schema.to_arrow_schema(), f"{self.location} ({shard.name})")
            for shard in self.shards
        )
        for shard, columns in zip(self.shards[1:], others, strict=True):
            if (columns.image, columns.references) != (first.image, first.references):
                raise DataError(
                    f"the shards of {self.location} differ: {self.shards[0].name} has columns "
                    f"{first.image}, {first.references}, but {shard.name} has {columns.image}, {columns.references}"
                )
        return first

    @property
    def is_local(self) -> bool:
        """Whether it lies on this machine's file system."""
        return is_local(self._filesystem)

    def read_file(self, path: str) -> bytes:
        """An image that a row names by a path relative to its shard's folder, never outside of it.

        Raises:
            ImageError: it is missing, too large, or the path is refused.
        """
        self._file_size(path)
        try:
            with self._filesystem.open_input_stream(self._full(path)) as source:
                return source.read()
        except (pa.ArrowException, OSError) as error:
            raise ImageError(f"image file {path} cannot be read: {' '.join(str(error).split())}") from error

    def _file_size(self, path: str) -> int:
        """Bytes of such an image, which is there and none too many."""
        try:
            info = self._filesystem.get_file_info(self._full(path))
        except (pa.ArrowException, OSError) as error:
            raise ImageError(f"image file {path} cannot be read: {' '.join(str(error).split())}") from error
        if info.type != fs.FileType.File:
            raise ImageError(f"image file {path} is missing in {self.folder}")
        if info.size is not None and info.size > MAX_BYTES:
            raise ImageError(f"image file {path} has {info.size:,} bytes: at most {MAX_BYTES:,} are accepted")
        return info.size or 0

    def _full(self, path: str) -> str:
        parts = path.split("/")
        if posixpath.isabs(path) or "\\" in path or ":" in parts[0] or ".." in parts or "\0" in path:
            raise ImageError(
                f"image path {path!r} is refused: it must be relative and stay inside the data set {self.folder}; "
                "rows written elsewhere need relative paths, or the pictures themselves"
            )
        full = posixpath.join(self.folder, path)
        if is_local(self._filesystem):
            full = os.path.realpath(full)
            if not Path(full).is_relative_to(os.path.realpath(self.folder)):
                raise ImageError(f"image path {path!r} is refused: a link leads outside the data set")
        return full


def _list_shards(filesystem: fs.FileSystem, root: str, location: str) -> tuple[fs.FileInfo, list[fs.FileInfo]]:
    try:
        info = filesystem.get_file_info(root)
        if info.type == fs.FileType.NotFound:
            raise DataError(f"no data at {location}: there is no such file or folder")
        if info.type == fs.FileType.File:
            return info, [info]
        files = filesystem.get_file_info(fs.FileSelector(root))
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{location} cannot be listed: {' '.join(str(error).split())}") from error
    shards = sorted(
        (f for f in files if f.type == fs.FileType.File and f.base_name.endswith(".parquet") and f.base_name[0] != "."),
        key=lambda f: f.base_name,
    )
    if not shards:
        raise DataError(f"no *.parquet files in folder {location}")
    _check_complete([f.base_name for f in shards], location)
    return info, shards


def _check_complete(names: list[str], location: str) -> None:
    """Every `-i-of-n` series has its n members."""
    series: dict[tuple[str, int], set[int]] = {}
    for name in names:
        if match := _OF.search(name):
            key = (name[: match.start()], int(match[2]))
            series.setdefault(key, set()).add(int(match[1]))
    for (stem, total), found in series.items():
        missing = [i for i in range(total) if i not in found]
        if missing:
            raise DataError(
                f"{location} has {len(found)} of {total} shards of {stem!r}: number {missing[0]} is missing; "
                "finish the copy or rename the files"
            )


def _row_groups(shards: tuple[Shard, ...]) -> Iterator[RowGroup]:
    for number, shard in enumerate(shards):
        first_row = 0
        for index in range(shard.metadata.num_row_groups):
            group = shard.metadata.row_group(index)
            if group.num_rows:
                yield RowGroup(number, index, first_row, group.num_rows, group.total_byte_size)
            first_row += group.num_rows


def locate(location: str | Path) -> tuple[fs.FileSystem, str]:
    """Local paths become absolute; `scheme://…` goes to the file system that pyarrow has for it.

    Raises:
        DataError: no such file system, or the URI cannot be read.
    """
    text = str(location)
    if "://" not in text:
        return fs.LocalFileSystem(), os.path.abspath(os.path.expanduser(text))
    try:
        filesystem, path = fs.FileSystem.from_uri(text)
    except (pa.ArrowException, OSError, ValueError, ImportError) as error:
        raise DataError(f"{text} is no location that pyarrow can open: {one_line(error)}") from error
    return filesystem, path.rstrip("/") or "/"


def is_local(filesystem: fs.FileSystem) -> bool:
    """Whether it is this machine's own file system."""
    return isinstance(filesystem, fs.LocalFileSystem)


def is_occupied(filesystem: fs.FileSystem, path: str) -> bool:
    """Whether a file, or a folder with anything in it, is there; raises what the file system raises."""
    info = filesystem.get_file_info(path)
    if info.type == fs.FileType.Directory:
        return bool(filesystem.get_file_info(fs.FileSelector(path)))
    return info.type != fs.FileType.NotFound
