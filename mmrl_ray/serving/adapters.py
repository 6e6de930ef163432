"""Adapters that are served: where they come from (run folders, plain folders), and how requests lease them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from pyarrow import fs

from mmrl_ray.config.paths import RUN_CONFIG
from mmrl_ray.errors import AdapterError, CheckpointError, ConfigError, MMRLError, OverloadedError, RunError
from mmrl_ray.learner.checkpoints import live_versions
from mmrl_ray.policy.heads import HEADS_FILE
from mmrl_ray.policy.lora.pool import ID_PATTERN, AdapterPool, AdapterSource, AdapterVersion, Resident
from mmrl_ray.run_records.checkpoint_choice import own_folder
from mmrl_ray.run_records.run_dir import (
    ADAPTER_FOLDER,
    CONFIG_FILE,
    LAST_ADAPTER_FOLDER,
    LIVE_FOLDER,
    MANIFEST,
    WEIGHTS_FILE,
    RunDir,
    checkpoint_name,
    checkpoint_steps,
)
from mmrl_ray.serving.decode_thread import DecodeThread

logger = logging.getLogger(__name__)

_ATTEMPTS = 3


class FolderSource:
    """One folder in the PEFT layout, of a step that nobody knows. It may be replaced by another at any time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def checkpoint(self, step: int) -> None:
        """None: a folder holds one adapter."""

    def newest(self) -> AdapterVersion | None:
        """The folder as it is now; None while files are missing."""
        files = [self._folder / CONFIG_FILE, self._folder / WEIGHTS_FILE]
        if not all(file.is_file() for file in files):
            return None
        if (heads := self._folder / HEADS_FILE).is_file():
            files.append(heads)
        stats = [file.stat() for file in files]
        stamp = ",".join(f"{stat.st_mtime_ns}:{stat.st_size}:{stat.st_ino}" for stat in stats)
        return AdapterVersion(0, stamp, int(max(stat.st_mtime for stat in stats)))

    @contextmanager
    def open(self, version: AdapterVersion) -> Iterator[Path]:
        """The folder itself."""
        yield self._folder


class RunSource:
    """A run: its newest version, be it the finished `adapter/`, a checkpoint, or one published for serving.

    The same weights are one version wherever they lie. What a version holds is checked by the hashes of its manifest
    when it is opened; a damaged one is passed over from then on, for the one before.
    """

    def __init__(self, run: RunDir, *, only: str | None = None) -> None:
        """With `only` what that folder of it holds, and nothing else."""
        self._run = run
        self._only = only
        self._places: dict[str, str] = {}
        """Folder in the run by stamp, of the last look."""
        self._damaged: set[tuple[str, str]] = set()

    def checkpoint(self, step: int) -> RunSource | None:
        """The checkpoint of that step alone; None where there is none."""
        return RunSource(self._run, only=checkpoint_name(step)) if step in checkpoint_steps(self._run) else None

    def newest(self) -> AdapterVersion | None:
        """The newest version that the run has published or checkpointed; None while there is none."""
        for name, step in self._candidates():
            info = self._run.filesystem.get_file_info(self._run.full_path(f"{name}/{MANIFEST}"))
            if info.type != fs.FileType.File:
                continue
            stamp = self._stamp(name)
            if stamp is not None and (name, stamp) not in self._damaged:
                self._places = {stamp: name}
                return AdapterVersion(step, stamp, int(info.mtime.timestamp()) if info.mtime is not None else 0)
        return None

    @contextmanager
    def open(self, version: AdapterVersion) -> Iterator[Path]:
        """A local folder with the files of that version."""
        name = self._places.get(version.stamp)
        if name is None:
            raise AdapterError(f"step {version.step} of {self._run.location} has been replaced meanwhile")
        try:
            self._run.verify_manifest(name)
        except CheckpointError:
            self._damaged.add((name, version.stamp))
            raise
        with self._run.local_copy(name) as folder:
            yield folder

    def _stamp(self, name: str) -> str | None:
        """What the manifest says of the adapter's two files and of its value heads; None if it does not."""
        try:
            files = self._run.read_json(f"{name}/{MANIFEST}")["files"]
            heads = (HEADS_FILE,) if HEADS_FILE in files else ()
            return ":".join(files[file]["sha256"] for file in (CONFIG_FILE, WEIGHTS_FILE, *heads))
        except (RunError, KeyError, TypeError):
            return None

    def _candidates(self) -> list[tuple[str, int]]:
        """Folder names and steps, the newest first; of equal steps the one that stays longest."""
        steps = checkpoint_steps(self._run)
        if self._only is not None:
            return [(self._only, self._written(self._only, steps))] if self._there(self._only) else []
        found = [(step, checkpoint_name(step), step) for step in steps]
        found += [(step, f"{LIVE_FOLDER}/step-{step:06d}", step) for step in live_versions(self._run)]
        if self._there(ADAPTER_FOLDER):
            step = self._written(ADAPTER_FOLDER, steps)
            # The best, which stands for the whole run up to its last: only what is learned after that is newer.
            last = self._written(LAST_ADAPTER_FOLDER, steps) if self._there(LAST_ADAPTER_FOLDER) else step
            found.insert(0, (max(step, last), ADAPTER_FOLDER, step))
        return [(name, step) for _, name, step in sorted(found, key=lambda candidate: -candidate[0])]

    def _there(self, folder: str) -> bool:
        return self._run.exists(f"{folder}/{MANIFEST}")

    def _written(self, folder: str, steps: Sequence[int]) -> int:
        """The step that a manifest says; older ones do not, and are taken for the newest."""
        return int(self._run.read_json(f"{folder}/{MANIFEST}").get("step", max(steps, default=0)))


