"""Where everything of a run lies: atomic writes, JSON lines, folders that appear whole or not at all.

    config.yaml  metrics.jsonl  events.jsonl  quarantine.jsonl  tb/  rollouts/step-%06d.parquet  images/
    reward/statistics.json  checkpoints/step-%06d/  adapter/  analysis/*.parquet  summary.json  report.html
    status.json  control/  samples/step-%06d.json  tracking/

A run folder is a local path or any `pyarrow.fs` URI. On a local file system a write goes to a temporary name in the
same folder, is fsynced, renamed, and the folder is fsynced: a reader sees the old file or the new one. An object
store has no rename but its puts are atomic, so a single file is a plain put, and a folder is committed by its
`manifest.json`, which carries the hash of every other file and is written last.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from pyarrow import fs

from mmrl_ray.config.paths import nearest_folder
from mmrl_ray.data import atomic
from mmrl_ray.errors import CheckpointError, RunError

MANIFEST = "manifest.json"
BASE = "base"
"""Folder of a run that keeps its base model, where a warm start made it."""
CHECKPOINTS = "checkpoints"
ADAPTER_FOLDER = "adapter"
"""Of a finished run: its best, where it was evaluated while it learned, else the last."""
LAST_ADAPTER_FOLDER = "adapter-last"
"""Of a finished run that was evaluated while it learned."""
LIVE_FOLDER = "live"
"""Adapters of the versions that were published last, where the policy is served while it trains."""
WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
STARTING_ADAPTER = f"{ADAPTER_FOLDER}/{WEIGHTS_FILE}"
"""In the folder that `data.rollouts.run` names."""
STATISTICS = "reward/statistics.json"
"""Of the training references."""
_OF_A_STEP = re.compile(r"step-(\d{6,})(\.\w+)?")


@dataclass(frozen=True)
class RunDir:
    """One run's folder. Picklable; names are relative to it, with forward slashes.

    Every method turns an `OSError` (a full disk, no permission, …) into a `RunError` that names the path and the
    remedy, and leaves nothing half-written behind.
    """

    filesystem: fs.FileSystem
    path: str
    """Of the run folder on `filesystem`."""
    location: str
    """What the user wrote for it: an absolute path or a URI."""

    # -- opening ---------------------------------------------------------------------------------------------------

    @classmethod
    def create(cls, root: str | Path, name: str, *, filesystem: fs.FileSystem | None = None) -> RunDir:
        """A new folder `name` under `root`; a RunError where there is one, or none can be made."""
        run = _resolve(str(root), name, filesystem)
        with _explained(run.location):
            if not run.is_local:
                if run.exists():
                    raise _taken(run)
                run.filesystem.create_dir(run.path, recursive=True)
                return run
            Path(run.path).parent.mkdir(parents=True, exist_ok=True)
            try:
                os.mkdir(run.path)
            except FileExistsError:
                raise _taken(run) from None
        return run

    @classmethod
    def require_new(cls, root: str | Path, name: str, *, filesystem: fs.FileSystem | None = None) -> None:
        """Refuses early, with a RunError, what `create` would refuse once there is something to put into the folder."""
        run = _resolve(str(root), name, filesystem)
        if run.exists():
            raise _taken(run)

    @classmethod
    def open(cls, root: str | Path, name: str, *, filesystem: fs.FileSystem | None = None) -> RunDir:
        """The existing folder `name` under `root`; a RunError where there is none."""
        return _existing(_resolve(str(root), name, filesystem))

    @classmethod
    def at(cls, location: str | Path, *, filesystem: fs.FileSystem | None = None) -> RunDir:
        """The existing run folder at a path or URI; a RunError where there is none."""
        return _existing(_resolve(str(location), "", filesystem))

    # -- where things are ------------------------------------------------------------------------------------------

    @property
    def is_local(self) -> bool:
        """Whether it lies on this machine's file system."""
        return isinstance(self.filesystem, fs.LocalFileSystem)

    @property
    def name(self) -> str:
        """The run's name: the last part of its path."""
        return self.path.rstrip("/").rsplit("/", 1)[-1]

    def full_path(self, name: str = "") -> str:
        """Path of `name` on `filesystem`."""
        return f"{self.path}/{name}" if name else self.path

    def local_path(self, name: str = "") -> Path:
        """Path of `name` for libraries that know only local files.

        Raises:
            RunError: the run does not lie on this machine.
        """
        if not self.is_local:
            raise RunError(
                f"{self.location} is not on this machine's file system: {name or 'this'} needs a local run.root"
            )
        return Path(self.full_path(name))

    def exists(self, name: str = "") -> bool:
        """Whether a file or folder of that name is there."""
        with _explained(self.full_path(name)):
            return self.filesystem.get_file_info([self.full_path(name)])[0].type != fs.FileType.NotFound

    # -- files -----------------------------------------------------------------------------------------------------

    def write_bytes(self, name: str, data: bytes) -> None:
        """Puts a whole file in place, atomically; folders within the run's are made."""
        target = self.full_path(name)
        self._refuse_gone()
        with _explained(target):
            if self.is_local:
                atomic.write_file(Path(target), data)
            else:
                self.filesystem.create_dir(target.rsplit("/", 1)[0], recursive=True)
                with self.filesystem.open_output_stream(target) as stream:
                    stream.write(data)

    def write_text(self, name: str, text: str) -> None:
        """`write_bytes` in UTF-8."""
        self.write_bytes(name, text.encode())

    def write_json(self, name: str, value: Any) -> None:
        """`write_bytes` of indented JSON; NaN and infinities become null."""
        self.write_text(name, json.dumps(to_json(value), indent=2, allow_nan=False) + "\n")

    def read_bytes(self, name: str) -> bytes:
        """The whole file."""
        with _explained(self.full_path(name)), self.filesystem.open_input_stream(self.full_path(name)) as stream:
            return stream.read()

    def read_text(self, name: str) -> str:
        """`read_bytes`, as UTF-8."""
        return self.read_bytes(name).decode()

    def read_json(self, name: str) -> Any:
        """`read_bytes`, as JSON; a RunError where it is none."""
        try:
            return json.loads(self.read_bytes(name))
        except ValueError as error:
            raise RunError(f"{self.full_path(name)} is not JSON ({error})") from None

    def delete(self, name: str) -> None:
        """Removes a file or a folder, whatever it holds; nothing happens when it is not there."""
        target = self.full_path(name)
        with _explained(target):
            kind = self.filesystem.get_file_info([target])[0].type
            if kind == fs.FileType.Directory:
                self.filesystem.delete_dir(target)
            elif kind != fs.FileType.NotFound:
                self.filesystem.delete_file(target)

    def _refuse_gone(self) -> None:
        """Refuses to make the run's folder anew: the half of a run that is written there would be of no use."""
        if self.is_local and not os.path.isdir(self.path):
            raise RunError(
                f"{self.location} is gone: it was moved or deleted while the run was writing there; if it is elsewhere "
                "now, go on there with --resume"
            )

    # -- JSON lines ------------------------------------------------------------------------------------------------

    def append_line(self, name: str, value: Mapping[str, Any]) -> None:
        """Adds one JSON object to a `.jsonl` file that has one writer; an object store has the file rewritten."""
        line = json.dumps(to_json(value), allow_nan=False).encode() + b"\n"
        target = self.full_path(name)
        if not self.is_local:
            self.write_bytes(name, (self.read_bytes(name) if self.exists(name) else b"") + line)
            return
        self._refuse_gone()
        with _explained(target):
            atomic.append(Path(target), line)

    def read_lines(self, name: str) -> list[dict[str, Any]]:
        """The objects of a `.jsonl` file, in order; none when it is missing. A last line torn by a crash is left out.

        Raises:
            RunError: a line before the last is not JSON.
        """
        if not self.exists(name):
            return []
        *lines, tail = self.read_bytes(name).split(b"\n")
        try:
            objects = [json.loads(line) for line in lines]
        except ValueError as error:
            raise RunError(f"{self.full_path(name)} has a line that is not JSON ({error})") from None
        with contextlib.suppress(ValueError):
            objects.append(json.loads(tail))
        return objects

    def truncate_lines(self, name: str, keep: Callable[[dict[str, Any]], bool]) -> int:
        """Rewrites a `.jsonl` file with the objects that `keep` accepts; returns how many went. For resuming."""
        objects = self.read_lines(name)
        kept = [o for o in objects if keep(o)]
        if self.exists(name):
            self.write_text(name, "".join(json.dumps(o) + "\n" for o in kept))
        return len(objects) - len(kept)

    def cut_torn_line(self, name: str) -> None:
        """Cuts off what a crash left of a last line, before more is added to it. For resuming."""
        if self.is_local and self.exists(name):
            whole, newline, torn = self.read_bytes(name).rpartition(b"\n")
            if torn:
                self.write_bytes(name, whole + newline)

    # -- folders that appear whole ---------------------------------------------------------------------------------

    @contextlib.contextmanager
    def staging_folder(self) -> Iterator[Path]:
        """A local scratch folder to fill for `commit_folder`; gone afterwards, whether it was committed or not."""
        with _explained(self.location):
            if self.is_local:  # on the same file system, so that the commit is a rename
                folder = Path(self.path) / f"{atomic.SCRATCH_PREFIXES[0]}{uuid.uuid4().hex}"
                folder.mkdir()
            else:
                folder = Path(tempfile.mkdtemp(prefix=atomic.SCRATCH_PREFIXES[0]))
        try:
            with _explained(str(folder)):
                yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def commit_folder(self, name: str, local_folder: Path, *, facts: Mapping[str, Any] | None = None) -> None:
        """Makes `local_folder` the folder `name`, whole, with a `manifest.json` of sha256 hashes and `facts`.

        `local_folder` is used up. A folder of that name that is there already is replaced.
        """
        target = self.full_path(name)
        self._refuse_gone()
        with _explained(target):
            files = sorted(p.relative_to(local_folder).as_posix() for p in local_folder.rglob("*") if p.is_file())
            entries = {
                f: {"bytes": (local_folder / f).stat().st_size, "sha256": atomic.sha256_of(local_folder / f)}
                for f in files
            }
            manifest = (
                json.dumps({**to_json(facts or {}), "files": entries}, indent=2, allow_nan=False).encode() + b"\n"
            )
            if self.is_local:
                (local_folder / MANIFEST).write_bytes(manifest)
                atomic.commit_folder(local_folder, Path(target))
            else:
                self._commit_remote(name, local_folder, files, manifest)

    def _commit_remote(self, name: str, local_folder: Path, files: list[str], manifest: bytes) -> None:
        if self.exists(f"{name}/{MANIFEST}"):
            self.delete(f"{name}/{MANIFEST}")  # from here on the old folder does not count
        self.delete(name)
        for file in files:
            self.write_bytes(f"{name}/{file}", (local_folder / file).read_bytes())
        self.write_bytes(f"{name}/{MANIFEST}", manifest)

    def verify_manifest(self, name: str) -> dict[str, Any]:
        """The manifest of a committed folder, after every file in it was found with its size and hash.

        Raises:
            CheckpointError: no manifest, or a file is missing, truncated or changed.
        """
        try:
            manifest = self.read_json(f"{name}/{MANIFEST}")
            entries = dict(manifest["files"])
            for file, entry in entries.items():
                data = self.read_bytes(f"{name}/{file}")
                if len(data) != entry["bytes"]:
                    raise CheckpointError(
                        f"{self.full_path(name)}/{file} has {len(data)} bytes instead of {entry['bytes']}"
                    )
                if hashlib.sha256(data).hexdigest() != entry["sha256"]:
                    raise CheckpointError(f"{self.full_path(name)}/{file} does not match its hash in {MANIFEST}")
        except CheckpointError:
            raise
        except (RunError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{self.full_path(name)} has no valid {MANIFEST} or lacks a file ({error})") from None
        return manifest

    @contextlib.contextmanager
    def local_copy(self, name: str) -> Iterator[Path]:
        """A folder as local files to read, for libraries that know only those; a download where it is not local."""
        if self.is_local:
            yield self.local_path(name)
            return
        with (
            tempfile.TemporaryDirectory(prefix=atomic.SCRATCH_PREFIXES[0]) as scratch,
            _explained(self.full_path(name)),
        ):
            fs.copy_files(self.full_path(name), scratch, source_filesystem=self.filesystem)
            yield Path(scratch)

    def remove_scratch(self) -> None:
        """Removes what a killed writer left half-made. For a resume, before anything else opens the run."""
        if not self.is_local:
            return
        with _explained(self.location):
            for path in [p for p in Path(self.path).rglob("*") if p.name.startswith(atomic.SCRATCH_PREFIXES)]:
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink(missing_ok=True)

    def list(self, folder: str = "") -> list[str]:
        """Sorted base names in a folder, without temporaries; empty when there is no such folder."""
        selector = fs.FileSelector(self.full_path(folder), allow_not_found=True, recursive=False)
        with _explained(self.full_path(folder)):
            names = [info.base_name for info in self.filesystem.get_file_info(selector)]
        return sorted(n for n in names if not n.startswith(atomic.SCRATCH_PREFIXES))


def to_json(value: Any) -> Any:
    """`value` with NaN and infinities as None (JSON has neither) and tuples as lists, through all containers."""
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): to_json(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(v) for v in value]
    return value


