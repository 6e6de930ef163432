"""What routes share: JSON answers, and how bodies and errors stand in the OpenAPI document.

Bodies are read by `routes/body.py`, after the key was checked and under the gateway's own caps, so the document is
told of them here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.responses import Response

VERSION_HEADER = "x-model-version"
"""Training step of the weights that answered."""
_REFS = "#/components/schemas/{model}"


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
    """As it is, without a second validation."""
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
