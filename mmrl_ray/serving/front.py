"""Around whatever Ray serves over HTTP: what its proxy and its replicas answer by themselves, as the gateway answers.

    client ──▶ Front ──▶ Ray's own middleware, health checks and routing ──▶ the gateway's app

Ray finds it by the name in `flags.py` and puts it outside everything else, in each proxy and each gateway replica. A
request has one id, which is the client's where that one is harmless; a path of Ray's tells strangers nothing; and where
no application answers, because it starts, stops or was lost, clients hear 503 and when to come again.
"""

from __future__ import annotations

import secrets

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mmrl_ray.serving.http_errors import closed, error_response, harmless_id, unavailable

ROUTES = "/-/routes"
"""Ray's list of applications. Its `/-/healthz` says no more than that it lives, and Kubernetes asks for it."""
_ID = "x-request-id"


def middlewares() -> list[Middleware]:
    """What `RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH` asks for."""
    return [Middleware(Front)]


class Front:
    """See the top of this file."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = harmless_id(Headers(scope=scope).get(_ID, "")) or secrets.token_hex(16)
        # Ray's middleware echoes what it finds here, and so does the gateway.
        MutableHeaders(scope=scope)[_ID] = request_id
        replaced = False

        async def send_once(message: Message) -> None:
            nonlocal replaced
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                del headers[_ID]
                headers[_ID] = request_id
                if message["status"] >= 400 and not headers.get("content-type", "").startswith("application/json"):
                    replaced = True
                    await answered(message["status"])
                    return
            if not replaced:
                await send(message)

        async def answered(status: int) -> None:
            error = TimeoutError() if status in (408, 504) else unavailable()
            response = error_response(error)
            response.headers[_ID] = request_id
            await response(scope, receive, send)

        if scope["path"] == ROUTES:
            response = error_response(closed())
            response.headers[_ID] = request_id
            await response(scope, receive, send)
            return
        await self._app(scope, receive, send_once)
