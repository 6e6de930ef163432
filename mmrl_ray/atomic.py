"""Local files and folders that appear whole or not at all: temporary name, fsync, rename, fsync of the folder."""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from pathlib import Path

SCRATCH_PREFIXES = (".tmp-", ".old-")
"""Of names that are half-made or on their way out; a killed writer may leave some."""
_HASH_BLOCK = 1 << 20


def write_file(target: Path, data: bytes) -> None:
    """Puts `data` at `target`; a reader sees the file before or after, nothing in between.

    Raises:
        OSError: of the file system; nothing is left behind then.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = _scratch(target, SCRATCH_PREFIXES[0])
    try:
        descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            _write_all(descriptor, data)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(scratch, target)
    except OSError:
        scratch.unlink(missing_ok=True)
        raise
    sync(target.parent)


def append(target: Path, data: bytes) -> None:
    """Adds `data` to a file that has one writer, all of it or nothing.

    Raises:
        OSError: of the file system; what a full disk took of `data` is cut off again.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        before = os.fstat(descriptor).st_size
        try:
            _write_all(descriptor, data)
        except OSError:
            os.ftruncate(descriptor, before)
            raise
    finally:
        os.close(descriptor)


def commit_folder(folder: Path, target: Path) -> None:
    """Makes `folder` the folder `target` by a rename, with everything in it on disk first; an old one is replaced.

    Raises:
        OSError: of the file system; `target` is then as it was before.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    if os.stat(folder).st_dev != os.stat(target.parent).st_dev:
        copy = _scratch(target, SCRATCH_PREFIXES[0])
        try:
            shutil.copytree(folder, copy)
            commit_folder(copy, target)
        finally:
            shutil.rmtree(copy, ignore_errors=True)
        return
    for path in (*folder.rglob("*"), folder):
        sync(path)
    # A folder cannot be renamed onto one that holds files, so the old one steps aside for a moment. A crash in that
    # moment costs this folder only, and a resume takes the checkpoint before it.
    aside = _scratch(target, SCRATCH_PREFIXES[1])
    if target.exists():
        os.rename(target, aside)
    os.rename(folder, target)
    sync(target.parent)
    shutil.rmtree(aside, ignore_errors=True)


def sha256_of(path: Path) -> str:
    """Hex digest of a file, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_HASH_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _scratch(target: Path, prefix: str) -> Path:
    return target.parent / f"{prefix}{uuid.uuid4().hex}"


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def sync(path: Path) -> None:
    """Has the system write a file, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
