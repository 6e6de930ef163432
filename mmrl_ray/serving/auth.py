"""What stands between the server and the routes: who may come in, how much each key may do, and what is counted.

    request ──▶ Envelope: an id, every failure as an error object, counts
            ──▶ Gate: a key, its rate, its requests under way, the size of the body
            ──▶ routes, each with the role that it takes (`app.py`)

The gate refuses whatever it was not told to let through, so that a route that is added later is closed until a key
opens it; only liveness is open.

What a key may do is limited by a token bucket and a cap on what is under way. Both count in this process: a gateway of
k replicas lets through up to k times as much.

What is counted for Prometheus is in a registry of its own, which `/metrics` shows, and once more for Ray.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import ipaddress
import logging
import os
import secrets
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from fastapi import Request
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mmrl_ray.config.serving import RateSection
from mmrl_ray.errors import ServingError
from mmrl_ray.serving.http_errors import CLIENT_GONE, error_response, harmless_id, is_expected, problem, rate_limited
from mmrl_ray.serving.keys import KeyRecord, KeyRole, KeyStore
from mmrl_ray.telemetry import table
from mmrl_ray.telemetry.meter import Meter, PrometheusMeter

LIVE = "/health/live"
"""The one path that needs no key."""
BROWSER_PATHS = ("/docs", "/docs/swagger-ui-bundle.js", "/docs/swagger-ui.css", "/openapi.json")
"""A browser, which sends no bearer token, may show these for a key given as the password of HTTP Basic."""
ADDRESS = "x-mmrl-address"
"""Header in which HAProxy tells the client's address; what a client itself sends there it takes away."""
_LOOK_UPS = 4
"""Keys looked up at a time, in threads of their own: nothing else that is slow may keep callers out."""
_CALLER = "mmrl.caller"
_ANYBODY = "insecure"
"""What limits call everybody where no key is asked for."""
_LOG = logging.getLogger(__name__)
_WRONG_BURST = 100
_WRONG_PER_S = 5.0
"""Wrong keys from one address: at once after a pause, and in the long run."""
_ADDRESSES = 4096
_METHODS = frozenset(("GET", "HEAD", "POST", "OPTIONS"))
_METRICS = tuple(metric for metric in table.METRICS if metric.name.startswith("mmrl_gateway_"))


class Envelope:
    """Around everything: gives each request an id and turns whatever is raised into an answer."""

    def __init__(self, app: ASGIApp, *, metrics: GatewayMetrics, clock: Callable[[], float] = time.monotonic) -> None:
        self._app = app
        self._metrics = metrics
        self._clock = clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request: gives it an id, counts it, and answers failures as error objects."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = harmless_id(Headers(scope=scope).get("x-request-id", "")) or secrets.token_hex(16)
        status = CLIENT_GONE  # unless an answer begins

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        began = self._clock()
        self._metrics.began()
        try:
            await self._app(scope, receive, send_with_id)
        except Exception as error:  # noqa: BLE001 - the boundary: a traceback is for the log, never for a client
            if not is_expected(error):
                _LOG.exception("request %s failed", request_id)
            if status == CLIENT_GONE:
                await error_response(error)(scope, receive, send_with_id)
        finally:
            route = getattr(scope.get("route"), "path", "(none)")
            self._metrics.answered(scope["method"], route, status, self._clock() - began)


