"""Which weights and which processor a policy has, as a short key: of every byte that they are read from.

A large file costs about a second for each 2.5 GB on two cores (a model of 3 B parameters in bfloat16: 3 s), once a
machine: its digest is kept in the user's cache, under everything by which the file system would show that it changed.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mmrl_ray.config.sections import ModelSection
from mmrl_ray.data import atomic

logger = logging.getLogger(__name__)

_SUFFIXES = (".json", ".safetensors", ".jinja")
_READ_WHOLE = 64 << 20
"""Larger files are hashed in blocks of this size, several at a time."""
_READ = 1 << 20
_THREADS = 8
_SETTLED_S = 2.0
"""A file that changed less long ago may change again within the clock's resolution: its digest is not kept."""
_OLD_BLOCKS = 16


def revision_key_of(path: str, cfg: ModelSection, commit: str | None) -> str:
    """16 hex digits: of the hub's commit, or of the folder's configs and weights."""
    return _key(path, cfg.processor, commit or cfg.revision, _add_large_file)


def is_revision(key: str, found: str, path: str, processor: Mapping[str, Any]) -> bool:
    """Whether `key`, kept by somebody, names the model at `path`, whose key is `found`.

    Keys that earlier versions kept saw only samples of files above 64 MiB; they still name what they named.
    """
    return key == found or (os.path.isdir(path) and key == _key(path, processor, None, _add_samples))


def _key(path: str, processor: Mapping[str, Any], revision: str | None, add_large: Callable[[Path, Any], None]) -> str:
    digest = hashlib.sha256(repr(sorted(processor.items())).encode())
    if not os.path.isdir(path):
        digest.update(f"{path}@{revision}".encode())
        return digest.hexdigest()[:16]
    for file in sorted(Path(path).iterdir()):
        if file.suffix in _SUFFIXES:
            size = file.stat().st_size
            digest.update(f"{file.name}:{size}".encode())
            if size <= _READ_WHOLE:
                digest.update(file.read_bytes())
            else:
                add_large(file, digest)
    return digest.hexdigest()[:16]


def _add_large_file(file: Path, digest: Any) -> None:
    digest.update(bytes.fromhex(_digest_of(file)))


def _add_samples(file: Path, digest: Any) -> None:
    size = file.stat().st_size
    with file.open("rb") as stream:
        for block in range(_OLD_BLOCKS):
            stream.seek(block * (size - _READ) // (_OLD_BLOCKS - 1))
            digest.update(stream.read(_READ))


def _digest_of(file: Path) -> str:
    """Hex digest of a large file's content, from the cache where it is known."""
    before = _identity(file)
    kept = _cache_folder() / hashlib.sha256(before.encode()).hexdigest()
    try:
        known = kept.read_text(encoding="ascii")
        if len(known) == hashlib.sha256().digest_size * 2:
            return known
    except (OSError, UnicodeDecodeError):
        pass
    found = _content_digest(file)
    changed = file.stat().st_ctime
    if _identity(file) == before and time.time() - changed > _SETTLED_S:
        try:
            atomic.write_file(kept, found.encode())
        except OSError as error:  # no home, a full disk: the next process reads the file again
            logger.debug("the digest of %s is not kept: %s", file, error)
    return found


def _content_digest(file: Path) -> str:
    starts = range(0, file.stat().st_size, _READ_WHOLE)
    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1, len(starts))) as pool:
        blocks = pool.map(lambda start: _block_digest(file, start), starts)
        return hashlib.sha256(b"".join(blocks)).hexdigest()


def _block_digest(file: Path, start: int) -> bytes:
    digest = hashlib.sha256()
    with file.open("rb", buffering=0) as stream:
        stream.seek(start)
        for _ in range(_READ_WHOLE // _READ):
            digest.update(stream.read(_READ))
    return digest.digest()


def _identity(file: Path) -> str:
    """Changes whenever the file does: a copy with the old time stamp has another inode or status change."""
    stat = file.stat()
    place = (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)
    return f"{file.resolve()}:{':'.join(map(str, place))}"


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mmrl_ray" / "digests"
