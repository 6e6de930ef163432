"""Several LoRA adapters on one policy, by id and version, while rows are being decoded.

    source ──scan──▶ newest version ──read, checked──▶ AdapterFiles ──install──▶ on the model ──lease──▶ rows

A new version is put on beside the old one: new rows take it, rows that run finish on the old one, and with the last of
them it goes. Adapters that nobody uses make room for others, least recently used first. What is on the model changes in
`install` and `sweep` only, which belong to the thread that runs the model, between two steps; everything else may be
called from any thread, and reads files but touches no model.
"""

from __future__ import annotations

import itertools
import logging
import re
import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from peft import PeftModel

from mmrl_ray.errors import AdapterError, MMRLError, OverloadedError, UnknownModelError
from mmrl_ray.policy.lora.adapter import forget_adapters
from mmrl_ray.policy.lora.files import AdapterFiles, read_adapter_files
from mmrl_ray.policy.lora.routing import RowAdapters
from mmrl_ray.policy.lora.targets import adaptable_layers
from mmrl_ray.policy.model import Policy

logger = logging.getLogger(__name__)

ID_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_CHECKPOINT = re.compile(rf"({ID_PATTERN.pattern}):ckpt-step-(\d{{1,9}})")
"""The id of one checkpoint of a run, as `run_dir.checkpoint_id` writes it."""


@dataclass(frozen=True, slots=True)
class AdapterVersion:
    """One state of an adapter."""

    step: int
    """Training steps it has behind it; 0 if nobody knows."""
    stamp: str
    """Differs whenever the files do."""
    created: int = field(default=0, compare=False)
    """Unix seconds."""


class AdapterSource(Protocol):
    """Where the versions of one adapter come from."""

    def checkpoint(self, step: int) -> AdapterSource | None:
        """The checkpoint of that step alone; None where there is none."""
        ...

    def newest(self) -> AdapterVersion | None:
        """The newest version there is; cheap. None while there is none.

        Raises:
            MMRLError, OSError: it cannot be looked up.
        """
        ...

    def open(self, version: AdapterVersion) -> AbstractContextManager[Path]:
        """A local folder with the files of that version, in the PEFT layout.

        Raises:
            MMRLError, OSError: they cannot be had.
        """
        ...


@dataclass(frozen=True, slots=True)
class AdapterInfo:
    """An adapter that can be asked for."""

    id: str
    version: AdapterVersion


@dataclass(frozen=True, slots=True)
class ReadAdapter:
    """A version that was read and fits the model."""

    id: str
    version: AdapterVersion
    files: AdapterFiles


@dataclass(slots=True, eq=False)
class Resident:
    """A version on the model. `AdapterPool.lease` hands it out, `release` takes it back."""

    id: str
    version: AdapterVersion
    name: str
    """PEFT's."""
    beta: float = 0.0
    """Of decoding by the values that it brought."""
    leases: int = 0
    last_used: int = 0


class AdapterHost(Protocol):
    """What adapters are put on: the policy's own model, or an engine of another process."""

    def fitted(self, files: AdapterFiles) -> AdapterFiles:
        """As `put_on` takes them; from any thread.

        Raises:
            AdapterError: they ask for what the host cannot do.
        """
        ...

    def put_on(self, name: str, files: AdapterFiles) -> None:
        """Makes rows able to go through them by that name, which no other version ever has.

        Raises:
            AdapterError: it does not take them.
        """
        ...

    def take_off(self, name: str) -> None:
        """Forgets them: no row goes through them any more."""
        ...