class AdapterFolders:
    """Adapters that were named, and whatever lies in folders that were named (`runs/`), each folder one adapter.

    Raises:
        ConfigError: an id is none.
    """

    def __init__(self, adapters: Mapping[str, str], folders: Sequence[str] = ()) -> None:
        """`adapters` are locations by id; in `folders` the id is the folder's name. A named adapter has precedence."""
        for id in adapters:
            if ID_PATTERN.fullmatch(id) is None:
                raise ConfigError(f"adapter id {id!r} must be 1 to 64 letters, digits, '.', '_' or '-'")
        self._folders = [Path(folder).expanduser() for folder in folders]
        self._named = {id: open_source(location) for id, location in adapters.items()}
        self._found: dict[Path, AdapterSource] = {}

    def __call__(self) -> Mapping[str, AdapterSource]:
        """The adapters there are at present."""
        found: dict[str, AdapterSource] = {}
        for folder in self._folders:
            for entry in sorted(folder.iterdir()) if folder.is_dir() else []:
                # A link may lead anywhere; what is served lies where the operator said.
                if ID_PATTERN.fullmatch(entry.name) is None or entry.is_symlink():
                    continue
                if not any((entry / file).is_file() for file in (RUN_CONFIG, CONFIG_FILE)):
                    continue
                if entry not in self._found:
                    self._found[entry] = open_source(str(entry))
                found.setdefault(entry.name, self._found[entry])
        return {**found, **self._named}


def open_source(location: str) -> AdapterSource:
    """The source at a location: a run folder (any file system), one of its adapters, or any folder in the PEFT layout.

    Raises:
        AdapterError: it is neither.
    """
    local = "://" not in location
    own = own_folder(location)
    if own is not None and (not local or _is_committed(Path(own[0]).expanduser(), own[1])):
        try:
            return RunSource(RunDir.at(own[0]), only=own[1])
        except RunError as error:
            raise AdapterError(str(error)) from error
    if not local or (Path(location).expanduser() / RUN_CONFIG).is_file():
        try:
            return RunSource(RunDir.at(location))
        except RunError as error:
            raise AdapterError(str(error)) from error
    folder = Path(location).expanduser()
    if not folder.is_dir():
        raise AdapterError(f"adapter folder {location!r} does not exist; name a run or a folder in the PEFT layout")
    return FolderSource(folder)


def _is_committed(run: Path, folder: str) -> bool:
    return (run / RUN_CONFIG).is_file() and (run / folder / MANIFEST).is_file()


class AdapterLeases:
    """The event loop's side of an `AdapterPool`: files are read in a thread, the model changes in the decode thread."""

    def __init__(self, pool: AdapterPool, thread: DecodeThread) -> None:
        self.pool = pool
        self._thread = thread
        self._readers = ThreadPoolExecutor(1, thread_name_prefix="adapters")
        self._loading: dict[str, asyncio.Task[None]] = {}

    def start(self) -> None:
        """Looks for adapters and loads as many as fit; blocks. One that cannot be used is logged."""
        self.pool.scan()
        for info in self.pool.infos()[: self.pool.max_adapters]:
            try:
                self._thread.call(partial(self.pool.install, self.pool.read(info.id))).result()
            except MMRLError as error:
                logger.warning("adapter %r is not served: %s", info.id, error)

    def close(self) -> None:
        """Lets no more files be read."""
        self._readers.shutdown(cancel_futures=True)

    async def take(self, id: str) -> Resident:
        """The version of an adapter for a new request, until `give_back`.

        Raises:
            UnknownModelError: there is no such adapter, or it cannot be used.
            OverloadedError: there is no room for it now.
            AdapterError: the model does not take it.
        """
        for _ in range(_ATTEMPTS):
            resident = self.pool.lease(id)
            if resident is not None:
                return resident
            await self._load(id)
        raise OverloadedError(f"adapter {id!r} is loaded and displaced again and again; try again later")

    def give_back(self, resident: Resident) -> None:
        """After the last row was let go of: what the decode thread was asked before, it does before."""
        self._thread.call(partial(self._release, resident))

    async def refresh(self) -> None:
        """Looks for new adapters, and puts new versions of those on the model beside them."""
        for id in await asyncio.get_running_loop().run_in_executor(self._readers, self.pool.scan):
            try:
                await self._load(id)
            except MMRLError as error:
                logger.warning("adapter %r stays at the version it has: %s", id, error)

    def _release(self, resident: Resident) -> None:
        self.pool.release(resident)
        self.pool.sweep()

    async def _load(self, id: str) -> None:
        """Puts the newest version on the model, once for all who ask at the same time."""
        task = self._loading.get(id)
        if task is None:
            task = asyncio.get_running_loop().create_task(self._load_now(id))
            self._loading[id] = task
            task.add_done_callback(partial(self._loaded, id))
        await asyncio.shield(task)  # others may wait for it too

    async def _load_now(self, id: str) -> None:
        read = await asyncio.get_running_loop().run_in_executor(self._readers, self.pool.read, id)
        await asyncio.wrap_future(self._thread.call(partial(self.pool.install, read)))

    def _loaded(self, id: str, task: asyncio.Task[None]) -> None:
        del self._loading[id]
        if not task.cancelled():
            task.exception()  # seen: whoever asked may be gone
