"""Whatever goes wrong, as OpenAI's clients expect it: `{"error": {"message", "type", "param", "code"}}`.

Around whatever Ray serves over HTTP: what its proxy and its replicas answer by themselves, as the gateway answers.

    client ──▶ Front ──▶ Ray's own middleware, health checks and routing ──▶ the gateway's app

Ray finds it by the name in `haproxy.py` and puts it outside everything else, in each proxy and each gateway replica. A
request has one id, which is the client's where that one is harmless; a path of Ray's tells strangers nothing; and where
no application answers, because it starts, stops or was lost, clients hear 503 and when to come again.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from http import HTTPStatus
from typing import Any, NamedTuple

from fastapi import HTTPException
from fastapi.exceptions import RequestValidationError
from pydantic_core import PydanticCustomError
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException as AnyHTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mmrl_ray.errors import (
    AccessError,
    AdapterError,
    ConfigError,
    ConflictError,
    ContextLengthError,
    DataError,
    ImageError,
    JobServerError,
    JobSetupError,
    OverloadedError,
    RewardError,
    UnknownFileError,
    UnknownImageError,
    UnknownJobError,
    UnknownModelError,
    UnknownPairError,
    one_line,
)

CLIENT_GONE = 499
"""Nobody reads it; metrics count what clients gave up."""
TAG = "~"
"""Begins the names of union branches, which are no part of what a client wrote."""
_INVALID = "invalid_request_error"
_SERVER = "server_error"
_VALUE_CHARS = 40
HARMLESS_ID = "^[A-Za-z0-9._-]{1,64}$"
"""Of a request: what logs and headers can hold."""
ROUTES = "/-/routes"
"""Ray's list of applications. Its `/-/healthz` says no more than that it lives, and Kubernetes asks for it."""
_ID = "x-request-id"


class _Kind(NamedTuple):
    status: int
    type: str
    code: str
    param: str | None = None


# The first that fits; anything else is unexpected, and its message is nobody's business.
_KINDS: tuple[tuple[type[Exception], _Kind], ...] = (
    (UnknownModelError, _Kind(404, _INVALID, "model_not_found", "model")),
    (UnknownImageError, _Kind(404, _INVALID, "image_not_found", "image_hash")),
    (UnknownJobError, _Kind(404, _INVALID, "job_not_found", "fine_tuning_job_id")),
    (UnknownFileError, _Kind(404, _INVALID, "file_not_found", "file_id")),
    (JobSetupError, _Kind(500, _SERVER, "jobs_misconfigured")),
    (UnknownPairError, _Kind(404, _INVALID, "pair_not_found", "pair")),
    (ConflictError, _Kind(409, _INVALID, "conflict", "choice")),
    (JobServerError, _Kind(503, _SERVER, "jobs_unavailable")),
    (OverloadedError, _Kind(503, _SERVER, "overloaded")),
    (AccessError, _Kind(403, "permission_error", "forbidden")),
    (RewardError, _Kind(502, _SERVER, "reward_failed")),
    (ImageError, _Kind(400, _INVALID, "invalid_image")),
    (ContextLengthError, _Kind(400, _INVALID, "context_length_exceeded", "messages")),
    (AdapterError, _Kind(400, _INVALID, "adapter_refused", "model")),
    (DataError, _Kind(400, _INVALID, "invalid_value")),
    (ConfigError, _Kind(400, _INVALID, "invalid_value")),
    (ClientDisconnect, _Kind(CLIENT_GONE, _INVALID, "client_gone")),
    (TimeoutError, _Kind(504, _SERVER, "timeout")),
)
_RETRY_AFTER_S = 1


def problem(
    status: int,
    message: str,
    *,
    code: str,
    param: str | None = None,
    type: str = _INVALID,
    headers: Mapping[str, str] | None = None,
) -> HTTPException:
    """An exception that becomes this answer."""
    detail = {"message": message, "type": type, "param": param, "code": code}
    return HTTPException(status, detail=detail, headers=dict(headers or {}))