class AdapterPool:
    """The adapters of one policy, which has none of its own.

    Raises:
        AdapterError: the policy has an adapter already.
    """

    def __init__(
        self,
        policy: Policy,
        sources: Callable[[], Mapping[str, AdapterSource]],
        *,
        max_adapters: int,
        max_rank: int,
        host: AdapterHost | None = None,
    ) -> None:
        """Nothing is looked up before `scan`.

        Args:
            policy: the base.
            sources: the adapters there are at present, by id; asked at every `scan`.
            max_adapters: ids whose weights are on the model at the same time. A version that was replaced stays beside
                them until its rows have finished.
            max_rank: the largest rank that is accepted.
            host: what they are put on; by default the policy's model.
        """
        if isinstance(policy.model, PeftModel):
            raise AdapterError("the policy has an adapter already; give the pool its base, or merge it first")
        self.rows = RowAdapters(policy)
        """Chooses among those on the policy's model, for a decoder."""
        self._host = host or _OnModel(policy, self.rows)
        self._policy = policy
        self._list_sources = sources
        self.max_adapters = max_adapters
        self._max_rank = max_rank
        self._layers = adaptable_layers(policy.hf_model)
        self._lock = threading.Lock()
        self._sources: dict[str, AdapterSource] = {}
        self._newest: dict[str, AdapterVersion] = {}
        self._refused: dict[str, tuple[AdapterVersion, str]] = {}
        self._current: dict[str, Resident] = {}
        self._retired: list[Resident] = []
        self._clock = itertools.count(1)

    # -- any thread ------------------------------------------------------------------------------------------------

    def scan(self) -> list[str]:
        """Looks for new adapters and versions; returns the ids on the model that have a newer version than that.

        A source that cannot be read is logged, and keeps what was known of it.
        """
        for id, source in self._list_sources().items():
            if ID_PATTERN.fullmatch(id) is None:
                logger.warning("adapter %r is left out: an id is 1 to 64 letters, digits, '.', '_' or '-'", id)
                continue
            try:
                version = source.newest()
            except (MMRLError, OSError, ValueError) as error:
                logger.warning("adapter %r cannot be looked up: %s", id, error)
                continue
            if version is not None:
                with self._lock:
                    self._sources[id], self._newest[id] = source, version
        with self._lock:
            return [id for id, resident in self._current.items() if self._is_stale(resident)]

    def infos(self) -> list[AdapterInfo]:
        """Adapters by id, each with the version that the next request gets; those known to be broken are left out."""
        with self._lock:
            loaded = {id: resident.version for id, resident in self._current.items()}
            sound = {id: v for id, v in self._newest.items() if id not in self._refused or self._refused[id][0] != v}
            return [AdapterInfo(id, version) for id, version in sorted({**sound, **loaded}.items())]

    def read(self, id: str) -> ReadAdapter:
        """Reads and checks the newest version of an adapter.

        Raises:
            UnknownModelError: there is no such adapter, or it cannot be used (the log says why; the message goes to
                clients and names no path).
        """
        with self._lock:
            source, version = self._sources.get(id), self._newest.get(id)
            refused = self._refused.get(id)
            checkpoint = _CHECKPOINT.fullmatch(id)
            run = self._sources.get(checkpoint[1]) if checkpoint is not None else None
        if checkpoint is not None and run is not None:
            source, version = _checkpoint(run, int(checkpoint[2]))
        if source is None or version is None:
            raise _unknown(id)
        if refused is not None and refused[0] == version:
            raise UnknownModelError(refused[1])
        try:
            with source.open(version) as folder:
                files = read_adapter_files(folder, self._policy, self._layers, max_rank=self._max_rank)
            return ReadAdapter(id, version, self._host.fitted(files))
        except torch.OutOfMemoryError:  # it may be used another time
            raise
        except Exception as error:  # whatever a file from outside makes a parser raise
            raise self._refuse(id, version, error) from error

    def lease(self, id: str) -> Resident | None:
        """The version that a new request of `id` takes, which stays until it is released; None if none is loaded.

        Raises:
            UnknownModelError: there is no such adapter.
        """
        with self._lock:
            resident = self._current.get(id)
            if resident is None:
                checkpoint = _CHECKPOINT.fullmatch(id)
                if (checkpoint[1] if checkpoint is not None else id) not in self._newest:
                    raise _unknown(id)
                return None
            resident.leases += 1
            resident.last_used = next(self._clock)
            return resident

    def release(self, resident: Resident) -> None:
        """Gives a lease back."""
        with self._lock:
            resident.leases -= 1

    # -- the thread that runs the model ----------------------------------------------------------------------------

    def install(self, read: ReadAdapter) -> None:
        """Puts a version on the model: from now on it is the one that `lease` gives.

        Raises:
            OverloadedError: there is no room, because rows are using every adapter.
            UnknownModelError: the model does not take it; as `read`.
        """
        with self._lock:
            old = self._current.get(read.id)
            if old is not None and old.version == read.version:
                return
            if old is None and len(self._current) >= self.max_adapters:
                self._make_room(read.id)
        name = f"version-{next(self._clock)}"  # an id may hold dots, which a module's name may not
        try:
            self._host.put_on(name, read.files)
        except AdapterError as error:
            raise self._refuse(read.id, read.version, error) from error
        heads = read.files.heads
        beta = 0.0 if heads is None else heads.beta
        with self._lock:
            if old is not None:
                self._retired.append(old)
            self._current[read.id] = Resident(read.id, read.version, name, beta, last_used=next(self._clock))
        self.sweep()
        logger.info("adapter %s of step %d is on", read.id, read.version.step)

    def sweep(self) -> None:
        """Takes off what was replaced and is not used any more."""
        with self._lock:
            gone = [resident for resident in self._retired if resident.leases == 0]
            self._retired = [resident for resident in self._retired if resident.leases > 0]
        for resident in gone:
            self._host.take_off(resident.name)

    def _refuse(self, id: str, version: AdapterVersion, error: Exception) -> UnknownModelError:
        """Remembers that a version cannot be used; what to tell who asked for it."""
        logger.warning("adapter %r of step %d is refused: %s", id, version.step, error)
        reason = f"adapter {id!r} of step {version.step} cannot be used; the server's log says why"
        with self._lock:
            self._refused[id] = (version, reason)
        return UnknownModelError(reason)

    def _make_room(self, id: str) -> None:
        idle = [resident for resident in self._current.values() if resident.leases == 0]
        if not idle:
            raise OverloadedError(
                f"adapter {id!r} is not loaded and all {self.max_adapters} that fit are in use; try again later"
            )
        oldest = min(idle, key=lambda resident: resident.last_used)
        self._retired.append(self._current.pop(oldest.id))

    def _is_stale(self, resident: Resident) -> bool:
        newest, refused = self._newest.get(resident.id), self._refused.get(resident.id)
        if newest is None:  # a checkpoint, which stays what it is
            return False
        return newest != resident.version and (refused is None or refused[0] != newest)