def run_location(root: str, name: str) -> str:
    """What the folder `name` under `root` is called: an absolute path, or a URI."""
    return _uri(root, name) if "://" in root else str(Path(root).expanduser().absolute() / name)


def _uri(root: str, name: str) -> str:
    if not name:
        return root.rstrip("/")
    parts = urlsplit(root)  # the name goes into the path of a URI, before its options
    return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{name}"))


def _resolve(root: str, name: str, filesystem: fs.FileSystem | None) -> RunDir:
    if filesystem is None and "://" not in root:
        location = run_location(root, name)
        return RunDir(fs.LocalFileSystem(), location, location)
    location = _uri(root, name)
    if filesystem is not None:
        return RunDir(filesystem, f"{root.rstrip('/')}/{name}".rstrip("/"), location)
    try:
        filesystem, path = fs.FileSystem.from_uri(location)
    except (ValueError, OSError) as error:
        raise RunError(f"run.root {root!r} is no location pyarrow.fs knows ({error})") from None
    return RunDir(filesystem, path.rstrip("/"), location)


def _taken(run: RunDir) -> RunError:
    return RunError(
        f"run folder {run.location} exists already: "
        f"continue it with --resume {run.location}, or choose another run.name"
    )


def _existing(run: RunDir) -> RunDir:
    if not run.exists():
        near = nearest_folder(run.path) if run.is_local else ""
        raise RunError(f"no run folder at {run.location}{near or ': check the name'}")
    return run