class Gate:
    """Lets in who has a key that works and has not used it up; reads no more of a body than is allowed."""

    def __init__(self, app: ASGIApp, *, keys: KeyStore | None, limits: KeyLimits, max_body_bytes: int) -> None:
        """Without `keys` everybody gets in who comes to a loopback address by its name."""
        self._app = app
        self._keys = keys
        self._limits = limits
        self._max_body_bytes = max_body_bytes
        self._wrong = WrongKeys()
        # Without HAProxy it would be whatever the client says.
        self._is_told_addresses = os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "1"
        self._threads = ThreadPoolExecutor(_LOOK_UPS, thread_name_prefix="keys")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request: lets it through with a key that is known and within its limits, or refuses it."""
        if scope["type"] == "lifespan" or (scope["type"] == "http" and scope["path"] == LIVE):
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        headers = Headers(scope=scope)
        caller = await self._caller(scope["path"], headers, self._address(scope, headers))
        scope[_CALLER] = caller
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length[:20]) > self._max_body_bytes:
            raise _too_large(self._max_body_bytes)
        key_id = _ANYBODY if caller is None else caller.id
        if (refusal := self._limits.enter(key_id)) is not None:
            raise rate_limited(refusal.message, refusal.retry_after_s)
        try:
            await self._app(scope, _capped(receive, self._max_body_bytes), send)
        finally:
            self._limits.leave(key_id)

    def _address(self, scope: Scope, headers: Headers) -> str:
        told = headers.get(ADDRESS) if self._is_told_addresses else None
        return told or (scope.get("client") or ("",))[0]

    async def _caller(self, path: str, headers: Headers, address: str) -> KeyRecord | None:
        if self._keys is None:
            _check_host(headers.get("host", ""))
            return None
        browser = path in BROWSER_PATHS
        key = _key(headers.get("authorization", ""), basic=browser)
        if key is None:
            raise no_key(browser=browser)
        record = self._keys.cached(key)
        if record is None:
            # Who had a good key a moment ago is let through to its look-up, whoever else sends wrong ones from there.
            if not self._keys.was_good(key) and (refusal := self._wrong.refusal(address)) is not None:
                raise rate_limited(refusal.message, refusal.retry_after_s)
            try:
                record = await asyncio.get_running_loop().run_in_executor(self._threads, self._keys.verify, key)
            except ServingError as error:
                _LOG.error("%s", error)
                raise problem(
                    503, "keys cannot be checked now: try again later", code="keys_unavailable", type="server_error"
                ) from error
        if record is None:
            self._wrong.count(address)
            raise no_key("this key is unknown, expired or revoked", browser=browser)
        return record


def needs(role: KeyRole) -> Callable[[Request], Awaitable[None]]:
    """A dependency of routes that take `role`."""

    async def check(request: Request) -> None:
        caller: KeyRecord | None = request.scope[_CALLER]
        if caller is not None and not caller.allows(role):
            raise problem(
                403,
                f"this key has the role {', '.join(sorted(caller.roles))}, and this path takes {role}",
                code="forbidden",
                type="permission_error",
            )

    return check


def caller_name(request: Request) -> str:
    """The name of the request's key, and one for everybody where no key is asked for."""
    caller: KeyRecord | None = request.scope[_CALLER]
    return _ANYBODY if caller is None else caller.name


def caller_id(request: Request) -> str | None:
    """The id of the request's key, by which callers get their shares; None where no key is asked for."""
    caller: KeyRecord | None = request.scope[_CALLER]
    return None if caller is None else caller.id


def is_loopback(host: str) -> bool:
    """Whether a host, as one writes it to listen on, is this machine alone."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _key(authorization: str, *, basic: bool) -> str | None:
    scheme, _, value = authorization.partition(" ")
    if scheme.lower() == "bearer":
        return value.strip() or None
    if basic and scheme.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).decode("latin-1").partition(":")[2] or None
        except binascii.Error:
            return None
    return None


def no_key(
    message: str = "no key was sent: send the header `Authorization: Bearer mmrl-…`", *, browser: bool = False
) -> Exception:
    """401; a browser is told how to ask for one."""
    scheme = 'Basic realm="mmrl", charset="UTF-8"' if browser else 'Bearer realm="mmrl"'
    return problem(
        401, message, code="invalid_api_key", type="authentication_error", headers={"www-authenticate": scheme}
    )


def _check_host(host: str) -> None:
    """Refuses names that a stranger's web page had made to point here."""
    name = host[1 : host.find("]")] if host.startswith("[") else host.partition(":")[0]
    if not is_loopback(name):
        raise problem(
            403,
            f"without keys only loopback names are answered, not {name[:64]!r}",
            code="forbidden",
            type="permission_error",
        )


def _capped(receive: Receive, max_bytes: int) -> Receive:
    """The same messages, until their bodies are together too large."""
    so_far = 0

    async def capped() -> Message:
        nonlocal so_far
        message = await receive()
        so_far += len(message.get("body", b""))
        if so_far > max_bytes:
            raise _too_large(max_bytes)
        return message

    return capped


