"""Local files and folders that appear whole or not at all: temporary name, fsync, rename, fsync of the folder."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

SCRATCH_PREFIXES = (".tmp-", ".old-")
"""Of names that are half-made or on their way out; a killed writer may leave some."""
_SCRATCH_FOLDER = re.compile(rf"{re.escape(SCRATCH_PREFIXES[0])}[0-9a-f]{{32}}")


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


@contextlib.contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """A new folder of a temporary name in `parent`, gone afterwards unless it was renamed into place.

    For places that several processes write to and none owns. It is locked while it is in use, by which those that a
    killed process has left are known: they are removed first. Where the file system has no locks, they stay.

    Raises:
        OSError: of the file system.
    """
    parent.mkdir(parents=True, exist_ok=True)
    for left in [path for path in parent.iterdir() if _SCRATCH_FOLDER.fullmatch(path.name) and path.is_dir()]:
        with contextlib.suppress(OSError):
            descriptor = os.open(left, os.O_RDONLY | os.O_CLOEXEC)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left, ignore_errors=True)
            finally:
                os.close(descriptor)
    folder, lock = _locked_folder(parent)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def _locked_folder(parent: Path) -> tuple[Path, int]:
    """A new folder, and the descriptor that locks it."""
    while True:
        folder = _scratch(parent / "any", SCRATCH_PREFIXES[0])
        folder.mkdir()
        try:
            lock = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:  # another process took it for one that was left, before it was locked
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            continue
        except OSError:  # no locks here
            return folder, lock
        if folder.exists():
            return folder, lock
        os.close(lock)


def sha256_of(path: Path) -> str:
    """Hex digest of a file, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
