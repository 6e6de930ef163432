"""For whoever runs the gateway: health, metrics, version, documentation, and `GET /v1/models`."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from importlib import resources

from fastapi import FastAPI, Response
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from mmrl_ray import __version__
from mmrl_ray.errors import UnknownModelError
from mmrl_ray.serving.auth import INFER, LIVE
from mmrl_ray.serving.http_errors import problem
from mmrl_ray.serving.openai import ModelCard, ModelList
from mmrl_ray.serving.protocols import ModelInfo
from mmrl_ray.serving.routes.common import Tools, json_answer

_SCRIPT, _STYLE = "swagger-ui-bundle.js", "swagger-ui.css"
_READY_S = 5.0
"""A service that has not said by then that it is ready is not."""
_OWNER = "mmrl_ray"


class Status(BaseModel):
    """How the gateway is."""

    status: str


class Version(BaseModel):
    """What runs here."""

    name: str
    version: str


def add_operations(app: FastAPI, tools: Tools) -> None:
    """Routes that any key opens, and liveness, which needs none."""

    @app.get(LIVE, response_model=Status, tags=["operations"], summary="The gateway runs")
    async def live() -> Response:
        return json_answer(Status(status="live"))

    @app.head(LIVE, include_in_schema=False)
    async def live_without_body() -> Response:
        return Response()

    @app.get(
        "/health/ready", response_model=Status, tags=["operations"], summary="The model is warm and the reward answers"
    )
    async def ready() -> Response:
        checks = {"policy": _within_deadline(tools.deps.policy.ready())}
        if tools.deps.reward is not None:
            checks["reward"] = _within_deadline(tools.deps.reward.ready())
        found = dict(zip(checks, await asyncio.gather(*checks.values()), strict=True))
        if missing := [name for name, is_ready in found.items() if not is_ready]:
            message = f"not ready: {' and '.join(missing)}"
            raise problem(503, message, code="not_ready", type="server_error")
        return json_answer(Status(status="ready"))

    @app.get("/metrics", response_class=Response, tags=["operations"], summary="Counts for Prometheus, of this replica")
    async def metrics() -> Response:
        return Response(tools.metrics.exposition(), headers={"content-type": tools.metrics.content_type})

    @app.get("/version", response_model=Version, tags=["operations"], summary="What runs here")
    async def version() -> Response:
        return json_answer(Version(name="mmrl_ray", version=__version__))

    @app.get("/openapi.json", include_in_schema=False)
    async def openapi() -> Response:
        return JSONResponse(app.openapi())

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return get_swagger_ui_html(
            openapi_url="openapi.json",
            title=app.title,
            swagger_js_url=f"docs/{_SCRIPT}",
            swagger_css_url=f"docs/{_STYLE}",
            swagger_favicon_url="data:,",
        )

    @app.get(f"/docs/{_SCRIPT}", include_in_schema=False)
    async def script() -> Response:
        return _asset(_SCRIPT, "text/javascript")

    @app.get(f"/docs/{_STYLE}", include_in_schema=False)
    async def style() -> Response:
        return _asset(_STYLE, "text/css")


def _asset(name: str, media_type: str) -> Response:
    """A file of Swagger's, from an installed package: a page that shows a key must load nothing from elsewhere."""
    data = resources.files("fastapi_offline").joinpath("static", name).read_bytes()
    return Response(data, media_type=media_type, headers={"cache-control": "private, max-age=86400"})


async def _within_deadline(check: Awaitable[bool]) -> bool:
    try:
        async with asyncio.timeout(_READY_S):
            return await check
    except Exception:  # noqa: BLE001 - whatever is wrong with a service, it is not ready
        return False


def add_models(app: FastAPI, tools: Tools) -> None:
    """Both routes."""

    async def served() -> list[ModelInfo]:
        async with asyncio.timeout(tools.timeout_s):
            return await tools.deps.policy.models()

    @app.get(
        "/v1/models",
        response_model=ModelList,
        tags=["policy"],
        dependencies=[INFER],
        summary="Models and adapters that can be asked for",
    )
    async def models() -> Response:
        return json_answer(ModelList(object="list", data=[_card(info) for info in await served()]))

    @app.get(
        "/v1/models/{model}", response_model=ModelCard, tags=["policy"], dependencies=[INFER], summary="One of them"
    )
    async def model(model: str) -> Response:
        for info in await served():
            if info.id == model:
                return json_answer(_card(info), info.version)
        raise UnknownModelError(f"no model {model[:64]!r} is served here: GET /v1/models lists those that are")


def _card(info: ModelInfo) -> ModelCard:
    return ModelCard(
        id=info.id,
        object="model",
        created=info.created,
        owned_by=_OWNER,
        root=info.root,
        parent=info.parent,
        step=info.version,
    )