class _OnModel:
    """`AdapterHost` of the policy's own model."""

    def __init__(self, policy: Policy, rows: RowAdapters) -> None:
        self._policy, self._rows = policy, rows

    def fitted(self, files: AdapterFiles) -> AdapterFiles:
        state = {name: tensor.to(self._policy.device) for name, tensor in files.state.items()}
        return AdapterFiles(files.config, state, files.heads)

    def put_on(self, name: str, files: AdapterFiles) -> None:
        policy, config = self._policy, files.config
        try:
            # On the meta device first: PEFT would draw random weights only to have them replaced.
            if isinstance(policy.model, PeftModel):
                policy.model.add_adapter(name, config, low_cpu_mem_usage=True)
            else:
                policy.model = PeftModel(policy.hf_model, config, adapter_name=name, low_cpu_mem_usage=True)
            # Assigned, not copied, and not by PEFT's own loader, which casts weights to the base's dtype.
            named = {key.replace(".weight", f".{name}.weight"): value for key, value in files.state.items()}
            left = policy.model.load_state_dict(named, strict=False, assign=True).unexpected_keys
            if left:
                raise ValueError(f"it has no place for {left[0]!r}")
        except (ValueError, RuntimeError, KeyError, TypeError) as error:
            if isinstance(policy.model, PeftModel) and name in policy.model.peft_config:
                self.take_off(name)
            self._rows.refresh()
            raise AdapterError(str(error)) from error
        policy.model.requires_grad_(False).eval()
        if files.heads is not None:
            policy.value_heads[name] = files.heads
        self._rows.refresh()

    def take_off(self, name: str) -> None:
        self._policy.value_heads.pop(name, None)
        peft: Any = self._policy.model
        others = [other for other in peft.peft_config if other != name]
        if others:
            peft.set_adapter(others[0])  # PEFT asks the active one for things, so it must not be the one that goes
            peft.delete_adapter(name)
            peft.requires_grad_(False)
        else:
            self._policy.model = forget_adapters(peft.unload())
        self._rows.refresh()


def _checkpoint(run: AdapterSource, step: int) -> tuple[AdapterSource | None, AdapterVersion | None]:
    """One checkpoint of a run; nothing where it is not there any more."""
    try:
        source = run.checkpoint(step)
        return source, None if source is None else source.newest()
    except (MMRLError, OSError, ValueError) as error:
        logger.warning("the checkpoint of step %d cannot be looked up: %s", step, error)
        return None, None


def _unknown(id: str) -> UnknownModelError:
    return UnknownModelError(f"no model {id[:64]!r} is served here; the list of models names those that are")
