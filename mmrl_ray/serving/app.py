"""The gateway: one FastAPI app in front of the policy and the reward, made without Ray.

Nothing here keeps state between requests but limits and counts, so that any number of replicas may stand side by side.
"""

from __future__ import annotations

from collections.abc import Sequence

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from mmrl_ray import __version__
from mmrl_ray.errors import ConfigError
from mmrl_ray.serving.auth import Envelope, Gate, KeyLimits, is_loopback
from mmrl_ray.serving.fine_tuning_types import FineTuningRequest
from mmrl_ray.serving.http_errors import error_response
from mmrl_ray.serving.metrics import GatewayMetrics
from mmrl_ray.serving.openai import ChatRequest
from mmrl_ray.serving.routes.captions import CaptionRequest, add_captions
from mmrl_ray.serving.routes.chat import add_chat
from mmrl_ray.serving.routes.common import ERRORS, VERSION_HEADER, GatewayDeps, Tools, document
from mmrl_ray.serving.routes.fine_tuning import add_fine_tuning
from mmrl_ray.serving.routes.operations import add_models, add_operations
from mmrl_ray.serving.routes.pictures import Pictures
from mmrl_ray.serving.routes.preferences import PreferenceRequest, add_preferences
from mmrl_ray.serving.routes.rewards import RewardRequest, add_rewards
from mmrl_ray.serving.routes.runs import WorkersRequest, add_runs
from mmrl_ray.serving.routes.score import ScoreRequest, add_score

__all__ = ["GatewayDeps", "make_app"]


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
        middleware=[*_cross_origin(settings.cors_origins), Middleware(Envelope, metrics=metrics), gate],
        exception_handlers={HTTPException: _refused, RequestValidationError: _refused},
    )
    parts = (add_chat, add_captions, add_models, add_rewards, add_score)
    for add in (*parts, add_preferences, add_runs, add_fine_tuning, add_operations):
        add(app, tools)
    bodies: list[type[BaseModel]] = [ChatRequest, CaptionRequest, RewardRequest, ScoreRequest, PreferenceRequest]
    document(app, [*bodies, WorkersRequest, FineTuningRequest])
    return app


def _cross_origin(origins: Sequence[str]) -> list[Middleware]:
    """For web pages of these origins, around everything: they ask for leave without a key, and read errors, too."""
    if not origins:
        return []
    return [
        Middleware(
            CORSMiddleware,
            allow_origins=origins,
            allow_methods=["GET", "POST", "PUT", "DELETE"],
            allow_headers=["*"],
            expose_headers=["x-request-id", VERSION_HEADER, "retry-after"],
        )
    ]


async def _refused(request: Request, error: Exception) -> Response:
    return error_response(error)
