"""A path or URI as a user writes it → a `pyarrow.fs` file system and a path on it."""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow as pa
from pyarrow import fs

from mmrl_ray.errors import DataError


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
        reason = " ".join(str(error).split())
        raise DataError(f"{text} is no location that pyarrow can open: {reason}") from error
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
