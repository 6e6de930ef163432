"""Pictures of requests: data URIs, uploads and, where allowed, URLs; all looked at before they go anywhere."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Self, TypeVar

from mmrl_ray.config.serving import ServingSection
from mmrl_ray.data.images import inspect_image
from mmrl_ray.serving.http_errors import about, problem
from mmrl_ray.serving.images import ImageLimits, RequestDecoder, decode_data_uri, is_data_uri
from mmrl_ray.serving.remote_images import RemoteImagePolicy, fetch_image
from mmrl_ray.serving.turns import Turns

_What = TypeVar("_What", str, bytes)
_THREADS = 2
"""For base64 and digests, milliseconds a picture."""


class Pictures:
    """Turns what clients send into encoded files."""

    def __init__(self, settings: ServingSection) -> None:
        remote = settings.remote_images
        self.limits = ImageLimits(max_bytes=int(settings.limits.max_image_mb * 2**20))
        self._remote = RemoteImagePolicy(
            enabled=remote.enabled,
            allowed_domains=tuple(remote.allowed_domains),
            max_bytes=int(remote.max_mb * 2**20),
            timeout_s=remote.timeout_s,
            max_redirects=remote.max_redirects,
            allow_http=remote.allow_http,
        )
        self._max_pixels = int(settings.limits.max_megapixels * 1e6)
        self._decoder = RequestDecoder(self.limits)
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="pictures")
        self._turns = Turns(_THREADS)

    async def at(self, urls: Sequence[str], params: Sequence[str], caller: str | None) -> tuple[bytes, ...]:
        """The encoded files of these URLs, in order, their headers looked at; whoever is sent them decodes them.

        Args:
            urls: data URIs, or where they are allowed others.
            params: where in the request each one stands.
            caller: who asks; see `caller_id`.

        Raises:
            HTTPException: 400, one is broken, too large, refused or cannot be fetched, or they have too many pixels
                together.
        """
        found = await self._read(urls, params, caller)
        return tuple(found[url].data for url in urls)

    async def decoded(
        self, urls: Sequence[Sequence[str]], params: Sequence[str], caller: str | None
    ) -> list[tuple[bytes, ...]]:
        """The same for each of several items, of which `params` says where each stands, and every different picture is
        known to decode, in turn with those of other callers.

        Raises:
            HTTPException: as `at`, or one cannot be decoded.
            OverloadedError: the decoders are lost or busy.
        """
        places = [param for item, param in zip(urls, params, strict=True) for _ in item]
        flat = [url for item in urls for url in item]
        found = await self._read(flat, places, caller)
        first = dict(zip(reversed(flat), reversed(places), strict=True))
        for url, file in found.items():
            with about(first[url]):
                await self._decoder.check(file.data, file.digest, caller)
        return [tuple(found[url].data for url in item) for item in urls]

    async def uploaded(self, data: bytes, caller: str | None) -> bytes:
        """A file that was uploaded as `image`, its header looked at.

        Raises:
            HTTPException: 400, broken, too large, or of a format that is not accepted.
        """
        with about("image"):
            self._count([await self._in_thread(_File.of, data, caller)])
        return data

    async def _read(self, urls: Sequence[str], params: Sequence[str], caller: str | None) -> dict[str, _File]:
        """Each different one once."""
        found: dict[str, _File] = {}
        for url, param in zip(urls, params, strict=True):
            if url in found:
                continue
            with about(param):
                found[url] = await self._one(url, caller)
            self._count(found.values())
        return found

    async def _one(self, url: str, caller: str | None) -> _File:
        if is_data_uri(url):
            return await self._in_thread(lambda u, limits: _File.of(decode_data_uri(u, limits), limits), url, caller)
        return await self._in_thread(_File.of, await fetch_image(url, self._remote), caller)

    def _count(self, files: Iterable[_File]) -> None:
        pixels = sum({file.digest: file.pixels for file in files}.values())
        if pixels > self._max_pixels:
            raise problem(
                400,
                f"images of {pixels:,} pixels together: at most {self._max_pixels:,} are accepted in one request",
                code="above_limit",
            )

    async def _in_thread(
        self, function: Callable[[_What, ImageLimits], _File], what: _What, caller: str | None
    ) -> _File:
        loop = asyncio.get_running_loop()
        async with self._turns.turn(caller):
            return await loop.run_in_executor(self._threads, function, what, self.limits)


@dataclass(frozen=True, slots=True)
class _File:
    """One encoded picture."""

    data: bytes
    digest: bytes
    pixels: int

    @classmethod
    def of(cls, data: bytes, limits: ImageLimits) -> Self:
        pixels = inspect_image(data, max_bytes=limits.max_bytes, max_pixels=limits.max_pixels, max_side=limits.max_side)
        return cls(data, hashlib.sha256(data).digest(), pixels)
