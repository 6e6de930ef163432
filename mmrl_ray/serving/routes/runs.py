"""`GET /v1/runs/{id}` and `PUT /v1/runs/{id}/rollout_workers`: training runs below `serving.runs_root`, for admins."""

from __future__ import annotations

import asyncio
import re
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Path, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from mmrl_ray.config.serving import MODEL_ID
from mmrl_ray.errors import ConfigError, RunError
from mmrl_ray.jobs.control import RunControl
from mmrl_ray.run_records.control_files import MAX_WORKERS, STATUS_FILE
from mmrl_ray.run_records.run_dir import RunDir
from mmrl_ray.serving.auth import needs
from mmrl_ray.serving.http_errors import problem
from mmrl_ray.serving.routes.common import Tools, json_answer, read_json, takes_json

_ADMIN = Depends(needs("admin"))
_ANSWER_S = 20.0
"""For a run to say yes or no: it looks for requests every second, every five in an object store."""
_ID = re.compile(MODEL_ID)
_RunId = Annotated[str, Path(description="Name of a run's folder.")]


class WorkersRequest(BaseModel):
    """How many rollout workers a run should have."""

    model_config = ConfigDict(extra="forbid", strict=True)

    workers: int | None = Field(..., ge=1, le=MAX_WORKERS)
    """null: as the run itself sees fit, within the bounds of its `rollout.workers`."""


class WorkersAnswer(BaseModel):
    """What the run said; its status tells when it has them."""

    id: str
    workers: int
    message: str


class RunStatus(BaseModel):
    """How a run stands: what `mmrl status --json` prints."""

    model_config = ConfigDict(extra="allow")

    run: str
    state: str
    alive: bool
    age_s: float
    """Seconds since the run last said something."""


def add_runs(app: FastAPI, tools: Tools) -> None:
    """Both routes."""

    def at(id: str) -> RunDir:
        root = tools.deps.settings.runs_root
        # A name, never a path: nothing beside the folder that the operator named can be reached.
        if root is None or _ID.fullmatch(id) is None:
            raise _unknown(id)
        try:
            run = RunDir.open(root, id)
            # A link may lead anywhere; a folder that never said anything is no run.
            is_run = not (run.is_local and run.local_path().is_symlink()) and run.exists(STATUS_FILE)
        except RunError as error:
            raise _unknown(id) from error
        if not is_run:
            raise _unknown(id)
        return run

    @app.get(
        "/v1/runs/{id}", response_model=RunStatus, tags=["runs"], dependencies=[_ADMIN], summary="How a run stands"
    )
    async def run(id: _RunId) -> Response:
        def look() -> dict[str, Any]:
            try:
                return RunControl(at(id)).status()
            except RunError as error:
                raise _unknown(id) from error

        async with asyncio.timeout(tools.timeout_s):
            return JSONResponse(await asyncio.to_thread(look))

    @app.put(
        "/v1/runs/{id}/rollout_workers",
        response_model=WorkersAnswer,
        tags=["runs"],
        dependencies=[_ADMIN],
        summary="Scale a run in progress",
        **takes_json(WorkersRequest),
    )
    async def rollout_workers(id: _RunId, request: Request) -> Response:
        body = await read_json(request, WorkersRequest, tools.timeout_s)

        def ask() -> WorkersAnswer:
            run = at(id)
            try:
                answer = RunControl(run).request(body.workers, by="an admin of the gateway", timeout_s=_ANSWER_S)
            except RunError as error:
                raise problem(409, _named(error, run), code="run_not_in_progress") from error
            except ConfigError as error:
                raise problem(400, f"workers: {error}", code="invalid_value", param="workers") from error
            return WorkersAnswer(id=id, workers=answer.target or 0, message=answer.message)

        async with asyncio.timeout(tools.timeout_s):
            return json_answer(await asyncio.to_thread(ask))


def _unknown(id: str) -> Exception:
    return problem(
        404,
        f"no run {id[:64]!r} is known here: a run is named as its folder below serving.runs_root",
        code="run_not_found",
        param="id",
    )


def _named(error: RunError, run: RunDir) -> str:
    """What is wrong with a run, but not where it lies."""
    return str(error).replace(run.location, run.name).replace(run.path, run.name)
