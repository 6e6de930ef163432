"""Reads bodies: within the time a request has, JSON that names what is wrong with it, forms with one file.

Parsing holds up everybody, in whatever thread it is done. So there is an end to how many values a body may have, and a
caller whose bodies take long has a part of the time for them.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError
from pydantic_core import from_json
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from mmrl_ray.config.serving import MAX_ITEMS
from mmrl_ray.serving.auth import caller_id
from mmrl_ray.serving.http_errors import invalid_body, problem
from mmrl_ray.serving.turns import Turns

Body = TypeVar("Body", bound=BaseModel)

_FORM_FIELDS = 32
_MOST_COMMAS = 10 * MAX_ITEMS
"""Parsing millions of small values holds everybody up for seconds, and pictures have none."""
_MOST_LISTS = 2 * MAX_ITEMS
"""And objects, which cost ten times as much: 0.1 s for so many."""
_SMALL_BYTES = 2**16
"""A body below is read in a millisecond or two, and waits for nobody."""
_REST = 3
"""A caller's next large body waits so many times as long as its last one took."""
_AT_A_TIME = 64
"""Callers whose large bodies are read side by side, each of them one."""
_MOST_PROBLEMS = 100
"""To list more of them takes longer than they are worth."""
_EXACT = 2**53
"""Every whole number below it is a float of its own."""


def is_json(request: Request) -> bool:
    """Whether the body is said to be JSON."""
    mime = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    return mime == "application/json" or mime.endswith("+json")


async def read_json(request: Request, model: type[Body], timeout_s: float) -> Body:
    """The body as `model`. One strict parser reads it: no half characters, no nesting without end.

    What is null is taken as left out, and 6.0 as the 6 that it is: clients send back what they were answered, with
    every key that they know, and JSON has one kind of number.

    Raises:
        HTTPException: 400, 408, 413 or 415.
    """
    if not is_json(request):
        raise problem(415, "send JSON, with the header `content-type: application/json`", code="unsupported_media_type")
    async with _in_time(timeout_s):
        raw = await request.body()
    if len(raw) < _SMALL_BYTES:
        return _parsed(raw, model)
    async with asyncio.timeout(timeout_s):
        async with _LARGE.turn(caller_id(request), rest=_REST):
            return _parsed(raw, model)


_LARGE = Turns(_AT_A_TIME, most=1)


def _parsed(raw: bytes, model: type[Body]) -> Body:
    if raw.count(b",") > _MOST_COMMAS or raw.count(b"[") + raw.count(b"{") > _MOST_LISTS:
        raise problem(400, "the body has too many values", code="above_limit")
    try:
        value = from_json(raw, allow_inf_nan=True, cache_strings=False)  # whose place the model names
    except ValueError as error:
        raise problem(400, f"the body is no JSON: {str(error)[:200]}", code="invalid_json") from error
    try:
        return model.model_validate(_plain(value))
    except ValidationError as error:
        if error.error_count() > _MOST_PROBLEMS:
            raise problem(400, f"the body has {error.error_count():,} mistakes", code="invalid_value") from None
        raise invalid_body(error.errors(include_url=False)) from error


async def read_form(
    request: Request, model: type[Body], file: str, timeout_s: float, max_file_bytes: int
) -> tuple[Body, bytes]:
    """The fields of a multipart body as `model`, and its one file.

    Raises:
        HTTPException: 400, 408, 413 or 415.
    """
    mime = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if mime != "multipart/form-data":
        raise problem(415, f"send multipart/form-data with a file `{file}`, or JSON", code="unsupported_media_type")
    try:
        async with _in_time(timeout_s), request.form(max_files=2, max_fields=_FORM_FIELDS) as form:
            uploads = [(name, value) for name, value in form.multi_items() if isinstance(value, UploadFile)]
            if [name for name, _ in uploads] != [file]:
                raise problem(400, f"{file}: send one file of this name", code="invalid_value", param=file)
            fields = {name: value for name, value in form.multi_items() if isinstance(value, str)}
            data = await uploads[0][1].read(max_file_bytes + 1)
    except HTTPException:
        raise
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        # The parser lets through what broken headers make its helpers raise.
        raise problem(
            400, "the form cannot be read: its parts or their headers are broken", code="invalid_form"
        ) from error
    try:
        return model.model_validate_strings(fields), data
    except ValidationError as error:
        raise invalid_body(error.errors(include_url=False)) from error


def _plain(value: Any) -> Any:
    """`value` without keys that are null, and with whole numbers as integers."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items() if each is not None}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return int(value) if isinstance(value, float) and value.is_integer() and abs(value) < _EXACT else value


@contextlib.asynccontextmanager
async def _in_time(timeout_s: float) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(timeout_s):
            yield
    except TimeoutError:
        raise problem(408, f"the body did not arrive within {timeout_s:g} s", code="request_timeout") from None
