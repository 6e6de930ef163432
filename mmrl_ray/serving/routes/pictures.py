"""Pictures of requests: data URIs, uploads and, where allowed, URLs; all checked before they go anywhere."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from mmrl_ray.config.serving import ServingSection
from mmrl_ray.serving.http_errors import about
from mmrl_ray.serving.images import ImageLimits, check_image, decode_data_uri, is_data_uri
from mmrl_ray.serving.remote_images import RemoteImagePolicy, fetch_image

_What = TypeVar("_What", str, bytes)
_THREADS = 2
"""Pictures decoded at a time: what they may need together stays small, whatever is in them."""


class Pictures:
    """Turns what clients send into encoded files that are known to decode."""

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
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="pictures")

    async def at(self, urls: Sequence[str], params: Sequence[str]) -> tuple[bytes, ...]:
        """The encoded files of these URLs, in order.

        Args:
            urls: data URIs, or where they are allowed others.
            params: where in the request each one stands.

        Raises:
            HTTPException: 400, one is broken, too large, refused, or cannot be fetched.
        """
        files = []
        for url, param in zip(urls, params, strict=True):
            with about(param):
                files.append(await self._one(url))
        return tuple(files)

    async def check(self, data: bytes) -> bytes:
        """A file that was uploaded as `image`.

        Raises:
            HTTPException: 400, broken, too large, or of a format that is not accepted.
        """
        with about("image"):
            return await self._decoded(check_image, data)

    async def _one(self, url: str) -> bytes:
        if is_data_uri(url):
            return await self._decoded(decode_data_uri, url)
        return await fetch_image(url, self._remote)

    async def _decoded(self, function: Callable[[_What, ImageLimits], bytes], what: _What) -> bytes:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, function, what, self.limits)