@contextlib.contextmanager
def _explained(path: str) -> Iterator[None]:
    """Turns an `OSError` into a `RunError` with a remedy; the one place where that is decided."""
    try:
        yield
    except OSError as error:
        raise RunError(f"{path}: {_remedy(error)}") from error


def _remedy(error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "the disk is full; free some space and continue with --resume, or choose another run.root"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"no permission to write or read here ({error.strerror}); choose another run.root"
    if error.errno == errno.ENOENT or isinstance(error, FileNotFoundError):
        return "no such file in this run"
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        return f"a file lies where a folder is needed ({error.strerror}); choose another run.root"
    return f"{error.strerror or error}; check the storage behind run.root"


def checkpoint_name(step: int) -> str:
    """Its folder's name in the run."""
    return f"{CHECKPOINTS}/step-{step:06d}"


def checkpoint_id(id: str, step: int) -> str:
    """What the checkpoint of a step is called where it is served and the run's adapter is called `id`."""
    return f"{id}:ckpt-step-{step}"


def checkpoint_steps(run: RunDir) -> list[int]:
    """Steps that have a checkpoint folder, ascending, valid or not."""
    return steps_in(run, CHECKPOINTS)


def steps_in(run: RunDir, folder: str, suffix: str = "") -> list[int]:
    """Steps of which a folder of the run has something, ascending; with a suffix those of which it has such a file."""
    names = (name.removesuffix(suffix) for name in run.list(folder) if name.endswith(suffix))
    return sorted(int(match[1]) for name in names if (match := _OF_A_STEP.fullmatch(name)))
