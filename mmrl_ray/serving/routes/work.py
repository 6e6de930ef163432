"""Work for a client: over when it is done, when its time is up, or when nobody waits for it any more."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from starlette.types import Receive

from mmrl_ray.serving.http_errors import CLIENT_GONE, problem


@contextlib.asynccontextmanager
async def for_client(receive: Receive, timeout_s: float) -> AsyncIterator[None]:
    """Cancels what its body awaits when the client goes away or `timeout_s` is over.

    Enter it once the request's body was read: from then on `receive` tells of nothing but the client's going.

    Raises:
        HTTPException: 499 or 504 where that happened.
    """
    gone = False
    try:
        async with asyncio.timeout(timeout_s) as limit:

            async def watch() -> None:
                nonlocal gone
                while (await receive())["type"] != "http.disconnect":
                    pass
                if not limit.expired():
                    gone = True
                    limit.reschedule(0.0)  # long ago: the body is cancelled at once

            watcher = asyncio.create_task(watch())
            try:
                yield
            finally:
                watcher.cancel()
    except TimeoutError:
        if gone:
            raise problem(CLIENT_GONE, "the client went away", code="client_gone") from None
        raise
