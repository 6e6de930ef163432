"""Training over HTTP, for admins: `/v1/fine_tuning/jobs` as OpenAI has them, and runs below `serving.runs_root`.

Of runs there is `GET /v1/runs/{id}` and `PUT /v1/runs/{id}/rollout_workers`.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from fastapi import APIRouter, Path, Query, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from mmrl_ray.config.serving import MODEL_ID, FineTuningSection
from mmrl_ray.errors import ConfigError, RunError
from mmrl_ray.jobs.control import RunControl
from mmrl_ray.run_records.control_files import MAX_WORKERS, STATUS_FILE
from mmrl_ray.run_records.run_dir import RunDir
from mmrl_ray.serving.fine_tuning_types import (
    CheckpointCard,
    CheckpointPage,
    EventCard,
    EventPage,
    FileCard,
    FineTuningRequest,
    JobCard,
    JobPage,
)
from mmrl_ray.serving.http_errors import problem
from mmrl_ray.serving.protocols import TuningJob
from mmrl_ray.serving.routes.common import Tools, json_answer, read_json, takes_json

if TYPE_CHECKING:
    from mmrl_ray.serving.job_service import RayJobService  # needs Ray, which a gateway without jobs does not

_PATH = "/v1/fine_tuning/jobs"
_SHOWN = 64
_After = Annotated[str | None, Query(max_length=128, description="Id of the last item of the page before.")]
_Limit = Annotated[int, Query(ge=1, le=100, description="Items of one page at most.")]
_EMPTY_BODY: dict[str, Any] = {
    "requestBody": {"required": False, "content": {"application/json": {"schema": {"type": "object"}}}}
}
_ANSWER_S = 20.0
"""For a run to say yes or no: it looks for requests every second, every five in an object store."""
_ID = re.compile(MODEL_ID)
_RunId = Annotated[str, Path(description="Name of a run's folder.")]
Item = TypeVar("Item", TuningJob, EventCard, CheckpointCard)
Told = TypeVar("Told")


def add_fine_tuning(router: APIRouter, tools: Tools) -> None:
    """Adds the routes of `/v1/fine_tuning/jobs`, and of the files that jobs write."""

    async def ask(question: Callable[[RayJobService], Told]) -> Told:
        service, _ = _service(tools)
        async with asyncio.timeout(tools.timeout_s):
            return await asyncio.to_thread(question, service)

    @router.post(_PATH, response_model=JobCard, summary="Train an adapter", **takes_json(FineTuningRequest))
    async def create(request: Request) -> Response:
        service, allowed = _service(tools)
        body = await read_json(request, FineTuningRequest, tools.timeout_s)
        _on_list("model", body.model, allowed.models)
        _on_list("training_file", body.training_file, allowed.datasets)
        if body.validation_file is not None:
            _on_list("validation_file", body.validation_file, allowed.datasets)
        # To its end, even if the client goes: a job that was begun is not half begun.
        return json_answer(JobCard.of(await asyncio.to_thread(service.create, body.order)))

    @router.get(_PATH, response_model=JobPage, summary="Jobs, the newest first")
    async def jobs(request: Request, after: _After = None, limit: _Limit = 20) -> Response:
        found = [job for job in await ask(lambda service: service.jobs()) if _has_notes(job, request)]
        page, has_more = _page(found, after, limit)
        return json_answer(JobPage(data=[JobCard.of(job) for job in page], has_more=has_more))

    @router.get(_PATH + "/{job_id}", response_model=JobCard, summary="One of them")
    async def job(job_id: str) -> Response:
        return json_answer(JobCard.of(await ask(lambda service: service.get(job_id))))

    @router.post(
        _PATH + "/{job_id}/cancel",
        response_model=JobCard,
        summary="Let a job finish its step and end",
        openapi_extra=_EMPTY_BODY,
    )
    async def cancel(job_id: str) -> Response:
        return json_answer(JobCard.of(await ask(lambda service: service.cancel(job_id))))

    @router.post(_PATH + "/{job_id}/{change}", include_in_schema=False)
    async def pause_or_resume(job_id: str, change: Literal["pause", "resume"]) -> Response:
        await ask(lambda service: service.get(job_id))
        message = (
            f"{change} is not supported here: cancel lets a job finish its step and write a checkpoint, and whoever "
            f"runs the cluster goes on from it with: mmrl jobs resume {job_id}"
        )
        raise problem(400, message, code="not_supported")

    @router.get(_PATH + "/{job_id}/events", response_model=EventPage, summary="What a job tells, the newest first")
    async def events(job_id: str, after: _After = None, limit: _Limit = 20) -> Response:
        page, has_more = _page(await ask(lambda service: service.events(job_id)), after, limit)
        return json_answer(EventPage(data=list(page), has_more=has_more))

    @router.get(
        _PATH + "/{job_id}/checkpoints",
        response_model=CheckpointPage,
        summary="Checkpoints that a job has kept, the newest first",
    )
    async def checkpoints(job_id: str, after: _After = None, limit: _Limit = 10) -> Response:
        page, has_more = _page(await ask(lambda service: service.checkpoints(job_id)), after, limit)
        return json_answer(CheckpointPage.of(page, has_more))

    @router.get("/v1/files/{file_id}", response_model=FileCard, summary="A result file of a job")
    async def file(file_id: str) -> Response:
        return json_answer(FileCard.of(file_id, await ask(lambda service: service.result(file_id))))

    @router.get("/v1/files/{file_id}/content", summary="What it holds")
    async def content(file_id: str) -> Response:
        held = await ask(lambda service: service.result(file_id))
        # Never shown as a page of this server: it holds captions and prompts of anybody's.
        headers = {"content-disposition": f'attachment; filename="{held.name}"', "x-content-type-options": "nosniff"}
        return Response(held.data, media_type="application/octet-stream", headers=headers)


def _service(tools: Tools) -> tuple[RayJobService, FineTuningSection]:
    jobs, allowed = tools.deps.jobs, tools.deps.settings.fine_tuning
    if jobs is None or allowed is None:
        message = "fine-tuning is off here: whoever runs this gateway turns it on with serving.fine_tuning"
        raise problem(404, message, code="fine_tuning_off")
    return jobs, allowed


def _on_list(param: str, value: str, allowed: Collection[str]) -> None:
    if value not in allowed:
        message = f"{param}: {value[:_SHOWN]!r} may not be used here; there is {', '.join(sorted(allowed))}"
        raise problem(400, message, code="not_allowed", param=param)


def _has_notes(job: TuningJob, request: Request) -> bool:
    """Whether the job's metadata has all of `?metadata[key]=value`."""
    wanted = {
        name[len("metadata[") : -1]: value
        for name, value in request.query_params.items()
        if name.startswith("metadata[") and name.endswith("]")
    }
    return wanted.items() <= dict(job.order.metadata or {}).items()


def _page(items: Sequence[Item], after: str | None, limit: int) -> tuple[Sequence[Item], bool]:
    """The items behind `after`, and whether there are more."""
    begin = 0
    if after is not None:
        places = {item.id: place for place, item in enumerate(items)}
        if after not in places:
            raise problem(
                400, f"after: there is no {after[:_SHOWN]!r} in this list", code="invalid_value", param="after"
            )
        begin = places[after] + 1
    return items[begin : begin + limit], begin + limit < len(items)


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


def add_runs(router: APIRouter, tools: Tools) -> None:
    """Adds both routes of `/v1/runs`."""

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

    @router.get("/v1/runs/{id}", response_model=RunStatus, summary="How a run stands")
    async def run(id: _RunId) -> Response:
        def look() -> dict[str, Any]:
            try:
                return RunControl(at(id)).status()
            except RunError as error:
                raise _unknown(id) from error

        async with asyncio.timeout(tools.timeout_s):
            return JSONResponse(await asyncio.to_thread(look))

    @router.put(
        "/v1/runs/{id}/rollout_workers",
        response_model=WorkersAnswer,
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
