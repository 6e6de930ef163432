"""Adapters for requests: leased while their rows run, loaded when asked for, replaced by new versions."""

from __future__ import annotations

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from mmrl_ray.errors import MMRLError, OverloadedError
from mmrl_ray.policy.adapters import AdapterPool, Resident
from mmrl_ray.serving.decode_thread import DecodeThread

logger = logging.getLogger(__name__)

_ATTEMPTS = 3


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
