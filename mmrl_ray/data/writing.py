"""Writing Parquet data sets so that they appear whole or not at all.

Shards are made under a temporary name beside the target and moved at the end. On a local file system that is one
rename. An object store has none: there the files are moved one by one, and their names say how many there must be
(`part-00000-of-00003.parquet`), so that a reader refuses what is not complete.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import posixpath
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Self

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from mmrl_ray.data.atomic import scratch_folder, sync
from mmrl_ray.data.row import Sample, sample_schema, table_from_samples
from mmrl_ray.data.shards import is_local, is_occupied, locate
from mmrl_ray.errors import DataError, one_line

CONTENT_KEY = "mmrl.images_sha256"
"""Footer entry: over all images of the data set up to and including this shard."""
ROWS_PER_GROUP = 100
"""As HF `datasets` writes images: small enough that a shuffle window of several groups fits in memory."""
_GROUP_BYTES = 64 * 1024 * 1024
"""A row group is closed early when its images reach this."""


class ShardWriter:
    """Streams samples into Parquet shards; a context manager that commits at its end, or leaves nothing.

    A location that ends in `.parquet` becomes one file, any other a folder of shards.
    """

    def __init__(
        self,
        location: str | Path,
        *,
        rows_per_group: int = ROWS_PER_GROUP,
        rows_per_shard: int | None = None,
        several_images: bool = False,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        """`several_images` makes the column a list; `metadata` goes into each shard's footer.

        Raises:
            DataError: from entering to leaving: the location exists already, or cannot be written.
        """
        if rows_per_group < 1 or (rows_per_shard is not None and rows_per_shard < 1):
            raise DataError(f"rows_per_group={rows_per_group}, rows_per_shard={rows_per_shard}: must be 1 or more")
        self.location = str(location)
        self._filesystem, self._target = locate(location)
        self._is_file = self._target.endswith(".parquet")
        if self._is_file and rows_per_shard is not None:
            raise DataError(f"{location} is one file: leave rows_per_shard out, or name a folder")
        self._rows_per_group, self._rows_per_shard = rows_per_group, rows_per_shard
        self._schema = sample_schema(several_images=several_images, extra=metadata)
        self.several_images = several_images
        self._scratch = posixpath.join(posixpath.dirname(self._target), f".tmp-{uuid.uuid4().hex}")
        self._open = contextlib.ExitStack()
        self._shards: list[str] = []
        self._files: set[str] = set()
        self._writer: pq.ParquetWriter | None = None
        self._buffer: list[tuple[Sample, tuple[str, ...] | None]] = []
        self._buffered_bytes = 0
        self._content = hashlib.sha256()
        self._rows_in_shard = 0
        self.rows = 0

    def write(self, sample: Sample, paths: tuple[str, ...] | None = None) -> None:
        """Adds a row; `paths` (of files put there by `add_file`) are stored instead of the image bytes.

        Raises:
            DataError: several images where the column holds one, or the location cannot be written.
        """
        if not sample.images or (len(sample.images) > 1 and not self.several_images):
            raise DataError(
                f"sample {sample.id} has {len(sample.images)} images: "
                + ("write at least one" if not sample.images else "write all samples with several_images=True")
            )
        self._buffer.append((sample, paths))
        for image in sample.images:
            self._content.update(hashlib.sha256(image).digest())
            self._buffered_bytes += len(image) if paths is None else 0
        self._rows_in_shard += 1
        self.rows += 1
        shard_full = self._rows_in_shard == self._rows_per_shard
        if shard_full or len(self._buffer) >= self._rows_per_group or self._buffered_bytes >= _GROUP_BYTES:
            self._flush()
        if shard_full:
            self._close_shard()

    def add_file(self, name: str, data: bytes) -> None:
        """Puts a file beside the shards, once; `name` is relative with forward slashes."""
        if self._is_file:
            raise DataError(f"{self.location} is one file: files beside it need a folder")
        if name in self._files:
            return
        path = posixpath.join(self._scratch, name)
        with self._explained():
            self._filesystem.create_dir(posixpath.dirname(path), recursive=True)
            with self._filesystem.open_output_stream(path) as stream:
                stream.write(data)
        self._files.add(name)

    def __enter__(self) -> Self:
        with self._explained():
            self._refuse_existing()
            if is_local(self._filesystem):
                self._scratch = str(self._open.enter_context(scratch_folder(Path(self._target).parent)))
            else:
                self._filesystem.create_dir(self._scratch, recursive=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._commit()
        finally:
            self._discard()

    def _flush(self) -> None:
        if not self._buffer:
            return
        with self._explained():
            if self._writer is None:
                self._shards.append(f"part-{len(self._shards):05d}.parquet")
                self._writer = pq.ParquetWriter(
                    posixpath.join(self._scratch, self._shards[-1]),
                    self._schema,
                    filesystem=self._filesystem,
                    # Images are compressed already and never repeat; trying a dictionary on them only costs.
                    use_dictionary=["prompt"],
                    # Nor has "the least image" a meaning; small ones would be copied into header and footer.
                    write_statistics=["id", "prompt", "references.list.element", "metadata"],
                    write_page_checksum=True,
                )
            self._writer.write_table(table_from_samples(self._buffer, self._schema))
        self._buffer.clear()
        self._buffered_bytes = 0

    def _close_shard(self) -> None:
        writer, self._writer = self._writer, None
        self._rows_in_shard = 0
        if writer is not None:
            with self._explained():
                # In the footer, so that the data set's fingerprint covers every byte of its images.
                writer.add_key_value_metadata({CONTENT_KEY: self._content.hexdigest()})
                writer.close()

    def _commit(self) -> None:
        self._flush()
        self._close_shard()
        if not self.rows:
            raise DataError(f"nothing to write to {self.location}: there are no samples")
        with self._explained():
            self._refuse_existing()
            if self._is_file:
                self._move(self._shards[0], self._target)
                return
            total = len(self._shards)
            final = [f"part-{i:05d}-of-{total:05d}.parquet" for i in range(total)]
            if is_local(self._filesystem):
                for old, new in zip(self._shards, final, strict=True):
                    os.rename(os.path.join(self._scratch, old), os.path.join(self._scratch, new))
                for path in (*Path(self._scratch).rglob("*"), Path(self._scratch)):
                    sync(path)
                # Fails when another process made the folder meanwhile, unless that is empty.
                os.rename(self._scratch, self._target)
                sync(Path(self._target).parent)
                return
            self._filesystem.create_dir(self._target, recursive=True)
            for old, new in [*((name, name) for name in sorted(self._files)), *zip(self._shards, final, strict=True)]:
                self._move(old, posixpath.join(self._target, new))

    def _move(self, name: str, target: str) -> None:
        source = posixpath.join(self._scratch, name)
        if not is_local(self._filesystem):
            self._filesystem.create_dir(posixpath.dirname(target), recursive=True)
            self._filesystem.move(source, target)
            return
        sync(Path(source))
        os.rename(source, target)
        sync(Path(target).parent)

    def _discard(self) -> None:
        """Removes what is left under the temporary name; after a commit that is at most an empty folder."""
        # What failed before is what the caller must hear of, not that cleaning up failed too.
        with contextlib.suppress(pa.ArrowException, OSError):
            if self._writer is not None:
                self._writer.close()
        with contextlib.suppress(pa.ArrowException, OSError):
            if self._filesystem.get_file_info(self._scratch).type != fs.FileType.NotFound:
                self._filesystem.delete_dir(self._scratch)
        self._open.close()

    def _refuse_existing(self) -> None:
        if is_occupied(self._filesystem, self._target):
            raise DataError(f"{self.location} exists already: remove it or write to another place")

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"cannot write {self.location}: {one_line(error)}") from error


def write_parquet(
    location: str | Path,
    samples: Iterable[Sample],
    *,
    rows_per_group: int = ROWS_PER_GROUP,
    shards: int = 1,
    metadata: Mapping[str, str] | None = None,
) -> int:
    """Writes samples in order, in shards of equal size, all or nothing; returns their count.

    With one shard the samples are streamed, with several they are held in memory to be counted first.

    Raises:
        DataError: the location exists already or cannot be written, or there are no samples.
    """
    rows_per_shard = None
    if shards > 1:
        samples = list(samples)
        rows_per_shard = max(1, -(-len(samples) // shards))
    rest = iter(samples)
    first = next(rest, None)
    if first is None:
        raise DataError(f"nothing to write to {location}: there are no samples")
    several = len(first.images) > 1
    if isinstance(samples, Sequence):
        several = any(len(sample.images) > 1 for sample in samples)
    with ShardWriter(
        location,
        rows_per_group=rows_per_group,
        rows_per_shard=rows_per_shard,
        several_images=several,
        metadata=metadata,
    ) as writer:
        writer.write(first)
        for sample in rest:
            writer.write(sample)
    return writer.rows
