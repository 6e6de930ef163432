"""The gateway: one FastAPI app in front of policy and reward, made without Ray, with the routes for whoever runs it.

Those are health, metrics, version, documentation, and `GET /v1/models`. Nothing here keeps state between requests but
limits and counts, so that any number of replicas may stand side by side.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from importlib import resources

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from mmrl_ray import __version__
from mmrl_ray.errors import ConfigError, UnknownModelError
from mmrl_ray.serving.auth import LIVE, Envelope, Gate, GatewayMetrics, KeyLimits, is_loopback, needs
from mmrl_ray.serving.fine_tuning_types import FineTuningRequest
from mmrl_ray.serving.http_errors import error_response, problem
from mmrl_ray.serving.keys import KeyRole
from mmrl_ray.serving.openai import ChatRequest, ModelCard, ModelList
from mmrl_ray.serving.protocols import ModelInfo
from mmrl_ray.serving.routes.captions import CaptionRequest, add_captions, add_chat
from mmrl_ray.serving.routes.common import ERRORS, VERSION_HEADER, GatewayDeps, Tools, document, json_answer
from mmrl_ray.serving.routes.pictures import Pictures
from mmrl_ray.serving.routes.preferences import PreferenceRequest, add_preferences
from mmrl_ray.serving.routes.rewards import RewardRequest, ScoreRequest, add_rewards, add_score
from mmrl_ray.serving.routes.training import WorkersRequest, add_fine_tuning, add_runs

__all__ = ["GatewayDeps", "make_app"]

_SCRIPT, _STYLE = "swagger-ui-bundle.js", "swagger-ui.css"
_READY_S = 5.0
"""A service that has not said by then that it is ready is not."""


def make_app(deps: GatewayDeps) -> FastAPI:
    """An ASGI app over these services.

    Raises:
        ConfigError: keys are missing, or `insecure` on a host that others reach, or jobs without their settings.
    """
    settings = deps.settings
    if deps.insecure and not is_loopback(settings.host):
        raise ConfigError(f"insecure on serving.host={settings.host!r}: without keys only 127.0.0.1 is served")
    if not deps.insecure and deps.keys is None:
        raise ConfigError("the gateway needs a key store, unless it is insecure on a loopback host")
    if deps.jobs is not None and settings.fine_tuning is None:
        raise ConfigError("the gateway has jobs but no serving.fine_tuning, which says what may be trained")
    metrics = GatewayMetrics(deps.meter)
    tools = Tools(deps, Pictures(settings), metrics)
    gate = Middleware(
        Gate,
        keys=None if deps.insecure else deps.keys,
        limits=KeyLimits(settings.rate),
        max_body_bytes=int(settings.limits.max_body_mb * 2**20),
    )
    app = FastAPI(
        title="mmrl_ray",
        version=__version__,
        description="Captions and their rewards. Every path but `/health/live` takes a key as a bearer token.",
        openapi_url=None,  # served by a route of its own, behind the gate like any other
        redirect_slashes=False,
        responses=ERRORS,
        middleware=[Middleware(Envelope, metrics=metrics), gate],
        exception_handlers={HTTPException: _refused, RequestValidationError: _refused},
    )
    if settings.cors_origins:  # around everything: their pages ask for leave without a key, and read errors, too
        app.add_middleware(
            _CrossOrigin,
            allow_origins=settings.cors_origins,
            allow_methods=["GET", "POST", "PUT", "DELETE"],
            allow_headers=["*"],
            expose_headers=["x-request-id", VERSION_HEADER, "retry-after"],
        )
    for tag, role, parts in _ROUTES:
        router = APIRouter(tags=[tag], dependencies=[Depends(needs(role))], responses=ERRORS)
        for add in parts:
            add(router, tools)
        app.router.routes += router.routes  # not by `include_router`, which hides them from whoever looks them over
    add_operations(app, tools)
    bodies: list[type[BaseModel]] = [ChatRequest, CaptionRequest, RewardRequest, ScoreRequest, PreferenceRequest]
    document(app, [*bodies, WorkersRequest, FineTuningRequest])
    return app


class _CrossOrigin(CORSMiddleware):
    """With its refusals as error objects: in plain text they would pass for an answer of a server that stops."""

    def preflight_response(self, request_headers: Headers) -> Response:
        """The answer of `CORSMiddleware` to a browser that asks whether it may ask; 400 as JSON where it may not."""
        answer = super().preflight_response(request_headers)
        if answer.status_code < 400:
            return answer
        headers = {
            name: value for name, value in answer.headers.items() if name not in ("content-length", "content-type")
        }
        message = "pages of this origin may not ask here in this way: serving.cors_origins lists those that may"
        return error_response(problem(answer.status_code, message, code="cross_origin_refused", headers=headers))


async def _refused(request: Request, error: Exception) -> Response:
    return error_response(error)


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


def add_models(router: APIRouter, tools: Tools) -> None:
    """Both routes."""

    async def served() -> list[ModelInfo]:
        async with asyncio.timeout(tools.timeout_s):
            return await tools.deps.policy.models()

    @router.get("/v1/models", response_model=ModelList, summary="Models and adapters that can be asked for")
    async def models() -> Response:
        return json_answer(ModelList(data=[_card(info) for info in await served()]))

    @router.get("/v1/models/{model}", response_model=ModelCard, summary="One of them")
    async def model(model: str) -> Response:
        for info in await served():
            if info.id == model:
                return json_answer(_card(info), info.version)
        raise UnknownModelError(f"no model {model[:64]!r} is served here: GET /v1/models lists those that are")


def _card(info: ModelInfo) -> ModelCard:
    return ModelCard(id=info.id, created=info.created, root=info.root, parent=info.parent, step=info.version)


_ROUTES: tuple[tuple[str, KeyRole, tuple[Callable[[APIRouter, Tools], None], ...]], ...] = (
    ("policy", "infer", (add_chat, add_captions, add_models)),
    ("reward", "infer", (add_rewards, add_score)),
    ("preferences", "feedback", (add_preferences,)),
    ("runs", "admin", (add_runs,)),
    ("fine-tuning", "admin", (add_fine_tuning,)),
)
"""What is served, by the tag it has in the documentation, and the role that a key needs for it."""
