"""Versions of an adapter as folders that a run's workers and a vLLM server share.

    PATH/RUN-vVERSION-HASH/     adapter_model.safetensors  adapter_config.json, as PEFT writes them
    PATH/.RUN-vVERSION-HASH.lock

A name has the hash of what it names, and no name ever has other weights: whoever of the workers comes first writes a
version, the others find it.

vLLM reads an adapter from its folder whenever it has forgotten it, and ends if that is gone. So a folder goes when no
worker holds it, by a lock, which a dead worker holds no more, and when it is older than any that may be sampled from.
What a run leaves at its end are its last ones; on a file system without locks, all.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save

from mmrl_ray.data.atomic import scratch_folder, sync
from mmrl_ray.errors import AdapterError
from mmrl_ray.run_records.run_dir import CONFIG_FILE, WEIGHTS_FILE

_NAME = re.compile(r"(?P<run>.+)-v(?P<version>\d+)-[0-9a-f]{16}")
_LOCK_S = 30.0
"""For a lock that somebody has while an adapter is deleted."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """One that lies where the server sees it, held by this process."""

    name: str
    path: Path
    lock: int
    """Descriptor; what holds it."""


class SharedAdapters:
    """A run's adapters in a folder that its workers and the server share."""

    def __init__(self, folder: Path, run: str, config: str) -> None:
        """`config` is what `adapter_config.json` says of each of them."""
        self._folder, self._run, self._config = folder, run, config.encode()

    def hold(self, version: int, weights: Mapping[str, torch.Tensor]) -> Adapter:
        """These weights, in their folder. It stays until `leave`, or until this process ends.

        Raises:
            AdapterError: the folder cannot be written to.
        """
        files = {WEIGHTS_FILE: save(dict(weights), metadata={"format": "pt"}), CONFIG_FILE: self._config}
        digest = hashlib.sha256(b"".join(files.values())).hexdigest()[:16]
        name = f"{self._run}-v{version}-{digest}"
        path = self._folder / name
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            lock = self._shared_lock(name)
            try:
                if not path.exists():
                    self._write(path, files)
            except BaseException:
                os.close(lock)
                raise
        except OSError as error:
            raise AdapterError(
                f"rollout.engine.adapters={self._folder} cannot be written to: {error.strerror or error}"
            ) from error
        return Adapter(name, path, lock)

    def leave(self, adapter: Adapter) -> None:
        """Nothing of it is under way here any more."""
        os.close(adapter.lock)

    @contextmanager
    def unused(self, names: Sequence[str]) -> Iterator[list[str]]:
        """Those of `names` that nobody holds; nobody gets hold of them meanwhile, and afterwards they are gone."""
        locks = {name: lock for name in names if (lock := self._exclusive_lock(name)) is not None}
        try:
            yield list(locks)
            for name in locks:
                shutil.rmtree(self._folder / name, ignore_errors=True)
                with suppress(OSError):
                    self._lock_file(name).unlink()
        finally:
            for lock in locks.values():
                os.close(lock)

    def before(self, version: int) -> list[str]:
        """Names of this run's earlier versions."""
        found = [match for path in self._folder.glob("*-v*") if (match := _NAME.fullmatch(path.name)) is not None]
        return [each[0] for each in found if each["run"] == self._run and int(each["version"]) < version]

    def _write(self, path: Path, files: Mapping[str, bytes]) -> None:
        with scratch_folder(self._folder) as scratch:
            for name, data in files.items():
                (scratch / name).write_bytes(data)
                sync(scratch / name)
            try:
                os.rename(scratch, path)
            except OSError:  # another worker was first, and the server may be reading: it stays as it is
                if not path.exists():
                    raise
            sync(self._folder)

    def _lock_file(self, name: str) -> Path:
        return self._folder / f".{name}.lock"

    def _shared_lock(self, name: str) -> int:
        deadline = time.monotonic() + _LOCK_S
        while True:
            lock = os.open(self._lock_file(name), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:  # it is being deleted
                if time.monotonic() > deadline:
                    os.close(lock)
                    raise
                time.sleep(0.05)
            except OSError:  # a file system without locks, where nothing is deleted either
                return lock
            else:
                if _is_still(lock, self._lock_file(name)):
                    return lock
            os.close(lock)

    def _exclusive_lock(self, name: str) -> int | None:
        try:
            lock = os.open(self._lock_file(name), os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_still(lock, self._lock_file(name)):
                return lock
        except OSError:
            pass
        os.close(lock)
        return None


def _is_still(lock: int, path: Path) -> bool:
    """Whether the locked file is the one of that name, and not one that was deleted before it was locked."""
    try:
        return os.path.samestat(os.fstat(lock), path.stat())
    except OSError:
        return False
