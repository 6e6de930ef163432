"""What the gateway's routes share: services, bodies, work under a deadline, JSON answers, the OpenAPI document.

**Bodies** are read here, after the key was checked and under the gateway's own caps: within the time a request has,
JSON that names what is wrong with it, forms with one file. Parsing holds up everybody, in whatever thread it is done.
So there is an end to how many values a body may have, and a caller whose bodies take long has a part of the time for
them. FastAPI does not see the bodies, so the OpenAPI document is told of them (`takes_json`, `document`).

**Work** for a client is over when it is done, when its time is up, or when nobody waits for it any more.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel, ValidationError
from pydantic.json_schema import models_json_schema
from pydantic_core import from_json
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Receive

from mmrl_ray.config.serving import MAX_ITEMS, LimitsSection, ServingSection
from mmrl_ray.experience.carriers import SamplingParams
from mmrl_ray.preferences.store import PreferenceStore
from mmrl_ray.serving.auth import GatewayMetrics, caller_id
from mmrl_ray.serving.http_errors import CLIENT_GONE, invalid_body, problem
from mmrl_ray.serving.images import Turns
from mmrl_ray.serving.keys import KeyStore
from mmrl_ray.serving.openai import Sampled
from mmrl_ray.serving.protocols import PolicyService, RewardService
from mmrl_ray.serving.routes.pictures import Pictures
from mmrl_ray.telemetry.meter import Meter

if TYPE_CHECKING:
    from mmrl_ray.serving.job_service import RayJobService  # needs Ray, which a gateway without jobs does not

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
VERSION_HEADER = "x-model-version"
"""Training step of the weights that answered."""
_REFS = "#/components/schemas/{model}"


@dataclass(frozen=True, slots=True)
class GatewayDeps:
    """The services behind the gateway, and what a user wrote about it."""

    policy: PolicyService
    reward: RewardService | None
    """None where no reward is served."""
    keys: KeyStore | None
    """None where `insecure`."""
    settings: ServingSection
    prompt: str = "Describe the image."
    """The user's turn of a caption that is asked for without one."""
    default_model: str | None = None
    """Answers captions that name no model; by default the first of `policy.models()`."""
    insecure: bool = False
    """Ask for no key; only on a loopback host."""
    meter: Meter | None = None
    """Takes the same measurements as `/metrics`, for a Prometheus that asks Ray."""
    preferences: PreferenceStore | None = None
    """What people think of captions; None where `settings.preferences` is not written."""
    jobs: RayJobService | None = None
    """Fine-tuning jobs; None where `settings.fine_tuning` is not written."""


@dataclass(frozen=True, slots=True)
class Tools:
    """The services, and what checks and counts on the way to them."""

    deps: GatewayDeps
    pictures: Pictures
    metrics: GatewayMetrics

    @property
    def limits(self) -> LimitsSection:
        """What one request may ask for."""
        return self.deps.settings.limits

    @property
    def timeout_s(self) -> float:
        """For a body to arrive, and then for its answer."""
        return self.deps.settings.request_timeout_s

    def sampling(
        self, request: Sampled, *, max_tokens: int | None, temperature: float, name: str = "max_tokens"
    ) -> SamplingParams:
        """How completions are drawn; `temperature` where the request names none.

        Raises:
            HTTPException: 400, more completions or tokens than are allowed.
        """
        at_most("n", request.n or 1, self.limits.max_n)
        tokens = self.limits.default_max_tokens if max_tokens is None else max_tokens
        at_most(name, tokens, self.limits.max_tokens)
        at_most("stop", sum(map(len, request.stops)), self.limits.max_text_chars, "characters")
        return request.sampling(tokens, temperature)


def at_most(param: str, value: int, limit: int, what: str = "") -> None:
    """Refuses, with 400, what is above a limit."""
    if value > limit:
        given = f"{value:,}" if value < 10**15 else "too large a number"
        raise problem(
            400,
            f"{param}: {given}{what and ' '}{what} is above {limit:,}, the most accepted",
            code="above_limit",
            param=param,
        )


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


class ErrorObject(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorAnswer(BaseModel):
    """Every answer that is not a success."""

    error: ErrorObject


ERRORS: dict[int | str, dict[str, Any]] = {"default": {"model": ErrorAnswer, "description": "Anything else"}}
"""`responses=` of every route."""


def json_answer(answer: BaseModel, version: int | None = None) -> Response:
    """An answer as JSON, without a second validation."""
    headers = None if version is None else {VERSION_HEADER: str(version)}
    return Response(answer.model_dump_json(), headers=headers, media_type="application/json")


def takes_json(body: type[BaseModel], form: dict[str, Any] | None = None) -> dict[str, Any]:
    """Keywords of a route whose body is `body`, or else a multipart form of this schema."""
    content = {"application/json": {"schema": {"$ref": _REFS.format(model=body.__name__)}}}
    if form is not None:
        content["multipart/form-data"] = {"schema": form}
    return {"openapi_extra": {"requestBody": {"required": True, "content": content}}}


def document(app: FastAPI, bodies: Sequence[type[BaseModel]]) -> None:
    """Makes `app.openapi()` complete: the bodies' schemas, and the key that every path but one takes."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
            _, definitions = models_json_schema([(body, "validation") for body in bodies], ref_template=_REFS)
            components = schema.setdefault("components", {})
            components.setdefault("schemas", {}).update(definitions["$defs"])
            components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
            schema["security"] = [{"key": []}]
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
