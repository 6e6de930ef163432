"""Pictures of requests on their way through the decoders: cancelled with their request, by turns of their callers.

Encoded pictures travel (a photograph has 4 MB, its pixels 36): the policy decodes what it is sent, the gateway looks at
headers alone. What goes to a reward or into a store is decoded by the gateway, once a distinct picture.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from PIL import Image

from mmrl_ray.data.decoder_pool import DecoderPool, Decoding, background_pool, shared_pool
from mmrl_ray.data.images import inspect_image
from mmrl_ray.errors import ImageError, OverloadedError, ProcessError
from mmrl_ray.serving.images import DEFAULT_LIMITS, ImageLimits
from mmrl_ray.serving.turns import Turns

_Found = TypeVar("_Found")
_QUICK_PIXELS = 4_000_000
_QUICK_BYTES = 2**20
"""A picture above either may take seconds: those have decoders of their own, which give way to the model."""
_QUICK, _SLOW = 3, 2
"""Decoded at a time of either kind, all but one of them for one caller: another one's never wait for it."""
_KNOWN = 4096
"""Pictures whose verdict is remembered, 100 bytes each."""


class RequestDecoder:
    """Used from one event loop at a time."""

    def __init__(self, limits: ImageLimits = DEFAULT_LIMITS, pool: DecoderPool | None = None) -> None:
        """`pool` is by default the one of this process."""
        self._limits = {"max_bytes": limits.max_bytes, "max_pixels": limits.max_pixels, "max_side": limits.max_side}
        self._pools = (lambda: pool, lambda: pool) if pool is not None else (shared_pool, background_pool)
        self._threads = ThreadPoolExecutor(_QUICK + _SLOW, thread_name_prefix="decode")
        self._turns = Turns(_QUICK), Turns(_SLOW)
        self._known: OrderedDict[bytes, str | None] = OrderedDict()
        """By digest: what is wrong with a picture, or None."""
        self._under_way: dict[bytes, _Check] = {}

    @asynccontextmanager
    async def decoded(self, images: Sequence[bytes], caller: str | None = None) -> AsyncIterator[list[Image.Image]]:
        """The pictures, each distinct one decoded once; what is done with them inside has its turn, too.

        Raises:
            ImageError: one is broken or refused.
            OverloadedError: the decoders are lost or busy.
        """
        slow = max((self._is_slow(image) for image in images), default=False)  # a look at each one's header
        async with self._turns[slow].turn(caller):
            pool = self._pools[slow]()
            found = {image: await self._run(pool.decode, image) for image in dict.fromkeys(images)}
            yield [found[image] for image in images]

    async def check(self, data: bytes, digest: bytes, caller: str | None = None) -> None:
        """Decodes a picture, unless it or one of the same digest was decoded before or is being.

        Raises:
            ImageError: it is broken or refused.
            OverloadedError: the decoders are lost or busy.
        """
        if digest in self._known:
            self._known.move_to_end(digest)
            if (wrong := self._known[digest]) is not None:
                raise ImageError(wrong)
            return
        check = self._under_way.get(digest)
        if check is None:
            check = self._under_way[digest] = _Check(asyncio.create_task(self._checked(data, digest, caller)))
        check.waiting += 1
        try:
            await asyncio.shield(check.task)
        finally:
            check.waiting -= 1
            if not check.waiting:
                check.task.cancel()  # a finished one takes no notice
                self._under_way.pop(digest, None)

    async def _checked(self, data: bytes, digest: bytes, caller: str | None) -> None:
        try:
            slow = self._is_slow(data)
            async with self._turns[slow].turn(caller):
                await self._run(self._pools[slow]().check, data)
        except ImageError as error:
            self._remember(digest, str(error))
            raise
        else:
            self._remember(digest, None)

    def _remember(self, digest: bytes, wrong: str | None) -> None:
        self._known[digest] = wrong
        if len(self._known) > _KNOWN:
            self._known.popitem(last=False)

    def _is_slow(self, image: bytes) -> bool:
        return inspect_image(image, **self._limits) > _QUICK_PIXELS or len(image) > _QUICK_BYTES

    async def _run(self, function: Callable[..., _Found], data: bytes) -> _Found:
        decoding = Decoding()
        work = partial(function, data, decoding=decoding, **self._limits)
        try:
            return await asyncio.get_running_loop().run_in_executor(self._threads, work)
        except asyncio.CancelledError:
            decoding.give_up()
            raise
        except ProcessError as error:
            raise OverloadedError(f"a picture could not be decoded now ({error}): try again later") from error


@dataclass(slots=True)
class _Check:
    """One decoding that several requests wait for; cancelled with the last of them."""

    task: asyncio.Task[None]
    waiting: int = 0
