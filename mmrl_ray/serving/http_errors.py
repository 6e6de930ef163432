"""Whatever goes wrong, as OpenAI's clients expect it: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any, NamedTuple

from fastapi import HTTPException
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException as AnyHTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from mmrl_ray.errors import (
    AccessError,
    AdapterError,
    ConfigError,
    ConflictError,
    ContextLengthError,
    DataError,
    ImageError,
    JobServerError,
    OverloadedError,
    RewardError,
    UnknownImageError,
    UnknownJobError,
    UnknownModelError,
    UnknownPairError,
)

CLIENT_GONE = 499
"""Nobody reads it; metrics count what clients gave up."""
TAG = "~"
"""Begins the names of union branches, which are no part of what a client wrote."""
_INVALID = "invalid_request_error"
_SERVER = "server_error"
_VALUE_CHARS = 40


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


def rate_limited(message: str, retry_after_s: float) -> HTTPException:
    """429 with whole seconds to wait."""
    headers = {"retry-after": str(max(1, math.ceil(retry_after_s)))}
    return problem(429, message, code="rate_limit_exceeded", type="rate_limit_error", headers=headers)


def invalid_body(problems: Sequence[Any]) -> HTTPException:
    """400 from pydantic's errors, of which the first is told in full."""
    # Of a union whose branches all refuse, the branch that got furthest tells best.
    first = max(problems, key=lambda item: len(item["loc"])) if _same_place(problems) else problems[0]
    path = tuple(part for part in first["loc"] if not str(part).startswith(TAG))
    param = _dotted(path) or None
    if first["type"] == "json_invalid":
        return problem(400, f"the body is no JSON: {first['ctx']['error']}", code="invalid_json")
    message, code = first["msg"].removeprefix("Value error, "), "invalid_value"
    if first["type"] == "extra_forbidden":
        message, code = "this parameter is unknown here", "unknown_parameter"
    elif first["type"] == "missing":
        message, code = "this parameter is required", "missing_required_parameter"
    elif first["type"] != "value_error":
        message = f"{message[:1].lower()}{message[1:]}, not {_show(first.get('input'))}"
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
    return " ".join(str(error).split())


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


def _same_place(problems: Sequence[Any]) -> bool:
    return len({tuple(item["loc"])[:1] for item in problems}) == 1


def _dotted(path: Sequence[int | str]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).removeprefix(".")


def _show(value: Any) -> str:
    """A value that was sent, cut short; never a picture."""
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    text = repr(value).encode("ascii", "backslashreplace").decode()
    return text if len(text) <= _VALUE_CHARS else f"{text[:_VALUE_CHARS]}…"