def wrong_parameter(param: str, message: str, *, code: str = "invalid_value") -> PydanticCustomError:
    """What a model's validator raises about one of its fields."""
    return PydanticCustomError(_NAMED, "{message}", {"param": param, "message": message, "code": code})


@contextlib.contextmanager
def about(param: str, *, image: str | None = None) -> Iterator[None]:
    """Names `param` as the reason of a refusal inside the block, where the error names none itself; of a
    picture that cannot be used it is `image`, if given."""
    try:
        yield
    except (DataError, ImageError) as error:
        kind = next(kind for of, kind in _KINDS if isinstance(error, of))
        if kind.param is not None:
            raise
        named = image if image is not None and isinstance(error, ImageError) else param
        raise problem(400, _message(error), code=kind.code, param=named) from error


def harmless_id(given: str) -> str | None:
    """A client's own id of its request, where logs and headers can hold it."""
    return given if re.fullmatch(HARMLESS_ID, given) else None


def rate_limited(message: str, retry_after_s: float) -> HTTPException:
    """429 with whole seconds to wait."""
    headers = {"retry-after": str(max(1, math.ceil(retry_after_s)))}
    return problem(429, message, code="rate_limit_exceeded", type="rate_limit_error", headers=headers)


def unavailable() -> HTTPException:
    """503 where no application answers."""
    message = "the server is starting, stopping or has lost a part: try again later"
    return problem(503, message, code="unavailable", type=_SERVER)


def closed() -> HTTPException:
    """401 for paths that are Ray's, and nobody's business."""
    return problem(401, "there is nothing here without a key", code="invalid_api_key", type="authentication_error")


def invalid_body(problems: Sequence[Any]) -> HTTPException:
    """400 from pydantic's errors, of which the first is told in full."""
    # Of a union whose branches all refuse, the branch that got furthest tells best.
    one_place = len({tuple(item["loc"])[:1] for item in problems}) == 1
    first = max(problems, key=lambda item: len(item["loc"])) if one_place else problems[0]
    path = tuple(part for part in first["loc"] if not str(part).startswith(TAG))
    code = _CODES.get(first["type"], "invalid_value")
    if first["type"] == _NAMED:
        path, code = (*path, first["ctx"]["param"]), first["ctx"]["code"]
    dotted = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")
    param, message = dotted or None, _plain_words(first)
    return problem(400, f"{param}: {message}" if param else message, code=code, param=param)


def is_expected(error: Exception) -> bool:
    """Whether `error` says something about the request, rather than about this program."""
    kinds = (AnyHTTPException, RequestValidationError, *(kind for kind, _ in _KINDS))
    return isinstance(error, kinds)


def error_response(error: Exception) -> Response:
    """The answer to a request that ended in `error`."""
    headers: dict[str, str] = {}
    if isinstance(error, RequestValidationError):  # of a path or a query, whose name is no part of the parameter's
        error = invalid_body([{**item, "loc": item["loc"][1:]} for item in error.errors()])
    if isinstance(error, AnyHTTPException):
        status = error.status_code
        headers |= error.headers or {}
        body = error.detail if isinstance(error.detail, dict) else _plain(status, error.detail)
    else:
        kind = next((kind for of, kind in _KINDS if isinstance(error, of)), None)
        if kind is None:
            status, body = 500, _body(_Kind(500, _SERVER, "internal_error"), "the server failed; see its log")
        else:
            status, body = kind.status, _body(kind, _message(error))
    if status == 503:
        headers.setdefault("retry-after", str(_RETRY_AFTER_S))
    return Response(json.dumps({"error": body}), status, headers, media_type="application/json")


def error_body(error: Exception) -> str:
    """The same for an answer that has begun: what its last event says."""
    return bytes(error_response(error).body).decode()