def _too_large(max_bytes: int) -> Exception:
    return problem(413, f"the body is larger than {max_bytes:,} bytes, the most accepted", code="body_too_large")


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a request does not get in now."""

    message: str
    retry_after_s: float


@dataclass(slots=True)
class _Account:
    tokens: float
    at: float
    """When `tokens` was right."""
    running: int = 0


class WrongKeys:
    """Slows down whoever sends keys that do not work: each costs a look into the database.

    Counted by address. Behind a proxy of one's own that is one for all, which is why keys that have worked are not
    asked of here.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._wrong: OrderedDict[str, tuple[float, float]] = OrderedDict()
        """By address: how many beyond what it may send, and when that was right."""

    def count(self, address: str) -> None:
        """A key from there was wrong."""
        self._wrong[address] = (self._now(address) + 1, self._clock())
        self._wrong.move_to_end(address)
        if len(self._wrong) > _ADDRESSES:
            self._wrong.popitem(last=False)

    def refusal(self, address: str) -> Refusal | None:
        """Why the next key from there is not looked up now."""
        above = self._now(address) + 1 - _WRONG_BURST
        if above <= 0:
            return None
        return Refusal("too many keys that do not work came from this address", above / _WRONG_PER_S)

    def _now(self, address: str) -> float:
        count, at = self._wrong.get(address, (0.0, 0.0))
        return max(0.0, count - (self._clock() - at) * _WRONG_PER_S)


class KeyLimits:
    """Used from one event loop; keys are named by their ids."""

    def __init__(self, rate: RateSection, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate = rate
        self._per_second = rate.requests_per_minute / 60
        self._clock = clock
        self._accounts: dict[str, _Account] = {}

    def enter(self, key_id: str) -> Refusal | None:
        """Lets one request in, which must `leave` later; or says why not, and counts nothing."""
        now = self._clock()
        account = self._accounts.setdefault(key_id, _Account(float(self._rate.burst), now))
        account.tokens = min(self._rate.burst, account.tokens + (now - account.at) * self._per_second)
        account.at = now
        if account.running >= self._rate.concurrency:
            return Refusal(f"this key has {account.running} requests under way, the most it may have", 1.0)
        if account.tokens < 1:
            wait_s = (1 - account.tokens) / self._per_second
            return Refusal(f"this key has made its {self._rate.requests_per_minute:g} requests a minute", wait_s)
        account.tokens -= 1
        account.running += 1
        return None

    def leave(self, key_id: str) -> None:
        """A request that was let in is over."""
        self._accounts[key_id].running -= 1


class GatewayMetrics:
    """One replica's numbers. Labels hold route templates, never what a client wrote: their number is fixed."""

    content_type = PrometheusMeter.content_type

    def __init__(self, meter: Meter | None = None) -> None:
        """`meter` takes the same measurements as `/metrics`."""
        self._own = PrometheusMeter(_METRICS)
        self._meters = (self._own, meter or Meter())
        self._under_way = 0

    def began(self) -> None:
        """Counts a request that has come."""
        self._count(1)

    def answered(self, method: str, route: str, status: int, seconds: float) -> None:
        """A request that `began` is over."""
        self._count(-1)
        method = method if method in _METHODS else "other"
        for meter in self._meters:
            meter.add(table.GATEWAY_REQUESTS, method=method, route=route, status=str(status))
            meter.observe(table.GATEWAY_SECONDS, seconds, route=route)

    def first_token(self, seconds: float) -> None:
        """A streamed answer began to say something."""
        for meter in self._meters:
            meter.observe(table.GATEWAY_FIRST_TOKEN, seconds)

    def generated(self, prompt_tokens: int, completion_tokens: int) -> None:
        """The policy read and wrote so many tokens."""
        for meter in self._meters:
            meter.add(table.GATEWAY_TOKENS, prompt_tokens, kind="prompt")
            meter.add(table.GATEWAY_TOKENS, completion_tokens, kind="completion")

    def scored(self, captions: int) -> None:
        """The reward scored so many captions."""
        for meter in self._meters:
            meter.add(table.GATEWAY_SCORED, captions)

    def exposition(self) -> bytes:
        """All of it, in Prometheus's text format."""
        return self._own.exposition()

    def _count(self, more: int) -> None:
        self._under_way += more
        for meter in self._meters:
            meter.set(table.GATEWAY_UNDER_WAY, self._under_way)