def _message(error: Exception) -> str:
    if isinstance(error, ClientDisconnect):
        return "the client went away"
    if isinstance(error, TimeoutError):
        return "the answer took too long: ask for less, or try again later"
    return one_line(error)


def _body(kind: _Kind, message: str) -> dict[str, Any]:
    return {"message": message, "type": kind.type, "param": kind.param, "code": kind.code}


def _plain(status: int, detail: str) -> dict[str, Any]:
    """Of an error that the framework raised."""
    try:
        phrase = HTTPStatus(status).phrase
    except ValueError:
        phrase = "error"
    code = phrase.lower().replace(" ", "_").replace("-", "_")
    message = "there is nothing at this path" if status == 404 else detail or phrase
    return _body(_Kind(status, _SERVER if status >= 500 else _INVALID, code), message)


_NAMED = "named"
_CODES = {"extra_forbidden": "unknown_parameter", "missing": "missing_required_parameter"}
_WORDS = {
    "extra_forbidden": "this parameter is unknown here",
    "missing": "this parameter is required",
    "none_required": "this parameter is not served here: leave it out",
    "greater_than": "must be above {gt}, not {shown}",
    "greater_than_equal": "must be at least {ge}, not {shown}",
    "less_than": "must be below {lt}, not {shown}",
    "less_than_equal": "must be at most {le}, not {shown}",
    "literal_error": "must be {expected}, not {shown}",
    "finite_number": "must be a finite number, not {shown}",
    "string_type": "must be a string, not {shown}",
    "string_too_long": "must have at most {max_length} characters, not {length}",
    "string_too_short": "must have at least {min_length} characters, not {length}",
    "string_pattern_mismatch": "must match the pattern {pattern}, which {shown} does not",
    "bool_type": "must be true or false, not {shown}",
    "too_long": "must have at most {max_length} items, not {length}",
    "too_short": "must have at least {min_length} items, not {length}",
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float"), "must be an integer, not {shown}"),
    "int_parsing_size": "must be an integer of fewer digits",
    **dict.fromkeys(("float_type", "float_parsing"), "must be a number, not {shown}"),
    "list_type": "must be a list, not {shown}",
    **dict.fromkeys(("dict_type", "model_type", "model_attributes_type"), "must be an object, not {shown}"),
}
"""What pydantic finds, by its error's type, in words for somebody who knows JSON and no pydantic."""


def _plain_words(found: Any) -> str:
    given = found.get("input")
    context = {key: f"{each:g}" if isinstance(each, float) else each for key, each in found.get("ctx", {}).items()}
    if context.get("expected") in ("True", "False"):  # as Python writes them
        context["expected"] = context["expected"].lower()
    if found["type"] == "too_long" and context.get("max_length") == 0:
        return _WORDS["none_required"]
    if (words := _WORDS.get(found["type"])) is not None:
        length = len(given) if isinstance(given, str | list | dict) else 0
        return words.format(**context, shown=_show(given), length=length)
    return str(found["msg"]).removeprefix("Value error, ")


def _show(value: Any) -> str:
    """A value that was sent, cut short; never a picture."""
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    text = repr(value).encode("ascii", "backslashreplace").decode()
    return text if len(text) <= _VALUE_CHARS else f"{text[:_VALUE_CHARS]}…"


def middlewares() -> list[Middleware]:
    """What `RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH` asks for."""
    return [Middleware(Front)]


class Front:
    """ASGI middleware around Ray's proxy or a replica: one id a request, and every failure as an error object."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request; what goes wrong below is answered here."""
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
                    await answer(TimeoutError() if message["status"] in (408, 504) else unavailable())
                    return
            if not replaced:
                await send(message)

        async def answer(error: Exception) -> None:
            response = error_response(error)
            response.headers[_ID] = request_id
            await response(scope, receive, send)

        if scope["path"] == ROUTES:
            await answer(closed())
            return
        await self._app(scope, receive, send_once)
